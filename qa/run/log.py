"""What a run leaves about itself in its output folder: run.json, log.jsonl and training.png.

Each line of log.jsonl is an object with the keys `event`, `step` and `time` (ISO 8601, UTC). The
events and their further keys:

    started, resumed    device ("IPU" or "host"); from, the checkpoint
    log                 epoch, loss (mean over the windows since the last one), learning_rate,
                        windows_per_second, rows_per_second, and the shares of the time in which the
                        host waited for data, for the device, and did the rest (evaluating, saving):
                        data_share, step_share, rest_share
    evaluation          epoch, questions ("validation" or "test"), seconds, and the metrics of
                        metrics.json, in percent; without training, step 0 and no epoch
    saved               path
    nonfinite           why
    stopped             signal
    trained             the figures of train_results.json

A resumed run continues its log, without the lines of the steps that it repeats. One on synthetic
data has synthetic_log.jsonl. TensorBoard and wandb get the same numbers.
"""
from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
from tqdm import tqdm

from ipu_options import device
from ipu_options.config import IPUConfig
from qa.data.rows import TrainingRows
from qa.settings import TrainSettings
from runtime import processes
from runtime.files import write_json, written_whole

if TYPE_CHECKING:
    from qa.run.state import Checkpoint

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "poptorch", "transformers", "tokenizers", "datasets", "evaluate", "numpy",
             "safetensors", "pyarrow")
LOG, SYNTHETIC_LOG, CURVES = "log.jsonl", "synthetic_log.jsonl", "training.png"
# The groups of Trainer's names; an evaluation on test questions is called "test" there as well.
_GROUPS = {"validation": "eval", "test": "test"}
_NO_METRICS = ("event", "step", "epoch", "time", "questions")
# The panels of training.png: {key of a line: (its name, how it is drawn)}.
_PANELS = (
    {"loss": ("loss", ".-")}, {"learning_rate": ("learning rate", ".-")},
    {"windows_per_second": ("windows/s", ".-")},
    {"f1": ("F1 (%)", "o-"), "exact_match": ("exact match (%)", "s--")})


