"""The lock on a run's output folder, and the signals that ask a run to stop."""
from __future__ import annotations

import fcntl
import os
import signal
import socket
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, Optional, Union

from ipu_options.errors import Stopped, UsageError


@contextmanager
def output_lock(output_dir: Union[str, Path]) -> Iterator[None]:
    """Create `output_dir` if necessary, and hold a lock on it while the block runs.

    It is a POSIX record lock (fcntl(2)). Unlike a lock of flock(2) it is not inherited by forked
    workers, so that it ends with this process. If the folder was created here and nothing else was
    written to it, it is removed again at the end.

    Raises UsageError if another running process holds the lock, or if the folder is not writable.
    """
    path = Path(output_dir) / ".lock"
    try:
        made = not path.parent.exists()
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
            holder = file.read().strip() or "another process"
            raise UsageError(
                f"--output_dir {output_dir}: {holder} is writing there; wait for it, "
                "or name another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            if made and os.listdir(path.parent) == [path.name]:
                path.unlink()
                path.parent.rmdir()


class StopSignals:
    """In its block SIGTERM, SIGINT and SIGHUP end the run in an orderly way; a second one kills.

    Outside of `deferred` blocks a signal raises Stopped at once: nothing has to be saved, and each
    phase cleans up after itself. In a `deferred` block, which is the training loop, it only sets
    `requested`, so that the loop can finish its step, save and end.

        with StopSignals() as stop:
            ...
            with stop.deferred():
                while not stop.requested:
                    ...
    """

    def __init__(self) -> None:
        self.requested: Optional[signal.Signals] = None
        self._deferring = False
        self._pid = os.getpid()

    @property
    def exit_status(self) -> int:
        """143 after SIGTERM, 130 after SIGINT, as a shell reports a process killed by the signal.

        0 as long as no signal has been received.
        """
        return 128 + self.requested if self.requested else 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In this block a signal only sets `requested`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """In this part of a `deferred` block a signal raises Stopped, which ends the part."""
        self._deferring = False
        try:
            if self.requested:
                raise Stopped(self.exit_status)
            yield
        except Stopped:
            pass  # `requested` tells
        finally:
            self._deferring = True

    @contextmanager
    def killable(self) -> Iterator[None]:
        """In this block signals have the system's default action.

        PopTorch compiles for minutes in C++, where no handler in Python can run.
        """
        before = {number: signal.signal(number, signal.SIG_DFL) for number in self._before}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it on purpose
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a forked worker, for which the system's action is right
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested = signal.Signals(number)
        # The next signal has to act at once. It therefore gets the system's default action: a
        # handler in Python would only run after the current call to PopTorch, which may take long.
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        what = "saving after this step" if self._deferring else "stopping"
        with suppress(OSError):  # a terminal that was closed takes no message
            os.write(2, f"\n{self.requested.name}: {what}; once more to stop at once\n".encode())
        if not self._deferring:
            raise Stopped(self.exit_status)
