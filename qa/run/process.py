"""The lock on a run's output folder, and the signals that ask a run to stop."""
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
    """In its block, SIGTERM and SIGINT only set `requested`, so that the loop can save and end.

    A second signal kills the process at once.

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
        """143 after SIGTERM, 130 after SIGINT, as a shell reports a process killed by the signal.

        Only defined after a signal has been received.
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
        # The next signal has to act at once. It therefore gets the system's default action: a
        # handler in Python would only run after the current call to PopTorch, which may take long.
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, f"\n{self.requested.name}: saving after this step; once more to stop at once\n"
                 .encode())
