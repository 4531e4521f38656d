"""What bounds a plan: what its time consists of, how far from the best it is, what moves it."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

from planner.advice import Change
from planner.plan import Plan
from planner.throughput import stage_work

# The terms of machine.Efficiencies' formula, by the numbers that leave the others out of it.
WORK = {
    "multiplications": {"matmul_cycles": 0.0, "element_cycles": 0.0, "exchange_cycles": 0.0},
    "fixed_cost": {"peak_utilisation": float("inf"), "element_cycles": 0.0},
    "element_wise": {"peak_utilisation": float("inf"), "matmul_cycles": 0.0,
                     "exchange_cycles": 0.0}}
UPDATE = ("gradient reduction", "gradient reduction between hosts", "weight update")
ROOFLINE = ("as planned", "balanced, no ramp, no host", "multiplications alone at the peak")


def bound_record(plan: Plan, better: Sequence[Change]) -> Dict[str, Any]:
    """Return what bounds a plan as a dictionary for JSON. better: what `advice.changes` returns."""
    job, seconds = plan.job, groups(plan)
    flops = sum(block.forward_flops + block.backward_flops for block in job.blocks)
    ipus, peak = len(plan.memory), job.machine.flops(job.precision)
    reached = flops / job.micro_batch_size * plan.rows_per_second / (
        ipus * job.config.replication_factor)
    balanced = sum(seconds.values()) - sum(seconds[name] for name in ("imbalance", "ramp", "host"))
    name = max(seconds, key=seconds.get)
    lever = _lever(plan, name, better)
    return {
        "flops_per_second_per_ipu": reached, "peak_share": reached / peak, "group_seconds": seconds,
        "bound": name, "bound_share": seconds[name] / plan.update_seconds,
        "lever": lever and lever[0].text, "lever_seconds_share": lever and lever[1],
        "roofline_windows_per_second": {
            name: plan.windows_per_second * gain for name, gain in zip(
                ROOFLINE, (1.0, plan.update_seconds / balanced, peak / reached))},
        "step_fixed_seconds": _fixed_seconds(plan)}


def stage_composition(plan: Plan) -> List[Dict[str, float]]:
    """Return {part of WORK: seconds} of each stage's whole work on one micro-batch."""
    terms = {name: stage_work(plan.job, replace(plan.efficiencies, **without))
             for name, without in WORK.items()}
    return [{name: sum(work[index][1:]) for name, work in terms.items()}
            for index in range(len(plan.schedule.stages))]


def groups(plan: Plan) -> Dict[str, float]:
    """Return {group: seconds} of the time of a weight update or call, as Plan.parts."""
    parts, batches, ipus = plan.parts(), plan.job.micro_batches, len(plan.memory)
    stages = stage_composition(plan)
    work = {name: batches * sum(stage[name] for stage in stages) / ipus for name in WORK}
    return {**work, "imbalance": parts["waiting for the slowest IPU"],
            "ramp": parts["pipeline ramp"], "copies": parts["copies between IPUs"],
            "update": sum(parts[name] for name in UPDATE), "host": parts["host"]}


def _lever(plan: Plan, name: str, better: Sequence[Change]) -> Optional[Tuple[Change, float]]:
    """Return the change that lowers a group's seconds most, if any does, and to which share."""
    # A row's seconds; if no change lowers these, a window's: packing helps all groups alike.
    for windows in (False, True):
        def seconds(one: Plan) -> float:
            return groups(one)[name] / one.job.rows_per_update / (
                one.job.windows_per_row if windows else 1)
        lowest = min(better, key=lambda change: seconds(change.plan), default=None)
        if lowest and seconds(lowest.plan) < 0.99 * seconds(plan):
            return lowest, seconds(lowest.plan) / seconds(plan)
    return None


def _fixed_seconds(plan: Plan) -> float:
    """Return the seconds of a step that do not depend on the micro-batch size."""
    slowest = max(plan.schedule.load, key=plan.schedule.load.get)
    # The counts are linear in the rows; what memory costs a multiplication is not.
    linear = replace(plan.efficiencies, exchange_cycles=0.0)
    once, twice = (
        sum(sum(work[1:]) for work in stage_work(job, linear) if work.ipu == slowest)
        for job in (plan.job, plan.job.changed(micro_batch_size=2 * plan.job.micro_batch_size)))
    return 2 * once - twice
