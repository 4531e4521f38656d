"""Draws a plan: timeline, memory against the limit, and split. Also writes a Chrome trace of it.

And draws several plans, runs and profiles side by side.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, List, Sequence

from ipu_options.popvision import trace_event, write_trace
from planner.comparison import Side
from planner.machine import MIB
from planner.memory import CATEGORIES
from planner.plan import Plan
from runtime.errors import UsageError
from runtime.files import writing

# Colour and hatching. Lightness falls from forward to update and each hatching is different, so
# that the picture can be read in black and white.
STYLES = {
    "forward": ("#cfe8fa", ""), "recompute": ("#f3cf7a", "////"), "backward": ("#d9735b", "...."),
    "update": ("#333333", "")}
MEMORY_STYLES = {
    "weights": ("#1f4e79", ""), "gradients": ("#5b9bd5", "////"),
    "optimizer_state": ("#bdd7ee", "...."), "stash": ("#b8860b", "xxxx"), "code": ("#7f7f7f", ""),
    "activations": ("#f3cf7a", "||||"), "matmul_temporaries": ("#ffffff", "\\\\\\\\"),
    "embedding_gradient": ("#d9735b", "++++"), "update_temporaries": ("#eeeeee", "oo")}
PROFILED = "profiled, other than code"
MOST_MICRO_BATCHES = 16  # in the drawn timeline; more would be too thin to see


def draw_plan(plan: Plan, path: str, title: str) -> None:
    """Draw timeline, memory and split to the file `path` (.png, .svg or .pdf), under `title`.

    Raises UsageError if matplotlib is missing or the file name has another ending, RunError if the
    file cannot be written.
    """
    pyplot = _pyplot(path)
    ipus = len(plan.memory)
    heights = {"height_ratios": [1.3 * ipus + 1.5, ipus + 1.5, ipus + 1]}
    size = (12, 5.5 + 1.1 * ipus)
    figure, (timeline, memory, split) = pyplot.subplots(3, 1, figsize=size, gridspec_kw=heights,
                                                        layout="constrained")
    figure.suptitle(
        f"{title}: {plan.windows_per_second:,.0f} windows/s on {plan.job.machine.name}, " +
        ("fits" if plan.fits else "DOES NOT FIT"))
    _timeline(timeline, plan)
    _memory(memory, plan)
    _split(split, plan)
    _save(figure, path)


def draw_comparison(sides: Sequence[Side], path: str) -> None:
    """Draw memory, time by stage and windows/s of several `sides` to the file `path`.

    Raises what `draw_plan` raises.
    """
    pyplot = _pyplot(path)
    ipus = 1 + max([ipu for side in sides for ipu in _most_ipus(side)], default=0)
    stages = max([len(side.plan["stages"]) for side in sides if side.plan], default=1)
    bars = [2 + len(sides) * count * 0.45 for count in (ipus, stages, 1)]
    figure, (memory, time, speed) = pyplot.subplots(
        3, 1, figsize=(12, 1 + sum(bars)), gridspec_kw={"height_ratios": bars},
        layout="constrained")
    figure.suptitle("\n".join(side.label for side in sides), fontsize=10)
    _compared_memory(memory, sides)
    _compared_stages(time, sides)
    _compared_speed(speed, sides)
    _save(figure, path)


def _pyplot(path: str) -> Any:
    """Return matplotlib.pyplot. Raises UsageError if it is missing or `path` is no picture's."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib "
            "(it is in requirements-dev.txt)")
    if not path.lower().endswith((".png", ".svg", ".pdf")):
        raise UsageError(f"--plot {path}: name a .png, .svg or .pdf file")
    return pyplot


def _save(figure: Any, path: str) -> None:
    """Write the picture and forget it. Raises RunError if the file cannot be written."""
    from matplotlib import pyplot
    try:
        with writing(f"--plot {path}"):
            figure.savefig(path, dpi=130)
    finally:
        pyplot.close(figure)


def write_timeline(plan: Plan, path: str) -> None:
    """Write the planned timeline of one weight update or call to `path`, as a Chrome trace.

    Each IPU is one lane; ui.perfetto.dev opens the file. Raises RunError if it cannot be written.
    """
    events = [
        trace_event(f"{e.kind} {i}", 1e6 * start, 1e6 * e.seconds, e.ipu, stage=e.stage,
                    micro_batch=i)
        for e in plan.schedule.events() for i, start in enumerate(e.start)]
    end = 1e6 * plan.schedule.seconds
    for ipu in plan.memory if plan.job.training else ():
        events.append(trace_event("gradient reduction", end, 1e6 * plan.reduction_seconds, ipu))
        events.append(
            trace_event("weight update", end + 1e6 * plan.reduction_seconds,
                        1e6 * plan.weight_update_seconds, ipu))
    write_trace(path, events, process="plan",
                lanes=[f"IPU {ipu}" for ipu in range(max(plan.memory) + 1)])


