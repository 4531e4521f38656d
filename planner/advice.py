"""Finds the change of one setting that would help most, by planning each such change."""
from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

from planner.job import Job
from planner.plan import Plan, make_plan, with_config, with_micro_batch
from planner.search import best_split, with_cut
from runtime.errors import UsageError

# A gain of half layers that is worth a remark.
HALVES_GAIN = 1.02


class Change(NamedTuple):
    """A changed plan, and the change as flags of train.py, some with a remark."""

    plan: Plan
    text: str

    @property
    def flags(self) -> str:
        """The change as flags of train.py, without the remark."""
        return self.text.partition(" (")[0]


def changes(plan: Plan) -> List[Change]:
    """Return the single changes that are worth making, the fastest first.

    Each of them fits and, if `plan` itself fits, is more than 0.5 % faster than it.
    """
    single = _training_changes if plan.job.training else _inference_changes
    better = []
    for job, text in single(plan.job, plan):
        changed = make_plan(job, plan.efficiencies)
        if changed.fits and (not plan.fits or
                             changed.windows_per_second > 1.005 * plan.windows_per_second):
            better.append(Change(changed, text))
    return sorted(better, key=lambda change: -change.plan.windows_per_second)


def half_layers(plan: Plan) -> Optional[float]:
    """Return the windows/s that placing attention and feed-forward parts separately would allow.

    None if that is no more than 2 % better than the plan and the best split of whole layers.
    """
    job = plan.job
    if not job.count or not plan.fits:
        return None
    halves = tuple(job.count(job.micro_batch_size, job.config.embedding_serialization_factor, True))
    whole, half = (_best(replace(job, blocks=blocks), plan) for blocks in (job.blocks, halves))
    return half if half > HALVES_GAIN * max(whole, plan.windows_per_second) else None


def _best(job: Job, plan: Plan) -> float:
    """Return the windows/s of the best split of the job's blocks; 0 if none fits."""
    cut = best_split(job, plan.efficiencies)
    return 0.0 if cut is None else make_plan(with_cut(job, cut),
                                             plan.efficiencies).windows_per_second


def suggestion(plan: Plan, better: Sequence[Change]) -> str:
    """Return one line with the best change and its throughput, or that there is none.

    better: what `changes` returns for the plan.
    """
    if better:
        return describe(plan, better[0])
    if plan.fits:
        return "no single change of a setting is faster and fits"
    command = "search" if plan.job.training else "search --inference"
    return ("no single change makes it fit: "
            f"`python -m planner {command}` tries all of them together")


def describe(plan: Plan, change: Change) -> str:
    """Return one line with the change, its windows/s and the gain over `plan` in percent."""
    new = change.plan.windows_per_second
    gain = f"{100 * (new / plan.windows_per_second - 1):+.0f} %" if plan.fits else "and it fits"
    return f"{change.text}: {new:,.0f} windows/s ({gain})"


def _training_changes(job: Job, plan: Plan) -> Iterator[Tuple[Job, str]]:
    """Yield each change to try: the changed job, and the change as flags of train.py."""
    config, micro, accumulation = (job.config, job.micro_batch_size,
                                   job.config.gradient_accumulation_steps)
    least = job.layout.min_gradient_accumulation()
    for factor in (2, 4):
        if job.count and accumulation % factor == 0 and accumulation // factor >= least:
            yield (with_micro_batch(job, micro * factor,
                                    gradient_accumulation_steps=accumulation // factor),
                   f"--micro_batch_size {micro * factor} --gradient_accumulation_steps "
                   f"{accumulation // factor} (the same batch)")
    for factor in (2, 4, 8):
        if job.count and micro % factor == 0:
            yield (with_micro_batch(job, micro // factor,
                                    gradient_accumulation_steps=accumulation * factor),
                   f"--micro_batch_size {micro // factor} --gradient_accumulation_steps "
                   f"{accumulation * factor} (the same batch)")
    if job.packed_windows_per_row and job.packed_windows_per_row > 1.05 * job.windows_per_row:
        yield (replace(job, windows_per_row=job.packed_windows_per_row),
               f"--pack ({job.packed_windows_per_row:.2f} windows in a row, "
               "the same windows an update)")
    yield from _balance(job, plan)
    yield from _memory_changes(job)
    yield (with_config(job, device_iterations=2 * config.device_iterations),
           f"--device_iterations {2 * config.device_iterations} "
           "(fewer calls; the learning rate changes half as often)")
    yield (with_config(job, gradient_accumulation_steps=2 * accumulation),
           f"--gradient_accumulation_steps {2 * accumulation} "
           "(shorter ramps, but twice the batch size)")


def _inference_changes(job: Job, plan: Plan) -> Iterator[Tuple[Job, str]]:
    """Yield the changes of an inference pipeline, in the form of `_training_changes`."""
    micro, iterations = job.micro_batch_size, job.config.device_iterations
    for changed in (4 * micro, 2 * micro, micro // 2, micro // 4):
        if changed:
            yield with_micro_batch(job, changed), f"--eval_micro_batch_size {changed}"
    if job.packed_windows_per_row and job.packed_windows_per_row > 1.05 * job.windows_per_row:
        yield (replace(job, windows_per_row=job.packed_windows_per_row),
               f"--pack ({job.packed_windows_per_row:.2f} windows in a row)")
    yield from _balance(job, plan)
    yield (with_config(job, device_iterations=4 * iterations),
           f"--inference_device_iterations {4 * iterations} (shorter ramps, fewer calls)")


def _balance(job: Job, plan: Plan) -> Iterator[Tuple[Job, str]]:
    """Yield the split of the job's blocks over as many IPUs that is best, if there is one."""
    cut = best_split(job, plan.efficiencies)
    if cut is not None:
        split = with_cut(job, cut)
        flag = "--layers_per_ipu" if job.training else "--inference_layers_per_ipu"
        yield split, f"{flag} {' '.join(map(str, split.config.layers_per_ipu))} (the best balance)"


def _memory_changes(job: Job) -> Iterator[Tuple[Job, str]]:
    """Yield the changes that trade memory for time, in the form of `_training_changes`."""
    config = job.config
    off, checkpoints = config.optimizer_state_offchip, config.recompute_checkpoint_every_layer
    yield (with_config(job, optimizer_state_offchip=not off),
           f"--optimizer_state_offchip {'false' if off else 'true'}")
    yield (with_config(job, recompute_checkpoint_every_layer=not checkpoints),
           f"--recompute_checkpoint_every_layer {'false' if checkpoints else 'true'}")
    if job.count:
        factor = 2 * config.embedding_serialization_factor
        with suppress(UsageError):  # an embedding of few rows has no more parts
            serialised = with_micro_batch(with_config(job, embedding_serialization_factor=factor),
                                          job.micro_batch_size)
            yield serialised, f"--embedding_serialization_factor {factor}"
    if config.replication_factor > 1 and not config.replicated_tensor_sharding:
        yield with_config(job, replicated_tensor_sharding=True), "--replicated_tensor_sharding true"
