"""Draws the curves of a run from the lines of its log."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

# Keys of the lines of an event, what each is called, and how it is drawn.
_PANELS = (
    ("log", {"loss": ("loss", ".-")}), ("log", {"learning_rate": ("learning rate", "-")}),
    ("log", {"windows_per_second": ("windows/s", ".-")}),
    ("evaluation", {"f1": ("F1 (%)", "o-"), "exact_match": ("exact match (%)", "s--")}))


def draw_curves(lines: List[Dict[str, Any]], path: Path) -> None:
    """Draw loss, learning rate, throughput and evaluations over the steps, to the PNG file `path`.

    lines: of qa.run.log.read_log. A dotted vertical line marks each step after which the run was
    resumed. Nothing is drawn without log points, or where matplotlib is not installed. Raises
    OSError.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not any(line["event"] == "log" for line in lines):
        return
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (event, curves) in zip(figure.subplots(2, 2, sharex=True).flat, _PANELS):
        for key, (name, style) in curves.items():
            points = [(line["step"], line[key]) for line in lines
                      if line["event"] == event and line.get("questions") != "test" and key in line]
            if points:
                axes.plot(*zip(*points), style, label=name)
        if len(curves) > 1 and axes.lines:
            axes.legend()
        for line in lines:
            if line["event"] == "resumed":
                axes.axvline(line["step"], linestyle=":", color="grey")
        axes.set_title(" and ".join(name for name, _ in curves.values()))
        axes.grid(alpha=0.3)
        axes.tick_params(labelbottom=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("step")
    figure.savefig(path, dpi=100)