def _timeline(axes: Any, plan: Plan) -> None:
    training, batches = plan.job.training, plan.job.micro_batches
    drawn = min(batches, MOST_MICRO_BATCHES)
    schedule = replace(plan.schedule, micro_batches=drawn)
    ipus = sorted(plan.memory)
    end = 1e3 * schedule.seconds
    update = 1e3 * (plan.reduction_seconds + plan.weight_update_seconds)
    for ipu in ipus:  # a white bar for the whole time; where nothing is drawn over it, it is idle
        axes.broken_barh([(0, end)], (ipu - 0.4, 0.8), facecolor="white", edgecolor="0.6",
                         linestyle=":", linewidth=0.8)
        axes.broken_barh([(end, update)], (ipu - 0.4, 0.8), **_bar(STYLES["update"]))
    for e in schedule.events():
        axes.broken_barh([(1e3 * t, 1e3 * e.seconds) for t in e.start], (e.ipu - 0.4, 0.8),
                         **_bar(STYLES[e.kind]))
    for step in range(schedule.steps + 1):
        axes.axvline(1e3 * step * schedule.step_seconds, color="0.75", linewidth=0.4, zorder=0)
    shortened = f", shortened to {drawn} of {batches} micro-batches" if drawn < batches else ""
    axes.set_title(f"Timeline of a {plan.job.phase.round}{shortened} "
                   "(white: idle; lines: steps)", loc="left")
    axes.set(xlabel=f"ms (and {1e3 * plan.host_seconds:.0f} ms of host before the next)",
             xlim=(0, end + update), yticks=ipus, yticklabels=[f"IPU {ipu}" for ipu in ipus],
             ylim=(ipus[-1] + 0.6, -0.6))
    _legend(axes, STYLES if training else {"forward": STYLES["forward"]})


def _memory(axes: Any, plan: Plan) -> None:
    limit = plan.job.machine.memory_bytes / MIB
    left = dict.fromkeys(plan.memory, 0.0)
    used = [name for name in CATEGORIES if any(parts[name] for parts in plan.memory.values())]
    for name in used:
        sizes = [parts[name] / MIB for parts in plan.memory.values()]
        axes.barh(list(plan.memory), sizes, left=list(left.values()), height=0.7,
                  **_bar(MEMORY_STYLES[name]))
        left = {ipu: at + size for (ipu, at), size in zip(left.items(), sizes)}
    axes.axvline(limit, color="black", linewidth=2)
    axes.text(limit, -0.85, f"{limit:.0f} MiB", va="bottom", ha="center", fontsize=9)
    for ipu, total in left.items():
        over = f", over by {total - limit:.0f}" if total > limit else ""
        axes.text(total, ipu, f" {total:.0f}{over}", va="center", fontsize=9)
    ipus = sorted(plan.memory)
    axes.set(xlabel="MiB", xlim=(0, max(1.12 * limit, 1.2 * max(left.values()))),
             ylim=(ipus[-1] + 0.6, -0.8), yticks=ipus, yticklabels=[f"IPU {i}" for i in ipus])
    axes.set_title("Memory of each IPU", loc="left")
    _legend(axes, {name: MEMORY_STYLES[name] for name in used})


def _split(axes: Any, plan: Plan) -> None:
    """Draw each block as a box on its IPU, and each IPU's work relative to the slowest one's."""
    names: Dict[int, List[str]] = {}
    for block, ipu in plan.job.layout.blocks():
        names.setdefault(ipu, []).append(block.replace("Encoder ", ""))
    widest = max(len(blocks) for blocks in names.values())
    load = plan.schedule.load
    for ipu, blocks in names.items():
        for place, block in enumerate(blocks):
            shade = "#eeeeee" if block.isdigit() else "#bbbbbb"
            axes.broken_barh([(place, 0.96)], (ipu - 0.35, 0.7), facecolor=shade, edgecolor="black",
                             linewidth=0.8)
            axes.text(place + 0.48, ipu, block, ha="center", va="center", fontsize=8)
        axes.text(widest + 0.1, ipu, f"{100 * load[ipu] / max(load.values()):.0f} % of the slowest",
                  va="center", fontsize=9)
    ipus = sorted(names)
    axes.set(xlim=(0, 1.25 * widest + 0.5), xticks=[], yticks=ipus,
             yticklabels=[f"IPU {i}" for i in ipus], ylim=(ipus[-1] + 0.6, -0.6))
    axes.set_title("Split (numbers: encoder layers) and the work of a micro-batch", loc="left")


def _most_ipus(side: Side) -> List[int]:
    """Return the IPUs of a side, of its plan and its profile."""
    return [*side.totals(), *range(len(side.profile.total_bytes) if side.profile else 0)]