class RunLog:
    """Writes the log of a run in its first process, and passes its numbers on to --report_to."""

    def __init__(self, settings: TrainSettings):
        self.settings, self._folder = settings, Path(settings.output_dir)
        self._path = self._folder / (SYNTHETIC_LOG if settings.synthetic_data else LOG)
        self._reporters: List[Any] = []
        self._begun = False

    def begin(self, ipu_config: IPUConfig, rows: TrainingRows,
              resumed: Optional["Checkpoint"] = None) -> None:
        """Write run.json, and begin the log or continue the one of the run that saved `resumed`."""
        if not processes.is_first() or self.settings.compile_only:
            return
        if not self.settings.dry_run:
            write_json(self._folder / "run.json",
                       _run_record(self.settings, ipu_config, rows, resumed))
        kept = before_resume(read_log(resumed.folder.parent / LOG), resumed.step) if resumed else []
        self._open(kept, resumed.step + 1 if resumed else 0)
        if resumed:
            self.add("resumed", resumed.step, device=device, **{"from": str(resumed.folder)})
        else:
            self.add("started", 0, device=device)

    def add(self, event: str, step: int, epoch: Optional[float] = None, **values: Any) -> None:
        """Write one line. values: see the top of this file; those that are None are left out."""
        if not processes.is_first():
            return
        if not self._begun:  # a run that only evaluates adds to the log of its folder
            self._open(read_log(self._path), None)
        line = {"event": event, "step": step, "epoch": epoch, **values, "time": _now()}
        line = {key: value for key, value in line.items() if value is not None}
        with _warned(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if event in ("log", "evaluation"):
            group = _GROUPS.get(values.get("questions"), "train")
            numbers = {f"{group}/{key}": value for key, value in line.items()
                       if key not in _NO_METRICS}
            if epoch is not None:
                numbers["train/epoch"] = epoch
            for reporter in self._reporters:
                reporter.add(numbers, step)

    def _open(self, lines: List[Dict[str, Any]], first_step: Optional[int]) -> None:
        """Start the file with `lines`. TensorBoard discards its events from `first_step` on."""
        self._begun = True
        with _warned(self._path), written_whole(self._path) as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        if not self.settings.synthetic_data:
            self._reporters = [_REPORTERS[name](self.settings, first_step)
                               for name in self.settings.report_to if name in _REPORTERS]

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        for reporter in self._reporters:
            reporter.close()
        if kind is None and self._begun and not self.settings.synthetic_data:
            with _warned(self._folder / CURVES):
                _draw_curves(read_log(self._path), self._folder / CURVES)


@contextmanager
def _warned(path: Path) -> Iterator[None]:
    """A log that cannot be written is no reason to lose a run."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"warning: {path}: cannot write it ({error.strerror or error}); the run goes on")


def read_log(path: Union[str, Path]) -> List[Dict[str, Any]]:
    """Return the complete lines of a log.jsonl; [] without the file."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and "event" in value and isinstance(value.get("step"), int):
                lines.append(value)
    return lines


def points(lines: List[Dict[str, Any]], key: str) -> List[Tuple[int, float]]:
    """Return (step, value) of a key in the training's log points and validations."""
    return [(line["step"], line[key]) for line in lines if key in line and "epoch" in line
            and line["event"] in ("log", "evaluation") and line.get("questions") != "test"]


def before_resume(lines: List[Dict[str, Any]], step: int) -> List[Dict[str, Any]]:
    """Return the lines that stay in the log if the run continues after `step`."""
    # A resumed run repeats its end: summary and evaluation.
    before_end = itertools.takewhile(lambda line: line["event"] != "trained", lines)
    return [line for line in before_end if line["step"] <= step]


def _run_record(settings: TrainSettings, ipu_config: IPUConfig, rows: TrainingRows,
                resumed: Optional["Checkpoint"]) -> Dict[str, Any]:
    command, token = shlex.join(sys.argv), settings.hub_token
    return {
        "command": command.replace(token, "***") if token else command,
        "settings": {**settings.values(), "hub_token": "***" if token else None},
        "ipu_config": ipu_config.values(), "data_fingerprint": rows.windows.fingerprint,
        "resumed_from": str(resumed.folder) if resumed else None, "time": _now(),
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {"host": socket.gethostname(), "platform": platform.platform(),
                    "device": device, "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
                    "processes": processes.count(), "launcher": processes.place().launcher},
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _git_revision() -> Optional[str]:
    try:
        revision = subprocess.run(
            ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40",
             "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return revision.stdout.strip() or None


def _versions() -> Dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _draw_curves(lines: List[Dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    if not any(line["event"] == "log" for line in lines):
        return
    figure = Figure(figsize=(9, 6), layout="constrained")
    resumed = [line["step"] for line in lines if line["event"] == "resumed"]
    for axes, curves in zip(figure.subplots(2, 2, sharex=True).flat, _PANELS):
        for key, (name, style) in curves.items():
            curve = points(lines, key)
            if curve:
                axes.plot(*zip(*curve), style, label=name)
        if len(curves) > 1 and axes.lines:
            axes.legend()
        for step in resumed:
            axes.axvline(step, linestyle=":", color="grey")
        if "f1" in curves and axes.lines:
            axes.set_ylim(0, 101)  # percent; the highest mark is not cut
        elif "windows_per_second" in curves:
            axes.set_ylim(bottom=0)
        axes.set_title(" and ".join(name for name, _ in curves.values()))
        axes.grid(alpha=0.3)
        axes.tick_params(labelbottom=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(path.parent.name)
    figure.supxlabel("step (dotted: resumed)" if resumed else "step")
    figure.savefig(path, dpi=100)


class _TensorBoard:
    """Writes to OUTPUT_DIR/runs; the names are Trainer's."""

    def __init__(self, settings: TrainSettings, first_step: Optional[int]):
        from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(str(Path(settings.output_dir) / "runs"),
                                     purge_step=first_step)

    def add(self, numbers: Dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Its environment variables (WANDB_PROJECT, ...) apply."""

    def __init__(self, settings: TrainSettings, first_step: Optional[int]):
        import wandb
        self._run = wandb.init(dir=settings.output_dir, name=Path(settings.output_dir).name,
                               config={**settings.values(), "hub_token": None})
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step")

    def add(self, numbers: Dict[str, float], step: int) -> None:
        self._run.log({**numbers, "train/global_step": step})

    def close(self) -> None:
        self._run.finish()


_REPORTERS = {"tensorboard": _TensorBoard, "wandb": _Wandb}
