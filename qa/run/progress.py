"""What a user sees of a training run: its batches in numbers, the progress bar and log lines."""
from __future__ import annotations

import time
from typing import Any, List, Optional

from tqdm import tqdm

from ipu_options.config import IPUConfig
from qa.data.rows import TrainingRows
from qa.run.checkpoint import Checkpoint
from qa.settings import TrainSettings


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


class Progress:
    """The progress bar and the log lines of a run, and the loss of each of its steps (`losses`).

    logging_steps: number of steps between two log lines. saved: the checkpoint from which the run
    continues, or None.
    """

    def __init__(self, rows: TrainingRows, logging_steps: int, saved: Optional[Checkpoint]):
        self.rows, self.logging_steps = rows, logging_steps
        self.losses: List[float] = list(saved.progress["losses"]) if saved else []
        # The number of windows since the last log line, and the time of that line.
        self._windows, self._since = 0, time.perf_counter()
        self._bar = tqdm(total=rows.total_steps, initial=saved.step if saved else 0,
                         desc="Training", unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: Optional[float], learning_rate: float) -> None:
        """Record that a step is done, and print a log line if it is time for one.

        step: its number, counted from 1. loss: the mean loss of the step, or None if the step was
        skipped or ran on synthetic data.
        """
        self._windows += self.rows.windows_in_step(step - 1)
        if loss is not None:
            self.losses.append(loss)
        self._bar.update()
        if step % self.logging_steps and step < self.rows.total_steps:
            return
        speed = self._windows / (time.perf_counter() - self._since)
        self._windows, self._since = 0, time.perf_counter()
        last = self.losses[-self.logging_steps:]
        loss_text = f"loss {sum(last) / len(last):.4f}  " if last else ""
        tqdm.write(
            f"step {step}/{self.rows.total_steps}  epoch {step / self.rows.steps_per_epoch:.2f}  "
            f"{loss_text}learning rate {learning_rate:.3g}  windows/s {speed:.1f}")
        self._bar.set_postfix_str(
            f"{loss_text}learning rate {learning_rate:.3g}  windows/s {speed:.0f}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()
