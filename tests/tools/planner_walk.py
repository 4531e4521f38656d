"""python -m tests.tools.planner_walk: writes into docs/planner.md what its commands print.

Each block there begins with a line `$ python -m planner COMMAND`, which may end with `| head -N`.
What follows in the block is what the command prints, so no figure in it is typed by hand.
"""
from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
from pathlib import Path
from unittest import mock

from planner.commands import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planner.md"
BLOCK = re.compile(r"(?ms)^```\n(\$ python -m planner (.*?))\n((?!\s).*?)^```$")


def output(words: str) -> str:
    """Return what a planner's command prints, in a folder and with a home of its own."""
    command, _, lines = words.replace("\\\n", " ").partition("| head -")
    before, text = os.getcwd(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {
            "XDG_CONFIG_HOME": folder, "NUM_AVAILABLE_IPU": "4"}):
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                main(shlex.split(command))
        finally:
            os.chdir(before)
    text = text.getvalue().replace(folder, "~/.config").splitlines(keepends=True)
    return "".join(text[:int(lines)] if lines else text)


def written(page: str, only=lambda words: True) -> str:
    """Return the page with the output of its commands. only(words): whether to run a command."""
    return BLOCK.sub(lambda block: block[0] if not only(block[2]) else (
        f"```\n{block[1]}\n{output(block[2])}```"), page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
