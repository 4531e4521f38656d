"""Presents sides as a command's flags ask for it: as text or JSON, as a picture, as a page."""
from __future__ import annotations

import json
from typing import Any, Optional, Sequence

from planner.page import check_page, write_page
from planner.pictures import check_picture, draw
from planner.sides import Side
from planner.text import comparison_text
from runtime.flags import Settings


def check_output(output: Settings) -> None:
    """Raise UsageError if --plot or --html names no file that can be written: before any work."""
    if getattr(output, "plot", None):
        check_picture(output.plot)
    if getattr(output, "html", None):
        check_page(output.html)


def present(sides: Sequence[Side], output: Settings, title: str, record: Any = None,
            text: Optional[str] = None) -> None:
    """Print `sides`, and draw or write what the flags `output` of a command ask for.

    title: of the picture and the page. record: what --json prints. text: what is printed in place
    of the comparison; a page has both. Raises UsageError or RunError for a file that cannot be
    written.
    """
    compared = comparison_text(sides)
    if getattr(output, "json", False):
        print(json.dumps(record, indent=2))
    else:
        print(text or compared)
    if getattr(output, "plot", None):
        draw(sides, output.plot, title)
    if getattr(output, "html", None):
        write_page(output.html, title, sides, f"{text}\n\n{compared}" if text else compared)