def _compared_memory(axes: Any, sides: Sequence[Side]) -> None:
    """Draw a bar for each IPU and side, and one for what a profile found."""
    limit, used, rows = 0.0, set(), []
    for place, side in enumerate(sides):
        for ipu in side.plan["ipus"] if side.plan else ():
            limit = max(limit, ipu["limit_bytes"] / MIB)
            sizes = {name: ipu[f"{name}_bytes"] / MIB for name in CATEGORIES
                     if ipu[f"{name}_bytes"]}
            rows.append(((ipu["ipu"], place, 0), side.name, sizes))
        for ipu, total in enumerate(side.profile.total_bytes if side.profile else ()):
            code = side.profile.ipu_code_bytes[ipu] / MIB
            rows.append(((ipu, place, 1), f"{side.name} profiled",
                         {"code": code, PROFILED: total / MIB - code}))
    labels, most = [], limit
    for at, (key, name, sizes) in enumerate(sorted(rows, key=lambda row: row[0])):
        left = 0.0
        for part, size in sizes.items():
            axes.barh(at, size, left=left, height=0.8, **_bar(MEMORY_STYLES.get(
                part, ("#fafafa", ""))))
            left += size
        over = f", over by {left - limit:.0f}" if limit and left > limit else ""
        axes.text(left, at, f" {left:.0f}{over}", va="center", fontsize=9)
        labels.append(f"IPU {key[0]}  {name}")
        used, most = used | set(sizes), max(most, left)
    if limit:
        axes.axvline(limit, color="black", linewidth=2)
    axes.set(xlabel=f"MiB (line: {limit:.0f}, what an IPU has)", xlim=(0, 1.15 * most or 1),
             yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.6))
    axes.set_title("Memory of each IPU, as planned unless it says profiled", loc="left")
    styles = {**MEMORY_STYLES, PROFILED: ("#fafafa", "")}
    _legend(axes, {name: styles[name] for name in styles if name in used})


def _compared_stages(axes: Any, sides: Sequence[Side]) -> None:
    """Draw a bar of forward, recomputation and backward for each stage and side."""
    rows = sorted(((stage["stage"], place, side.name, stage) for place, side in enumerate(sides)
                   if side.plan for stage in side.plan["stages"]), key=lambda row: row[:2])
    kinds = [kind for kind in ("forward", "recompute", "backward")
             if any(row[3][f"{kind}_seconds"] for row in rows)]
    for at, (*_, stage) in enumerate(rows):
        left = 0.0
        for kind in kinds:
            length = 1e3 * stage[f"{kind}_seconds"]
            axes.barh(at, length, left=left, height=0.8, **_bar(STYLES[kind]))
            left += length
        axes.text(left, at, f" {left:.2f}", va="center", fontsize=9)
    axes.set(xlabel="ms", yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6),
             yticklabels=[f"stage {stage}  {name}" for stage, _, name, _ in rows])
    axes.margins(x=0.1)
    axes.set_title("Time of one micro-batch by pipeline stage, as planned for IPUs", loc="left")
    _legend(axes, {kind: STYLES[kind] for kind in kinds})


def _compared_speed(axes: Any, sides: Sequence[Side]) -> None:
    """Draw windows/s with the expected range, and what was measured on IPUs.

    What a host measured is of another kind, so that it is not drawn to the same scale but written.
    """
    for at, side in enumerate(sides):
        notes, right = [], 0.0
        if side.plan:
            speed, low, high = (side.plan[f"windows_per_second{end}"]
                                for end in ("", "_low", "_high"))
            axes.barh(at, speed, height=0.6, xerr=[[speed - low], [high - speed]], capsize=4,
                      **_bar(STYLES["forward"]))
            notes += [f"{speed:,.0f} planned",
                      f"{100 * side.plan['bubble_fraction']:.1f} % bubbles"]
            notes += [] if side.plan["fits"] else ["DOES NOT FIT"]
            right = high
        if side.measured_on("IPU") is not None:
            axes.plot(side.measured_on("IPU"), at, "D", color="black", markersize=8)
            notes.append(f"{side.measured_on('IPU'):,.0f} measured on IPUs (diamond)")
            right = max(right, side.measured_on("IPU"))
        if side.measured_on("host") is not None:
            notes.append(f"{side.measured_on('host'):,.1f} measured on a host without IPUs")
        axes.text(right, at, "  " + "; ".join(notes), va="center", fontsize=9)
    axes.set(xlabel="windows/s (line: the range that the plan expects)", yticks=range(len(sides)),
             yticklabels=[side.name for side in sides], ylim=(len(sides) - 0.4, -0.6))
    axes.set_xlim(0, 1.9 * (axes.dataLim.x1 if axes.dataLim.x1 > 0 else 1))
    axes.set_title("Throughput", loc="left")


def _bar(style) -> Dict[str, Any]:
    color, hatch = style
    return {"facecolor": color, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}


def _legend(axes: Any, styles: Dict[str, Any]) -> None:
    from matplotlib.patches import Patch
    axes.legend(
        handles=[
            Patch(label=name.replace("_", " "), **_bar(style)) for name, style in styles.items()],
        loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, handlelength=2.2, handleheight=1.4,
        frameon=False)
