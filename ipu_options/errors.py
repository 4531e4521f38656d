"""The two ways a script ends badly, and the one place that turns them into an exit status.

2: the command line or an input file is wrong, found before any work starts.  1: a run that started
and failed.
"""
from __future__ import annotations

import sys
from typing import Callable, Optional


class UsageError(ValueError):
    """A flag, a value or an input file is wrong. The message is one line: what is wrong and what
    would be right.
    """


class RunError(RuntimeError):
    """A run failed after it started: a file that cannot be written, a hub that cannot be reached, a
    loss gone wrong.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error that may have a whole page to say, for a message of one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()),
                type(error).__name__)


def run_script(main: Callable[[], Optional[int]]) -> int:
    """Run `main` and return its exit status; `--debug` on the command line lets a traceback
    through.

    UsageError gives 2, everything else that goes wrong 1, each as one line on standard error;
    Ctrl-C before the loop gives 130; what `main` returns is passed on (None is 0).
    """
    try:
        return main() or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # pylint: disable=broad-except
        if "--debug" in sys.argv:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        elif not isinstance(error, (UsageError, RunError)):
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
