"""Measure whole fine-tunings with train.py and with Hugging Face's Trainer.

    python -m benchmarks.training [--jobs shape demo] [--runs 1]

Needs `accelerate`, and 12 minutes per run on 2 cores. The time is that from the start of the
command to the saved model. Both sides have the same model, questions, epochs, number of windows in
an update, and schedule; Trainer runs run_qa's preprocessing (benchmarks/trainer.py). The jobs:

    shape   layers of roberta-base on made-up questions as long as SQuAD's, one epoch; time only
    demo    the demo's questions and model, three epochs, other seeds in each run; time, exact
            match and F1

The saved models of both sides answer the validation questions through the same infer.py.
"""
from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, NamedTuple

from benchmarks.measure import compare, machine, matmul_rate
from benchmarks.questions import (
    ROBERTA_BASE,
    made_up,
    train_tokenizer,
    write_model,
    write_questions,
)

PADDED, OURS = "Trainer, padded, float32", "train.py, packed"
BEST = {f"Trainer, {kind}, by length": ["--best", kind] for kind in ("float32", "bfloat16")}
# Without a pipeline, which requires more accumulation and so makes micro-batches smaller.
ONE_IPU = ["--ipus_per_replica", "1", "--layers_per_ipu", "-1"]


class Result(NamedTuple):
    """One run: seconds until the model is saved, number of windows trained on, exact match, F1."""

    seconds: float
    windows: int
    exact_match: float
    f1: float


def run(command: List[str], folder: Path, validation_file: Path, epochs: int) -> Result:
    """Run a fine-tuning that saves its model in `folder`, then answer the validation questions."""
    begin = time.time()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    seconds = (folder / "model.safetensors").stat().st_mtime - begin
    windows = int(re.search(r"(\d+) windows", done.stdout).group(1)) * epochs
    answers = folder / "answers.jsonl"
    subprocess.run([
        sys.executable, "infer.py", "--checkpoint", folder, "--input_file", validation_file,
        "--output_file", answers, "--ipus_per_replica", "1", "--layers_per_ipu", "-1"], check=True,
                   capture_output=True)
    return Result(seconds, windows, *score(answers, validation_file))


def score(answers: Path, validation_file: Path) -> tuple:
    """(exact match, F1) of a file of infer.py's answers."""
    from qa.answers.metrics import squad_metrics
    from qa.data.dataset import load_examples

    examples = load_examples(split="validation", file=str(validation_file))
    predictions = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    metrics = squad_metrics(
        [{"id": name, "answers": gold} for name, gold in zip(examples["id"], examples["answers"])],
        [{"id": found["id"], "prediction_text": found["answer"]} for found in predictions], False)
    return metrics["exact_match"], metrics["f1"]


def shape_job(folder: Path, seed: int, layers: int, questions: int) -> Dict[str, List[str]]:
    """The commands of the job `shape`."""
    train = list(made_up(questions))
    write_questions(folder / "train.jsonl", train)
    write_questions(folder / "validation.jsonl", made_up(20, seed=1))
    write_model(folder / "model", train_tokenizer(question["context"] for question in train[::5]),
                layers, **ROBERTA_BASE)
    trainer = [
        "-m", "benchmarks.trainer", "--model", folder / "model", "--train_file",
        folder / "train.jsonl"]
    return {
        PADDED: trainer, **{side: trainer + flags for side, flags in BEST.items()}, OURS: [
            "train.py", "--pack", "--model_name_or_path", folder / "model", "--train_file",
            folder / "train.jsonl", "--validation_file", folder / "validation.jsonl",
            "--num_train_epochs", "1", "--warmup_ratio", "0.1", "--seed", seed,
            "--micro_batch_size", "8", "--gradient_accumulation_steps", "4", *ONE_IPU], }


def trainer_on_demo(folder: Path) -> List[str]:
    """The command of Trainer on what write_demo has written to `folder`.

    It pads to 64 tokens, since no window of the demo is longer.
    """
    return [
        "-m", "benchmarks.trainer", "--model", folder / "model", "--train_file",
        folder / "train.json", "--batch_size", "32", "--max_seq_length", "64", "--doc_stride", "16",
        "--learning_rate", "2e-3"]


