"""Measure how time and memory grow with the number of examples.

    python -m benchmarks.growth        ten minutes, 4 GB of disk for the largest size

The sizes are 1,000 to 1,000,000 examples; the stages are features, packing, loading and answers.
Time should grow linearly; memory should stay flat apart from the indices.

The examples are made up (benchmarks/questions.py), and so are the windows of the last three
stages, one per example (benchmarks/input_pipeline.py). Each figure comes from a process of its own.
Memory is the peak of the process's own (anonymous) memory, less what it held at the start of the
stage; examples and windows are in a memory-mapped file, whose pages belong to the system's cache.
"""
from __future__ import annotations

import argparse
import collections
import multiprocessing
import re
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Tuple

import datasets
import torch
from transformers import AutoTokenizer

from benchmarks.input_pipeline import write_windows
from benchmarks.measure import machine
from benchmarks.questions import as_dataset, train_tokenizer
from qa.answers.spans import AnswerFinder
from qa.data.rows import InferenceRows, TrainingRows
from qa.data.windows import Windows, make_windows

STAGES = ("features", "packing", "loading", "answers")
ROW = dict(row_length=384, max_windows_per_row=8, pad_token_id=1)


def features(examples: datasets.Dataset, tokenizer: str) -> None:
    """Cut examples into windows with labels, as train.py does."""
    make_windows(examples, AutoTokenizer.from_pretrained(tokenizer), max_seq_length=384,
                 doc_stride=128, labels=True, offsets=False, overwrite_cache=True)


def packing(windows: Windows) -> None:
    """Pack and shuffle a training run's rows."""
    TrainingRows(windows, micro_batch_size=1, micro_batches_per_update=64, **ROW)


def loading(windows: Windows) -> None:
    """Make every training row of an epoch."""
    rows = TrainingRows(windows, micro_batch_size=1, micro_batches_per_update=64, **ROW)
    for first in range(0, len(rows), rows.rows_per_step):
        rows.__getitems__(range(first, first + rows.rows_per_step))


def answers(windows: Windows) -> None:
    """Find the answers from the (random) logits of packed rows, with one question per window."""
    examples = datasets.Dataset.from_dict({"id": ["question"], "context": [
        "0123456789" * 160]}).select([0] * len(windows))
    rows = InferenceRows(windows, rows_per_step=16, **ROW)
    finder = AnswerFinder(windows, examples)
    torch.manual_seed(0)
    start_logits, end_logits = torch.randn(2, 16, 384)
    for first in range(0, len(rows), 16):
        slices = [rows.slices(row) for row in range(first, first + 16)]
        collections.deque(finder.add(slices, start_logits, end_logits), maxlen=0)
    collections.deque(finder.finish(), maxlen=0)


def own_memory() -> float:
    """MB of anonymous memory that this process has in use (proc(5), RssAnon)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return int(re.search(r"RssAnon:\s*(\d+) kB", status.read()).group(1)) / 1024


def measure(stage: str, folder: str) -> Tuple[float, float]:
    """Run a stage on the data in `folder`; returns (seconds, peak MB beyond the start)."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    source = datasets.load_from_disk(folder)
    if stage == "features":
        run = partial(features, source, folder + "/tokenizer")
    else:
        run = partial({"packing": packing, "loading": loading, "answers": answers}[stage],
                      Windows(source))
    before, peak, done = own_memory(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return seconds, max(peak, own_memory()) - before


def prepare(stage: str, folder: str, count: int) -> None:
    """Write the input of a stage to `folder`: examples and a tokenizer, or windows."""
    if stage != "features":
        write_windows(folder, count, offsets=stage == "answers")
        return
    with tempfile.TemporaryDirectory() as cache:
        examples = as_dataset(count, 5, cache)
        examples.save_to_disk(folder)
        train_tokenizer(examples[:2000:5]["context"]).save_pretrained(folder + "/tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[
        1_000, 10_000, 100_000, 1_000_000])
    given = parser.parse_args()
    print("growth with the number of examples, rows of 384 tokens, packed; one thread "
          f"(the tokenizer has as many as there are cores); {machine()}")
    print(f"{'examples':>12}" + "".join(f"{stage:>16}: s us/example     MB" for stage in STAGES))
    for count in given.examples:
        figures = []
        for stage in STAGES:
            with tempfile.TemporaryDirectory() as folder:
                prepare(stage, folder, count)
                with ProcessPoolExecutor(
                        1, mp_context=multiprocessing.get_context("spawn")) as process:
                    figures.append(process.submit(measure, stage, folder).result())
        print(f"{count:12,}" +
              "".join(f"{seconds:19.3f} {seconds / count * 1e6:10.2f} {memory:6.0f}"
                      for seconds, memory in figures))


if __name__ == "__main__":
    main()
