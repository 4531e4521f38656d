"""The signals that ask a run to stop, what worker processes make of them, and the folder's lock."""
from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ContextManager, Dict, Iterable, Iterator, Optional, Union

from runtime import processes
from runtime.errors import Stopped, UsageError


class StopSignals:
    """In its block SIGTERM, SIGINT and SIGHUP end the run in an orderly way; a second one kills.

    A signal raises Stopped at once, for each phase cleans up after itself. In the training loop, a
    `deferred` block, it waits for the next `poll`: all processes stop after the same step and save.
    """

    def __init__(self) -> None:
        self.requested: Optional[signal.Signals] = None
        self._received: Optional[signal.Signals] = None
        self._received_at = 0.0
        self._deferring = self._with_others = self._is_immediate = False
        self._pid = os.getpid()

    @property
    def exit_status(self) -> int:
        """128 + the signal's number; 0 without a signal."""
        number = self.requested or self._received
        return 128 + number if number else 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferring, self._with_others = True, processes.count() > 1
        try:
            yield
        finally:
            self._deferring = self._with_others = False
        if self._received and not self.requested:  # after the last `poll`
            raise Stopped(self.exit_status)

    def poll(self) -> Optional[signal.Signals]:
        """Collective: set `requested` to the signal that a process has received, and return it."""
        number = max(processes.share(int(self._received or 0)))
        self.requested = signal.Signals(number) if number else None
        return self.requested

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """In this part of a `deferred` block a signal raises Stopped, which ends the part.

        With several processes the signal waits for `raise_stopped`, where all leave it.
        """
        self._is_immediate, self._deferring = True, self._with_others
        try:
            yield
        except Stopped:
            pass
        finally:
            self._is_immediate, self._deferring = False, True
        self.poll()

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it on purpose
            numbers.append(signal.SIGHUP)
        self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
        global _current
        _current = self
        return self

    def __exit__(self, *exception: Any) -> None:
        global _current
        _current = None
        _restore(self._handlers)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a forked worker, for which the system's action is right
            _kill_self(number)
        elif self._with_others and self._received:
            # torchrun forwards what a terminal has sent to its processes already.
            if time.monotonic() > self._received_at + 3:
                _kill_self(number)
        else:
            self._received, self._received_at = signal.Signals(number), time.monotonic()
            if not self._with_others:
                # The next signal has to act at once, so it gets the system's default action: a
                # handler in Python would run only after the current call to PopTorch.
                _restore(dict.fromkeys(self._handlers, signal.SIG_DFL))
            if processes.is_first():
                what = "saving after this step" if self._deferring else "stopping"
                with suppress(OSError):  # a terminal that was closed takes no message
                    os.write(2, f"\n{self._received.name}: {what}; once more to stop at once\n"
                             .encode())
            if not self._deferring:
                raise Stopped(self.exit_status)


_current: Optional[StopSignals] = None  # the one in whose block the run is


def killable() -> ContextManager[None]:
    """In this block the signals of StopSignals have the system's default action."""
    return _acting(_current._handlers if _current else (), signal.SIG_DFL)


def raise_stopped() -> None:
    """Collective: raise Stopped in an `immediate` block if a process has received a signal."""
    if _current and _current._is_immediate and _current.poll():
        raise Stopped(_current.exit_status)


def _kill_self(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def _acting(numbers: Iterable[int], action: Any) -> Iterator[None]:
    handlers = {number: signal.signal(number, action) for number in numbers}
    try:
        yield
    finally:
        _restore(handlers)


def _restore(handlers: Dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- worker processes ----


def workers_ignore_signals() -> ContextManager[None]:
    """Have the processes that are started in this block ignore SIGINT, SIGTERM and SIGHUP.

    Terminals and launchers send them to all, but the loader's worker has to finish the step.
    """
    return _acting((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)


@contextmanager
def forked_workers() -> Iterator[None]:
    """Have the processes that are forked in this block end with this one, however that ends.

    They ignore a terminal's SIGINT, and end at their pool's SIGTERM or with their parent.
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
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG (sys/prctl.h)


_forking = False
os.register_at_fork(after_in_child=_after_fork)


# ---- the lock ----


@contextmanager
def output_lock(output_dir: Union[str, Path]) -> Iterator[None]:
    """Collective: create `output_dir` if necessary, and hold a lock on it. Raises UsageError."""
    with ExitStack() as stack:
        holder = processes.on_first(lambda: stack.enter_context(_lock(output_dir)))
        lock = Path(output_dir) / ".lock"
        # The holder would lose its lock by closing another descriptor of the file (fcntl(2)).
        sees = processes.is_first() or lock.exists() and lock.read_text() == holder
        views = processes.share(sees)
        if not all(views):
            raise UsageError(
                f"--output_dir {output_dir}: process {views.index(False)} does not see the first "
                "process's folder there: name one that all hosts share")
        yield


@contextmanager
def _lock(output_dir: Union[str, Path]) -> Iterator[str]:
    """Hold the lock, a POSIX record lock (fcntl(2)): forked workers do not inherit it.

    Gives the text of its file, which names this process. A folder that was created here and got no
    other file is removed at the end. Raises UsageError if another running process holds the lock.
    """
    path = Path(output_dir) / ".lock"
    try:
        is_new = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="ascii")
    except OSError as error:
        raise UsageError(
            f"--output_dir {output_dir}: cannot be written ({error.strerror}); "
            "name a folder that can") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # fcntl(2) allows both EAGAIN and EACCES
            file.seek(0)
            raise UsageError(
                f"--output_dir {output_dir}: {file.read().strip() or 'another process'} is writing "
                "there; wait for it, or name another folder") from None
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        file.truncate(0)
        file.write(holder)
        file.flush()
        try:
            yield holder
        finally:
            with suppress(OSError):  # somebody may have moved the folder away
                if is_new and os.listdir(path.parent) == [path.name]:
                    path.unlink()
                    path.parent.rmdir()
