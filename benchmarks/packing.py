"""Measure how full packed rows are, how long packing takes, and how well the trained model answers.

    python -m benchmarks.packing [--file FILE --tokenizer FOLDER] [--seeds 3]

It takes a quarter of an hour on 2 cores.

Fullness: 100,000 window lengths with SQuAD's distribution (181 tokens on average, 300 at the 95th
percentile) are packed into rows of 384 tokens with up to 8 windows; with --file also the windows of
those questions.
Quality: the demo is trained packed and unpacked with each seed; both should answer equally well.
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
from typing import Tuple

import numpy

from benchmarks.measure import compare, machine
from qa.data.packing import pack

ROW_LENGTH, MOST = 384, 8


def fullness(what: str, lengths: numpy.ndarray, least: float) -> None:
    """Pack windows of these lengths and print which share of the rows' tokens is not padding."""
    begin = time.perf_counter()
    rows = len(pack(lengths, ROW_LENGTH, MOST).row_slots) - 1
    seconds = time.perf_counter() - begin
    print(f"{what}: {len(lengths):,} windows of {lengths.mean():.0f} tokens on average, "
          f"{len(lengths) / rows:.2f} in a row; packed in {seconds:.3f} s on one core")
    compare(100 * lengths.sum() / (rows * ROW_LENGTH), least,
            "per cent of the rows' tokens that are real")


def lengths_of(file: str, tokenizer: str) -> numpy.ndarray:
    """The lengths of the windows of the questions in `file`."""
    from transformers import AutoTokenizer

    from qa.data.dataset import load_examples
    from qa.data.windows import Windows, make_windows

    examples = load_examples(split="train", file=file, version_2_with_negative=True)
    windows = make_windows(examples, AutoTokenizer.from_pretrained(tokenizer),
                           max_seq_length=ROW_LENGTH, doc_stride=128, labels=True, offsets=False)
    return Windows(windows).lengths


def demo(seed: int, packed: bool) -> Tuple[float, float, float]:
    """Train and evaluate the demo; returns (exact match, F1, seconds).

    Unpacked rows are only as long as the longest window requires, so that the time is not spent on
    padding.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = [] if packed else [
            "--pack", "false", "--max_seq_length", "64", "--doc_stride", "16", "--micro_batch_size",
            "4", "--gradient_accumulation_steps", "8"]
        begin = time.perf_counter()
        subprocess.run([
            sys.executable, "train.py", "--config", "demo", "--seed",
            str(seed), "--output_dir", folder, *rows], check=True, capture_output=True)
        seconds = time.perf_counter() - begin
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    return metrics["exact_match"], metrics["f1"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", help="questions in any format that train.py reads")
    parser.add_argument("--tokenizer", help="folder of the tokenizer for them")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    print(machine())
    lengths = numpy.random.default_rng(0).gamma(7.5, 24, 100_000).clip(20, ROW_LENGTH).astype(int)
    fullness("SQuAD's distribution", lengths, 98)
    if given.file:
        fullness(given.file, lengths_of(given.file, given.tokenizer), 96.5)
    found = {True: [], False: []}
    for seed in range(given.seeds):
        for packed in found:
            found[packed].append(demo(seed, packed))
            exact_match, f1, seconds = found[packed][-1]
            print(
                f"demo, seed {seed}, {'packed' if packed else 'unpacked'}: "
                f"exact match {exact_match:.2f}, F1 {f1:.2f}, {seconds:.0f} s", flush=True)
    if given.seeds:
        means = {packed: statistics.mean(f1 for _, f1, _ in runs) for packed, runs in found.items()}
        print(f"  mean F1 of {given.seeds} seeds: "
              f"packed {means[True]:.2f}, unpacked {means[False]:.2f}")


if __name__ == "__main__":
    main()
