"""Counts the annotated model for the planner (ipu_options/plan), from its configuration alone."""
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
from qa.model.roberta import model_class


def make_counter(model_config, *, max_seq_length: int, windows_per_row: int = 1,
                 precision: str = "float16") -> BlockCounter:
    """Return a function that counts the blocks of a model for given settings.

    Its signature is count(micro_batch_size, embedding_serialization_factor=1), and it returns the
    CountedBlocks in the order of execution. Rows have `max_seq_length` tokens and room for
    `windows_per_row` windows. precision: "float16" or "float32".

    The model is counted for one and for two rows, from which the counts of any micro-batch follow.
    For a serialised embedding, only a model of one layer is counted: the other blocks are those of
    the model without serialisation.
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
                embedding_serialization_factor: int) -> List[List[CountedBlock]]:
    """Return two lists of counted blocks, for a micro-batch of one row and for one of two rows.

    The model is built on the meta device with the kernels that an IPU runs, and annotated as for
    training. The counts do not depend on which block is on which IPU. See `make_counter` for the
    arguments.
    """
    with torch.device("meta"):
        model = model_class(model_config)(model_config, IPU_KERNELS)
    model = (model.half() if precision == "float16" else model).train()
    layout = make_layout([model_config.num_hidden_layers], model_config.num_hidden_layers)
    blocks = parallelize(model, layout,
                         embedding_serialization_factor=embedding_serialization_factor)
    named = [(block.name, block.kind, block.module) for block in blocks]
    with torch.device("meta"):  # for the tensors that the forward pass creates
        return [
            count_blocks(model, named, _meta_rows(rows, max_seq_length, windows_per_row))
            for rows in (1, 2)]


def _meta_rows(rows: int, length: int, windows: int) -> dict:
    """Return a micro-batch of training rows (qa/data/rows.py) with shapes but without values."""
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="meta")

    return {
        "input_ids": ints(rows, length), "position_ids": ints(rows, length),
        "window_ids": ints(rows, length), "start_positions": ints(rows, windows),
        "end_positions": ints(rows, windows),
        "loss_weights": torch.zeros(rows, windows, device="meta")}
