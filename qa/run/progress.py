"""What a user sees of a training run: its batches in numbers, the progress bar and log lines."""
from __future__ import annotations

import io
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Dict, Tuple

import torch
from tqdm import tqdm

from ipu_options.config import IPUConfig
from ipu_options.options import executable_cache
from ipu_options.popvision import PhaseTimer
from qa.data.rows import TrainingRows
from qa.run.log import RunLog
from qa.run.state import MeanLoss, TrainingState
from qa.settings import TrainSettings
from runtime import processes
from runtime.errors import counted
from runtime.files import write_json, writing


def mean_loss(losses: torch.Tensor, loss_weights: torch.Tensor, ipu_config: IPUConfig,
              ) -> Tuple[float, int]:
    """Collective: return the mean loss of the windows in what a call returned, and their number.

    losses: as ipu_config.output_mode returns them: of all micro-batches, of each replica's last one
    ("final", "default"), or each replica's sum. loss_weights: [rows, windows of a row], of this
    process's rows in the call. A micro-batch's loss is the sum of its windows' losses, each times
    the weight that all windows of the update have (qa/data/rows.py). A sum does not tell updates
    with different weights apart: over several updates it gives the mean of the updates' means.
    """
    losses = losses.float().reshape(-1)
    replicas = ipu_config.replication_factor // processes.count()
    micro_batches = ipu_config.gradient_accumulation_steps * ipu_config.device_iterations
    weights = loss_weights.reshape(micro_batches * replicas, -1)
    if ipu_config.output_mode == "sum":
        loss = processes.gather_rows(losses, replicas).mean().item() / micro_batches
        return loss, int(processes.gather_rows(weights.count_nonzero(), 1).sum())
    weights = weights[-len(losses):]
    columns = torch.stack((losses, weights.amax(1), weights.count_nonzero(1).float()), dim=1)
    losses, weights, windows = processes.gather_rows(columns, replicas).unbind(1)
    weights[windows == 0] = 1.0  # the loss of a micro-batch without a window is 0
    return ((losses / weights).sum() / windows.sum()).item(), int(windows.sum())


class _Lines(tqdm):
    def display(self, msg: Any = None, pos: Any = None) -> None:
        print(f"{self.desc}: {self.unit} {self.n}/{self.total}  {self.postfix or ''}".rstrip(),
              file=sys.stderr, flush=True)

    def close(self) -> None:
        self.disable = True


def progress_bar(total: int, desc: str, unit: str, initial: int = 0, seconds: float = 30) -> tqdm:
    """Return a bar for a terminal, or what prints a line every 30 `seconds` to a file or pipe."""
    if sys.stderr.isatty():
        return tqdm(total=total, initial=initial, desc=desc, unit=unit, dynamic_ncols=True)
    # With another file than standard error, tqdm.write takes it for no bar that has to be cleared.
    return _Lines(total=total, initial=initial, desc=desc, unit=unit, miniters=1, delay=seconds,
                  mininterval=seconds, maxinterval=math.inf, file=io.StringIO())


def describe_rows(rows: TrainingRows, questions: int, settings: TrainSettings,
                  ipu_config: IPUConfig) -> str:
    """Return lines on how so many questions become windows, rows and updates, and what helps."""
    micro_batch_size, replicas = settings.micro_batch_size, ipu_config.replication_factor
    accumulation, updates = ipu_config.gradient_accumulation_steps, ipu_config.device_iterations
    notes = []
    if rows.fill < 0.5:
        notes.append("--pack fills the rows" if not settings.pack else
                     f"--max_seq_length {rows.windows.lengths.max()} is enough for all windows")
    if 1 < rows.total_steps <= settings.logging_steps:
        notes.append(f"--logging_steps {math.ceil(rows.total_steps / 10)} shows the loss before "
                     "the end (for few questions: --config small)")
    return (
        f"{counted(questions, 'question')}, {counted(len(rows.windows), 'window')}, "
        f"{rows.windows_per_row:.2f} in a row, {rows.fill:.1%} of the tokens are real\n"
        f"weight update: micro-batch {micro_batch_size} x accumulation {accumulation} x replicas "
        f"{replicas} rows, {len(rows.windows) / rows.updates_per_epoch:.1f} windows on average\n"
        f"run: {counted(rows.updates_per_epoch, 'update')} an epoch; "
        f"{counted(rows.total_steps, 'step')} of {counted(updates, 'update')}, "
        f"{rows.epoch_after(rows.total_steps):.2f} epochs"
        + ("\nnote: " + "; ".join(notes) if notes else ""))


