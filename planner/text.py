"""Formats plans as text and tables for a terminal, and as a dictionary for JSON."""
from __future__ import annotations

import math
from typing import Any, Dict, List, Optional, Sequence

from ipu_options.config import IPUS_OF_A_HOST, IPUConfig, reserved_ipus
from planner.advice import changes, describe, suggestion
from planner.calibrate import Comparison
from planner.confidence import CONFIDENCE, PUBLISHED_RMS, expected_error
from planner.flags import flags_text
from planner.job import Job
from planner.machine import MIB, Efficiencies
from planner.memory import CATEGORIES, reasons
from planner.plan import Plan, latency_seconds
from planner.search import settings_in

SHORT = {
    "optimizer_state": "optimizer", "matmul_temporaries": "matmul",
    "embedding_gradient": "emb. grad", "update_temporaries": "update"}
# Share of the memory that should stay free: what is estimated of the rest is not better than this.
TIGHT = 0.05


def plan_text(plan: Plan, title: str, note: Optional[str] = None) -> str:
    """Return the whole plan as text.

    title: what to call the job in the heading. note: a sentence to add to the heading.
    """
    parts = [
        heading(plan, title) + (f"\n{note}" if note else ""),
        _blocks(plan),
        _memory(plan),
        _stages(plan),
        throughput_text(plan),
        _where(plan),
        _advice(plan),
        _provenance(plan.efficiencies)]
    return "\n\n".join(parts)


def plan_dict(plan: Plan) -> Dict[str, Any]:
    """Return the whole plan as a dictionary that can be written as JSON, with units in the keys."""
    job, config = plan.job, plan.job.config
    limit = job.machine.memory_bytes
    names = {ipu: [name for name, at in job.layout.blocks() if at == ipu] for ipu in plan.memory}
    low, high = expected_windows_per_second(plan)
    better = changes(plan)
    return {
        "phase": job.phase.name,
        "fits": plan.fits, "free_bytes": plan.free_bytes, "fullest_ipu": plan.fullest_ipu,
        "windows_per_second": plan.windows_per_second, "windows_per_second_low": low,
        "windows_per_second_high": high, "confidence": CONFIDENCE,
        "bubble_fraction": plan.schedule.bubble_fraction, "rows_per_second": plan.rows_per_second,
        "windows_per_row": job.windows_per_row, "run_seconds": plan.run_seconds,
        "update_seconds": plan.update_seconds, "pipeline_steps": plan.schedule.steps,
        "step_seconds": plan.schedule.step_seconds, "update_parts_seconds": plan.parts(),
        "one_question_seconds": None if job.training else latency_seconds(plan),
        "suggestion": suggestion(plan, better),
        "suggestions": [{
            "flags": change.text, "windows_per_second": change.plan.windows_per_second,
            "fits": change.plan.fits} for change in better],
        "why_not": reasons(job, plan.memory),
        "ipus": [{
            "ipu": ipu, "blocks": names[ipu], "total_bytes": sum(parts.values()),
            "limit_bytes": limit, "fits": sum(parts.values()) <= limit,
            **{f"{name}_bytes": parts[name] for name in parts},
            "busy_seconds": plan.schedule.load[ipu] * job.micro_batches}
            for ipu, parts in plan.memory.items()],
        "stages": [{
            "stage": i, "ipu": work.ipu, "blocks": [block.name for block in blocks],
            "forward_seconds": work.forward, "recompute_seconds": work.recompute,
            "backward_seconds": work.backward}
            for i, (work, (_, blocks)) in enumerate(zip(plan.work, job.stages()))],
        "blocks": [{
            "name": block.name, "ipu": ipu, "parameters": block.parameters,
            "forward_flops": block.forward_flops, "backward_flops": block.backward_flops,
            "saved_bytes": block.saved_bytes, "output_bytes": block.output_bytes}
            for block, (_, ipu) in zip(job.blocks, job.layout.blocks())],
        "machine": job.machine.name, "ipus_in_all": job.ipus, "hosts": job.hosts,
        "instances": job.hosts, "precision": job.precision,
        "max_seq_length": job.max_seq_length, "micro_batch_size": job.micro_batch_size,
        "rows_per_update": job.rows_per_update, "micro_batches": job.micro_batches,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "replication_factor": config.replication_factor, "ipus_per_replica": config.num_ipus(),
        "layers_per_ipu": job.layout.layers_per_ipu(config.num_ipus()),
        "embedding_serialization_factor": config.embedding_serialization_factor,
        "optimizer_state_offchip": config.optimizer_state_offchip,
        "ipu_config": config.to_dict(),
        "efficiencies": dict(vars(plan.efficiencies))}


