"""What a user sees of a training run: its batches in numbers, the progress bar and log lines."""
from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Dict, List, Optional

from tqdm import tqdm

from ipu_options.config import IPUConfig, executable_cache
from ipu_options.popvision import Spans
from qa.data.rows import TrainingRows
from qa.run.checkpoint import Checkpoint
from qa.run.log import RunLog
from qa.settings import TrainSettings
from runtime import processes
from runtime.bars import progress_bar
from runtime.files import write_json, writing


def describe_rows(rows: TrainingRows, questions: int, settings: TrainSettings,
                  ipu_config: IPUConfig) -> str:
    """Return two lines of text on how the questions become windows, rows, updates and steps.

    questions: the number of training questions. ipu_config: that of the training pipeline. The size
    of an update is given in windows, since a packed row holds a varying number of them.
    """
    micro_batch_size, replicas = settings.micro_batch_size, ipu_config.replication_factor
    accumulation = ipu_config.gradient_accumulation_steps
    update = rows.windows_per_row * micro_batch_size * accumulation * replicas
    return (
        f"{questions} questions, {len(rows.windows)} windows, {rows.windows_per_row:.2f} in a row, "
        f"{rows.fill:.1%} of the tokens are real\n"
        f"weight update: micro-batch {micro_batch_size} x accumulation {accumulation} x replicas "
        f"{replicas} rows, {update:.0f} windows on average; "
        f"step: {ipu_config.device_iterations} update(s); "
        f"{rows.steps_per_epoch} steps an epoch, {rows.total_steps} in all")


def describe_compiled(seconds: float, ipu_config: IPUConfig, settings: TrainSettings) -> str:
    """Return the last line of a run that only compiles, which took so many seconds."""
    return (f"compiled in {seconds:.0f} s, executable cache: "
            f"{executable_cache(ipu_config, settings)}; nothing was run")


class Progress:
    """The progress bar, the log lines and the summary of a run, and the losses of its steps.

    saved: the checkpoint from which the run continues, or None. spans: has the time of each phase.
    log: gets a line at each log point.
    """

    def __init__(self, rows: TrainingRows, settings: TrainSettings, saved: Optional[Checkpoint],
                 spans: Spans, log: RunLog):
        self.rows, self.settings, self.spans, self.log = rows, settings, spans, log
        self.losses: List[float] = list(saved.progress["losses"]) if saved else []
        self._first_step = self._step = saved.step if saved else 0
        self._first_loss = len(self.losses)  # of the losses of this process
        # The number of windows since the last log line and before it, and what was reached then.
        self._windows = self._earlier_windows = 0
        self._since = self._now()
        self._bar = progress_bar(rows.total_steps, "Training", "step", self._step)

    def evaluation_is_due(self, step: int) -> bool:
        """Return whether the model is to be evaluated after `step`, before the end of the run.

        The end evaluates in any case; but the best model can only be chosen once it is known how
        good the last one is.
        """
        settings, last = self.settings, step == self.rows.total_steps
        due = (settings.eval_steps and step % settings.eval_steps == 0
               or settings.evaluate_every_epoch and step % self.rows.steps_per_epoch == 0)
        return bool(settings.evaluates and (settings.load_best_model_at_end if last else due))

    def update(self, step: int, loss: Optional[float], learning_rate: float) -> None:
        """Record that a step is done, and print a log line if it is time for one.

        step: its number, counted from 1. loss: the mean loss of the step, or None if the step was
        skipped or ran on synthetic data.
        """
        self._step = step
        self._windows += self.rows.windows_in_step(step - 1)
        if loss is not None:
            self.losses.append(loss)
        self._bar.update()
        if step % self.settings.logging_steps and step < self.rows.total_steps:
            return
        now = self._now()
        seconds = {name: now[name] - self._since[name] for name in now}
        total, steps = seconds.pop("total"), seconds.pop("steps")
        speed = self._windows / total
        self._earlier_windows += self._windows
        self._windows, self._since = 0, now
        last = self.losses[-self.settings.logging_steps:]
        shares = {f"{name}_share": seconds[name] / total for name in seconds}
        self.log.add(
            "log", step, self.rows.epoch_after(step), loss=sum(last) / len(last) if last else None,
            learning_rate=learning_rate, windows_per_second=speed,
            rows_per_second=steps * self.rows.rows_per_step / total, **shares,
            rest_share=1 - sum(shares.values()))
        loss_text = f"loss {sum(last) / len(last):.4f}  " if last else ""
        tqdm.write(
            f"step {step}/{self.rows.total_steps}  epoch {self.rows.epoch_after(step):.2f}  "
            f"{loss_text}learning rate {learning_rate:.3g}  windows/s {speed:.1f}")
        self._bar.set_postfix_str(
            f"{loss_text}learning rate {learning_rate:.3g}  windows/s {speed:.0f}")

    def _now(self) -> Dict[str, float]:
        """Return the time, the steps done and the seconds spent in data and step, all so far."""
        return {"total": time.perf_counter(), "steps": self._step,
                **{phase: self.spans.seconds[phase] for phase in ("data", "step")}}

    def write_summary(self) -> None:
        """Print the summary of the training and write it to train_results.json.

        The figures are those of this process alone: a resumed run has done fewer steps than the
        whole. Raises RunError if the file cannot be written.
        """
        training = sum(self.spans.seconds[phase] for phase in ("data", "step", "schedule"))
        windows, losses = self._earlier_windows + self._windows, self.losses[self._first_loss:]
        summary = {
            "steps": self._step - self._first_step, "epoch": self.rows.epoch_after(self._step),
            "train_loss": sum(losses) / len(losses) if losses else None,
            "train_seconds": training, "compile_seconds": self.spans.seconds["compile"],
            "windows_per_second": windows / training if training else None}
        print("training: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}"
                                       for name, value in summary.items() if value is not None))
        with writing(f"--output_dir {self.settings.output_dir}"):
            processes.on_first(write_json, Path(self.settings.output_dir) / "train_results.json",
                               summary)
        summary.pop("epoch")
        self.log.add("trained", self._step, self.rows.epoch_after(self._step), **summary)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()
