"""Finds the change of one setting that would help most, by planning each such change."""
from __future__ import annotations

from dataclasses import replace
from typing import Iterator, List, NamedTuple, Tuple

from ipu_options.plan.job import Job
from ipu_options.plan.planner import Plan, make_plan, with_config
from ipu_options.plan.search import best_split, with_cut


class Change(NamedTuple):
    """A changed plan, and the change as flags of train.py, some with a remark."""

    plan: Plan
    text: str


def changes(plan: Plan) -> List[Change]:
    """Return the single changes that are worth making, the fastest first.

    Each of them fits and, if `plan` itself fits, is more than 0.5 % faster than it.
    """
    better = []
    for job, text in _single_changes(plan.job, plan):
        changed = make_plan(job, plan.efficiencies)
        if changed.fits and (not plan.fits or
                             changed.windows_per_second > 1.005 * plan.windows_per_second):
            better.append(Change(changed, text))
    return sorted(better, key=lambda change: -change.plan.windows_per_second)


def suggestion(plan: Plan) -> str:
    """Return one line with the best change and its throughput, or that there is none."""
    better = changes(plan)
    if better:
        return describe(plan, better[0])
    if plan.fits:
        return "no single change of a setting is faster and fits"
    return ("no single change makes it fit: "
            "`python -m ipu_options search` tries all of them together")


def describe(plan: Plan, change: Change) -> str:
    """Return one line with the change, its windows/s and the gain over `plan` in percent."""
    new = change.plan.windows_per_second
    gain = f"{100 * (new / plan.windows_per_second - 1):+.0f} %" if plan.fits else "and it fits"
    return f"{change.text}: {new:,.0f} windows/s ({gain})"


def _single_changes(job: Job, plan: Plan) -> Iterator[Tuple[Job, str]]:
    """Yield each change to try: the changed job, and the change as flags of train.py."""
    config, micro, accumulation = (job.config, job.micro_batch_size,
                                   job.config.gradient_accumulation_steps)
    least = job.layout.min_gradient_accumulation()
    for factor in (2, 4):
        if job.count and accumulation % factor == 0 and accumulation // factor >= least:
            yield (_with_micro_batch(job, micro * factor, accumulation // factor),
                   f"--micro_batch_size {micro * factor} --gradient_accumulation_steps "
                   f"{accumulation // factor} (the same batch)")
    for factor in (2, 4, 8):
        if job.count and micro % factor == 0:
            yield (_with_micro_batch(job, micro // factor, accumulation * factor),
                   f"--micro_batch_size {micro // factor} --gradient_accumulation_steps "
                   f"{accumulation * factor} (the same batch)")
    if job.packed_windows_per_row and job.packed_windows_per_row > 1.05 * job.windows_per_row:
        fewer = max(least, round(accumulation / job.packed_windows_per_row))
        packed = replace(with_config(job, gradient_accumulation_steps=fewer),
                         windows_per_row=job.packed_windows_per_row)
        yield (packed, f"--pack ({job.packed_windows_per_row:.2f} windows in a row, "
               "the same windows an update)")
    cut = best_split(job, plan.efficiencies)
    if cut is not None:
        split = with_cut(job, cut)
        yield (split, f"--layers_per_ipu {' '.join(map(str, split.config.layers_per_ipu))} "
               "(the best balance)")
    yield from _memory_changes(job)
    yield (with_config(job, device_iterations=2 * config.device_iterations),
           f"--device_iterations {2 * config.device_iterations} "
           "(fewer calls; the learning rate changes half as often)")
    yield (with_config(job, gradient_accumulation_steps=2 * accumulation),
           f"--gradient_accumulation_steps {2 * accumulation} "
           "(shorter ramps, but twice the batch size)")


def _memory_changes(job: Job) -> Iterator[Tuple[Job, str]]:
    """Yield the changes that trade memory for time, in the form of `_single_changes`."""
    config = job.config
    off, checkpoints = config.optimizer_state_offchip, config.recompute_checkpoint_every_layer
    yield (with_config(job, optimizer_state_offchip=not off),
           f"--optimizer_state_offchip {'false' if off else 'true'}")
    yield (with_config(job, recompute_checkpoint_every_layer=not checkpoints),
           f"--recompute_checkpoint_every_layer {'false' if checkpoints else 'true'}")
    if job.count:
        factor = 2 * config.embedding_serialization_factor
        blocks = tuple(job.count(job.micro_batch_size, factor))
        serialised = replace(with_config(job, embedding_serialization_factor=factor), blocks=blocks)
        yield serialised, f"--embedding_serialization_factor {factor}"
    if config.replication_factor > 1 and not config.replicated_tensor_sharding:
        yield with_config(job, replicated_tensor_sharding=True), "--replicated_tensor_sharding true"


def _with_micro_batch(job: Job, micro_batch_size: int, accumulation: int) -> Job:
    blocks = tuple(job.count(micro_batch_size, job.config.embedding_serialization_factor))
    return replace(with_config(job, gradient_accumulation_steps=accumulation),
                   micro_batch_size=micro_batch_size, blocks=blocks)