def expected_windows_per_second(plan: Plan) -> List[float]:
    """Return the ends of the range in which the plan's windows/s are expected."""
    return [plan.windows_per_second * (1 + error) for error in expected_error(plan)]


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


def search_text(plans: Sequence[Plan], tried: int, seconds: float, given: Plan, whole: IPUConfig,
                ipus: int) -> str:
    """Return the best plans of a search as text, each with its reasons.

    tried, seconds: the number of settings searched and the time it took. given, whole: the plan of
    the user's own settings and their configuration, for comparison. ipus: what was searched for.
    """
    now = f"{given.windows_per_second:,.0f} windows/s" + ("" if given.fits else ", does not fit")
    lines = [
        f"{tried} settings, each with its best split, in {seconds:.1f} s. "
        f"As given: {flags_text(settings_in(given, whole, ipus, IPUConfig()))}: {now}."]
    for place, plan in enumerate(plans, 1):
        # An inference run is a whole number of calls, so that its duration is what counts.
        ratio = (plan.windows_per_second / given.windows_per_second if plan.job.training else
                 given.run_seconds / plan.run_seconds)
        setting = flags_text(settings_in(plan, whole, ipus))
        lines.append(f"\n{place}. {setting}: {plan.windows_per_second:,.0f} windows/s, "
                     f"{ratio:.2f} times as {'' if plan.job.training else 'fast as '}given")
        lines += ["   " + reason for reason in _reasons(plan)]
    if ipus > IPUS_OF_A_HOST:
        lines += ["", f"The first takes {hosts_text(plans[0].job)}"]
    return "\n".join(lines)


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


def heading(plan: Plan, title: str) -> str:
    """Return the lines that begin a plan's text: model, IPUs and batch."""
    job, config = plan.job, plan.job.config
    replicas, ipus = config.replication_factor, config.num_ipus()
    batches = f"{job.phase.iterations} {job.micro_batches}"
    if job.training and job.micro_batches != config.gradient_accumulation_steps:
        batches += f" (of {config.gradient_accumulation_steps}, since rows are packed)"
    packed = f", {job.windows_per_row:.2f} windows in a row" if job.windows_per_row > 1 else ""
    return (
        f"Plan{'' if job.training else ' of inference'}: {title}, length {job.max_seq_length}, "
        f"{job.precision}, on {job.ipus} {job.machine.name} IPU{'s' * (job.ipus != 1)} "
        f"({replicas} replica{'s' * (replicas > 1)} of {ipus})\n"
        f"micro-batch {job.micro_batch_size} x {batches} x replicas {replicas} = "
        f"{job.rows_per_update} rows a {plan.job.phase.round}{packed}")


def hosts_text(job: Job) -> str:
    """Return how several hosts share the job, what starts them, and what is assumed of them."""
    replicas, hosts = job.config.replication_factor, job.hosts
    text = (f"{hosts} hosts of {IPUS_OF_A_HOST} IPUs, with one instance each, which feeds "
            f"{replicas // hosts} replicas (more instances on a host are not planned): poprun "
            f"--num-instances {hosts} --num-replicas {replicas} --ipus-per-replica "
            f"{reserved_ipus(job.config.num_ipus())}.")
    return text if not job.training else (
        f"{text}\nAssumed: gradients are reduced within each rack of {IPUS_OF_A_HOST} over its "
        "IPU-Links, and the shares of its IPUs between racks over two GW-Links of 100 Gbit/s for "
        "each four IPUs; no published run tells how good this is.")


