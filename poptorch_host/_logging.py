"""The logger "poptorch::python".

Like PopTorch's, it prints to standard error whether or not a script configures logging. The
environment variable POPTORCH_LOG_LEVEL sets its level; DEBUG shows every transfer between host and
device.
"""
from __future__ import annotations

import logging
import os
import sys
import time

LEVELS = {
    "TRACE": logging.DEBUG, "DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARN": logging.WARNING,
    "ERR": logging.ERROR, "OFF": logging.CRITICAL}


class _Console(logging.Handler):
    """Prints to the current sys.stderr, whereas logging's handler keeps the one it started with."""

    def emit(self, record: logging.LogRecord) -> None:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        print(
            f"[{clock}.{record.msecs:03.0f}] [{record.name}] [{record.levelname.lower()}] "
            f"{record.getMessage()}",
            file=sys.stderr)


logger = logging.getLogger("poptorch::python")
logger.addHandler(_Console())
_level = os.environ.get("POPTORCH_LOG_LEVEL", "WARN")
if _level not in LEVELS:
    raise ValueError(f"POPTORCH_LOG_LEVEL must be one of {', '.join(LEVELS)}, not {_level!r}")
logger.setLevel(LEVELS[_level])
