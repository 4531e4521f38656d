"""Formats plans as text and tables for a terminal, and as a dictionary for JSON."""
from __future__ import annotations

from typing import Any, Dict, List, Sequence

from ipu_options.plan.advice import changes, describe, suggestion
from ipu_options.plan.machine import PUBLISHED_ERRORS_PERCENT, Efficiencies
from ipu_options.plan.memory import CATEGORIES, reasons
from ipu_options.plan.planner import Plan

MIB = 2 ** 20
SHORT = {
    "optimizer_state": "optimizer", "matmul_temporaries": "matmul",
    "embedding_gradient": "emb. grad", "update_temporaries": "update"}


def plan_text(plan: Plan, title: str) -> str:
    """Return the whole plan as text; title: what to call the job in the heading."""
    parts = [
        _heading(plan, title),
        _blocks(plan),
        _memory(plan),
        _stages(plan),
        _throughput(plan),
        _where(plan),
        _advice(plan),
        _provenance(plan.efficiencies)]
    return "\n\n".join(parts)


def plan_dict(plan: Plan) -> Dict[str, Any]:
    """Return the whole plan as a dictionary that can be written as JSON, with units in the keys."""
    job, config = plan.job, plan.job.config
    limit = job.machine.memory_bytes
    names = {ipu: [name for name, at in job.layout.blocks() if at == ipu] for ipu in plan.memory}
    return {
        "fits": plan.fits, "windows_per_second": plan.windows_per_second,
        "bubble_fraction": plan.bubble_fraction, "rows_per_second": plan.rows_per_second,
        "windows_per_row": job.windows_per_row, "training_seconds": plan.training_seconds,
        "update_seconds": plan.update_seconds, "pipeline_steps": plan.schedule.steps,
        "step_seconds": plan.schedule.step_seconds, "update_parts_seconds": plan.parts(),
        "suggestion": suggestion(plan), "why_not": reasons(job, plan.memory),
        "ipus": [{
            "ipu": ipu, "blocks": names[ipu], "total_bytes": sum(parts.values()),
            "limit_bytes": limit, "fits": sum(parts.values()) <= limit,
            **{f"{name}_bytes": parts[name] for name in parts}, "busy_seconds": busy}
            for (ipu, parts), busy in zip(plan.memory.items(), plan.schedule.busy_seconds)],
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
        "machine": job.machine.name, "precision": job.precision,
        "max_seq_length": job.max_seq_length, "micro_batch_size": job.micro_batch_size,
        "rows_per_update": job.rows_per_update,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "replication_factor": config.replication_factor, "ipus_per_replica": config.num_ipus(),
        "layers_per_ipu": job.layout.layers_per_ipu(config.num_ipus()),
        "efficiencies": dict(vars(plan.efficiencies))}


def fit_text(rows: Sequence[Dict[str, Any]], efficiencies: Efficiencies) -> str:
    """Return the table of published runs and predictions as text.

    rows: what calibrate.fit_table returns for these efficiencies.
    """
    body = []
    for row in rows:
        published, error = row["published_windows_per_second"], "-"
        if row["use"] == "at least":
            error = "bound met" if row["error_percent"] >= 0 else "BOUND MISSED"
        elif published is not None:
            error = f"{row['error_percent']:+.1f} %"
        body.append([
            row["name"], row["use"], "-" if published is None else f"{published:,.0f}",
            f"{row['predicted_windows_per_second']:,.0f}", error, "yes" if row["fits"] else "NO"])
    heading = f"Published runs (efficiencies: {efficiencies.source})"
    notes = (
        "fit: the efficiencies are fitted to it. held out: predicted only. at least: the published "
        "time holds compilation and evaluation too,\n"
        "so that the true throughput is higher. fits: known to run in memory, no throughput "
        "published. Sources: ipu_options/plan/published_runs.json.")
    return "\n".join([
        heading,
        table(["run", "use", "published windows/s", "planned windows/s", "error", "fits"], body),
        notes])


