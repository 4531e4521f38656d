"""This process as its surroundings see it: the lock on its output folder, and the signals that ask
it to stop.
"""
from __future__ import annotations

import fcntl
import os
import signal
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Optional, Union

from ipu_options.errors import UsageError


@contextmanager
def output_lock(output_dir: Union[str, Path]) -> Iterator[None]:
    """Make `output_dir` and hold it as this run's own. Raises UsageError while another live run
    holds it.

    A POSIX record lock (fcntl(2)): unlike that of flock(2) it is not inherited by forked workers,
    so that it ends with this very process. A folder that was made for a run which then wrote
    nothing is removed again.
    """
    path = Path(output_dir) / ".lock"
    try:
        made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="ascii")
    except OSError as error:
        raise UsageError(
            f"--output_dir {output_dir}: cannot be written ({error.strerror}); name a folder that can"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as fcntl(2) leaves open
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UsageError(
                f"--output_dir {output_dir}: {holder} is writing there; wait for it, or name another folder"
            ) from None
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
    """While active, SIGTERM and SIGINT only set `requested`, for the loop to finish its step and
    save. A second one kills.

        with StopSignals() as stop:
            for ...:
                ...
                if stop.requested:
                    save; return stop.exit_status
    """

    def __init__(self) -> None:
        self.requested: Optional[signal.Signals] = None

    @property
    def exit_status(self) -> int:
        """143 after SIGTERM, 130 after SIGINT: what a shell reports for a process that died of the
        signal.
        """
        return 128 + self.requested

    def __enter__(self) -> "StopSignals":
        self._before = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = signal.Signals(number)
        # the system's own action, as a Python handler would wait for the end of a long call to
        # PopTorch
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        os.write(
            2,
            f"\n{self.requested.name}: saving after this step; once more to stop at once\n".encode(
            ))
