"""Prints plans, comparisons and rankings for a terminal: the answer first, then the tables."""
from __future__ import annotations

import math
from typing import Any, Dict, List, Sequence

from ipu_options.config import IPUS_OF_A_HOST, IPUConfig
from planner.calibrate import Comparison
from planner.confidence import CONFIDENCE, PUBLISHED_RMS, expected_error
from planner.flags import flags_text
from planner.from_settings import hosts_text
from planner.machine import MIB, Efficiencies
from planner.phase import PHASES
from planner.plan import Plan
from planner.search import settings_in
from planner.sides import Side, differences
from planner.views import (
    View,
    count,
    duration,
    memory,
    mib,
    parts,
    percent,
    profiled,
    stages,
    throughput,
)
from runtime.errors import UsageError

SHORT = {
    "optimizer_state": "optimizer", "matmul_temporaries": "matmul",
    "embedding_gradient": "emb. grad", "update_temporaries": "update",
    "profiled, other than code": "other"}
# Share of the memory that should stay free: what is estimated of the rest is not better than this.
TIGHT = 0.05


def comparison_text(sides: Sequence[Side]) -> str:
    """Return all that is known of `sides` as text. A plan alone is a comparison of one side."""
    alone = len(sides) == 1 and sides[0].plan
    sections = [plan_summary(sides[0].plan) if alone else _titles(sides)]
    sections += [_blocks(alone)] if alone else [_differences(sides)]
    views = [memory(sides), stages(sides), parts(sides), profiled(sides)]
    sections += [render(view) for view in [*views, *([] if alone else [throughput(sides)])]
                 if view.rows]
    return "\n\n".join(sections + ([_provenance(alone["efficiencies"])] if alone else []))


def render(view: View) -> str:
    """Return a view as a table under its title."""
    if not any(row.group for row in view.rows):
        return f"{view.title}\n{_by_side(view)}"
    several = any(row.label for row in view.rows)
    names = view.parts()
    cells = list(dict.fromkeys(name for row in view.rows for name in row.cells))
    rows = []
    for row in view.rows:
        lengths = dict.fromkeys(names, 0.0)
        for piece in row.segments:
            if piece.part in lengths:
                lengths[piece.part] += piece.length
        rows.append([row.group, *[row.label][:several],
                     *(f"{length:.{view.digits}f}" for length in lengths.values()),
                     *(row.cells.get(name, "") for name in cells)])
    head = ["", *[""][:several], *(SHORT.get(name, name) for name in names), *cells]
    return "\n".join([view.title, table(head, rows, left=(0, 1) if several else (0,)),
                      *[view.note][:bool(view.note)]])


def profile_text(side: Side) -> str:
    """Return a profile beside the plan of the profiled run. Raises UsageError if it is no such."""
    ipus, planned = len(side.profile.total_bytes), len(side.plan["ipus"])
    if ipus != planned:
        raise UsageError(f"the profile is of {ipus} IPUs, the plan of {planned}: give report the "
                         "flags that the profiled run was started with")
    return "\n\n".join(render(view([side])) for view in (memory, profiled))


