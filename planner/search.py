"""Searches the best split of the blocks over IPUs and the best settings, within the memory limit.

The blocks are cut into contiguous stages, one per IPU. A weight update takes

    steps x (slowest stage + copies) + update(most parameters on an IPU) + constants

which contains two maxima over the stages. Among the splits that keep every stage within memory and
below a cap on its parameters, dynamic programming finds the one whose slowest stage is fastest.
Lowering the cap until nothing more can be gained gives the exact minimum. The copies count
as the same for every split: all layers take tensors of one size. Only a QA head that is alone on
its IPU takes less, by the window ids (0.3 % of the copies with a width of 768).
"""
from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from ipu_options.config import IPUConfig, pod_of, reserved_ipus
from ipu_options.layout import Layout, in_ipus, least_accumulation
from planner.job import Job
from planner.machine import Efficiencies
from planner.memory import stage_memory
from planner.phase import INFERENCE
from planner.plan import Plan, make_plan
from planner.throughput import stage_seconds, update_seconds
from planner.totals import Totals, range_totals
from runtime.errors import UsageError
from runtime.flags import Source, make_settings

SERIALIZATION_FACTORS = (1, 2, 4)
MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
FASTER = 1.005  # a smaller gain is none
ITERATIONS = (1, 2, 4, 8, 16, 32, 64)  # micro-batches of an inference call
MATMUL_PROPORTION = 0.25  # used if the job gives a proportion per IPU, for another number of IPUs


Ends = Tuple[int, ...]  # a split of the blocks: the index of the one after each stage's last


def search(now: Plan, ipus: int, whole: IPUConfig, keep: int = 5) -> Tuple[List[Plan], int]:
    """Return the `keep` best plans that fit on `ipus` IPUs, and the number of settings tried.

    Where the plan `now` runs there, they are FASTER than it; if none is, it is the only one. Its
    job gives all that is not searched, as the batch size, which the learning rate was chosen for.
    Its `count` must be set. whole: the run's configuration, with
    which train.py must take what is found. Training's plans are sorted by speed, inference's by the
    time for all windows in steps of 2 %, then by a call's rows. Raises UsageError if none fits, or
    if it is not known how many windows there are to answer.
    """
    job, plans, tried = now.job, [], 0
    if not job.training and job.windows is None:
        raise UsageError("how many windows there are to answer is not known: give --eval_windows, "
                         "for the number of micro-batches of a call depends on it")
    for candidate in _candidates(job, ipus):
        tried += 1
        plan = best_plan(candidate, now.efficiencies)
        if plan is not None and _runs(plan, whole, ipus):
            plans.append(plan)
    if now.fits and job.ipus <= ipus and _runs(now, whole, ipus):
        plans = [plan for plan in plans if gain(plan, now) > FASTER] or [now]
    if not plans:
        batch = f" with {job.batch_size} rows a weight update" if job.training else ""
        raise UsageError(
            f"nothing fits: no split of this model over {in_ipus(ipus)} keeps every IPU within its "
            f"memory{batch}; use more IPUs, or a shorter --max_seq_length")
    if job.training:
        plans.sort(key=lambda plan: (
            -plan.windows_per_second, plan.job.config.optimizer_state_offchip,
            plan.job.config.embedding_serialization_factor,
            -plan.job.config.recompute_checkpoint_every_layer))
    else:
        plans.sort(key=lambda plan: (
            round(np.log(plan.run_seconds) / 0.02), plan.job.rows_per_update))
    return _distinct(plans)[:keep], tried


def gain(plan: Plan, now: Plan) -> float:
    """Return how many times as fast as `now` a plan is; inference ends with a whole call."""
    if plan.job.training or plan.run_seconds is None:
        return plan.windows_per_second / now.windows_per_second
    return now.run_seconds / plan.run_seconds


