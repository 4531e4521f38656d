"""Around the training loop: the output folder's lock, signals that ask to stop, the record of what ran, numbers gone wrong."""
from __future__ import annotations

import fcntl
import importlib.metadata
import math
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Optional, Tuple, Union

from ipu_options.errors import UsageError
from qa.files import write_json

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "poptorch", "transformers", "tokenizers", "datasets", "evaluate", "numpy", "safetensors", "pyarrow")


@contextmanager
def output_lock(output_dir: Union[str, Path]) -> Iterator[None]:
    """Make `output_dir` and hold it as this run's own. Raises UsageError while another live run holds it.

    A POSIX record lock (fcntl(2)): unlike flock(2)'s it is not inherited by forked workers, so it dies with this very process.
    """
    path = Path(output_dir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="ascii")
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir}: cannot be written ({error.strerror}); name a folder that can") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as fcntl(2) leaves open
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UsageError(f"--output_dir {output_dir}: {holder} is writing there; wait for it, or name another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


class StopSignals:
    """While active, SIGTERM and SIGINT only set `requested`, for the loop to finish its step and save. A second one kills.

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
        """143 after SIGTERM, 130 after SIGINT: what a shell reports for a process that died of the signal."""
        return 128 + self.requested

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = signal.Signals(number)
        for each in self._before:  # the system's own action, as a Python handler would wait for the end of a long call to PopTorch
            signal.signal(each, signal.SIG_DFL)
        os.write(2, f"\n{self.requested.name}: saving after this step; once more to stop at once\n".encode())


@contextmanager
def workers_ignore_interrupt() -> Iterator[None]:
    """Processes started in here ignore SIGINT, which a terminal's Ctrl-C sends to the whole group: the loader's worker must
    live on for the step to be finished. (A signal that is ignored stays so over exec, and Python leaves it as it finds it.)"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def write_run_record(output_dir: Union[str, Path], *, settings: Dict[str, Any], **facts: Any) -> None:
    """Write OUTPUT_DIR/run.json: all that is needed to repeat this run.

    settings: the flags and their values; the hub's access token is left out, in the command line too. facts: what else the
    caller knows (ipu_config, data_fingerprint, resumed_from), anything JSON can hold.
    """
    import torch

    command, hide = [], False
    for word in sys.argv:
        command.append("***" if hide else "--hub_token=***" if word.startswith("--hub_token=") else word)
        hide = word == "--hub_token"
    record = {
        "command": " ".join(map(shlex.quote, command)),
        "settings": {**settings, "hub_token": "***" if settings.get("hub_token") else None},
        **facts,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {"host": socket.gethostname(), "platform": platform.platform(), "cpus": os.cpu_count(),
                    "threads": torch.get_num_threads()},
    }
    write_json(Path(output_dir) / "run.json", record)


def git_revision() -> Optional[str]:
    """The project's commit, with "-dirty" where tracked files differ from it; None outside a git clone."""
    root = Path(__file__).resolve().parent.parent
    try:
        revision = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                                  capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return revision.stdout.strip() or None


def _versions() -> Dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def find_nonfinite(tensors: Iterable[Tuple[str, torch.Tensor]]) -> Optional[str]:
    """The name of the first floating-point tensor of (name, tensor) pairs with an infinity or a NaN in it, or None."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return None


def explain_nonfinite(*, step: int, loss: float, earlier_losses: List[float], learning_rate: float, loss_scaling: float,
                      precision: str, bad_tensor: Optional[str] = None) -> str:
    """One line on numbers gone wrong in `step`: whether they overflowed or the run diverged, and what to try.

    The device has updated the weights by the time the host sees the loss: one that is not finite has spoilt them all, and
    its cause is in this step's forward pass or in the step before. What tells overflow from divergence is therefore the finite
    losses before it, in order: a run that diverges shows it there, while an overflow (float16 ends at 65,504) strikes a
    run whose losses were steady.  bad_tensor: the gradient ("Gradient___" and a parameter) or the weight that `find_nonfinite`
    found, which a finite loss needs: then the forward pass was sound, and the gradients or their update were not.
    """
    sound_forward = math.isfinite(loss)
    bad_gradient = sound_forward and bad_tensor.startswith("Gradient___")
    what = f"the loss is {loss}"
    if bad_gradient:
        what = f"the gradient of {bad_tensor[len('Gradient___'):]} is not finite (the loss was {loss:.4g})"
    elif sound_forward:
        what = f"{bad_tensor} is not finite after the update (the loss was {loss:.4g})"
    facts = f"step {step}: {what}, with learning rate {learning_rate:.3g}, loss scaling {loss_scaling:g}, {precision}"
    smaller_rate = f"try --learning_rate {learning_rate / 3:.2g} or a larger --warmup_ratio"
    if _rising(earlier_losses):
        lowest, last = min(earlier_losses), earlier_losses[-1]
        return f"{facts}: the run diverged, its loss had risen from {lowest:.3g} to {last:.3g}; {smaller_rate}"
    if precision != "float16" and not (bad_gradient and loss_scaling > 1):  # scaling may be too much for any precision
        return f"{facts}: one update was too large, the losses before it were steady; {smaller_rate}, and look at this step's data"
    overflow = f"{facts}: {precision} overflowed, the losses before it were steady; try "
    if loss_scaling <= 1:
        return overflow + "--precision float32"
    overflow += f"--loss_scaling {max(1.0, loss_scaling / 8):g}"
    if not sound_forward:
        overflow += ", or --precision float32 if the same step stops again: then the forward pass overflowed, not the gradients"
    return overflow


def _rising(losses: List[float]) -> bool:
    """Whether the last eighth of `losses` has a mean half as high again as the lowest mean of as many in a row."""
    width = max(1, len(losses) // 8)
    means = [sum(losses[i:i + width]) / width for i in range(len(losses) - width + 1)]
    return bool(means) and means[-1] > 1.5 * min(means)
