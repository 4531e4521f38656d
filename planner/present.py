"""Presents sides as a command's flags ask for it: as text or JSON, as a picture, as a page."""
from __future__ import annotations

import json
from typing import Any, Optional, Sequence

from planner.page import write_page
from planner.pictures import draw
from planner.sides import Side
from planner.text import Ranking, comparison_text, legend, table, verdict
from runtime.flags import Settings


def present(sides: Sequence[Side], output: Settings, title: str, record: Any = None,
            text: Optional[str] = None, ranking: Optional[Ranking] = None,
            notes: Sequence[str] = ()) -> None:
    """Print `sides`, and draw or write what the flags `output` of a command ask for.

    record: what --json prints. text, ranking, notes: what is printed in place of the comparison.
    Raises RunError for a file that cannot be written.
    """
    printed = "\n".join([text, "", table(*ranking), *notes]) if ranking else comparison_text(sides)
    print(json.dumps(record, indent=2) if getattr(output, "json", False) else printed)
    if getattr(output, "legend", False):
        print("\n" + legend(sides))
    if getattr(output, "plot", None):
        draw(sides, output.plot, title)
    if getattr(output, "html", None):
        lines = text.splitlines() if text else verdict(sides)
        write_page(output.html, title, sides, lines, f"{printed}\n\n{legend(sides)}", ranking)
