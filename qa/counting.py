"""The annotated model, counted for the planner (ipu_options/plan): needs a config.json at most, and no weights."""
from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, List

import torch

import qa.model
from ipu_options import kernels
from ipu_options.layout import Layout
from ipu_options.plan.count import CountedBlock, count_blocks, for_micro_batch


def count_model(model_config, layout: Layout, *, max_seq_length: int, windows_per_row: int = 1, micro_batch_size: int = 1,
                precision: str = "float16", recompute_checkpoint_every_layer: bool = True,
                embedding_serialization_factor: int = 1) -> List[CountedBlock]:
    """Count the blocks of a RobertaForSpans of `model_config` (a transformers config) for one micro-batch.

    Built on the meta device, annotated as for training, and run with rows of `max_seq_length` tokens and
    `windows_per_row` windows. Counted for one and for two rows, from which any micro-batch follows.
    """
    with torch.device("meta"):
        model = qa.model.RobertaForSpans(model_config)
    model = (model.half() if precision == "float16" else model).train()
    blocks = qa.model.annotate(model, layout, recompute_checkpoint_every_layer=recompute_checkpoint_every_layer,
                               embedding_serialization_factor=embedding_serialization_factor)
    named = [(block.name, kind, block.module) for block, kind in zip(blocks, _kinds(len(blocks)))]
    with ipu_kernels(), torch.device("meta"):  # the device context is for tensors that the forward pass makes itself
        counts = [count_blocks(model, named, meta_rows(rows, max_seq_length, windows_per_row)) for rows in (1, 2)]
    return for_micro_batch(*counts, micro_batch_size)


def meta_rows(rows: int, length: int, windows: int) -> dict:
    """A micro-batch of training rows (qa/rows.py) that has shapes and no values."""
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="meta")
    return {"input_ids": ints(rows, length), "position_ids": ints(rows, length), "window_ids": ints(rows, length),
            "start_positions": ints(rows, windows), "end_positions": ints(rows, windows),
            "loss_weights": torch.zeros(rows, windows, device="meta")}


@contextmanager
def ipu_kernels() -> Iterator[None]:
    """Let the model run the attention that an IPU runs, whichever kernels this machine's PopTorch brings."""
    here, qa.model.attention = qa.model.attention, kernels.attention
    try:
        yield
    finally:
        qa.model.attention = here


def _kinds(blocks: int) -> List[str]:
    return ["embedding"] + ["layer"] * (blocks - 2) + ["head"]
