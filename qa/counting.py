"""The annotated model, counted for the planner (ipu_options/plan): needs a config at most, and no weights."""
from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from typing import Iterator, List

import torch

import qa.model
from ipu_options import ipu_kernels
from ipu_options.layout import make_layout
from ipu_options.plan.count import CountedBlock, count_blocks, for_micro_batch
from ipu_options.plan.job import Counter


def make_counter(model_config, *, max_seq_length: int, windows_per_row: int = 1, precision: str = "float16") -> Counter:
    """count(micro_batch_size, embedding_serialization_factor) -> the blocks of a RobertaForSpans of `model_config`, counted.

    Rows have `max_seq_length` tokens and room for `windows_per_row` windows. The model is counted for one and for two rows,
    from which every micro-batch follows; a serialised embedding is counted in a model of one layer.
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


def count_model(model_config, max_seq_length: int, windows_per_row: int, precision: str, embedding_serialization_factor: int,
                ) -> List[List[CountedBlock]]:
    """The counted blocks for micro-batches of one and of two rows. The model is built on the meta device and annotated as
    for training; on which IPUs does not matter to the counts."""
    with torch.device("meta"):
        model = qa.model.RobertaForSpans(model_config)
    model = (model.half() if precision == "float16" else model).train()
    layout = make_layout([model_config.num_hidden_layers], model_config.num_hidden_layers)
    blocks = qa.model.annotate(model, layout, embedding_serialization_factor=embedding_serialization_factor)
    kinds = ["embedding"] + ["layer"] * model_config.num_hidden_layers + ["head"]
    named = [(block.name, kind, block.module) for block, kind in zip(blocks, kinds)]
    with _ipu_kernels(), torch.device("meta"):  # the device context is for tensors that the forward pass makes itself
        return [count_blocks(model, named, _meta_rows(rows, max_seq_length, windows_per_row)) for rows in (1, 2)]


def _meta_rows(rows: int, length: int, windows: int) -> dict:
    """A micro-batch of training rows (qa/rows.py) that has shapes and no values."""
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="meta")
    return {"input_ids": ints(rows, length), "position_ids": ints(rows, length), "window_ids": ints(rows, length),
            "start_positions": ints(rows, windows), "end_positions": ints(rows, windows),
            "loss_weights": torch.zeros(rows, windows, device="meta")}


@contextmanager
def _ipu_kernels() -> Iterator[None]:
    """Let the model run the kernels that an IPU runs, whichever this machine's PopTorch brings."""
    here, qa.model.kernels = qa.model.kernels, ipu_kernels
    try:
        yield
    finally:
        qa.model.kernels = here
