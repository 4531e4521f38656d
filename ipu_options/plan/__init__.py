"""The planner: memory and time of a pipeline, from counts of the real model, before an IPU is booked.

    count.py       what each block of the model needs: parameters, FLOPs, saved bytes (counted)
    machine.py     Mk2 and Bow (documented) and how much of them is reached (fitted)
    memory.py      bytes on each IPU
    schedule.py    the pipeline step by step
    throughput.py  seconds of each stage, of a weight update, windows/s
    planner.py     all of these for one job: the Plan
    search.py      the best split and settings under the memory limit
    calibrate.py   the efficiencies fitted to published runs, or to the user's own
    draw.py, text.py, profile.py, sweep.py   pictures, the printed plan, PopVision profiles, many plans in a table
"""
