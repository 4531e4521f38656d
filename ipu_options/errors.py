"""The two kinds of errors that end a script, and the function that turns them into an exit status.

Exit status 2 (UsageError): the command line or an input file is wrong; found before work starts.
Exit status 1 (RunError and any other exception): the run started and failed.
"""
from __future__ import annotations

import sys
from typing import Callable, Optional


class UsageError(ValueError):
    """A flag, a value or an input file is wrong.

    The message is one line that says what is wrong and what would be right.
    """


class RunError(RuntimeError):
    """A run failed after it started.

    Examples: a file cannot be written, the hub cannot be reached, the loss is not finite.
    """


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of the error's message, or else the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()),
                type(error).__name__)


def run_script(main: Callable[[], Optional[int]]) -> int:
    """Run `main` and return the exit status of the script.

    It is what `main` returns (None counts as 0), 2 for a UsageError, 1 for any other exception, and
    130 for a Ctrl-C that `main` does not handle. An error is printed as one line on standard error;
    with `--debug` on the command line the exception is raised instead, for its traceback.
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
