"""The log of a run: log.jsonl in its output folder, and the same for TensorBoard and for wandb.

Each line of log.jsonl is a JSON object with the keys `event`, `step` and `time` (ISO 8601, UTC).
The events and their further keys:

    started, resumed    device ("IPU" or "host"); from, the checkpoint
    log                 epoch, loss (mean of the last --logging_steps steps), learning_rate,
                        windows_per_second, rows_per_second, and the shares of the time in which the
                        host waited for data, for the device, and did the rest (evaluating, saving):
                        data_share, step_share, rest_share
    evaluation          epoch, questions ("validation" or "test"), seconds, and the metrics of
                        metrics.json, in percent
    saved               path
    nonfinite           why
    stopped             signal
    trained             the figures of train_results.json

A run that continues from a checkpoint continues its log as well: the lines of the steps that are
done once more are removed, so that none is there twice. A run on synthetic data is only timed; its
log is synthetic_log.jsonl, so that it leaves the log of a real run in the same folder alone.
"""
from __future__ import annotations

import json
import signal
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

from tqdm import tqdm

from ipu_options import device
from qa.run.curves import draw_curves
from qa.settings import TrainSettings
from runtime import processes
from runtime.files import written_whole

LOG, SYNTHETIC_LOG, CURVES = "log.jsonl", "synthetic_log.jsonl", "training.png"
# The groups of Trainer's names; an evaluation on test questions is called "test" there as well.
_GROUPS = {"validation": "eval", "test": "test"}
_NO_METRICS = ("event", "step", "epoch", "time", "questions")


class RunLog:
    """Writes the log of a run, and passes its numbers on to what --report_to names.

    A log that cannot be written is no reason to lose a run: a warning says so. Of several processes
    the first one writes.
    """

    def __init__(self, settings: TrainSettings):
        self.settings, self._folder = settings, Path(settings.output_dir)
        self._path = self._folder / (SYNTHETIC_LOG if settings.synthetic_data else LOG)
        self._reporters: List[Any] = []
        self._begun = False

    def begin(self, resumed: Any = None) -> None:
        """Begin the log, or continue that of the run that saved a checkpoint.

        resumed: the qa.run.checkpoint.Checkpoint from which the run continues, or None. A run that
        only compiles has no log.
        """
        if self.settings.compile_only:
            return
        kept = before_resume(read_log(resumed.folder.parent / LOG), resumed.step) if resumed else []
        self._open(kept, resumed.step + 1 if resumed else 0)
        if resumed:
            self.add("resumed", resumed.step, device=device, **{"from": str(resumed.folder)})
        else:
            self.add("started", 0, device=device)

    def add(self, event: str, step: int, epoch: Optional[float] = None, **values: Any) -> None:
        """Write one line. values: see the top of this file; those that are None are left out."""
        if not self._begun:  # a run that only evaluates adds to the log of its folder
            self._open(read_log(self._path), None)
        line = {"event": event, "step": step, "epoch": epoch, **values,
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        line = {key: value for key, value in line.items() if value is not None}
        self._attempt(self._append, json.dumps(line) + "\n")
        if event in ("log", "evaluation"):
            group = _GROUPS.get(values.get("questions"), "train")
            numbers = {f"{group}/{key}": value for key, value in line.items()
                       if key not in _NO_METRICS}
            numbers["train/epoch"] = epoch
            for reporter in self._reporters:
                reporter.add(numbers, step)

    def stopped(self, step: int, number: signal.Signals) -> None:
        """Say that a signal has ended the run after `step`, and how to go on."""
        self.add("stopped", step, signal=number.name)
        print(f"stopped by {number.name} after step {step}; "
              "the same command with --resume_from_checkpoint auto goes on")

    def _open(self, lines: List[Dict[str, Any]], first_step: Optional[int]) -> None:
        """Start the file with `lines`. first_step: what TensorBoard has from there on is void."""
        self._begun = True
        self._attempt(self._rewrite, lines)
        if processes.is_first() and not self.settings.synthetic_data:
            self._reporters = [_REPORTERS[name](self.settings, first_step)
                               for name in self.settings.report_to if name in _REPORTERS]

    def _rewrite(self, lines: List[Dict[str, Any]]) -> None:
        with written_whole(self._path) as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _append(self, text: str) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(text)

    def _attempt(self, write: Callable, what: Any) -> None:
        if not processes.is_first():
            return
        try:
            write(what)
        except OSError as error:
            tqdm.write(f"warning: {self._path}: cannot write it ({error.strerror or error}); "
                       "the run goes on")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        for reporter in self._reporters:
            reporter.close()
        if kind is None and self._begun and not self.settings.synthetic_data:
            self._attempt(partial(draw_curves, read_log(self._path)), self._folder / CURVES)


def read_log(path: Union[str, Path]) -> List[Dict[str, Any]]:
    """Return the lines of a log.jsonl, [] if there is none.

    A line that a killed process has left incomplete is left out.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "event" in value and isinstance(value.get("step"), int):
            lines.append(value)
    return lines


def before_resume(lines: List[Dict[str, Any]], step: int) -> List[Dict[str, Any]]:
    """Return the lines that stay in the log if the run continues after `step`.

    The end of a finished run is done once more even if its last step was saved: what follows
    `trained` goes, too.
    """
    kept = []
    for line in lines:
        if line["event"] == "trained":
            break
        if line["step"] <= step:
            kept.append(line)
    return kept


class _TensorBoard:
    """TensorBoard's own writer, in OUTPUT_DIR/runs; names are Trainer's."""

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
    """Weights & Biases' own writer; its environment variables (WANDB_PROJECT, ...) apply."""

    def __init__(self, settings: TrainSettings, first_step: Optional[int]):
        import wandb
        config = {**settings.values(), "hub_token": None}
        self._run = wandb.init(dir=settings.output_dir, name=Path(settings.output_dir).name,
                               config=config)
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step")

    def add(self, numbers: Dict[str, float], step: int) -> None:
        self._run.log({**numbers, "train/global_step": step})

    def close(self) -> None:
        self._run.finish()


_REPORTERS = {"tensorboard": _TensorBoard, "wandb": _Wandb}
