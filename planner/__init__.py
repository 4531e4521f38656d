"""The planner: predicts memory and time of a pipeline before an IPU is booked.

    python -m planner plan | search | compare | sweep | calibrate | explore | report

Its engine takes a Job, which holds counts of the real model, and returns a Plan. In the order of
their imports, from the bottom:

    phase                   training and inference: what differs between the two pipelines
    machine                 documented figures of Mk2 and Bow, and the fitted efficiencies
    job from_settings       Job: counted blocks, layout, IPU configuration; from flags
    count                   what each block of the model needs: parameters, FLOPs, saved bytes
    totals matmul memory    bytes on each IPU (weights, stash ...), from sums over a stage
    schedule throughput     steps of the pipeline, depth of the stash; seconds of a stage
    plan                    Plan: all of the above for one job
    search advice bound     the best split; the change that would help most; what bounds a plan
    calibrate confidence    efficiencies fitted to published runs, or to your own; their error
    sides sweep profile     what is compared: plans, runs of train.py, PopVision profiles
    views present           what there is to see of a plan, as data; shown by the three renderers
    text pictures page      what is printed (words.json), drawn, and put on a page
    explore                 a page on which a plan changes while one edits its settings
    commands flags          the commands above, and their flags
"""
