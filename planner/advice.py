"""Finds the change of one setting that would help most, by planning each such change."""
from __future__ import annotations

from contextlib import suppress
from itertools import combinations
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

from planner.flags import flags_text
from planner.job import Job
from planner.plan import Plan, make_plan
from planner.search import FASTER, gain, split_settings
from runtime.errors import UsageError

# Settings of the pipeline by their names in training, and what else to say of the change.
Candidate = Tuple[Dict[str, Any], str]
SPLIT = "the best split that fits"
LARGER_BATCH = "shorter ramps, but twice the batch size"


class Change(NamedTuple):
    """A change of settings and the plan that it leads to."""

    settings: Dict[str, Any]    # by their names in training
    remark: str
    plan: Plan

    @property
    def text(self) -> str:
        return flags_text(self.flags) + (f" ({self.remark})" if self.remark else "")

    @property
    def flags(self) -> Dict[str, Any]:
        """The change by flag of train.py."""
        return self.plan.job.phase.flags(self.settings)


def changes(plan: Plan) -> List[Change]:
    """Return the changes that fit and are FASTER, the fastest first; the best pair, too."""
    def speed(change: Change) -> float:
        return gain(change.plan, plan)

    def faster(changes: Iterable[Change], least: float) -> List[Change]:
        fitting = [change for change in changes if change.plan.fits and speed(change) > least]
        return sorted(fitting, key=speed, reverse=True)

    planned, least = planned_changes(plan), FASTER if plan.fits else 0
    better = faster(planned, least)
    pair = faster(_pairs(plan, planned), FASTER * speed(better[0]) if better else least)[:1]
    split = [change for change in better if change.remark == SPLIT]
    rest = [change for change in better if change.remark != SPLIT]
    shown = [*pair, *split, *rest[:4 - len(pair) - len(split)]]
    return faster(shown, 0) + [change for change in rest if change not in shown]


def planned_changes(plan: Plan) -> List[Change]:
    """Return each change that is possible."""
    candidates = (_training_changes if plan.job.training else _inference_changes)(plan)
    return [change for candidate in candidates for change in _planned(plan, *candidate)]


def _planned(plan: Plan, settings: Dict[str, Any], *remarks: str) -> List[Change]:
    with suppress(UsageError):  # an embedding of few rows has no more parts
        changed = make_plan(plan.job.changed(**settings), plan.efficiencies)
        # Where packed rows would not fill the pipeline, an update has more windows than before.
        if LARGER_BATCH in remarks or not plan.job.training or (
                changed.job.windows_per_update < 1.1 * plan.job.windows_per_update):
            return [Change(settings, "; ".join(filter(None, remarks)), changed)]
    return []


def _pairs(plan: Plan, planned: Sequence[Change]) -> Iterator[Change]:
    """Yield any two changes that keep the batch, and each change with the best split for it."""
    planned = [change for change in planned if change.remark not in (SPLIT, LARGER_BATCH)]
    for one, other in combinations(planned, 2):
        if not set(one.settings) & set(other.settings):
            yield from _planned(plan, {**one.settings, **other.settings}, one.remark, other.remark)
    for change in planned:
        job = change.plan.job
        split = split_settings(job, plan.efficiencies)
        if split.get("layers_per_ipu") not in (None, job.config.layers_per_ipu):
            yield from _planned(plan, {**change.settings, **split}, change.remark, SPLIT)


def suggestion(plan: Plan, better: Sequence[Change]) -> str:
    """Return one line with the best of the `changes` of a plan, or that there is none."""
    if better:
        return describe(plan, better[0])
    if plan.fits:
        return "no single change of a setting is faster and fits"
    command = "search" if plan.job.training else "search --inference"
    return ("no single change makes it fit: "
            f"`python -m planner {command}` tries all of them together")


def describe(plan: Plan, change: Change) -> str:
    """Return one line with the change, its windows/s and the gain over `plan`."""
    more = f"{100 * (gain(change.plan, plan) - 1):+.0f} %" if plan.fits else "and it fits"
    return f"{change.text}: {change.plan.windows_per_second:,.0f} windows/s ({more})"


def _training_changes(plan: Plan) -> Iterator[Candidate]:
    job, config = plan.job, plan.job.config
    micro, accumulation = job.micro_batch_size, config.gradient_accumulation_steps
    sizes = [(micro * factor, accumulation // factor) for factor in (2, 4)
             if accumulation % factor == 0
             and accumulation // factor >= job.layout.min_gradient_accumulation()]
    sizes += [(micro // factor, accumulation * factor) for factor in (2, 4, 8)
              if micro % factor == 0]
    for size, steps in sizes:
        yield ({"micro_batch_size": size, "gradient_accumulation_steps": steps}, "the same batch")
    yield from _packing(job, ", the same windows an update")
    yield from _balance(plan)
    for name in ("optimizer_state_offchip", "recompute_checkpoint_every_layer"):
        yield {name: not getattr(config, name)}, ""
    yield {"embedding_serialization_factor": 2 * config.embedding_serialization_factor}, ""
    if config.replication_factor > 1 and not config.replicated_tensor_sharding:
        yield {"replicated_tensor_sharding": True}, ""
    yield ({"device_iterations": 2 * config.device_iterations},
           "fewer calls; the learning rate changes half as often")
    yield {"gradient_accumulation_steps": 2 * accumulation}, LARGER_BATCH


def _inference_changes(plan: Plan) -> Iterator[Candidate]:
    micro = plan.job.micro_batch_size
    for size in (4 * micro, 2 * micro, micro // 2, micro // 4):
        if size:
            yield {"micro_batch_size": size}, ""
    yield from _packing(plan.job)
    yield from _balance(plan)
    yield ({"device_iterations": 4 * plan.job.config.device_iterations},
           "shorter ramps, fewer calls")


def _packing(job: Job, remark: str = "") -> Iterator[Candidate]:
    if job.gains_by_packing:
        yield {"pack": True}, f"{job.packed_windows_per_row:.2f} windows in a row{remark}"


def _balance(plan: Plan) -> Iterator[Candidate]:
    split = split_settings(plan.job, plan.efficiencies)
    if split:
        yield split, SPLIT
