"""Worker processes and signals: workers end with their parent, and neither before nor after it."""
from __future__ import annotations

import ctypes
import os
import signal
from contextlib import contextmanager, suppress
from typing import Iterator

_PR_SET_PDEATHSIG = 1


@contextmanager
def workers_ignore_signals() -> Iterator[None]:
    """Have the processes that are started in this block ignore SIGINT, SIGTERM and SIGHUP.

    A terminal sends SIGINT and SIGHUP to the whole process group, and launchers send SIGTERM to it;
    but the loader's worker has to live on so that the current step can be finished. A signal that
    is ignored remains so when another program is executed, and Python leaves it as it finds it.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def forked_workers() -> Iterator[None]:
    """Have the processes that are forked in this block end with this one, however that ends.

    They ignore SIGINT, which a terminal sends to them too, end at SIGTERM, by which their pool ends
    them, and are killed by the kernel when their parent has ended (prctl(2)): without that a worker
    whose parent was killed would wait for work for ever.
    """
    global _forking
    _forking = True
    try:
        yield
    finally:
        _forking = False


def _after_fork() -> None:
    if _forking:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_forking = False
os.register_at_fork(after_in_child=_after_fork)