def settings_of(plan: Plan, whole: IPUConfig, ipus: int) -> IPUConfig:
    """Return the configuration `whole` with what carries out `plan`, and evaluates on `ipus`."""
    config = plan.job.config
    if not plan.job.training:
        whole = replace(
            whole, inference_layers_per_ipu=config.layers_per_ipu,
            inference_ipus_per_replica=config.num_ipus(),
            inference_replication_factor=config.replication_factor,
            inference_device_iterations=config.device_iterations)
        inherited = whole.for_pod(pod_of(ipus)).inference().values()
        return replace(whole, **{
            f"inference_{name}": getattr(config, name)
            for name in ("matmul_proportion", "embedding_serialization_factor")
            if getattr(config, name) != inherited[name]})
    if reserved_ipus(config.inference().num_ipus()) > ipus:
        config = replace(config, inference_layers_per_ipu=config.layers_per_ipu,
                         inference_ipus_per_replica=config.num_ipus())
    inference, changes = config.inference(), {}
    stages = len(inference.layers_per_ipu)
    if len(inference.matmul_shares()) != stages:
        changes["matmul_proportion"] = MATMUL_PROPORTION
    changes["device_iterations"] = max(stages, inference.device_iterations)
    if inference.replication_factor > ipus // reserved_ipus(stages):
        changes["replication_factor"] = ipus // reserved_ipus(stages)
    return replace(config, **INFERENCE.flags(changes))


def settings_in(plan: Plan, whole: IPUConfig, ipus: int) -> Dict[str, Any]:
    """Return {flag: value} that carry out `plan`: layout, batch, and what differs from `whole`."""
    phase, config, old = plan.job.phase, settings_of(plan, whole, ipus), whole.values()
    batches = "gradient_accumulation_steps" if plan.job.training else "device_iterations"
    names = list(phase.flags(dict.fromkeys(("layers_per_ipu", "replication_factor", batches))))
    for name, value in old.items():
        # Where the number of IPUs was not given, it follows from layers_per_ipu.
        follows = name.endswith("ipus_per_replica") and value is None
        if name not in names and name.startswith(phase.prefix) and (
                not follows and getattr(config, name) != value):
            names.append(name)
    return {**{name: getattr(config, name) for name in names if getattr(config, name) is not None},
            **({"pack": True} if plan.job.pack and plan.job.training else {}),
            phase.micro_batch_flag: plan.job.micro_batch_size}


