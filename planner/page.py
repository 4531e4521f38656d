"""Writes views as one page with Plotly, to zoom and to hover for numbers.

The page holds plotly.js and opens without a network. Below the views is the same as text, for
screen readers too; patterns tell the parts of a bar apart without colour.
"""
from __future__ import annotations

import html
from importlib.util import find_spec
from typing import Any, Dict, List, Sequence

from planner.sides import Side
from planner.views import STYLES, View, views_of
from runtime.errors import UsageError
from runtime.files import user_file, writing

# Plotly's patterns for matplotlib's hatches.
_PATTERNS = {"////": "/", "....": ".", "xxxx": "x", "||||": "|", "\\\\\\\\": "\\", "++++": "+",
             "oo": "-", "": ""}
# Plotly's toolbar without the button that uploads a plot.
PLOT_CONFIG = {"displaylogo": False, "responsive": True, "showSendToCloud": False}


def check_page(path: str) -> None:
    """Raise UsageError if Plotly is missing or the name `path` of a page does not end in .html."""
    if find_spec("plotly") is None:
        raise UsageError("--html needs plotly, which is not installed: "
                         "pip install -r requirements-pages.txt")
    if not path.lower().endswith((".html", ".htm")):
        raise UsageError(f"--html {path}: name an .html file")


def write_page(path: str, title: str, sides: Sequence[Side], text: str) -> None:
    """Write the page to `path`: the views of `sides`, and `text` below.

    Raises UsageError as `check_page` does, RunError if the file cannot be written.
    """
    check_page(path)
    from plotly.io import to_html
    views = "\n".join(
        to_html(figure(view), full_html=False, include_plotlyjs=not place, config=PLOT_CONFIG,
                validate=False, div_id=view.name) for place, view in enumerate(views_of(sides)))
    title = html.escape(title)
    names = "".join(f"<li>{html.escape(side.label)}</li>" for side in sides)
    with writing(f"--html {path}"), user_file(path) as file:
        file.write(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{title}</title></head>\n<body style=\"font-family: sans-serif\"><main>"
            f"<h1>{title}</h1><ul>{names}</ul>\n{views}\n<h2>In words and numbers</h2>"
            f'<pre tabindex="0" style="overflow-x: auto">{html.escape(text)}</pre>'
            "</main></body></html>\n")


def figure(view: View) -> Dict[str, Any]:
    """Return a view as Plotly takes it; a figure object would take ten times as long to make."""
    two = any(row.group for row in view.rows) and any(row.label for row in view.rows)
    places: List[Any] = [(row.group, row.label) if two else row.group or row.label or " "
                         for row in view.rows]
    data = [_bars(view, part, places) for part in view.parts()]
    data += [{"type": "scatter", "mode": "markers", "name": "measured on IPUs",
              "y": [place for place, row in zip(places, view.rows) if row.measured is not None],
              "x": [row.measured for row in view.rows if row.measured is not None],
              "marker": {"symbol": "diamond", "size": 12, "color": "black"},
              "hovertemplate": "%{x:,.0f} windows/s measured on IPUs<extra></extra>"}
             ] * any(row.measured is not None for row in view.rows)
    line = {"x0": view.limit, "x1": view.limit, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"width": 3}}
    return {"data": data, "layout": {
        "title": {"text": view.title}, "barmode": "overlay", "showlegend": True,
        "height": 190 + 30 * len(view.rows), "margin": {"t": 60, "b": 60},
        "xaxis": {"title": {"text": view.unit}, "gridcolor": "#dddddd"},
        "yaxis": {"autorange": "reversed", "automargin": True,
                  "type": "multicategory" if two else "category"},
        "shapes": [line] * bool(view.limit), "legend": {"traceorder": "normal"}}}


def _bars(view: View, part: str, places: Sequence[Any]) -> Dict[str, Any]:
    """Return the bars of one part of a view."""
    pieces = [(place, row, piece) for place, row in zip(places, view.rows)
              for piece in row.segments if piece.part == part]
    y: Any = [place for place, _, _ in pieces]
    color, hatch = STYLES[part]
    name = part.replace("_", " ")
    bars = {
        "type": "bar", "orientation": "h", "name": name,
        "y": [list(level) for level in zip(*y)] if isinstance(y[0], tuple) else y,
        "x": [piece.length for _, _, piece in pieces],
        "base": [piece.start for _, _, piece in pieces],
        "customdata": [piece.hint or row.remark for _, row, piece in pieces],
        "marker": {"color": color, "line": {"color": "black", "width": 0.5}, "pattern": {
            "shape": _PATTERNS[hatch], "fgcolor": "black", "solidity": 0.2,
            "fillmode": "overlay"}},
        "hovertemplate": f"{name}: %{{x:,.2f}} {view.unit.partition(' (')[0]}<br>%{{customdata}}"
                         "<extra></extra>"}
    if view.hints:
        bars.update(text=bars["customdata"], textposition="inside")
    if any(row.expected for _, row, _ in pieces):
        bars["error_x"] = {
            "type": "data", "symmetric": False,
            "array": [row.expected[1] - piece.length for _, row, piece in pieces],
            "arrayminus": [piece.length - row.expected[0] for _, row, piece in pieces]}
    return bars
