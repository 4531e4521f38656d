"""Writes views as one page with Plotly, which opens without a network (page.html)."""
from __future__ import annotations

import html
import textwrap
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any, Dict, List, Optional, Sequence, Tuple

from planner.sides import Side
from planner.views import PLANNED, STYLES, WORDS, View, views_of
from runtime.files import user_file, writing

# Plotly's toolbar without the button that uploads a plot.
PLOT_CONFIG = {"displaylogo": False, "responsive": True, "showSendToCloud": False,
               "modeBarButtonsToRemove": ["pan2d", "select2d", "lasso2d", "autoScale2d"]}
CURVES = {"loss": "Loss", "f1": "F1 in %", "windows_per_second": "windows/s"}
DASHES = ("solid", "dash", "dot", "dashdot")
LEGEND_NAMES = {**WORDS["short"], PLANNED: PLANNED}  # two of them fit beside each other on a phone


def write_page(path: str, title: str, sides: Sequence[Side], lines: Sequence[str], text: str,
               ranking: Optional[Tuple[List[str], List[List[str]]]] = None) -> None:
    """Write the page to `path`: the verdict's `lines`, ranking, curves, views, and `text` below."""
    from plotly.io import to_html
    figures = {**curves(sides), **{view.name: figure(view) for view in views_of(_named(sides))
                                   if view.parts() or any(row.measured for row in view.rows)}}
    views = [to_html(drawn, full_html=False, include_plotlyjs=not place, config=PLOT_CONFIG,
                     validate=False, div_id=name)
             for place, (name, drawn) in enumerate(figures.items())]
    head, rows = ranking or ([], [])
    cells = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
             for row in rows]
    buttons = "".join(f"<th><button>{html.escape(cell)}</button></th>" for cell in head)
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    with writing(f"--html {path}"), user_file(path) as file:
        file.write(page.substitute(
            title=html.escape(title), text=html.escape(text), views="\n".join(views),
            verdict="\n".join(
                f'<p class="{"no" * ("oes not fit" in line)} {"" if place else "headline"}">'
                f'{html.escape(line)}</p>' for place, line in enumerate(lines)),
            ranking=ranking and f'<div class="scroll"><table><thead><tr>{buttons}</tr></thead>'
                                f'<tbody>{"".join(cells)}</tbody></table></div>' or "",
            names="".join(f"<li>{html.escape(side.label)}</li>" for side in sides if side.name)))


def _named(sides: Sequence[Side]) -> List[Side]:
    """Return the sides with the split in their names, and the micro-batch where it differs."""
    plans = [side.plan or {} for side in sides]
    batches = [plan.get("micro_batch_size") for plan in plans]
    names = [" ".join(map(str, plan.get("layers_per_ipu", ()))) + (
        f"<br>micro-batch {batch}" if batch and len(set(batches)) > 1 else "")
        for plan, batch in zip(plans, batches)]
    return [replace(side, name=f"{side.name}: {name}" if side.name and name else side.name)
            for side, name in zip(sides, names)]


def curves(sides: Sequence[Side]) -> Dict[str, Dict[str, Any]]:
    """Return {key of log.jsonl: figure}: each with the curves of all runs, by step."""
    from qa.run.log import LOG, points, read_log
    logs = {side.label: read_log(Path(side.item, LOG)) for side in sides if side.kind == "run"}
    figures = {}
    for key, title in CURVES.items():
        runs = {label: points(log, key) for label, log in logs.items()}
        data = [{"type": "scatter", "mode": "lines+markers", "name": label, "x": x, "y": y,
                 "marker": {"symbol": place}, "line": {"dash": DASHES[place % len(DASHES)]}}
                for place, (label, pairs) in enumerate(runs.items()) if pairs
                for x, y in [list(zip(*pairs))]]
        figures.update({key: {"data": data, "layout": {
            "title": {"text": title, "x": 0, "font": {"size": 15}}, "height": 320,
            "showlegend": True, "legend": {"orientation": "h", "y": -0.3},
            "margin": {"t": 50, "l": 60, "r": 45}, "modebar": {"orientation": "v"},
            "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"}}}} if data else {})
    return figures


