"""Presents sides as a command's flags ask for it: as text or JSON, as a picture, as a page."""
from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any, Optional, Sequence

from planner.page import write_page
from planner.pictures import draw
from planner.sides import Side
from planner.text import Ranking, comparison_text, legend, table, verdict
from runtime.errors import UsageError
from runtime.flags import Settings


def check_output(output: Settings) -> None:
    """Raise UsageError if --plot or --html names no file that can be written: before any work."""
    plot, page = getattr(output, "plot", None), getattr(output, "html", None)
    if plot and not plot.lower().endswith((".png", ".svg", ".pdf")):
        raise UsageError(f"--plot {plot}: name a .png, .svg or .pdf file")
    if page and find_spec("plotly") is None:
        raise UsageError("--html needs plotly, which is not installed: "
                         "pip install -r requirements-pages.txt")
    if page and not page.lower().endswith((".html", ".htm")):
        raise UsageError(f"--html {page}: name an .html file")


def present(sides: Sequence[Side], output: Settings, title: str, record: Any = None,
            text: Optional[str] = None, ranking: Optional[Ranking] = None,
            notes: Sequence[str] = ()) -> None:
    """Print `sides`, and draw or write what the flags `output` of a command ask for.

    record: what --json prints. text, ranking, notes: what is printed in place of the comparison.
    Raises RunError for a file that cannot be written.
    """
    printed = "\n".join([text, "", table(*ranking), *notes]) if ranking else comparison_text(sides)
    if getattr(output, "json", False):
        print(json.dumps(record, indent=2))
    else:
        print(printed)
    if getattr(output, "legend", False):
        print("\n" + legend(sides))
    if getattr(output, "plot", None):
        draw(sides, output.plot, title)
    if getattr(output, "html", None):
        lines = text.splitlines() if text else verdict(sides)
        write_page(output.html, title, sides, lines, f"{printed}\n\n{legend(sides)}", ranking)
