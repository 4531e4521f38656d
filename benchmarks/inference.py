"""Measure how fast infer.py answers a file of questions, compared with transformers' pipeline.

    python -m benchmarks.inference [--questions 10000] [--width 256] [--layers 4] [--runs 1]

Whole commands are timed, on the same untrained model and the same made-up questions, which are as
long as SQuAD's. infer.py packs its rows. The question-answering pipeline runs with its defaults
(float32, one window at a time) and at its best on a processor (bfloat16, 16 windows at a time).
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List

from benchmarks.measure import compare, describe, machine
from benchmarks.questions import made_up, train_tokenizer, write_model, write_questions

PIPELINE, BEST, OURS = "pipeline", "pipeline, bfloat16, batches of 16", "infer.py, packed"


def run_pipeline(folder: Path, best: bool) -> None:
    """Answer the questions in `folder` with transformers' pipeline, as a command of its own."""
    import torch
    from transformers import pipeline

    answering = pipeline("question-answering", str(folder / "model"), device=-1,
                         torch_dtype=torch.bfloat16 if best else torch.float32)
    questions = [
        json.loads(line)
        for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = answering(
        question=[each["question"] for each in questions],
        context=[each["context"] for each in questions],
        max_seq_len=384, doc_stride=128, max_answer_len=30, batch_size=16 if best else 1)
    with open(folder / "pipeline.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(answer) + "\n" for answer in answers)


def commands(folder: Path) -> Dict[str, List[str]]:
    """The arguments to Python of each side's command."""
    other = ["-m", "benchmarks.inference", "--folder", str(folder)]
    ours = [
        "infer.py", "--checkpoint",
        str(folder / "model"), "--input_file",
        str(folder / "questions.jsonl"), "--pack", "--output_file",
        str(folder / "ours.jsonl"), "--ipus_per_replica", "1", "--layers_per_ipu", "-1",
        "--eval_micro_batch_size", "4"]
    return {PIPELINE: other, BEST: [*other, "--best"], OURS: ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--best", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        return run_pipeline(given.folder, given.best)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = list(made_up(given.questions))
        write_questions(folder / "questions.jsonl", questions)
        tokenizer = train_tokenizer(question["context"] for question in questions[:2000:5])
        write_model(folder / "model", tokenizer, given.layers, hidden_size=given.width,
                    num_attention_heads=given.width // 64, intermediate_size=4 * given.width)
        seconds: Dict[str, List[float]] = {}
        for _ in range(given.runs):
            for side, command in commands(folder).items():
                begin = time.perf_counter()
                done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
                seconds.setdefault(side, []).append(time.perf_counter() - begin)
                if done.returncode:
                    sys.exit(f"{side} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    print(f"{given.questions:,} questions, a model of {given.layers} layers of width "
          f"{given.width}, whole commands; {machine()}")
    medians = {side: statistics.median(runs) for side, runs in seconds.items()}
    for side, runs in seconds.items():
        describe(side, runs, given.questions, "questions")
    compare(medians[PIPELINE] / medians[OURS], 1.8, "infer.py over the pipeline")
    print(f"  infer.py over the pipeline at its best: {medians[BEST] / medians[OURS]:.2f}")


if __name__ == "__main__":
    main()
