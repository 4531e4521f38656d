"""Draws views with matplotlib, and writes the timeline of a plan as a Chrome trace."""
from __future__ import annotations

from typing import Any, Dict, Sequence

from ipu_options.popvision import trace_event, write_trace
from planner.bound import UPDATE
from planner.sides import Side
from planner.views import STYLES, View, schedule_of, views_of
from runtime.files import writing

# Of one plan, and of several sides.
DRAWN = (("timeline", "memory", "split"), ("throughput", "memory", "stages"))


def draw(sides: Sequence[Side], path: str, title: str) -> None:
    """Draw views of `sides` below each other to the file `path`."""
    from matplotlib.figure import Figure

    views = views_of(sides, DRAWN[len(sides) > 1])
    heights = [1.6 + 0.45 * len(view.rows) for view in views]
    figure = Figure(figsize=(12, 0.5 + 0.2 * len(sides) + sum(heights)), layout="constrained")
    axes = figure.subplots(len(views), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    figure.suptitle(title, fontsize=10)
    for view, place in zip(views, axes[:, 0]):
        _draw_view(place, view)
    with writing(f"--plot {path}"):
        figure.savefig(path, dpi=130)


def _draw_view(axes: Any, view: View) -> None:
    from matplotlib.patches import Patch

    for at, row in enumerate(view.rows):
        for part in STYLES:
            pieces = [piece for piece in row.segments if piece.part == part and piece.length]
            if pieces:
                axes.broken_barh([(piece.start, piece.length) for piece in pieces],
                                 (at - 0.4, 0.8), **_style(part))
            for piece in pieces if view.hints else ():
                axes.text(piece.start + piece.length / 2, at, piece.hint, ha="center", va="center",
                          fontsize=8)
        for piece in row.segments if row.expected else ():
            low, high = row.expected
            axes.errorbar(piece.length, at, capsize=4, color="black",
                          xerr=[[piece.length - low], [high - piece.length]])
        if row.measured is not None:
            axes.plot(row.measured, at, "D", color="black", markersize=8)
        axes.text(row.end, at, f"  {row.remark}", va="center", fontsize=9)
    if view.limit:
        axes.axvline(view.limit, color="black", linewidth=2)
    longest = max((len(row.remark) for row in view.rows), default=0)
    end = max([view.limit or 0.0, *(row.end for row in view.rows)])
    axes.set(xlabel=view.unit, xlim=(0, end * (1.02 + 0.011 * longest) or 1),
             yticks=range(len(view.rows)), ylim=(len(view.rows) - 0.4, -0.6),
             yticklabels=[f"{row.group}  {row.label}".strip() for row in view.rows])
    axes.tick_params(labelbottom=bool(view.unit), bottom=bool(view.unit))
    axes.set_title(view.title, loc="left")
    axes.legend(handles=[Patch(label=part.replace("_", " "), **_style(part))
                         for part in view.parts()], loc="upper center", fontsize=8, frameon=False,
                bbox_to_anchor=(0.5, -0.12 - 0.5 / max(2, len(view.rows))), ncols=5,
                handlelength=2.2, handleheight=1.4)


def _style(part: str) -> Dict[str, Any]:
    color, hatch = STYLES[part]
    return {"facecolor": color, "hatch": hatch, "edgecolor": "black", "linewidth": 0.5}


def write_timeline(plan: Dict[str, Any], path: str) -> None:
    """Write the timeline of a weight update or call to `path` as a Chrome trace, a lane an IPU."""
    schedule = schedule_of(plan)
    events = [
        trace_event(f"{event.kind} {batch}", 1e6 * start, 1e6 * event.seconds, event.ipu,
                    stage=event.stage, micro_batch=batch)
        for event in schedule.events() for batch, start in enumerate(event.start)]
    ipus, at = [ipu["ipu"] for ipu in plan["ipus"]], schedule.seconds
    for name in UPDATE:
        seconds = plan["update_parts_seconds"][name]
        events += [trace_event(name, 1e6 * at, 1e6 * seconds, ipu) for ipu in ipus if seconds]
        at += seconds
    write_trace(path, events, process="plan",
                lanes=[f"IPU {ipu}" for ipu in range(max(ipus) + 1)])