def search_text(plans: Sequence[Plan], tried: int, seconds: float, given: Plan) -> str:
    """Return the best plans of a search as text, each with its reasons.

    tried, seconds: the number of settings searched and the time it took. given: the plan of the
    user's own settings, for comparison.
    """
    now = f"{given.windows_per_second:,.0f} windows/s" + ("" if given.fits else ", does not fit")
    lines = [
        f"{tried} settings, each with its best split, in {seconds:.1f} s. "
        f"As given: {_setting(given)}: {now}."]
    for place, plan in enumerate(plans, 1):
        ratio = plan.windows_per_second / given.windows_per_second
        lines.append(
            f"\n{place}. {_setting(plan)}: {plan.windows_per_second:,.0f} windows/s, "
            f"{ratio:.2f} times as given")
        lines += ["   " + reason for reason in _reasons(plan)]
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


def _heading(plan: Plan, title: str) -> str:
    job, config = plan.job, plan.job.config
    replicas, ipus = config.replication_factor, config.num_ipus()
    packed = f" ({job.windows_per_row:.2f} windows in a row)" if job.windows_per_row > 1 else ""
    return (
        f"Plan: {title}, length {job.max_seq_length}, {job.precision}, "
        f"on {replicas * ipus} {job.machine.name} IPUs "
        f"({replicas} replica{'s' * (replicas > 1)} of {ipus})\n"
        f"micro-batch {job.micro_batch_size} x accumulation {config.gradient_accumulation_steps} "
        f"x replicas {replicas} = {job.rows_per_update} rows a weight update{packed}")


def _blocks(plan: Plan) -> str:
    ipus, blocks = dict(plan.job.layout.blocks()), plan.job.blocks
    rows = [[
        b.name, str(ipus[b.name]), f"{b.parameters:,}", f"{b.forward_flops / 1e9:.2f}",
        f"{b.saved_bytes / MIB:.1f}", f"{b.output_bytes / MIB:.2f}"] for b in blocks]
    rows.append([
        "total", "", f"{sum(b.parameters for b in blocks):,}",
        f"{sum(b.forward_flops for b in blocks) / 1e9:.2f}",
        f"{sum(b.saved_bytes for b in blocks) / MIB:.1f}", ""])
    return "Allocation, for one micro-batch (counted from the model)\n" + table(
        ["block", "IPU", "parameters", "forward GFLOP", "saved MiB", "output MiB"], rows)


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
    verdict = ("Fits." if plan.fits else "Does not fit: " +
               "; ".join(reasons(plan.job, plan.memory)) + ".")
    return (f"Memory of each IPU in MiB, of {limit / MIB:.0f}\n" +
            table([""] + [SHORT.get(name, name) for name in used] + ["total", "free"], rows) +
            "\n" + verdict)


def _stages(plan: Plan) -> str:
    slowest = plan.schedule.step_seconds - plan.copy_seconds
    load = plan.load()
    rows = [[
        f"stage {i}", str(work.ipu), f"{1e3 * work.forward:.2f}", f"{1e3 * work.recompute:.2f}",
        f"{1e3 * work.backward:.2f}", f"{100 * load[work.ipu] / slowest:.0f} %"]
        for i, work in enumerate(plan.work)]
    return (
        "Time of one micro-batch in ms, by pipeline stage\n" +
        table(["", "IPU", "forward", "recompute", "backward", "IPU's load"], rows) +
        f"\nA step takes {1e3 * plan.schedule.step_seconds:.2f} ms, as long as the slowest IPU and "
        f"the copies between IPUs; {plan.schedule.steps} steps an update, "
        f"{100 * plan.bubble_fraction:.1f} % of them ramp-up and ramp-down.")


def _throughput(plan: Plan) -> str:
    job = plan.job
    lines = [f"Predicted: {plan.windows_per_second:,.0f} windows/s"]
    if job.windows_per_row > 1:
        lines[0] += f" real, in {plan.rows_per_second:,.0f} rows/s"
    lines[0] += f"; a weight update every {1e3 * plan.update_seconds:.1f} ms"
    if plan.training_seconds:
        lines.append(
            f"{job.epochs:g} epoch{'s' * (job.epochs != 1)} of {job.train_windows:,} windows: "
            f"{_duration(plan.training_seconds)} (without compilation and evaluation)")
    return "\n".join(lines)


