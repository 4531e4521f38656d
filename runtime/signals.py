"""The lock on a run's output folder, and the signals that ask a run to stop."""
from __future__ import annotations

import fcntl
import os
import signal
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, Optional, Union

from runtime import processes
from runtime.errors import Stopped, UsageError


@contextmanager
def output_lock(output_dir: Union[str, Path]) -> Iterator[None]:
    """Create `output_dir` if necessary, and hold a lock on it while the block runs.

    Collective: the first process holds the lock, for all. Raises UsageError as `_lock` does, and if
    another process does not see the same folder.
    """
    with ExitStack() as held:
        holder = processes.on_first(lambda: held.enter_context(_lock(output_dir)))
        lock = Path(output_dir) / ".lock"
        # The holder would lose its lock by closing another descriptor of the file (fcntl(2)).
        seen = processes.is_first() or lock.exists() and lock.read_text() == holder
        blind = [index for index, sees in enumerate(processes.share(seen)) if not sees]
        if blind:
            raise UsageError(
                f"--output_dir {output_dir}: process {blind[0]} does not see the first process's "
                "folder there: name one that all hosts share")
        yield


@contextmanager
def _lock(output_dir: Union[str, Path]) -> Iterator[str]:
    """Create `output_dir` if necessary, and hold a lock on it while the block runs.

    Gives the text of the lock file, which names this process.

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
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        file.truncate(0)
        file.write(holder)
        file.flush()
        try:
            yield holder
        finally:
            with suppress(OSError):  # somebody may have moved the folder away
                if made and os.listdir(path.parent) == [path.name]:
                    path.unlink()
                    path.parent.rmdir()


class StopSignals:
    """In its block SIGTERM, SIGINT and SIGHUP end the run in an orderly way; a second one kills.

    Outside of `deferred` blocks a signal raises Stopped at once: nothing has to be saved, and each
    phase cleans up after itself. In a `deferred` block, which is the training loop, it counts from
    the next `poll` on, which tells all processes, so that they end after the same step and save.

        with StopSignals() as stop:
            ...
            with stop.deferred():
                while not stop.requested:
                    ...
                    stop.poll()
    """

    def __init__(self) -> None:
        self.requested: Optional[signal.Signals] = None
        self._received: Optional[signal.Signals] = None
        self._received_at = 0.0
        self._deferring = self._together = False
        self._pid = os.getpid()

    @property
    def exit_status(self) -> int:
        """143 after SIGTERM, 130 after SIGINT, as a shell reports a process killed by the signal.

        0 as long as no signal has been received.
        """
        number = self.requested or self._received
        return 128 + number if number else 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In this block a signal waits for `poll`."""
        self._deferring, self._together = True, processes.count() > 1
        try:
            yield
        finally:
            self._deferring = self._together = False
        if self._received and not self.requested:  # after the last `poll`
            raise Stopped(self.exit_status)

    def poll(self) -> Optional[signal.Signals]:
        """Collective: set `requested` to the signal that a process has received, and return it."""
        number = processes.any_true(self._received or 0)
        self.requested = signal.Signals(number) if number else None
        return self.requested

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """In this part of a `deferred` block a signal raises Stopped, which ends the part.

        `requested` tells that it was so. With several processes all have to leave the part at the
        same place, which is a call of processes.raise_stopped in it.
        """
        processes.watch_signal(lambda: self._received or 0)
        self._deferring = self._together
        try:
            yield
        except Stopped:
            pass
        finally:
            processes.watch_signal(None)
            self._deferring = True
        self.poll()

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
        if self._together and self._received is None:
            self._received, self._received_at = signal.Signals(number), time.monotonic()
            self._tell("saving after this step")
            return
        if self._together:
            # torchrun forwards what a terminal has sent to its processes already.
            if time.monotonic() > self._received_at + 3:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._received = signal.Signals(number)
        # The next signal has to act at once. It therefore gets the system's default action: a
        # handler in Python would only run after the current call to PopTorch, which may take long.
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        self._tell("saving after this step" if self._deferring else "stopping")
        if not self._deferring:
            raise Stopped(self.exit_status)

    def _tell(self, what: str) -> None:
        if processes.is_first():
            name = self._received.name
            with suppress(OSError):  # a terminal that was closed takes no message
                os.write(2, f"\n{name}: {what}; once more to stop at once\n".encode())
