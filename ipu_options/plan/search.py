"""Searches the best split of the blocks over IPUs and the best settings, within the memory limit.

For given settings the blocks are cut into contiguous stages, one per IPU; embedding and head may
have an IPU of their own or share one with layers. A weight update takes

    steps x (slowest stage + copies) + update(most parameters on an IPU) + constants

which contains two maxima over the stages. Among the splits that keep every stage within memory and
below a cap on its parameters, dynamic programming finds the one whose slowest stage is fastest.
Lowering the cap until nothing more can be gained gives the exact minimum of the sum. The copies are
the same for every split, because all blocks of a transformer hand on tensors of one size.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ipu_options.errors import UsageError
from ipu_options.layout import Layout
from ipu_options.plan.count import CountedBlock
from ipu_options.plan.job import Job
from ipu_options.plan.machine import Efficiencies
from ipu_options.plan.memory import stage_memory
from ipu_options.plan.planner import Plan, make_plan
from ipu_options.plan.throughput import stage_seconds, update_seconds_of
from ipu_options.plan.totals import Totals, range_totals

SERIALIZATION_FACTORS = (1, 2, 4)
MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MATMUL_PROPORTION = 0.25  # used if the job gives a proportion per IPU, for another number of IPUs


class Cut(NamedTuple):
    """A split of the blocks into stages.

    ends: for each stage, the index of the block after its last one. slowest_seconds: the time of
    the slowest stage for one micro-batch, without copies.
    """

    ends: Tuple[int, ...]
    slowest_seconds: float


def search(job: Job, ipus: int, efficiencies: Efficiencies = Efficiencies(),
           keep: int = 5) -> Tuple[List[Plan], int]:
    """Return the `keep` best plans that fit on `ipus` IPUs, and the number of settings tried.

    job: gives all that is not searched: model, length, machine, rows of a weight update (the batch
    size that the learning rate was chosen for), replicated tensor sharding and precision. Its
    `count` must be set.

    Searched are the IPUs of a replica (powers of two) and the number of replicas, the split,
    micro-batch size and accumulation, recomputation checkpoints, embedding serialisation, and
    optimizer state on or off chip. The plans are sorted, the fastest first. Raises UsageError if
    nothing fits.
    """
    plans, tried = [], 0
    for candidate in _candidates(job, ipus):
        tried += 1
        cut = best_split(candidate, efficiencies)
        if cut is not None:
            plans.append(make_plan(with_cut(candidate, cut), efficiencies))
    if not plans:
        raise UsageError(
            f"nothing fits: no split of this model over {ipus} IPUs keeps every IPU within its "
            f"memory with {job.rows_per_update} rows a weight update; use more IPUs, or a shorter "
            "--max_seq_length")
    plans.sort(key=lambda plan: (
        -plan.windows_per_second, plan.job.config.optimizer_state_offchip,
        plan.job.config.embedding_serialization_factor,
        -plan.job.config.recompute_checkpoint_every_layer))
    return _distinct(plans)[:keep], tried


def best_split(job: Job, efficiencies: Efficiencies) -> Optional[Cut]:
    """Return the contiguous split of the job's blocks with the shortest weight update.

    It is over job.config.num_ipus() IPUs. Returns None if no split fits.
    """
    totals = range_totals(job.blocks)
    stages = job.config.num_ipus()
    if stages > len(job.blocks):
        return None
    seconds = [_stage_table(job, efficiencies, totals, index, stages) for index in range(stages)]
    steps = job.config.gradient_accumulation_steps + 2 * (stages - 1)
    best, best_seconds, cap = None, np.inf, np.inf
    # A lower bound of the update's time: that of parameters in equal shares.
    least = sum(update_seconds_of(job, -(-int(totals.parameters[0, -1]) // stages)))
    while True:
        cut = _least_slowest([
            np.where(totals.parameters <= cap, table, np.inf) for table in seconds])
        if cut is None or steps * cut.slowest_seconds + least >= best_seconds:
            return best
        starts = (0,) + cut.ends[:-1]
        most = max(int(totals.parameters[i, j]) for i, j in zip(starts, cut.ends))
        total = steps * cut.slowest_seconds + sum(update_seconds_of(job, most))
        if total < best_seconds:
            best, best_seconds = cut, total
        cap = most - 1


def with_cut(job: Job, cut: Cut) -> Job:
    """Return a copy of the job with the split `cut` in its layout and configuration."""
    ipu_of = [
        ipu for ipu, (start, end) in enumerate(zip((0,) + cut.ends[:-1], cut.ends))
        for _ in range(start, end)]
    layout = Layout.from_blocks(ipu_of)
    layers = layout.layers_per_ipu(len(cut.ends))
    return replace(job, layout=layout,
                   config=replace(job.config, layers_per_ipu=layers, embedding_ipu=0,
                                  head_ipu=None))


def _candidates(job: Job, ipus: int) -> Iterator[Job]:
    """Yield a job for each combination of all that is searched besides the split.

    Gradient accumulation follows from the rows of a weight update, which stay as they are.
    """
    stages = 1
    while stages <= min(ipus, len(job.blocks)):
        replicas = ipus // stages
        for micro_batch in MICRO_BATCHES:
            accumulation, rest = divmod(job.rows_per_update, micro_batch * replicas)
            if rest or accumulation < 2 * stages - 1:
                continue
            for factor in SERIALIZATION_FACTORS:
                blocks = tuple(job.count(micro_batch, factor))
                for offchip in (False, True):
                    for checkpoints in (True, False):
                        yield _candidate(
                            job, blocks, micro_batch, ipus_per_replica=stages,
                            replication_factor=replicas, gradient_accumulation_steps=accumulation,
                            embedding_serialization_factor=factor, optimizer_state_offchip=offchip,
                            recompute_checkpoint_every_layer=checkpoints)
        stages *= 2


def _candidate(job: Job, blocks: Tuple[CountedBlock, ...], micro_batch: int, **changes) -> Job:
    config = replace(job.config, **changes)
    if len(config.matmul_shares()) != config.num_ipus():
        config = replace(config, matmul_proportion=MATMUL_PROPORTION)
    return replace(job, blocks=blocks, micro_batch_size=micro_batch, config=config)


def _stage_table(job: Job, efficiencies: Efficiencies, totals: Totals, index: int,
                 stages: int) -> np.ndarray:
    """Return the seconds of a step for every run of blocks as stage `index` of `stages`.

    The entry [i, j] is for blocks[i:j]; it is infinite if they do not fit or there are none.
    """
    memory = stage_memory(job, totals,
                          job.config.matmul_shares()[index], index, stages, efficiencies.code_bytes)
    forward, again, backward = stage_seconds(job, efficiencies, totals, last=index == stages - 1)
    fits = (sum(memory.values()) <= job.machine.memory_bytes) & (totals.parameters > 0)
    return np.where(fits, forward + again + backward, np.inf)


def _least_slowest(tables: Sequence[np.ndarray]) -> Optional[Cut]:
    """Return the split into stages s that minimises the maximum of tables[s][start, end].

    Returns None if this maximum is infinite for every split.
    """
    blocks = tables[0].shape[0]
    # The slowest stage so far, by the index of the block with which the next stage begins.
    reached = np.full(blocks + 1, np.inf)
    reached[0] = 0.0
    origins = []
    for table in tables:
        slowest = np.maximum(reached[:-1, None], table)
        origins.append(slowest.argmin(axis=0))
        reached = slowest.min(axis=0)
    if not np.isfinite(reached[-1]):
        return None
    ends = [blocks]
    for origin in reversed(origins[1:]):
        ends.append(int(origin[ends[-1]]))
    return Cut(tuple(reversed(ends)), float(reached[-1]))


def _distinct(plans: Sequence[Plan]) -> List[Plan]:
    """Return the best plan of each layout, micro-batch size and place of the optimizer state.

    plans: sorted, the best first. The plans that are left out differ from the one that is kept only
    in embedding serialisation or recomputation checkpoints, and are not faster.
    """
    seen, kept = set(), []
    for plan in plans:
        key = (plan.job.layout, plan.job.micro_batch_size, plan.job.config.optimizer_state_offchip)
        if key not in seen:
            seen.add(key)
            kept.append(plan)
    return kept
