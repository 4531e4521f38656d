"""The search is compared with trying every contiguous split of small models.

In these models the choice depends on the memory and on both maxima of the time: the slowest stage,
and the most parameters on an IPU.
"""
from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from ipu_options.config import IPUConfig
from ipu_options.layout import Layout
from planner.count import CountedBlock
from planner.job import Job
from planner.machine import MACHINES, Efficiencies
from planner.phase import INFERENCE, TRAINING
from planner.plan import make_plan
from planner.search import best_split, with_split


def random_job(choose: random.Random) -> Job:
    """A model of up to 9 uneven blocks on up to 4 IPUs.

    The IPUs have about as much memory as is needed, so that only some splits fit.
    """
    layers, stages = choose.randint(2, 7), choose.randint(1, 4)
    names = ([("Embedding", "embedding")] + [(f"Encoder {i}", "layer") for i in range(layers)]
             + [("QA head", "head")])
    # Every block takes as much, which the search relies on: the copies of all splits are alike.
    taken = choose.randint(1, 8) * 2 ** 20
    blocks = tuple(
        CountedBlock(
            name, kind, parameters=choose.randint(1, 60) * 10 ** 6, largest_parameter=10 ** 6,
            forward_flops=choose.randint(1, 40) * 10 ** 9,
            backward_flops=choose.randint(2, 80) * 10 ** 9, forward_matmuls=6, backward_matmuls=12,
            forward_elements=choose.randint(1, 9) * 10 ** 7, backward_elements=10 ** 7,
            saved_bytes=choose.randint(1, 40) * 2 ** 20, input_bytes=taken,
            output_bytes=2 ** 20, matmul_flops=choose.randint(1, 12) * 10 ** 9,
            large_flops=choose.randint(1, 20) * 10 ** 9)
        for name, kind in names)
    config = IPUConfig(
        layers_per_ipu=[0] * stages, gradient_accumulation_steps=choose.randint(7, 40),
        replication_factor=2, device_iterations=7, optimizer_state_offchip=choose.random() < 0.5,
        replicated_tensor_sharding=choose.random() < 0.5,
        recompute_checkpoint_every_layer=choose.random() < 0.5)
    # If links are slow, the time depends on the number of parameters as well.
    machine = replace(MACHINES["mk2"], tile_bytes=choose.choice([150, 400, 624]) * 1024,
                      link_bytes_per_second=choose.choice([1e9, 320e9]))
    return Job(blocks, Layout(0, (0, ) * layers, 0), config, machine, micro_batch_size=1,
               max_seq_length=384, phase=TRAINING if choose.random() < 0.7 else INFERENCE)


@pytest.mark.slow
def test_best_split_is_the_best_of_all_splits():
    choose = random.Random(1)
    found, refused = {True: 0, False: 0}, {True: 0, False: 0}  # by training
    for _ in range(120):
        job = random_job(choose)
        stages, blocks = job.config.num_ipus(), len(job.blocks)
        every = [make_plan(with_split(job, (*inner, blocks)))
                 for inner in itertools.combinations(range(1, blocks), stages - 1)]
        fitting = [plan.update_seconds for plan in every if plan.fits]
        ends = best_split(job, Efficiencies())
        if ends is None:
            refused[job.training] += 1
            assert not fitting
            continue
        found[job.training] += 1
        plan = make_plan(with_split(job, ends))
        assert plan.fits
        assert abs(plan.update_seconds - min(fitting)) < 1e-12
    # All cases occur.
    assert min(found.values()) > 10 and min(refused.values()) > 2, (found, refused)
