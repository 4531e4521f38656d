"""Counts the annotated model for the planner (ipu_options/plan), from its configuration alone."""
from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Dict, List, Tuple

import torch

from ipu_options.ipu_kernels import IPU_KERNELS
from ipu_options.layout import make_layout
from planner.count import CountedBlock, count_blocks, for_micro_batch
from planner.job import BlockCounter
from qa.model.families import row_kind
from qa.model.parallelize import parallelize
from qa.model.roberta import model_class

_COUNTED: Dict[Tuple, List[List[CountedBlock]]] = {}  # by all that it depends on


def make_counter(model_config, *, max_seq_length: int, windows_per_row: int = 1,
                 precision: str = "float16", training: bool = True) -> BlockCounter:
    """Return a function that counts the blocks of a model for given settings.

    Its signature is count(micro_batch_size, embedding_serialization_factor=1, halves=False), and it
    returns the CountedBlocks in the order of execution. Rows have `max_seq_length` tokens and room
    for `windows_per_row` windows. precision: "float16" or "float32". training: False counts the
    forward pass in evaluation mode. halves: count attention and feed-forward of each layer as two
    blocks.

    The model is counted for two and for three rows, from which the counts of any micro-batch
    follow. Of its layers, only the first, the second and the last are run: those in between are
    like the second. The factor changes the embedding alone, for which one layer is run. What was
    counted once is not counted again by another counter of such a model.
    """
    layers = model_config.num_hidden_layers
    of_all = (type(model_config), model_config.to_json_string(), max_seq_length, windows_per_row,
              precision, training)

    def counted(most_layers: int, factor: int, halves: bool) -> List[List[CountedBlock]]:
        key = (*of_all, most_layers, factor, halves)
        if key not in _COUNTED:
            small = deepcopy(model_config)
            small.num_hidden_layers = min(layers, most_layers)
            _COUNTED[key] = count_model(small, max_seq_length, windows_per_row, precision, factor,
                                        training, halves)
        return _COUNTED[key]

    def count(micro_batch_size: int, embedding_serialization_factor: int = 1,
              halves: bool = False) -> List[CountedBlock]:
        embeddings = counted(1, embedding_serialization_factor, False)
        both = [_with_layers([embedding, *blocks], layers, 2 if halves else 1)
                for (embedding, *_), (_, *blocks) in zip(embeddings, counted(3, 1, halves))]
        return for_micro_batch(*both, micro_batch_size)

    return count


def count_model(model_config, max_seq_length: int, windows_per_row: int, precision: str,
                embedding_serialization_factor: int, training: bool = True,
                halves: bool = False) -> List[List[CountedBlock]]:
    """Return two lists of counted blocks, for micro-batches of two and of three rows.

    The model is built on the meta device with the kernels that an IPU runs, and annotated as for
    training. The counts do not depend on which block is on which IPU. See `make_counter` for the
    arguments.
    """
    with torch.device("meta"):
        model = model_class(model_config)(model_config, IPU_KERNELS)
    model = (model.half() if precision == "float16" else model).train(training)
    layout = make_layout([model_config.num_hidden_layers], model_config.num_hidden_layers)
    blocks = parallelize(model, layout,
                         embedding_serialization_factor=embedding_serialization_factor)
    named = [(block.name, block.kind, block.module) for block in blocks]
    token_types = "token_types" in row_kind(model_config)
    with torch.device("meta"):  # for the tensors that the forward pass creates
        counted = [
            (_count_halves if halves else count_blocks)(
                model, named, _meta_rows(rows, max_seq_length, windows_per_row, training,
                                         token_types))
            for rows in (2, 3)]
    return [_with_projection(model, each) for each in counted]


def _with_projection(model, blocks: List[CountedBlock]) -> List[CountedBlock]:
    """Return the blocks with all parameters of the model.

    A linear layer between the embeddings and the first layer (ELECTRA) runs in the embedding's
    block, but is no part of its module. What it passes on has the shape of a layer's output.
    """
    rest = sum(p.numel() for p in model.parameters()) - sum(block.parameters for block in blocks)
    if not rest:
        return blocks
    embedding = replace(blocks[0], parameters=blocks[0].parameters + rest,
                        output_bytes=blocks[1].output_bytes)
    return [embedding, *blocks[1:]]


def _with_layers(blocks: List[CountedBlock], layers: int, parts: int) -> List[CountedBlock]:
    """Return the blocks of a model of `layers` layers, given those of a model of at most 3.

    parts: blocks of a layer.
    """
    more = [blocks[1 + parts + i % parts] for i in range(parts * max(0, layers - 3))]
    every = blocks[1:1 + 2 * parts] + more + blocks[1 + 2 * parts:-1]
    return [blocks[0], *(replace(block, name=f"Encoder {i}") for i, block in enumerate(every)),
            blocks[-1]]


def _count_halves(model, named, inputs) -> List[CountedBlock]:
    """Return what count_blocks returns, with two blocks for each layer.

    They are attention and feed-forward; the latter begins where the model calls its first linear
    layer. The hooks count the whole layer's parameters for the first, and that linear layer's
    parameters and output for the second, which is corrected here.
    """
    embedding, *layers, head = named
    parts = [embedding]
    for name, kind, layer in layers:
        parts += [(name, kind, layer), (name, kind, layer.parts.inner)]
    counted = count_blocks(model, parts + [head], inputs)
    for i in range(1, len(parts), 2):
        first, second = counted[i], counted[i + 1]
        layer = parts[i][2].parts
        own = sum(p.numel() for module in (layer.inner, layer.outer, layer.outer_norm)
                  for p in module.parameters())
        counted[i] = replace(first, parameters=first.parameters - own)
        counted[i + 1] = replace(second, parameters=own, output_bytes=first.output_bytes)
    return counted


def _meta_rows(rows: int, length: int, windows: int, training: bool, token_types: bool) -> dict:
    """Return a micro-batch of rows (qa/data/rows.py) with shapes but without values.

    Rows for inference have no labels.
    """
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="meta")

    tokens = {name: ints(rows, length) for name in ("input_ids", "position_ids", "window_ids")}
    if token_types:
        tokens["token_type_ids"] = ints(rows, length)
    if not training:
        return tokens
    return {
        **tokens, "start_positions": ints(rows, windows), "end_positions": ints(rows, windows),
        "loss_weights": torch.zeros(rows, windows, device="meta")}
