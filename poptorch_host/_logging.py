"""The logger "poptorch::python", which prints to standard error whether a script sets up logging or
not, as PopTorch does.
"""
from __future__ import annotations

import logging
import os
import sys
import time
from typing import Union

logger = logging.getLogger("poptorch::python")
LEVELS = {
    "TRACE": logging.DEBUG, "DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARN": logging.WARNING,
    "ERR": logging.ERROR, "OFF": logging.CRITICAL}
NUMBERS = {0: "TRACE", 1: "DEBUG", 2: "INFO", 3: "WARN", 4: "ERR", 6: "OFF"}


class _Console(logging.Handler):
    """Prints to what sys.stderr is now; logging's own handler keeps the stream it was made with."""

    def emit(self, record: logging.LogRecord) -> None:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        print(
            f"[{clock}.{record.msecs:03.0f}] [{record.name}] [{record.levelname.lower()}] {record.getMessage()}",
            file=sys.stderr)


def setLogLevel(level: Union[str, int]) -> None:
    """What is logged: TRACE, DEBUG (every transfer between host and device), INFO, WARN, ERR or
    OFF, or PopTorch's number for it; at the start POPTORCH_LOG_LEVEL or WARN. ValueError for
    anything else.
    """
    name = NUMBERS.get(level, level)
    if name not in LEVELS:
        raise ValueError(f"Unknown log level: {level}. Valid values are {', '.join(LEVELS)}")
    logger.setLevel(LEVELS[name])


setLogLevel(os.environ.get("POPTORCH_LOG_LEVEL", "WARN"))
logger.addHandler(_Console())
