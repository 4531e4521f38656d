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
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch

from ipu_options.errors import UsageError
from qa.files import write_json

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


def write_run_record(output_dir: Union[str, Path], **facts: Any) -> None:
    """Write OUTPUT_DIR/run.json: all that is needed to repeat this run.

    `facts` are the caller's (settings, ipu_config, data_fingerprint, resumed_from ...), anything JSON can hold; command line,
    versions, git revision, machine and time are added. Access tokens are left out.
    """
    command, hide = [], False
    for word in sys.argv:
        command.append("***" if hide else "--hub_token=***" if word.startswith("--hub_token=") else word)
        hide = word == "--hub_token"
    if isinstance(facts.get("settings"), dict) and facts["settings"].get("hub_token"):
        facts["settings"] = {**facts["settings"], "hub_token": "***"}
    record = {
        "command": " ".join(map(shlex.quote, command)),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {"host": socket.gethostname(), "platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        **facts,
    }
    write_json(Path(output_dir) / "run.json", record)


def git_revision() -> Optional[str]:
    """The project's commit, with "-dirty" where tracked files differ from it; None outside a git clone."""
    root = Path(__file__).resolve().parent.parent
    try:
        revision = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True, timeout=10
        )
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
    """The name of the first floating-point tensor with an infinity or a NaN in it, or None."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def explain_nonfinite(
    *, step: int, loss: float, earlier_losses: List[float], learning_rate: float, loss_scaling: float, precision: str, bad_weight: Optional[str]
) -> str:
    """One line on a non-finite loss: what gave way (overflow of the scaled gradients, of the forward pass, or divergence) and what to try.

    The device returns the loss alone, after the update is done. So the evidence is: the weights read back now (`bad_weight`, from
    `find_nonfinite`), and the finite losses before (`earlier_losses`, of the latest steps in order). A run that diverges shows it in
    its losses; gradients that overflow under loss scaling (float16 ends at 65,504) strike a run whose losses were calm.
    """
    facts = f"step {step}: the loss is {loss} (learning rate {learning_rate:.3g}, loss scaling {loss_scaling:g}, {precision})"
    if _rising(earlier_losses):
        return (
            f"{facts}: the run diverged, its loss rose from {min(earlier_losses):.3g} to {earlier_losses[-1]:.3g} before; "
            f"try --learning_rate {learning_rate / 3:.2g}, or a larger --warmup_ratio"
        )
    if bad_weight is None:
        remedy = "try --precision float32" if precision == "float16" else "look at the batch of this step, and try a smaller --learning_rate"
        return f"{facts}: the weights are finite, so the forward pass of this step overflowed; {remedy}"
    if precision == "float16" and loss_scaling > 1:
        return (
            f"{facts}: {bad_weight} is not finite after steady losses, so gradients overflowed under loss scaling in the step before; "
            f"try --loss_scaling {max(1, loss_scaling / 8):g}"
        )
    return f"{facts}: {bad_weight} is not finite, the update of the step before was too large; try --learning_rate {learning_rate / 3:.2g}"


def _rising(losses: List[float]) -> bool:
    """Whether the last eighth of `losses` lies well above the lowest run of that length: half as much again."""
    width = max(1, len(losses) // 8)
    means = [math.fsum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]
    return len(losses) >= 3 and means[-1] > 1.5 * min(means)
