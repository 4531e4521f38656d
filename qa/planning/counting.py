"""The annotated model, counted for the planner (ipu_options/plan): needs a config at most, and no
weights.
"""
from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import List

import torch

from ipu_options.ipu_kernels import IPU_KERNELS
from ipu_options.layout import make_layout
from ipu_options.plan.count import CountedBlock, count_blocks, for_micro_batch
from ipu_options.plan.job import BlockCounter
from qa.model.parallelize import parallelize
from qa.model.roberta import RobertaForSpans


def make_counter(model_config, *, max_seq_length: int, windows_per_row: int = 1,
                 precision: str = "float16") -> BlockCounter:
    """count(micro_batch_size, embedding_serialization_factor) -> the blocks of a RobertaForSpans of
    `model_config`, counted.

    Rows have `max_seq_length` tokens and room for `windows_per_row` windows. The model is counted
    for one and for two rows, from which every micro-batch follows; a serialised embedding is
    counted in a model of one layer.
    """
    @lru_cache(maxsize=None)
    def counted(factor: int) -> List[List[CountedBlock]]:
        if factor == 1:
            return count_model(model_config, max_seq_length, windows_per_row, precision, factor)
        small = deepcopy(model_config)
        small.num_hidden_layers = 1
        serialised = count_model(small, max_seq_length, windows_per_row, precision, factor)
        return [[blocks[0]] + whole[1:] for blocks, whole in zip(serialised, counted(1))]

    def count(micro_batch_size: int, embedding_serialization_factor: int = 1) -> List[CountedBlock]:
        return for_micro_batch(*counted(embedding_serialization_factor), micro_batch_size)

    return count


def count_model(model_config, max_seq_length: int, windows_per_row: int, precision: str,
                embedding_serialization_factor: int,
                ) -> List[List[CountedBlock]]:
    """The counted blocks for micro-batches of one and of two rows.

    The model is built on the meta device, with the kernels that an IPU runs, and annotated as for
    training; on which IPUs makes no difference to the counts.
    """
    with torch.device("meta"):
        model = RobertaForSpans(model_config, IPU_KERNELS)
    model = (model.half() if precision == "float16" else model).train()
    layout = make_layout([model_config.num_hidden_layers], model_config.num_hidden_layers)
    blocks = parallelize(model, layout,
                         embedding_serialization_factor=embedding_serialization_factor)
    named = [(block.name, block.kind, block.module) for block in blocks]
    with torch.device("meta"):  # for the tensors that the forward pass makes itself
        return [
            count_blocks(model, named, _meta_rows(rows, max_seq_length, windows_per_row))
            for rows in (1, 2)]


def _meta_rows(rows: int, length: int, windows: int) -> dict:
    """A micro-batch of training rows (qa/data/rows.py) that has shapes and no values."""
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="meta")

    return {
        "input_ids": ints(rows, length), "position_ids": ints(rows, length), "window_ids": ints(
            rows, length), "start_positions": ints(rows, windows), "end_positions": ints(
                rows, windows), "loss_weights": torch.zeros(rows, windows, device="meta")}
