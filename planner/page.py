"""Writes plans, runs and profiles as one page with Plotly, to zoom and to hover for numbers.

The page holds plotly.js, so that it opens without a network. Below the views is the same as text,
for screen readers too; patterns tell the parts of a bar apart without colour.
"""
from __future__ import annotations

import html
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Dict, List, Optional, Sequence, Tuple

from planner.comparison import Side
from planner.machine import MIB
from planner.memory import CATEGORIES
from planner.pictures import MEMORY_STYLES, MOST_MICRO_BATCHES, PROFILED, STYLES
from planner.plan import Plan
from runtime.errors import UsageError
from runtime.files import user_file, writing

# Plotly's patterns for matplotlib's hatches in draw.py.
_PATTERNS = {"////": "/", "....": ".", "xxxx": "x", "||||": "|", "\\\\\\\\": "\\", "++++": "+",
             "oo": "-", "": ""}
# Plotly's toolbar without the button that uploads a plot.
PLOT_CONFIG = {"displaylogo": False, "responsive": True, "showSendToCloud": False}
_PART_STYLES = {
    **{kind: STYLES[kind] for kind in ("forward", "recompute", "backward")},
    "waiting for the slowest IPU": ("#ffffff", ""), "pipeline ramp": ("#ffffff", "\\\\\\\\"),
    "copies between IPUs": ("#b8860b", "xxxx"), "gradient reduction": ("#5b9bd5", "||||"),
    "gradient reduction between hosts": ("#cfe8fa", "||||"),
    "weight update": STYLES["update"], "host": ("#bbbbbb", "++++")}
# A row of a chart: its group (an IPU, a stage), its side, and {part: length}.
Row = Tuple[str, str, Dict[str, float]]


def write_page(path: str, title: str, sides: Sequence[Side], text: str,
               plan: Optional[Plan] = None) -> None:
    """Write the page to `path`: the timeline of `plan`, the views of `sides`, and `text` below.

    Raises UsageError as `check_page` does, RunError if the file cannot be written.
    """
    check_page(path)
    from plotly.io import to_html
    figures = [timeline(plan)] if plan else []
    views = "\n".join(
        to_html(figure, full_html=False, include_plotlyjs=not place,
                config=PLOT_CONFIG, validate=False)
        for place, figure in enumerate([*figures, *views_of(sides)]))
    title = html.escape(title)
    names = "".join(f"<li>{html.escape(side.label)}</li>" for side in sides)
    with writing(f"--html {path}"), user_file(path) as file:
        file.write(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{title}</title></head>\n<body style=\"font-family: sans-serif\"><main>"
            f"<h1>{title}</h1><ul>{names}</ul>\n{views}\n<h2>In words and numbers</h2>"
            f'<pre tabindex="0" style="overflow-x: auto">{html.escape(text)}</pre>'
            "</main></body></html>\n")


def check_page(path: str) -> None:
    """Raise UsageError if Plotly is missing or the name `path` of a page does not end in .html."""
    if find_spec("plotly") is None:
        raise UsageError("--html needs plotly, which is not installed: "
                         "pip install -r requirements-pages.txt")
    if not path.lower().endswith((".html", ".htm")):
        raise UsageError(f"--html {path}: name an .html file")


def views_of(sides: Sequence[Side]) -> List[Any]:
    """Return the figures of `sides`: memory, where the time goes, stages, throughput."""
    return [_memory(sides), _parts(sides), _stages(sides), _throughput(sides)]


def timeline(plan: Plan) -> Any:
    """Return the timeline of a weight update or call, shortened to a few micro-batches."""
    shown = min(plan.job.micro_batches, MOST_MICRO_BATCHES)
    schedule, data = replace(plan.schedule, micro_batches=shown), []
    passes = [(event, batch, start) for event in schedule.events()
              for batch, start in enumerate(event.start)]
    for kind in dict.fromkeys(event.kind for event, _, _ in passes):
        of_kind = [each for each in passes if each[0].kind == kind]
        data.append(_bars(
            [f"IPU {event.ipu}" for event, _, _ in of_kind],
            [1e3 * event.seconds for event, _, _ in of_kind], kind, STYLES[kind],
            f"{kind}, stage %{{customdata[0]}}, micro-batch %{{customdata[1]}}<br>"
            "from %{base:.2f} ms, %{x:.2f} ms", base=[1e3 * start for _, _, start in of_kind],
            customdata=[(event.stage, batch) for event, batch, _ in of_kind]))
    update = 1e3 * (plan.reduction_seconds + plan.weight_update_seconds)
    if update:
        ipus = [f"IPU {ipu}" for ipu in plan.memory]
        data.append(_bars(ipus, [update] * len(ipus), "reduction and weight update",
                          STYLES["update"], "update, %{x:.2f} ms",
                          base=[1e3 * schedule.seconds] * len(ipus)))
    less = f", shortened to {shown} of {plan.job.micro_batches} micro-batches" if (
        shown < plan.job.micro_batches) else ""
    return _finished(data, f"Timeline of a {plan.job.phase.round}"
                     f"{less} (white: idle)",
                     f"ms (and {1e3 * plan.host_seconds:.0f} ms of host before the next)",
                     len(plan.memory), barmode="overlay")


def _parts(sides: Sequence[Side]) -> Any:
    """Return where the time of a weight update or call goes."""
    planned = [side for side in sides if side.plan]
    phases = {side.plan["phase"] for side in planned}
    rows = [("", side.name, {name: 1e3 * seconds for name, seconds
                             in side.plan["update_parts_seconds"].items()}) for side in planned]
    return _finished(_stacked(rows, _PART_STYLES, "ms"), "Where the time of a "
                     f"{'call' if phases == {'inference'} else 'weight update'} goes, as planned "
                     "for IPUs (mean over the IPUs)", "ms", len(rows))


