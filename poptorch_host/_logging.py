"""The logger "poptorch::python".

Like PopTorch's, it prints to standard error whether or not a script configures logging.
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
    """Prints to the current sys.stderr, whereas logging's handler keeps the one it started with."""

    def emit(self, record: logging.LogRecord) -> None:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        print(
            f"[{clock}.{record.msecs:03.0f}] [{record.name}] [{record.levelname.lower()}] "
            f"{record.getMessage()}",
            file=sys.stderr)


def setLogLevel(level: Union[str, int]) -> None:
    """Set the level from which messages are logged.

    `level` is TRACE, DEBUG (which includes every transfer between host and device), INFO, WARN,
    ERR or OFF, or PopTorch's number for one of them. The initial level is that of the environment
    variable POPTORCH_LOG_LEVEL, or WARN. Raises ValueError for any other level.
    """
    name = NUMBERS.get(level, level)
    if name not in LEVELS:
        raise ValueError(f"Unknown log level: {level}. Valid values are {', '.join(LEVELS)}")
    logger.setLevel(LEVELS[name])


setLogLevel(os.environ.get("POPTORCH_LOG_LEVEL", "WARN"))
logger.addHandler(_Console())