def best_split(job: Job, efficiencies: Efficiencies) -> Optional[Ends]:
    """Return the fitting split over job.config.num_ipus() IPUs with the shortest update or call."""
    totals = range_totals(job.blocks)
    stages = job.config.num_ipus()
    seconds = [_stage_table(job, efficiencies, totals, index, stages) for index in range(stages)]
    steps = job.phase.steps(job.micro_batches_over(stages), stages)
    best, best_seconds, cap = None, np.inf, np.inf
    # A lower bound of the update's time: that of parameters in equal shares.
    least = sum(update_seconds(job, -(-int(totals.parameters[0, -1]) // stages)))
    while True:
        ends, slowest = _least_slowest([
            np.where(totals.parameters <= cap, table, np.inf) for table in seconds])
        if steps * slowest + least >= best_seconds:
            return best
        most = max(int(totals.parameters[i, j]) for i, j in zip((0, *ends), ends))
        total = steps * slowest + sum(update_seconds(job, most))
        if total < best_seconds:
            best, best_seconds = ends, total
        cap = most - 1


def with_split(job: Job, ends: Ends) -> Job:
    """Return the job with this split in its layout and configuration."""
    ipus = len(ends)
    layout = Layout.from_blocks(np.repeat(range(ipus), np.diff((0, *ends))).tolist())
    # The last IPU is the default for the head; it is named only where another one was.
    head_ipu = None if job.config.head_ipu is None else ipus - 1
    return replace(job, layout=layout,
                   config=replace(job.config, layers_per_ipu=layout.layers_per_ipu(ipus),
                                  ipus_per_replica=ipus, embedding_ipu=0, head_ipu=head_ipu))


def best_plan(job: Job, efficiencies: Efficiencies) -> Optional[Plan]:
    """Return the plan of `job` with the best split, if one fits."""
    ends = best_split(job, efficiencies)
    return None if ends is None else make_plan(with_split(job, ends), efficiencies)


def split_settings(job: Job, efficiencies: Efficiencies) -> Dict[str, Any]:
    """Return {field of the configuration: value} that the best split changes; {} if none fits."""
    ends = best_split(job, efficiencies)
    if ends is None:
        return {}
    config, changed = job.config, with_split(job, ends).config
    return {name: getattr(changed, name) for name in ("layers_per_ipu", "embedding_ipu", "head_ipu")
            if name == "layers_per_ipu" or getattr(changed, name) != getattr(config, name)}


def _runs(plan: Plan, whole: IPUConfig, ipus: int) -> bool:
    """Whether train.py would take the plan's settings, for training and for evaluation."""
    layers, pod = len(plan.job.layout.layer_ipus), pod_of(ipus)
    try:
        config = make_settings(IPUConfig, [Source(settings_of(plan, whole, ipus).values())])
        plan.job.phase.pipeline(config, layers, pod)
        INFERENCE.pipeline(config, layers, pod)
    except UsageError:
        return False
    return True


def _candidates(job: Job, ipus: int) -> Iterator[Job]:
    jobs = [job, job.changed(pack=True)] if job.gains_by_packing else [job]
    powers = [2 ** power for power in range(min(ipus, len(job.blocks)).bit_length())]
    for one, stages, micro_batch in itertools.product(jobs, powers, MICRO_BATCHES):
        for changes in _choices(one, stages, ipus // stages, micro_batch):
            config = replace(one.config, ipus_per_replica=stages,
                             replication_factor=ipus // stages, **changes)
            if len(config.matmul_shares()) != stages:
                config = replace(config, matmul_proportion=MATMUL_PROPORTION)
            blocks = job.count(micro_batch, config.embedding_serialization_factor, one.pack)
            yield replace(one, blocks=blocks, micro_batch_size=micro_batch, config=config)


def _choices(job: Job, stages: int, replicas: int, micro_batch: int) -> Iterator[Dict[str, Any]]:
    if not job.training:
        yield from ({"device_iterations": number} for number in ITERATIONS if number >= stages)
        return
    accumulation, rest = divmod(job.batch_size, micro_batch * replicas)
    if rest or round(accumulation / job.windows_per_row) < least_accumulation(stages):
        return
    for factor, offchip, checkpoints in itertools.product(
            SERIALIZATION_FACTORS, (False, True), (True, False)):
        yield {"gradient_accumulation_steps": accumulation,
               "embedding_serialization_factor": factor, "optimizer_state_offchip": offchip,
               "recompute_checkpoint_every_layer": checkpoints}


def _stage_table(job: Job, efficiencies: Efficiencies, totals: Totals, index: int,
                 stages: int) -> np.ndarray:
    """Return [i, j]: seconds of blocks[i:j] as stage `index`; infinite if they do not fit."""
    share = job.config.matmul_shares()[index]
    memory = stage_memory(job, totals, share, index, stages, efficiencies.code_bytes)
    seconds = sum(stage_seconds(job, efficiencies, totals, share, index, stages))
    fits = (sum(memory.values()) <= job.machine.memory_bytes) & (totals.parameters > 0)
    return np.where(fits, seconds, np.inf)


def _least_slowest(tables: Sequence[np.ndarray]) -> Tuple[Ends, float]:
    """Return the split into stages s whose largest tables[s][start, end] is least, and that."""
    blocks = tables[0].shape[0]
    # The slowest stage so far, by the index of the block with which the next stage begins.
    reached = np.full(blocks + 1, np.inf)
    reached[0] = 0.0
    origins = []
    for table in tables:
        slowest = np.maximum(reached[:-1, None], table)
        origins.append(slowest.argmin(axis=0))
        reached = slowest.min(axis=0)
    ends = [blocks]
    for origin in reversed(origins[1:]):
        ends.append(int(origin[ends[-1]]))
    return tuple(reversed(ends)), float(reached[-1])


def _distinct(plans: Sequence[Plan]) -> List[Plan]:
    """Return the first plan of each layout, kind of rows and place of the optimizer state."""
    kept: Dict[Any, Plan] = {}
    for plan in plans:
        kept.setdefault((plan.job.layout, plan.job.micro_batch_size, plan.job.pack,
                         plan.job.config.optimizer_state_offchip), plan)
    return list(kept.values())