def _where(plan: Plan) -> str:
    parts = sorted(((name, seconds) for name, seconds in plan.parts().items() if seconds > 0),
                   key=lambda part: -part[1])
    rows = [[name, f"{1e3 * seconds:.2f}", f"{100 * seconds / plan.update_seconds:.1f} %"]
            for name, seconds in parts]
    return ("Where the time of an update goes (mean over the IPUs)\n" +
            table(["", "ms", "share"], rows))


def _advice(plan: Plan) -> str:
    better = changes(plan)
    if not better:
        return "What would help most: " + (
            "nothing that is one setting."
            if plan.fits else "no single change makes it fit; try `python -m ipu_options search`.")
    lines = ["What would help most: " + describe(plan, better[0])]
    return "\n".join(
        lines + ["          or, instead: " + describe(plan, change) for change in better[1:4]])


def _provenance(efficiencies: Efficiencies) -> str:
    e = efficiencies
    lines = [
        "Counted from the model: parameters, FLOPs, saved and output bytes. Documented: clock, "
        "peak, memory, links.",
        f"Estimated: code {e.code_bytes / MIB:.0f} MiB, matmul temporaries.",
        (f"Fitted ({e.source}): {100 * e.peak_utilisation:.1f} % of the peak rate at most, "
         f"{e.matmul_cycles:,.0f} cycles around each multiplication, "
         f"{1e3 * e.call_seconds:.0f} ms of host a call.")]
    if e == Efficiencies():
        errors = ", ".join(
            f"{name} {error:+.0f} %" for name, error in PUBLISHED_ERRORS_PERCENT.items())
        lines.append(f"Against published runs: {errors}.")
    return "\n".join(lines)


def _setting(plan: Plan) -> str:
    """Return the settings that the search chose, as flags of train.py."""
    config = plan.job.config
    layers = " ".join(
        str(plan.job.layout.layer_ipus.count(ipu)) for ipu in range(config.num_ipus()))
    text = (
        f"--layers_per_ipu {layers} --replication_factor {config.replication_factor} "
        f"--micro_batch_size {plan.job.micro_batch_size} "
        f"--gradient_accumulation_steps {config.gradient_accumulation_steps}")
    if config.embedding_serialization_factor > 1:
        text += f" --embedding_serialization_factor {config.embedding_serialization_factor}"
    if config.optimizer_state_offchip:
        text += " --optimizer_state_offchip true"
    return text + ("" if config.recompute_checkpoint_every_layer else
                   " --recompute_checkpoint_every_layer false")


def _reasons(plan: Plan) -> List[str]:
    """Return a line about the plan's time and a line about its memory."""
    limit, parts = plan.job.machine.memory_bytes, plan.parts()
    full = max(plan.memory, key=lambda ipu: sum(plan.memory[ipu].values()))
    used = sum(plan.memory[full].values())
    slowest = max(plan.memory,
                  key=lambda ipu: sum(work.seconds for work in plan.work if work.ipu == ipu))
    share = {name: 100 * seconds / plan.update_seconds for name, seconds in parts.items()}
    useful, between = (share["forward"] + share["backward"],
                       share["host"] + share["weight update"] + share["gradient reduction"])
    tight = " (tight, for an estimate)" if used > 0.95 * limit else ""
    return [(
        f"{useful:.0f} % of the time is forward and backward work, "
        f"{share['recompute']:.0f} % recomputation, "
        f"{share['waiting for the slowest IPU']:.0f} % imbalance (IPU {slowest} is slowest), "
        f"{share['pipeline ramp']:.0f} % ramp, {between:.0f} % update and host"),
        f"IPU {full} is fullest: {used / MIB:.0f} of {limit / MIB:.0f} MiB{tight}"]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
