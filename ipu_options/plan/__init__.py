"""The planner's engine: memory and time of a pipeline, from counts of the real model, before an IPU
is booked.

A Job goes in, a Plan comes out. Its commands and flags are in qa/planning.

    count.py       what each block of the model needs: parameters, FLOPs, saved bytes (counted)
    machine.py     Mk2 and Bow (documented) and how much of them is reached (fitted)
    job.py         what is planned: counted blocks, layout, IPU configuration
    totals.py      what a stage needs, or every stage that a split could have
    memory.py      bytes on each IPU
    schedule.py    the pipeline step by step
    throughput.py  seconds of a stage and of a weight update
    planner.py     all of these for one job: the Plan
    advice.py      the one change that would help most
    search.py      the best split and settings under the memory limit
    calibrate.py   the efficiencies fitted to published runs, or to the user's own
    text.py, draw.py, profile.py   the printed plan, pictures, PopVision profiles
"""
