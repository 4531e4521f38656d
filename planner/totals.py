"""Adds up what consecutive blocks need: for one stage, or for every possible stage at once.

The totals of one stage are numbers; those of every possible stage are arrays. memory.py and
throughput.py compute with either, so that a plan (numbers) and the search over all splits (arrays)
share the same formulas.
"""
from __future__ import annotations

from collections import namedtuple
from functools import lru_cache
from typing import Sequence, Tuple

import numpy as np

from planner.job import CountedBlock

# Fields of CountedBlock of which a stage has sums, sums over the blocks after the last checkpoint
# (the last encoder layer and the QA head), and maxima.
SUMS = ("parameters", "saved_bytes", "forward_flops", "forward_matmuls", "forward_elements",
        "backward_flops", "backward_matmuls", "backward_elements", "large_flops")
TAIL = ("forward_flops", "forward_matmuls", "forward_elements", "saved_bytes")
MAXIMA = ("largest_parameter", "saved_results", "output_bytes", "result_bytes", "linear_bytes",
          "matmul_flops", "handed_bytes")
# The totals of a stage. The others are the saved bytes of the block that saves most, the largest
# parameter of an embedding and of another block, the first block's input, and that with the outputs
# of layers that other layers take.
Totals = namedtuple("Totals", (
    *SUMS, *(f"tail_{name}" for name in TAIL), *MAXIMA, "most_saved_bytes", "embedding_parameter",
    "layer_parameter", "input_bytes", "checkpoint_bytes"))


@lru_cache(maxsize=4096)
def stage_totals(blocks: Tuple[CountedBlock, ...]) -> Totals:
    """Return the totals of one stage, as numbers; 0 without blocks."""
    if not blocks:
        return Totals(*[0] * len(Totals._fields))
    return Totals(*(int(field[0, len(blocks)]) for field in range_totals(blocks)))


def range_totals(blocks: Sequence[CountedBlock]) -> Totals:
    """Return the totals of every possible stage blocks[i:j], as arrays.

    Each has the shape [len(blocks), len(blocks) + 1] and is 0 where j <= i.
    """
    def of(name: str) -> np.ndarray:
        # A block without a multiplication, the embedding, takes the fixed time of one as well.
        values = np.array([getattr(block, name) for block in blocks], dtype=float)
        return np.maximum(values, 1) if name.endswith("_matmuls") else values

    kinds = np.array([block.kind for block in blocks])
    tail = kinds == "head"
    # It is read for the last stage only, whose last layer is the model's.
    tail[np.flatnonzero(kinds == "layer")[-1:]] = True
    largest, before = of("largest_parameter"), np.roll(of("output_bytes"), 1)
    first_input = np.triu(np.tile(of("input_bytes")[:, None], len(blocks) + 1), 1)
    between_layers = np.where((kinds == "layer") & (np.roll(kinds, 1) == "layer"), before, 0)
    return Totals(
        **{name: _sums(of(name)) for name in SUMS},
        **{f"tail_{name}": _sums(tail * of(name)) for name in TAIL},
        **{name: _maxima(of(name)) for name in MAXIMA},
        most_saved_bytes=_maxima(of("saved_bytes")),
        embedding_parameter=_maxima(np.where(kinds == "embedding", largest, 0)),
        layer_parameter=_maxima(np.where(kinds == "embedding", 0, largest)),
        input_bytes=first_input,
        checkpoint_bytes=first_input + np.triu(
            _sums(between_layers) - between_layers[:, None], 1))


def _sums(values: np.ndarray) -> np.ndarray:
    """Return the sum of values[i:j] for every i and j, 0 where j <= i."""
    ends = np.concatenate([[0], np.cumsum(values)])
    return np.maximum(ends[None, :] - ends[:-1, None], 0)


def _maxima(values: np.ndarray) -> np.ndarray:
    """Return the maximum of values[i:j] for every i and j, 0 where j <= i."""
    table = np.zeros((len(values), len(values) + 1), dtype=float)
    for first in range(len(values)):
        table[first, first + 1:] = np.maximum.accumulate(values[first:])
    return table