def _blocks(plan: Plan) -> str:
    ipus, blocks, training = dict(plan.job.layout.blocks()), plan.job.blocks, plan.job.training
    rows = [[
        b.name, str(ipus[b.name]), f"{b.parameters:,}", f"{b.forward_flops / 1e9:.2f}",
        f"{b.saved_bytes / MIB:.1f}", f"{b.output_bytes / MIB:.2f}"] for b in blocks]
    rows.append([
        "total", "", f"{sum(b.parameters for b in blocks):,}",
        f"{sum(b.forward_flops for b in blocks) / 1e9:.2f}",
        f"{sum(b.saved_bytes for b in blocks) / MIB:.1f}", ""])
    head = ["block", "IPU", "parameters", "forward GFLOP", "saved MiB", "output MiB"]
    kept = [i for i, name in enumerate(head) if training or name != "saved MiB"]
    return "Allocation, for one micro-batch (counted from the model)\n" + table(
        [head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _memory(plan: Plan) -> str:
    limit = plan.job.machine.memory_bytes
    used = [name for name in CATEGORIES if any(parts[name] for parts in plan.memory.values())]
    rows = []
    for ipu, parts in plan.memory.items():
        total = sum(parts.values())
        free = (f"{(limit - total) / MIB:.0f}" if total <= limit else
                f"OVER BY {(total - limit) / MIB:.0f}")
        rows.append([f"IPU {ipu}"] + [f"{parts[name] / MIB:.0f}" for name in used] +
                    [f"{total / MIB:.0f}", free])
    return (f"Memory of each IPU in MiB, of {limit / MIB:.0f}\n" +
            table([""] + [SHORT.get(name, name) for name in used] + ["total", "free"], rows) +
            "\n" + verdict(plan))


def verdict(plan: Plan) -> str:
    """Return a sentence on the margin of a plan that fits, or on why it does not fit."""
    if not plan.fits:
        return f"Does not fit: {'; '.join(reasons(plan.job, plan.memory))}."
    share = plan.free_bytes / plan.job.machine.memory_bytes
    text = (f"Fits, with a margin of {plan.free_bytes / MIB:.0f} MiB ({100 * share:.0f} %) on IPU "
            f"{plan.fullest_ipu}, the fullest")
    return text + ("." if share >= TIGHT else
                   f": less than {100 * TIGHT:.0f} % is tight for an estimate.")


def _stages(plan: Plan) -> str:
    slowest, load = plan.schedule.step_seconds - plan.copy_seconds, plan.schedule.load
    kinds = plan.job.phase.kinds
    rows = [[
        f"stage {i}", str(work.ipu), *(f"{1e3 * getattr(work, kind):.2f}" for kind in kinds),
        f"{100 * load[work.ipu] / slowest:.0f} %"] for i, work in enumerate(plan.work)]
    return (
        "Time of one micro-batch in ms, by pipeline stage\n" +
        table(["", "IPU", *kinds, "IPU's load"], rows) +
        f"\nA step takes {1e3 * plan.schedule.step_seconds:.2f} ms, as long as the slowest IPU and "
        f"the copies between IPUs; {plan.schedule.steps} steps a {plan.job.phase.round}, "
        f"{100 * plan.schedule.bubble_fraction:.1f} % of them ramp-up and ramp-down.")


def throughput_text(plan: Plan) -> str:
    """Return lines with the throughput, its range, and the time of the whole run."""
    job = plan.job
    low, high = expected_windows_per_second(plan)
    real = (f" real, in {plan.rows_per_second:,.0f} rows/s" if job.windows_per_row > 1 else "")
    lines = [
        f"Predicted: {plan.windows_per_second:,.0f} windows/s{real}, "
        f"{100 * CONFIDENCE:.0f} % sure to be within {low:,.0f} and {high:,.0f}; "
        f"a {plan.job.phase.round} every {1e3 * plan.update_seconds:.1f} ms"]
    if plan.run_seconds is not None:
        lines.append(f"{_amount(plan)}: {duration(plan.run_seconds)} "
                     f"(without compilation{' and evaluation' if job.training else ''})")
    if not job.training:
        lines.append(
            f"One question in one row: {1e3 * latency_seconds(plan):.1f} ms, through the stages "
            "one after the other; no published run tells how good this is")
    return "\n".join(lines)


def _amount(plan: Plan) -> str:
    """Return what the whole run works through."""
    job = plan.job
    if job.updates is not None:
        return f"{job.updates:,} weight updates"
    if not job.training:
        return f"{job.windows:,} windows"
    return f"{job.epochs:g} epoch{'s' * (job.epochs != 1)} of {job.windows:,} windows"


def _where(plan: Plan) -> str:
    parts = sorted(((name, seconds) for name, seconds in plan.parts().items() if seconds > 0),
                   key=lambda part: -part[1])
    rows = [[name, f"{1e3 * seconds:.2f}", f"{100 * seconds / plan.update_seconds:.1f} %"]
            for name, seconds in parts]
    return (f"Where the time of a {plan.job.phase.round} goes (mean over the IPUs)\n" +
            table(["", "ms", "share"], rows))


def _advice(plan: Plan) -> str:
    better = changes(plan)
    if better:
        lines = ["What would help most: " + describe(plan, better[0])]
        lines += ["          or, instead: " + describe(plan, change) for change in better[1:4]]
    elif plan.fits:
        lines = ["What would help most: nothing that is one setting."]
    else:
        lines = ["What would help most: no single change makes it fit; try `python -m planner "
                 f"search{'' if plan.job.training else ' --inference'}`."]
    return "\n".join(lines)


def _provenance(efficiencies: Efficiencies) -> str:
    e = efficiencies
    lines = [
        "Counted from the model: parameters, FLOPs, elements, saved and output bytes. Documented: "
        "clock, peak, memory, links.",
        f"Estimated: code {e.code_bytes / MIB:.0f} MiB, matmul temporaries.",
        (f"Fitted ({e.source}): {100 * e.peak_utilisation:.1f} % of the peak rate at most, "
         f"{e.matmul_cycles:,.0f} cycles around each multiplication, "
         f"{e.element_cycles:.2f} for each other element, "
         f"{1e3 * e.call_seconds:.0f} ms of host a call and {1e9 * e.token_seconds:.0f} ns a "
         "token.")]
    if e == Efficiencies():
        fitted, blind = (100 * error for error in PUBLISHED_RMS)
        lines.append(f"Errors against the published runs: {fitted:.1f} % rms, {blind:.1f} % in "
                     "cross-validation (`calibrate --show`).")
    return "\n".join(lines)


def _reasons(plan: Plan) -> List[str]:
    """Return a line about the plan's time and a line about its memory."""
    limit, load = plan.job.machine.memory_bytes, plan.schedule.load
    share = {name: 100 * seconds / plan.update_seconds for name, seconds in plan.parts().items()}
    useful, between = (share["forward"] + share["backward"],
                       share["host"] + share["weight update"] + share["gradient reduction"] +
                       share["gradient reduction between hosts"])
    used = limit - plan.free_bytes
    work = ("forward and backward work, "
            f"{share['recompute']:.0f} % recomputation" if plan.job.training else "work")
    rest = "update and host" if plan.job.training else "host"
    time = (
        f"{useful:.0f} % of the time is {work}, "
        f"{share['waiting for the slowest IPU']:.0f} % imbalance (IPU {max(load, key=load.get)} is "
        f"slowest), {share['pipeline ramp']:.0f} % ramp, {between:.0f} % {rest}")
    if not plan.job.training:
        time += f"; {_amount(plan)} take {duration(plan.run_seconds)}"
    return [time,
            f"IPU {plan.fullest_ipu} is fullest: {used / MIB:.0f} of {limit / MIB:.0f} MiB" +
            (" (tight, for an estimate)" if plan.free_bytes < TIGHT * limit else "")]


def duration(seconds: float) -> str:
    """Return a time as text, in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
