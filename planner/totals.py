"""Adds up what consecutive blocks need: for one stage, or for every possible stage at once.

The totals of one stage are numbers; those of every possible stage are arrays. memory.py and
throughput.py compute with either, so that a plan (numbers) and the search over all splits (arrays)
share the same formulas.
"""
from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Sequence, Tuple

import numpy as np

from planner.count import CountedBlock


class Totals(NamedTuple):
    """Sums and maxima over the blocks of a stage.

    Each field is a number, or an array whose element [i, j] is for the stage blocks[i:j].
    """

    parameters: Any
    largest_parameter: Any
    embedding_parameter: Any   # largest parameter of an embedding block
    layer_parameter: Any       # of another block
    input_bytes: Any           # of the stage's first block
    checkpoint_bytes: Any      # the same, and the outputs of layers that other layers take
    saved_bytes: Any           # of all blocks
    most_saved_bytes: Any      # of the block that saves most
    saved_results: Any
    output_bytes: Any          # the largest of a block
    result_bytes: Any          # the largest of an operation
    linear_bytes: Any          # the largest of a linear layer
    matmul_bytes: Any          # the largest of a block
    forward_flops: Any
    forward_matmuls: Any
    forward_elements: Any
    backward_flops: Any
    backward_matmuls: Any
    backward_elements: Any
    # Of the blocks after the last checkpoint, the last encoder layer and the QA head:
    tail_flops: Any            # forward
    tail_matmuls: Any
    tail_elements: Any
    tail_saved_bytes: Any


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
    def of(value) -> np.ndarray:
        return np.array([value(block) for block in blocks], dtype=float)

    heads = of(lambda b: b.kind == "head")
    layers = np.flatnonzero(of(lambda b: b.kind == "layer"))
    tail = heads.copy()
    tail[layers[-1:]] = 1  # read for the last stage only, whose last layer is the model's
    first_input = np.triu(np.tile(of(lambda b: b.input_bytes)[:, None], len(blocks) + 1), 1)
    between_layers = np.array([0.0] + [
        block.input_bytes if before.kind == block.kind == "layer" else 0
        for before, block in zip(blocks, blocks[1:])])
    # A block without a multiplication, the embedding, takes the fixed time of one as well.
    forward_matmuls = of(lambda b: max(b.forward_matmuls, 1))
    return Totals(
        parameters=_sums(of(lambda b: b.parameters)),
        largest_parameter=_maxima(of(lambda b: b.largest_parameter)),
        embedding_parameter=_maxima(
            of(lambda b: b.largest_parameter if b.kind == "embedding" else 0)),
        layer_parameter=_maxima(
            of(lambda b: b.largest_parameter if b.kind != "embedding" else 0)),
        input_bytes=first_input,
        checkpoint_bytes=first_input + np.triu(
            _sums(between_layers) - between_layers[:, None], 1),
        saved_bytes=_sums(of(lambda b: b.saved_bytes)),
        most_saved_bytes=_maxima(of(lambda b: b.saved_bytes)),
        saved_results=_maxima(of(lambda b: b.saved_results)),
        output_bytes=_maxima(of(lambda b: b.output_bytes)),
        result_bytes=_maxima(of(lambda b: b.result_bytes)),
        linear_bytes=_maxima(of(lambda b: b.linear_bytes)),
        matmul_bytes=_maxima(of(lambda b: b.matmul_bytes)),
        forward_flops=_sums(of(lambda b: b.forward_flops)),
        forward_matmuls=_sums(forward_matmuls),
        forward_elements=_sums(of(lambda b: b.forward_elements)),
        backward_flops=_sums(of(lambda b: b.backward_flops)),
        backward_matmuls=_sums(of(lambda b: max(b.backward_matmuls, 1))),
        backward_elements=_sums(of(lambda b: b.backward_elements)),
        tail_flops=_sums(tail * of(lambda b: b.forward_flops)),
        tail_matmuls=_sums(tail * forward_matmuls),
        tail_elements=_sums(tail * of(lambda b: b.forward_elements)),
        tail_saved_bytes=_sums(tail * of(lambda b: b.saved_bytes)))


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