def describe_compiled(seconds: float, ipu_config: IPUConfig, settings: TrainSettings) -> str:
    """Return the last line of a run that only compiles."""
    return (f"compiled in {seconds:.0f} s, executable cache: "
            f"{executable_cache(ipu_config, settings)}; nothing was run")


def describe_end(seconds: float, settings: TrainSettings) -> str:
    """Return the last line of a run that has trained."""
    return (f"saved to {settings.output_dir} after {seconds:.0f} s; ask it: python infer.py "
            f"--checkpoint {shlex.quote(settings.output_dir)}")


class Progress:
    """The progress bar, the log lines and the summary of a run, which begins with `state`."""

    def __init__(self, rows: TrainingRows, settings: TrainSettings, state: TrainingState,
                 timer: PhaseTimer, log: RunLog):
        self.rows, self.settings, self.state = rows, settings, state
        self.timer, self.log = timer, log
        self._first_step = state.step
        self._windows = 0  # trained by this process
        self._clocks: Dict[str, float] = {}  # at the last log line

    def evaluation_is_due(self) -> bool:
        """Whether to evaluate the model now, after this step; the end evaluates it anyway."""
        settings, step = self.settings, self.state.step
        due = (settings.eval_steps and step % settings.eval_steps == 0
               or settings.evaluate_every_epoch
               and int(self.rows.epoch_after(step)) > int(self.rows.epoch_after(step - 1)))
        last = step == self.rows.total_steps  # whose metrics may be the best
        return bool(settings.evaluates and (settings.load_best_model_at_end if last else due))

    def update(self, learning_rate: float) -> None:
        """Count the step that is done, and print and log a line if it is time for one."""
        step, total_steps = self.state.step, self.rows.total_steps
        self._windows += self.rows.windows_in_step(step - 1)
        self._bar.update()
        if step % self.settings.logging_steps and step < total_steps:
            return
        clocks = self._read_clocks()
        passed = {name: clocks[name] - self._clocks[name] for name in clocks}
        total, steps, windows = (passed.pop(name) for name in ("total", "steps", "windows"))
        shares = {f"{name}_share": passed[name] / total for name in passed}
        speed, epoch = windows / total, self.rows.epoch_after(step)
        self._clocks = clocks
        loss, self.state.logged_loss = self.state.logged_loss.mean, MeanLoss()
        self.log.add("log", step, epoch, loss=loss, learning_rate=learning_rate,
                     windows_per_second=speed,
                     rows_per_second=steps * self.rows.rows_per_step / total, **shares,
                     rest_share=1 - sum(shares.values()))
        numbers = f"loss {loss:.4f}  " if loss is not None else ""
        tqdm.write(f"step {step}/{total_steps}  epoch {epoch:.2f}  {numbers}"
                   f"learning rate {learning_rate:.3g}  windows/s {speed:.1f}")
        # Beside the bar, 80 columns have room for no more.
        self._bar.set_postfix_str(f"{numbers}{speed:.0f} windows/s", refresh=False)

    def _read_clocks(self) -> Dict[str, float]:
        return {"total": time.perf_counter(), "steps": self.state.step, "windows": self._windows,
                **{phase: self.timer.seconds[phase] for phase in ("data", "step")}}

    def write_summary(self) -> None:
        """Print the summary, and write it to train_results.json. Raises RunError.

        Of a resumed run, seconds and windows per second are those since then.
        """
        state, seconds = self.state, self.timer.seconds
        training = sum(seconds[phase] for phase in ("data", "step", "schedule"))
        epoch = self.rows.epoch_after(state.step)
        resumed = {"steps_since_resume": state.step - self._first_step} if self._first_step else {}
        summary = {
            "steps": state.step, "epoch": epoch, **resumed,
            "train_loss": state.run_loss.mean,
            "train_seconds": training, "compile_seconds": seconds["compile"],
            "windows_per_second": self._windows / training if training else None}
        print("training: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}"
                                       for name, value in summary.items() if value is not None))
        with writing(f"--output_dir {self.settings.output_dir}"):
            processes.on_first(write_json, Path(self.settings.output_dir) / "train_results.json",
                               summary)
        summary.pop("epoch")
        self.log.add("trained", state.step, epoch, **summary)

    def __enter__(self) -> "Progress":
        self._clocks = self._read_clocks()
        self._bar = progress_bar(self.rows.total_steps, "Training", "step", self.state.step)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()
