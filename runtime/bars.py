"""A progress bar in a terminal, and now and then a line where the output is a file or a pipe."""
from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


def in_terminal() -> bool:
    """Return whether standard error, where progress is shown, is a terminal."""
    return bool(sys.stderr and sys.stderr.isatty())


def progress_bar(total: int, desc: str, unit: str, initial: int = 0) -> Any:
    """Return an object with tqdm's methods update, set_postfix_str and close, to use in a `with`.

    total: the number of units at the end. initial: how many of them are done already.
    """
    if in_terminal():
        return tqdm(total=total, initial=initial, desc=desc, unit=unit, dynamic_ncols=True)
    return Lines(total, desc, unit, initial)


class Lines:
    """Prints a line on standard error where a terminal would show a bar; short work prints none.

    seconds: the time between two lines.
    """

    def __init__(self, total: int, desc: str, unit: str, initial: int = 0,
                 seconds: float = SECONDS_BETWEEN_LINES):
        self._total, self._desc, self._unit, self._done = total, desc, unit, initial
        self._seconds, self._postfix, self._printed = seconds, "", time.monotonic()

    def update(self, count: int = 1) -> None:
        """Record that `count` more units are done."""
        self._done += count
        if time.monotonic() - self._printed >= self._seconds:
            self._printed = time.monotonic()
            line = f"{self._desc}: {self._unit} {self._done}/{self._total}  {self._postfix}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def set_postfix_str(self, text: str) -> None:
        """Set what stands at the end of the next line."""
        self._postfix = text

    def close(self) -> None:
        """Nothing is left to do, for each line was complete."""

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
