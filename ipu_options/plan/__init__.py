"""The planner's engine: predicts memory and time of a pipeline before an IPU is booked.

Its input is a Job, which holds counts of the real model, and its output a Plan. The commands and
flags are in qa/planning.

    count.py       counts what each block of the model needs: parameters, FLOPs, saved bytes
    machine.py     documented figures of Mk2 and Bow, and the fitted efficiencies
    job.py         Job: counted blocks, layout, IPU configuration
    totals.py      sums over the blocks of one stage, or of every possible stage
    memory.py      bytes on each IPU
    schedule.py    the steps of the pipeline in one weight update
    throughput.py  seconds of a stage and of a weight update
    planner.py     Plan: all of the above for one job
    advice.py      the single change of a setting that would help most
    search.py      the best split and settings within the memory limit
    calibrate.py   fits the efficiencies to published runs, or to a run of the user's own
    text.py, draw.py, profile.py   the printed plan, pictures, PopVision profiles
"""
