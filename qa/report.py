"""What a person reads while a run goes on: the batch's make-up, the log line, predictions beside true answers."""
from __future__ import annotations

import random
from typing import List

from ipu_options.config import IPUConfig
from qa.rows import TrainingRows


def describe_rows(rows: TrainingRows, questions: int, micro_batch_size: int, ipu: IPUConfig) -> str:
    """How questions become windows, rows and weight updates. The global batch is counted in windows."""
    update = rows.windows_per_row * micro_batch_size * ipu.gradient_accumulation_steps * ipu.replication_factor
    return (f"{questions} questions, {len(rows.windows)} windows, {rows.windows_per_row:.2f} in a row, "
            f"{rows.fill:.1%} of the tokens are real\n"
            f"weight update: micro-batch {micro_batch_size} x accumulation {ipu.gradient_accumulation_steps} x replicas "
            f"{ipu.replication_factor} rows, {update:.0f} windows on average; step: {ipu.device_iterations} update(s); "
            f"{rows.steps_per_epoch} steps an epoch, {rows.total_steps} in all")


def log_line(step: int, rows: TrainingRows, losses: List[float], learning_rate: float, windows_per_second: float) -> str:
    """One line of the training log. losses: mean loss of each step since the last line."""
    loss = sum(losses) / len(losses) if losses else float("nan")
    return (f"step {step}/{rows.total_steps}  epoch {step / rows.steps_per_epoch:.2f}  loss {loss:.4f}  "
            f"learning rate {learning_rate:.3g}  windows/s {windows_per_second:.1f}")


def show_predictions(examples, predictions: List[dict], count: int, seed: int) -> str:
    """`count` random questions with predicted and true answers.

    examples: data set with columns question and answers; predictions: [{prediction_text, ...}] in the same order.
    """
    lines = []
    for i in sorted(random.Random(seed).sample(range(len(examples)), min(count, len(examples)))):
        true = " / ".join(sorted(set(examples[i]["answers"]["text"]))) or "(no answer)"
        predicted = predictions[i]["prediction_text"] or "(no answer)"
        lines.append(f"  {examples[i]['question']}\n      predicted: {predicted}\n      true:      {true}")
    return "\n".join(lines)