def _memory(sides: Sequence[Side]) -> Any:
    """Return the memory of each IPU and side, with a line at what an IPU has."""
    rows: List[Tuple[Tuple[int, int], Row]] = []
    limit = 0.0
    for place, side in enumerate(sides):
        for ipu in side.plan["ipus"] if side.plan else ():
            limit = max(limit, ipu["limit_bytes"] / MIB)
            rows.append(((ipu["ipu"], place), (f"IPU {ipu['ipu']}", side.name, {
                name: ipu[f"{name}_bytes"] / MIB for name in CATEGORIES})))
        for ipu, total in enumerate(side.profile.total_bytes if side.profile else ()):
            code = side.profile.ipu_code_bytes[ipu]
            rows.append(((ipu, place), (f"IPU {ipu}", f"{side.name} profiled", {
                "code": code / MIB, PROFILED: (total - code) / MIB})))
    rows.sort(key=lambda row: row[0])
    data = _stacked([row for _, row in rows], {**MEMORY_STYLES, PROFILED: ("#fafafa", "")}, "MiB")
    line = {"x0": limit, "x1": limit, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 3}}
    text = {"x": limit, "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False,
            "text": f"{limit:.0f} MiB"}
    return _finished(data, "Memory of each IPU, as planned unless it says profiled", "MiB",
                     len(rows), shapes=[line][:bool(limit)], annotations=[text][:bool(limit)])


def _stages(sides: Sequence[Side]) -> Any:
    """Return the time of one micro-batch, by stage and side."""
    rows = sorted(((stage["stage"], place), (f"stage {stage['stage']}", side.name, {
        kind: 1e3 * stage[f"{kind}_seconds"] for kind in ("forward", "recompute", "backward")}))
                  for place, side in enumerate(sides) if side.plan
                  for stage in side.plan["stages"])
    return _finished(_stacked([row for _, row in rows], STYLES, "ms"),
                     "Time of one micro-batch by pipeline stage, as planned for IPUs", "ms",
                     len(rows))


def _throughput(sides: Sequence[Side]) -> Any:
    """Return windows/s, planned with the expected range and measured on IPUs; a host's as text."""
    planned = [side for side in sides if side.plan]
    speeds = [side.plan["windows_per_second"] for side in planned]
    data = [_bars(
        [side.name for side in planned], speeds, "planned for IPUs", STYLES["forward"],
        "%{x:,.0f} windows/s planned, %{customdata:.1f} % bubbles",
        customdata=[100 * side.plan["bubble_fraction"] for side in planned],
        error_x={"type": "data", "symmetric": False,
                 "array": [side.plan["windows_per_second_high"] - speed
                           for side, speed in zip(planned, speeds)],
                 "arrayminus": [speed - side.plan["windows_per_second_low"]
                                for side, speed in zip(planned, speeds)]})]
    on_ipus = [side for side in sides if side.measured_on("IPU") is not None]
    if on_ipus:
        data.append({
            "type": "scatter", "y": [side.name for side in on_ipus],
            "x": [side.measured_on("IPU") for side in on_ipus], "mode": "markers",
            "name": "measured on IPUs", "marker": {"symbol": "diamond", "size": 12,
                                                   "color": "black"},
            "hovertemplate": "%{x:,.0f} windows/s measured on IPUs<extra></extra>"})
    hosts = "; ".join(f"{side.name}: {side.measured_on('host'):,.1f} measured on a host, no IPUs"
                      for side in sides if side.measured_on("host") is not None)
    return _finished(data, "Throughput" + (f" ({hosts})" if hosts else ""),
                     "windows/s (line: the range that the plan expects)", len(sides))


def _stacked(rows: Sequence[Row], styles: Dict[str, Any], unit: str) -> List[Any]:
    """Return stacked bars, one for each row, grouped; a part that no row has is left out."""
    places = [[row[0] for row in rows], [row[1] for row in rows]]
    names = {part: part.replace("_", " ") for part in styles}
    return [_bars(places, [parts.get(part, 0.0) for _, _, parts in rows], names[part], styles[part],
                  f"{names[part]}: %{{x:,.2f}} {unit}")
            for part in styles if any(parts.get(part) for _, _, parts in rows)]


def _bars(places: List[Any], lengths: List[float], name: str, style: Tuple[str, str], hover: str,
          **more: Any) -> Dict[str, Any]:
    """Return horizontal bars as Plotly takes them."""
    color, hatch = style
    pattern = {"shape": _PATTERNS[hatch], "fgcolor": "black", "solidity": 0.2,
               "fillmode": "overlay"}
    return {"type": "bar", "orientation": "h", "y": places, "x": lengths, "name": name,
            "marker": {"color": color, "line": {"color": "black", "width": 1}, "pattern": pattern},
            "hovertemplate": f"{hover}<extra></extra>", **more}


def _finished(data: List[Any], title: str, unit: str, rows: int, barmode: str = "stack",
              **more: Any) -> Dict[str, Any]:
    """Return a figure as Plotly takes it; a figure object would take ten times as long to make."""
    grouped = any(isinstance(place, list) for trace in data for place in trace["y"])
    return {"data": data, "layout": {
        "title": {"text": title}, "barmode": barmode, "showlegend": True,
        "height": max(150 + 34 * rows, 140 + 20 * len(data)), "margin": {"t": 60, "b": 60},
        "xaxis": {"title": {"text": unit}, "gridcolor": "#dddddd"},
        "yaxis": {"autorange": "reversed", "automargin": True,
                  "type": "multicategory" if grouped else "category"},
        "legend": {"traceorder": "normal"}, **more}}