def demo_job(folder: Path, seed: int) -> Dict[str, List[str]]:
    """The commands of the job `demo`."""
    from qa.data.demo import write_demo

    write_demo(folder, seed=seed)
    trainer = [*trainer_on_demo(folder), "--num_train_epochs", "3"]
    return {
        PADDED: trainer, **{side: trainer + flags for side, flags in BEST.items()},
        # 7 packed rows hold 31 windows.
        OURS: [
            "train.py", "--config", "demo", "--demo_data", "false", "--model_name_or_path",
            folder / "model", "--seed", seed, *ONE_IPU, "--micro_batch_size", "7",
            "--gradient_accumulation_steps", "4", "--train_file", folder / "train.json",
            "--validation_file", folder / "validation.json"], }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=("shape", "demo"), default=("shape", "demo"))
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--questions", type=int, default=1000)
    given = parser.parse_args()
    print(f"from the start of the command to the saved model; {machine()}")
    for job in given.jobs:
        results: Dict[str, List[Result]] = {}
        for seed in range(given.runs):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                sides = shape_job(folder, seed, given.layers,
                                  given.questions) if job == "shape" else demo_job(folder, seed)
                validation_file = next(folder.glob("validation.json*"))
                for number, (side, command) in enumerate(sides.items()):
                    out = folder / f"out{number}"
                    command = [*map(str, command), "--output_dir", str(out)]
                    results.setdefault(side, []).append(
                        run(command, out, validation_file, epochs=1 if job == "shape" else 3))
        report(job, results, given.layers)


def report(job: str, results: Dict[str, List[Result]], layers: int) -> None:
    """Print the figures of each side and, for the job `shape`, the ratios against their limits.

    For `shape` it also prints how much that is of what the matrix multiplications alone would
    allow, for train.py and for Trainer by length, which multiply about equally much.
    """
    print(f"{job}" + (f": {layers} layers of roberta-base" if job == "shape" else ""))
    medians = {}
    for side, runs in results.items():
        seconds = [result.seconds for result in runs]
        medians[side] = runs[0].windows / statistics.median(seconds)
        quality = "".join(f"   {result.exact_match:.2f} / {result.f1:.2f}"
                          for result in runs) if job == "demo" else ""
        print(f"  {side:32} {statistics.median(seconds):7.1f} s "
              f"({min(seconds):.1f} .. {max(seconds):.1f})   "
              f"{runs[0].windows:,} windows   {medians[side]:7.2f} windows/s"
              f"{'   exact match / F1 by seed:' if quality else ''}{quality}")
    over_padded = medians[OURS] / medians[PADDED]
    over_best = medians[OURS] / max(medians[side] for side in BEST)
    if job == "demo":
        print(f"  train.py over Trainer padded: {over_padded:.2f}, "
              f"over Trainer at its best: {over_best:.2f}")
        return
    import torch

    from poptorch_host._device import half_type

    least = (5, 1.5) if half_type() == torch.bfloat16 else (3, 1.6)
    compare(over_padded, least[0], "windows/s of train.py over Trainer padded")
    compare(over_best, least[1], "windows/s of train.py over the faster Trainer by length")
    parameters = layers * 12 * ROBERTA_BASE["hidden_size"] ** 2
    # 181 tokens per window on average; for each parameter and token 2 operations in the forward
    # and 4 in the backward pass (Kaplan et al. 2020).
    operations = 6 * parameters * 181
    kinds = {OURS: half_type(), **{side: getattr(torch, kind) for side, (_, kind) in BEST.items()}}
    rates = {kind: matmul_rate(kind) for kind in set(kinds.values())}
    for side, kind in kinds.items():
        alone = rates[kind] / operations
        print(f"  {side}: {100 * medians[side] / alone:.0f} % of the {alone:.2f} windows/s that "
              f"the matrix multiplications alone would allow, at {rates[kind] / 1e9:.0f} GFLOP/s "
              f"in {kind} (start-up and all)")


if __name__ == "__main__":
    main()
