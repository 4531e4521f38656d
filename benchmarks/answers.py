"""Measure how fast qa.answers turns logits into answers, compared with run_qa's implementation.

    python -m benchmarks.answers

There are as many windows as in SQuAD v1's validation set. qa.answers is compared with two other
implementations, and all three are checked to give the same answers, scores and n-best lists bit
for bit:

- run_qa and the question-answering notebook: Python loops over pairs of tokens, where the windows
  are rows of a `datasets` table;
- the same loops with the offsets already in arrays (tests/reference/answers.py), so that the loops
  alone are compared.
"""
from __future__ import annotations

import argparse
import collections
import operator
import statistics
from typing import Iterator

import numpy
import torch
from datasets import Dataset

from benchmarks.measure import alternate, compare, describe, machine
from qa.answers.spans import AnswerFinder
from tests.reference.answers import plain_answers
from tests.reference.synthetic_windows import SyntheticWindows

LENGTH, N_BEST, MAX_ANSWER, BATCH = 384, 20, 30, 16


def trained_logits(random: numpy.random.Generator, windows: SyntheticWindows) -> numpy.ndarray:
    """Logits as a trained model gives them, float32 [windows, 2, tokens].

    They are low everywhere except around a few places, where a high end follows a high start.
    """
    logits = random.normal(-6, 1.5, (len(windows), 2, LENGTH)).astype(numpy.float32)
    for window, first in enumerate(windows.context_start.tolist()):
        for height in (9, 6, 4):
            start = random.integers(first, LENGTH - 8)
            logits[window, 0, start - 1:start + 2] += height
            logits[window, 1, start + 1:start + 6] += height
    return logits


class TableWindows:
    """The windows as rows of a `datasets` table, as run_qa and the notebook keep and read them.

    One pass over all rows finds out which windows belong to which question. Then one row at a time
    is read, with all its columns converted to Python lists.
    """

    def __init__(self, windows: SyntheticWindows):
        self.cls_position, self.context_start = windows.cls_position, windows.context_start
        offsets = numpy.zeros((len(windows), LENGTH, 2), numpy.int64)
        for window, first in enumerate(self.context_start.tolist()):
            offsets[window, first:LENGTH - 1] = windows.offsets(window)
        tokens = numpy.ones((len(windows), LENGTH), numpy.int64)
        self._table = Dataset.from_dict({
            "input_ids": list(tokens), "attention_mask": list(tokens),
            "offset_mapping": list(offsets), "example_id": windows.example.tolist()})

    @property
    def example(self) -> numpy.ndarray:
        return numpy.array([row["example_id"] for row in self._table])

    def offsets(self, window: int) -> numpy.ndarray:
        return numpy.array(
            self._table[window]["offset_mapping"][self.context_start[window]:LENGTH - 1])


def find_all(windows, examples, logits: torch.Tensor, version_2: bool) -> Iterator[dict]:
    finder = AnswerFinder(windows, examples, n_best_size=N_BEST, max_answer_length=MAX_ANSWER,
                          version_2_with_negative=version_2)
    for first in range(0, len(windows), BATCH):
        batch = logits[first:first + BATCH]
        slices = [[(window, 0, LENGTH)] for window in range(first, first + len(batch))]
        yield from finder.add(slices, batch[:, 0], batch[:, 1])
    yield from finder.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=10_800)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    random = numpy.random.default_rng(0)
    windows = SyntheticWindows(numpy.full(given.windows, LENGTH))
    # SQuAD has 1.02 windows per question.
    windows.example = numpy.arange(given.windows, dtype=numpy.int32) * 100 // 102
    windows.context_start = random.integers(8, 30, given.windows).astype(numpy.int32)
    count = int(windows.example[-1]) + 1
    examples = Dataset.from_dict({
        "id": [str(i) for i in range(count)], "context": ["0123456789" * 120] * count})
    logits = trained_logits(random, windows)
    tensor = torch.from_numpy(logits)
    print(f"answers from the logits of {given.windows} windows of {LENGTH} tokens, "
          f"n_best_size {N_BEST}; {machine()}")
    table = TableWindows(windows)
    for version_2 in (False, True):
        loops = (examples, logits, N_BEST, MAX_ANSWER, version_2, 0.0)
        sides = {"run_qa's way": lambda: plain_answers(table, *loops),
                 "its loops alone": lambda: plain_answers(windows, *loops),
                 "qa.answers": lambda: find_all(windows, examples, tensor, version_2)}
        for name, side in sides.items():
            assert all(map(operator.eq, side(),
                           sides["qa.answers"]())), f"the answers differ from {name}"
        print(f" version {2 if version_2 else 1}: "
              "answers, scores and n-best lists are equal bit for bit")
        seconds = alternate({name: lambda side=side: collections.deque(side(), maxlen=0)
                             for name, side in sides.items()}, given.runs)
        for name, values in seconds.items():
            describe(name, values, given.windows, "windows")
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        compare(medians["run_qa's way"] / medians["qa.answers"], 10,
                "times as fast as run_qa's way")
        print("  times as fast as its loops alone: "
              f"{medians['its loops alone'] / medians['qa.answers']:.2f}")


if __name__ == "__main__":
    main()
