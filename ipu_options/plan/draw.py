"""Draws a plan: timeline, memory against the limit, and split. Also writes a Chrome trace of it."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, List

from ipu_options.errors import UsageError
from ipu_options.files import writing
from ipu_options.plan.machine import MIB
from ipu_options.plan.memory import CATEGORIES
from ipu_options.plan.planner import Plan
from ipu_options.popvision import trace_event, write_trace

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
MOST_MICRO_BATCHES = 16  # in the drawn timeline; more would be too thin to see


def draw_plan(plan: Plan, path: str, title: str) -> None:
    """Draw timeline, memory and split to the file `path` (.png, .svg or .pdf), under `title`.

    Raises UsageError if matplotlib is missing or the file name has another ending, RunError if the
    file cannot be written.
    """
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
    axes.set_title(f"Timeline of a {'weight update' if training else 'call'}{shortened} "
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