def _by_side(view: View) -> str:
    """Return a table with a line for each figure and a column for each side."""
    figures = list(dict.fromkeys(name for row in view.rows for name in row.cells))
    rows = [[name, *(row.cells.get(name, "-") for row in view.rows)] for name in figures]
    return table(["", *(row.label for row in view.rows)], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return a text table with the headings `head` and a line of dashes below them.

    left: indices of the columns that are aligned to the left; the others are aligned to the right.
    """
    cells = [list(map(str, row)) for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  " + "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]
    lines.insert(1, "  " + "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def value_text(value: Any) -> str:
    """Return a setting's value as it is written on a command line; None as "not set"."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def plan_summary(plan: Dict[str, Any]) -> str:
    """Return what a plan comes to: throughput, memory, what would help most, and what it is of."""
    return "\n".join([throughput_line(plan), verdict(plan), *_advice(plan), "", heading(plan)])


def throughput_line(plan: Dict[str, Any]) -> str:
    """Return a plan's windows/s with their range."""
    rows = plan["windows_per_row"] > 1
    real = f" real, in {count(plan['rows_per_second'])} rows/s" if rows else ""
    return (f"Predicted: {count(plan['windows_per_second'])} windows/s{real}, "
            f"{percent(plan['confidence'])} sure to be within "
            f"{count(plan['windows_per_second_low'])} and "
            f"{count(plan['windows_per_second_high'])}; a {_round(plan)} every "
            f"{1e3 * plan['update_seconds']:.1f} ms")


def verdict(plan: Dict[str, Any]) -> str:
    """Return a sentence on the margin of a plan that fits, or on why it does not fit."""
    if not plan["fits"]:
        return f"Does not fit: {'; '.join(plan['why_not'])}."
    share = plan["free_bytes"] / plan["ipus"][0]["limit_bytes"]
    text = (f"Fits, with a margin of {mib(plan['free_bytes'])} MiB ({percent(share)}) on IPU "
            f"{plan['fullest_ipu']}, the fullest")
    return text + ("." if share >= TIGHT else
                   f": less than {percent(TIGHT)} is tight for an estimate.")


def heading(plan: Dict[str, Any]) -> str:
    """Return what a plan is of: model, IPUs, batch and the whole run."""
    training, replicas, config = plan["phase"] == "training", plan["replication_factor"], plan[
        "gradient_accumulation_steps"]
    batches = f"{PHASES[plan['phase']].iterations} {plan['micro_batches']}"
    if training and plan["micro_batches"] != config:
        batches += f" (of {config}, since rows are packed)"
    packed = (f", {plan['windows_per_row']:.2f} windows in a row"
              if plan["windows_per_row"] > 1 else "")
    lines = [
        f"Plan{'' if training else ' of inference'}: {plan['title']}, length "
        f"{plan['max_seq_length']}, {plan['precision']}, on {plan['ipus_in_all']} "
        f"{plan['machine']} IPU{'s' * (plan['ipus_in_all'] != 1)} "
        f"({replicas} replica{'s' * (replicas > 1)} of {plan['ipus_per_replica']})",
        f"micro-batch {plan['micro_batch_size']} x {batches} x replicas {replicas} = "
        f"{plan['rows_per_update']} rows a {_round(plan)}{packed}"]
    if plan["run_seconds"] is not None:
        lines.append(f"{_amount(plan)}: {duration(plan['run_seconds'])} "
                     f"(without compilation{' and evaluation' * training})")
    if not training:
        lines.append(
            f"One question in one row: {1e3 * plan['one_question_seconds']:.1f} ms, through the "
            "stages one after the other; no published run tells how good this is")
    return "\n".join(lines + [plan["pod_note"]][:bool(plan.get("pod_note"))])


def _round(plan: Dict[str, Any]) -> str:
    return PHASES[plan["phase"]].round


def _amount(plan: Dict[str, Any]) -> str:
    """Return what the whole run works through."""
    windows, epochs = plan.get("windows"), plan.get("epochs")
    if plan.get("updates") is not None:
        return f"{plan['updates']:,} weight updates"
    if plan["phase"] != "training":
        return f"{windows:,} windows"
    return f"{epochs:g} epoch{'s' * (epochs != 1)} of {windows:,} windows"


def _advice(plan: Dict[str, Any]) -> List[str]:
    """Return the changes that would help most, a line each."""
    if not plan["suggestions"]:
        return [f"What would help most: {plan['suggestion']}."]
    return [("What would help most: " if not place else "          or, instead: ") +
            describe(plan, change) for place, change in enumerate(plan["suggestions"][:4])]


def describe(plan: Dict[str, Any], change: Dict[str, Any]) -> str:
    """Return a change of a plan, its windows/s and the gain in percent."""
    speed = change["windows_per_second"]
    gain = (f"{100 * (speed / plan['windows_per_second'] - 1):+.0f} %" if plan["fits"] else
            "and it fits")
    return f"{change['flags']}: {count(speed)} windows/s ({gain})"


def _blocks(plan: Dict[str, Any]) -> str:
    """Return what is on each IPU; equal layers that follow each other are one row."""
    runs: List[List[Dict[str, Any]]] = []
    for block in plan["blocks"]:
        same = runs and {**block, "name": ""} == {**runs[-1][0], "name": ""}
        runs[-1].append(block) if same else runs.append([block])
    rows = [[run[0]["name"] + (f"-{run[-1]['name'].split()[-1]}" if len(run) > 1 else ""),
             str(run[0]["ipu"]), *_counts(run)] for run in runs]
    head = ["block", "IPU", "parameters", "forward GFLOP", "saved MiB", "output MiB"]
    rows.append(["total", "", *_counts(plan["blocks"])[:3], ""])
    return "Allocation, for one micro-batch (counted from the model)\n" + table(head, rows)


def _counts(blocks: Sequence[Dict[str, Any]]) -> List[str]:
    """Return the cells of some blocks: sums, and the output of the last one."""
    def total(name: str) -> float:
        return sum(block[name] for block in blocks)
    return [count(total("parameters")), f"{total('forward_flops') / 1e9:.2f}",
            f"{total('saved_bytes') / MIB:.1f}", f"{blocks[-1]['output_bytes'] / MIB:.2f}"]


def _titles(sides: Sequence[Side]) -> str:
    return "\n".join(line for side in sides for line in (
        side.label, f"   {side.note}" if side.note else "") if line)


def _differences(sides: Sequence[Side]) -> str:
    different = differences(sides)
    if not different:
        return "Settings that differ: none of those that are known"
    rows = [[name, *(value_text(values[side.name]) if side.name in values else "not known"
                     for side in sides)] for name, values in different.items()]
    return "Settings that differ\n" + table(["", *(side.name for side in sides)], rows)


def _provenance(efficiencies: Dict[str, Any]) -> str:
    e = Efficiencies(**efficiencies)
    lines = [
        "Counted from the model: parameters, FLOPs, elements, saved and output bytes. Documented: "
        "clock, peak, memory, links.",
        f"Estimated: code {mib(e.code_bytes)} MiB, matmul temporaries.",
        (f"Fitted ({e.source}): {percent(e.peak_utilisation, 1)} of the peak rate at most, "
         f"{e.matmul_cycles:,.0f} cycles around each multiplication, "
         f"{e.element_cycles:.2f} for each other element, "
         f"{1e3 * e.call_seconds:.0f} ms of host a call and {1e9 * e.token_seconds:.0f} ns a "
         "token.")]
    if e.source == Efficiencies().source:
        fitted, blind = (percent(error, 1) for error in PUBLISHED_RMS)
        lines.append(f"Errors against the published runs: {fitted} rms, {blind} in "
                     "cross-validation (`calibrate --show`).")
    return "\n".join(lines)


def search_text(sides: Sequence[Side], tried: int, seconds: float, plans: Sequence[Plan],
                ipu_config: IPUConfig, ipus: int) -> str:
    """Return the best plans of a search as text, each with its reasons.

    sides: the user's own settings, and the plans from the best one on, which are also in `plans`.
    tried, seconds: the number of settings searched and the time it took. ipu_config: the user's.
    ipus: what was searched for.
    """
    own = sides[0].plan
    own_flags = flags_text(settings_in(plans[0], ipu_config, ipus, IPUConfig()))
    lines = [
        f"{tried} settings, each with its best split, in {seconds:.1f} s. As given: {own_flags}: "
        f"{count(own['windows_per_second'])} windows/s{', does not fit' * (not own['fits'])}."]
    for side in sides[1:]:
        # An inference run is a whole number of calls: its duration is what counts.
        training, plan = own["phase"] == "training", side.plan
        ratio = (plan["windows_per_second"] / own["windows_per_second"] if training else
                 own["run_seconds"] / plan["run_seconds"])
        lines.append(f"\n{side.name}. {side.title}: {count(plan['windows_per_second'])} windows/s, "
                     f"{ratio:.2f} times as {'' if training else 'fast as '}given")
        lines += ["   " + reason for reason in _reasons(plan)]
    if ipus > IPUS_OF_A_HOST:
        lines += ["", f"The first takes {hosts_text(plans[1].job)}"]
    return "\n".join(lines)


def _reasons(plan: Dict[str, Any]) -> List[str]:
    """Return a line about a plan's time and a line about its memory."""
    training, limit = plan["phase"] == "training", plan["ipus"][0]["limit_bytes"]
    share = {name: 100 * seconds / plan["update_seconds"]
             for name, seconds in plan["update_parts_seconds"].items()}
    between = (share["host"] + share["weight update"] + share["gradient reduction"] +
               share["gradient reduction between hosts"])
    slowest = max(plan["ipus"], key=lambda ipu: ipu["busy_seconds"])["ipu"]
    work = ("forward and backward work, "
            f"{share['recompute']:.0f} % recomputation" if training else "work")
    time = (
        f"{share['forward'] + share['backward']:.0f} % of the time is {work}, "
        f"{share['waiting for the slowest IPU']:.0f} % imbalance (IPU {slowest} is slowest), "
        f"{share['pipeline ramp']:.0f} % ramp, {between:.0f} % {'update and ' * training}host")
    if not training:
        time += f"; {_amount(plan)} take {duration(plan['run_seconds'])}"
    return [time,
            f"IPU {plan['fullest_ipu']} is fullest: {mib(limit - plan['free_bytes'])} of "
            f"{mib(limit)} MiB" +
            (" (tight, for an estimate)" if plan["free_bytes"] < TIGHT * limit else "")]


def fit_dict(rows: Sequence[Comparison]) -> List[Dict[str, Any]]:
    """Return published runs and their plans as dictionaries that can be written as JSON."""
    def measured(row: Comparison) -> Dict[str, Any]:
        low, high = expected_error(row.blind)
        return {
            "error_percent": 100 * row.error(row.plan),
            "cross_validated_error_percent": 100 * row.error(row.blind),
            "expected_low_percent": 100 * low, "expected_high_percent": 100 * high,
            "within_expected": row.within}

    return [{
        "name": row.run.name, "use": row.run.use, "source": row.run.source,
        "machine": row.run.job.machine.name,
        "published_rows_per_second": row.run.rows_per_second,
        "planned_rows_per_second": row.plan.rows_per_second, "planned_fits": row.plan.fits,
        "free_bytes": row.plan.free_bytes, "right": row.right,
        **(measured(row) if row.blind else {})} for row in rows]


def fit_text(rows: Sequence[Comparison], efficiencies: Efficiencies) -> str:
    """Return the table of published runs and predictions as text.

    rows: what calibrate.compare returns for these efficiencies.
    """
    body = [[
        row.run.name, row.run.job.machine.name, row.run.use,
        "-" if row.run.rows_per_second is None else f"{row.run.rows_per_second:,.0f}",
        f"{row.plan.rows_per_second:,.0f}", *_errors(row),
        ("yes" if row.plan.fits else "no") + ("" if row.right else " WRONG")] for row in rows]
    measured = [row for row in rows if row.blind]
    lines = [
        f"Published runs (efficiencies: {efficiencies.source})",
        table(["run", "IPU", "use", "published rows/s", "planned rows/s", "error",
               "cross-validated", "expected within", "fits"], body),
        *(_summary(machine, [row for row in measured
                             if machine in ("both", row.run.job.machine.name)])
          for machine in ("Mk2", "Bow", "both")),
        f"verdicts: {sum(row.right for row in rows)} of {len(rows)} right",
        "measured: the efficiencies are fitted to it. cross-validated: the error if no run of the "
        "same publisher takes part in the fit; the",
        f"range is the one that such a plan expects in {100 * CONFIDENCE:.0f} % of all cases. at "
        "least: the published time holds compilation and evaluation, so that the",
        "true throughput is higher. fits, does not fit: so published, without a throughput. "
        "Sources: planner/published_runs.json."]
    return "\n".join(lines)


def _errors(row: Comparison) -> List[str]:
    """Return the cells of an error, of the cross-validated error and of its expected range."""
    if row.run.use == "at least":
        return ["bound met" if row.error(row.plan) >= 0 else "BOUND MISSED", "-", "-"]
    if row.blind is None:
        return ["-", "-", "-"]
    low, high = expected_error(row.blind)
    return [f"{100 * row.error(row.plan):+.1f} %",
            f"{100 * row.error(row.blind):+.1f} %" + ("" if row.within else " OUT"),
            f"{100 * low:+.0f} to {100 * high:+.0f} %"]


def _summary(name: str, rows: Sequence[Comparison]) -> str:
    """Return one line on the errors of some measured runs."""
    (rms, worst), (blind, blind_worst) = (
        (100 * math.sqrt(sum(e * e for e in errors) / len(errors)), 100 * max(map(abs, errors)))
        for errors in ([row.error(row.plan) for row in rows],
                       [row.error(row.blind) for row in rows]))
    return (f"{name}, {len(rows)} runs: {rms:.1f} % rms, {worst:.1f} % at most; cross-validated "
            f"{blind:.1f} % rms, {blind_worst:.1f} % at most, "
            f"{sum(row.within for row in rows)} of {len(rows)} within the expected range")
