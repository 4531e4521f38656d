"""The kinds of errors that end a script, and the function that turns them into an exit status.

Exit status 2 (UsageError): the command line or an input file is wrong; found before work starts.
Exit status 1 (RunError and any other exception): the run started and failed.
Exit status 128 + N (Stopped): signal N ended the run.
"""
from __future__ import annotations

import gc
import io
import os
import re
import sys
import traceback
from contextlib import suppress
from typing import Any, Callable, Optional, Union


class UsageError(ValueError):
    """A flag, a value or an input file is wrong; the message says what would be right."""


class RunError(RuntimeError):
    """A run failed after it started: a full disk, a hub that does not answer, a loss of nan."""


class Stopped(SystemExit):
    """A signal has stopped the run. `code` is 128 + the signal's number, as a shell reports it."""


def one_line(error: BaseException) -> str:
    """Return an error's text, with its type and no more than a line if it is not one of ours."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    kind, lines = type(error).__name__, list(filter(None, map(str.strip, str(error).splitlines())))
    if not lines:
        return kind
    return " ".join(lines) if isinstance(error, (UsageError, RunError)) else f"{kind}: {lines[0]}"


def counted(number: Union[int, str], noun: str) -> str:
    """Return a number of things for a message, as "1 window" or "2 windows"."""
    return f"{number} {noun}{'s' * (str(number) != '1')}"


def run_script(main: Callable[[], Optional[int]]) -> int:
    """Run `main`, print its error as one line, and return the exit status of the script.

    It is what `main` returns (None counts as 0), 2 for a UsageError, 1 for any other exception, 130
    for a Ctrl-C that `main` does not handle, and 141 if the reader of the output has gone away.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed, as by >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what its encoding lacks
    # Looking through the imports' million objects for garbage takes 0.6 of 4.5 s (measured).
    gc.set_threshold(500_000)
    try:
        if sys.flags.optimize > 1:
            raise UsageError("python -OO removes docstrings, which transformers reads: run python, "
                             "or python -O")
        status = main() or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with suppress(OSError):  # what is still buffered would fail again when Python exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports for a process that SIGPIPE has killed
    except Exception as error:  # pylint: disable=broad-except
        stopped = _stopped(error)
        if stopped:
            return stopped.code
        if _debug():
            traceback.print_exc()
        explained = isinstance(error, (UsageError, RunError, OSError))
        print(f"error: {one_line(error)}{'' if explained else ' (--debug shows where)'}",
              file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


class LastingOutput:
    """A text stream that drops what is written to it once its reader has gone away."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except BrokenPipeError:
            # What is buffered goes nowhere, too: the descriptor itself is replaced.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def keep_running_without_reader() -> None:
    """From now on `train.py | head` does not end a training."""
    sys.stdout, sys.stderr = LastingOutput(sys.stdout), LastingOutput(sys.stderr)


def _stopped(error: Optional[BaseException]) -> Optional[Stopped]:
    # `datasets` has its worker processes finish in a `finally`, and raises another error there.
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def _debug() -> bool:
    # The command line may not have been parsed yet.
    words = " ".join(sys.argv).lower()
    return bool(re.search(r" --debug(=(true|yes|1)\b| (?!(false|no|0)\b)|$)", words))