def figure(view: View) -> Dict[str, Any]:
    """Return a view as Plotly takes it; a figure object would take ten times as long to make."""
    two = any(row.group for row in view.rows) and any(row.label for row in view.rows)
    places: List[Any] = [(row.group, row.label) if two else row.group or row.label or " "
                         for row in view.rows]
    data = [_bars(view, part, places) for part in view.parts()]
    measured = {place: row.measured for place, row in zip(places, view.rows) if row.measured}
    if measured:
        data.append({
            "type": "scatter", "mode": "markers", "name": "measured on IPUs",
            "y": _levels(list(measured)), "x": list(measured.values()),
            "marker": {"symbol": "diamond", "size": 12, "color": "black"},
            "hovertemplate": "%{x:,.0f} windows/s measured on IPUs<extra></extra>"})
    ends = [row.end for row in view.rows]
    remarks = [f" {row.remark}" for row in view.rows]
    data += [{"type": "scatter", "mode": "text", "textposition": "middle right", "name": "totals",
              "x": ends, "y": _levels(places), "cliponaxis": False, "showlegend": False,
              "hoverinfo": "skip", "text": remarks}] * any(row.remark for row in view.rows)
    most = max([*ends, view.limit or 0.0]) * (1 + 0.03 * min(20, max(map(len, remarks), default=1)))
    line = {"x0": view.limit, "x1": view.limit, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"width": 3}}
    height = 30 * len(view.rows) + 40
    below = 75 + 10 * len(data)  # the axis, and a legend of two columns
    return {"data": data, "layout": {
        "title": {"text": "<br>".join(textwrap.wrap(view.title, 44)), "x": 0, "font": {"size": 15}},
        "barmode": "overlay", "showlegend": True, "height": height + 70 + below,
        "margin": {"t": 70, "b": below, "l": 10, "r": 45}, "modebar": {"orientation": "v"},
        "xaxis": {"title": {"text": view.unit}, "gridcolor": "#dddddd", "range": [0, most],
                  "showticklabels": bool(view.unit)},
        "yaxis": {"autorange": "reversed", "automargin": True,
                  "type": "multicategory" if two else "category"},
        "shapes": [line] * bool(view.limit),
        "legend": {"orientation": "h", "traceorder": "normal", "y": -65 / height, "yanchor": "top",
                   "font": {"size": 11}}}}


def _levels(places: Sequence[Any]) -> List[Any]:
    # Plotly takes places of two levels as a list of each.
    return [list(level) for level in zip(*places)] if isinstance(
        next(iter(places), ""), tuple) else list(places)


def _bars(view: View, part: str, places: Sequence[Any]) -> Dict[str, Any]:
    pieces = [(place, row, piece) for place, row in zip(places, view.rows)
              for piece in row.segments if piece.part == part]
    color, hatch = STYLES[part]
    name = LEGEND_NAMES.get(part, part)
    bars = {
        "type": "bar", "orientation": "h", "name": name,
        "y": _levels([place for place, _, _ in pieces]),
        "x": [piece.length for _, _, piece in pieces],
        "base": [piece.start for _, _, piece in pieces],
        "customdata": [piece.hint or row.remark for _, row, piece in pieces],
        "marker": {"color": color, "line": {"color": "black", "width": 0.5}, "pattern": {
            # Plotly's pattern for matplotlib's hatch
            "shape": {"oo": "-"}.get(hatch, hatch[:1]), "fgcolor": "black", "solidity": 0.2,
            "fillmode": "overlay"}},
        "hovertemplate": f"{name}: %{{x:,.2f}} {view.unit.partition(' (')[0]}<br>%{{customdata}}"
                         "<extra></extra>"}
    if view.hints:
        bars.update(text=bars["customdata"], textposition="inside", insidetextanchor="middle",
                    textangle=0)
    if any(row.expected for _, row, _ in pieces):
        bars["error_x"] = {
            "type": "data", "symmetric": False,
            "array": [row.expected[1] - piece.length for _, row, piece in pieces],
            "arrayminus": [piece.length - row.expected[0] for _, row, piece in pieces]}
    return bars
