"""Counts what each block of a model needs, by running the model itself once.

Training is counted forward and backward, inference forward only. On the meta device this needs
neither weights nor arithmetic. In the forward pass, an operation is counted for the block that
began last, which is also PopTorch's rule ("operations after a BeginBlock belong to the last one
begun"). In the backward pass, it is counted for the block that saved the tensors in use. Since the
real model runs, the counts follow from the checkpoint, the row length and any edit to a layer.
"""
from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import fields, replace
from functools import lru_cache, partial
from typing import Any, Dict, Iterable, List, Sequence, Tuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ipu_options.ipu_kernels import IPU_KERNELS
from ipu_options.layout import make_layout
from planner.job import BlockCounter, CountedBlock
from qa.families import row_kind
from qa.model.parallelize import parallelize
from qa.model.roberta import model_class

_COUNTS: Dict[Tuple, List[List[CountedBlock]]] = {}  # by all that it depends on


def make_counter(model_config, *, max_seq_length: int, max_windows_per_row: int = 1,
                 precision: str = "float16", training: bool = True) -> BlockCounter:
    """Return count(micro_batch_size, embedding_serialization_factor=1, pack=False, halves=False).

    It returns the CountedBlocks in the order of execution. Rows have `max_seq_length` tokens and
    room for one window, with `pack` for `max_windows_per_row`. training: False counts the forward
    pass in evaluation mode. halves: count attention and feed-forward of each layer as two blocks.

    The model is counted for two and for three rows, from which any micro-batch follows. Of its
    layers, the first, the second and the last are run: those in between are like the second. The
    factor changes the embedding alone, for which one layer is run. What was counted once is kept.
    """
    layers = model_config.num_hidden_layers
    of_all = (type(model_config), model_config.to_json_string(), max_seq_length, precision,
              training)

    def counted(most_layers: int, factor: int, windows: int,
                halves: bool) -> List[List[CountedBlock]]:
        key = (*of_all, most_layers, factor, windows, halves)
        if key not in _COUNTS:
            small = deepcopy(model_config)
            small.num_hidden_layers = min(layers, most_layers)
            _COUNTS[key] = count_model(small, max_seq_length, windows, precision, factor, training,
                                       halves)
        return _COUNTS[key]

    @lru_cache(maxsize=256)
    def count(micro_batch_size: int, embedding_serialization_factor: int = 1, pack: bool = False,
              halves: bool = False) -> Tuple[CountedBlock, ...]:
        windows = max_windows_per_row if pack else 1
        embeddings = counted(1, embedding_serialization_factor, windows, False)
        others = counted(3, 1, windows, halves)
        both = [_with_layers([embedding, *blocks], layers, 2 if halves else 1)
                for (embedding, *_), (_, *blocks) in zip(embeddings, others)]
        return tuple(for_micro_batch(*both, micro_batch_size))

    return count


def count_model(model_config, max_seq_length: int, windows_per_row: int, precision: str,
                embedding_serialization_factor: int, training: bool = True,
                halves: bool = False) -> List[List[CountedBlock]]:
    """Return the blocks of two and of three rows, with an IPU's kernels; see `make_counter`."""
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

    ELECTRA's linear layer after the embeddings and DeBERTa's embeddings of distances run in their
    block, but not in its module. The output has the shape of a layer's.
    """
    rest = sum(p.numel() for p in model.parameters()) - sum(block.parameters for block in blocks)
    if not rest:
        return blocks
    embedding = replace(blocks[0], parameters=blocks[0].parameters + rest,
                        output_bytes=blocks[1].output_bytes)
    return [embedding, *blocks[1:]]


def _with_layers(blocks: List[CountedBlock], layers: int, parts: int) -> List[CountedBlock]:
    """Return the blocks of a model of `layers` layers of `parts` blocks, from at most 3 layers."""
    more = [blocks[1 + parts + i % parts] for i in range(parts * max(0, layers - 3))]
    every = blocks[1:1 + 2 * parts] + more + blocks[1 + 2 * parts:-1]
    return [blocks[0], *(replace(block, name=f"Encoder {i}") for i, block in enumerate(every)),
            blocks[-1]]


def _count_halves(model, named, inputs) -> List[CountedBlock]:
    """Return what count_blocks does, with attention and feed-forward of a layer as two blocks."""
    # The second begins at the first linear layer. The hooks count all parameters for the first, and
    # that linear layer's parameters and output for the second.
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
    """Return a micro-batch of rows (qa/data/rows.py) without values; inference has no labels."""
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


def count_blocks(model: torch.nn.Module, blocks: Sequence[Tuple[str, str, torch.nn.Module]],
                 inputs: Dict[str, torch.Tensor]) -> List[CountedBlock]:
    """Run the model once and return the counts of each of `blocks`.

    model: in training mode, `model(**inputs)` returns the loss, and the backward pass follows.
    blocks: (name, kind, module) in the order of execution; each module is called once. Counted is
    what PopART computes and keeps (tests/planner/test_popart_facts.py), see `_OperationCounter`.
    """
    counter = _OperationCounter(len(blocks), model.parameters())
    with ExitStack() as hooks:
        for index, (_, _, module) in enumerate(blocks):
            hooks.enter_context(module.register_forward_pre_hook(partial(counter.begin, index)))
            hooks.enter_context(module.register_forward_hook(partial(counter.end, index)))
        saving = saved_tensors_hooks(counter.pack, counter.unpack)
        with torch.set_grad_enabled(model.training), saving, counter:
            loss = model(**inputs)
            if model.training:
                counter.direction = "backward"
                loss.backward()
    model.zero_grad(set_to_none=True)
    return [CountedBlock(name, kind, sum(p.numel() for p in module.parameters()),
                         max(p.numel() for p in module.parameters()), **counted)
            for (name, kind, module), counted in zip(blocks, counter.counts)]


def for_micro_batch(two: Sequence[CountedBlock], three: Sequence[CountedBlock],
                    micro_batch_size: int) -> List[CountedBlock]:
    """Return the counts of any rows, in which all are linear; torch leaves out copies for one."""
    return [replace(a, **{
        name: getattr(a, name) + (micro_batch_size - 2) * (getattr(b, name) - getattr(a, name))
        for name in _COUNTED}) for a, b in zip(two, three)]


_COUNTED = [f.name for f in fields(CountedBlock)][4:]  # from forward_flops on


class _OperationCounter(TorchDispatchMode):
    """Adds the operations that reach the dispatcher to `block`, the counts of the block at hand.

    torch.utils.flop_counter came after torch 2.0 and counts matrix multiplications only.

    free: the storages that PopART neither computes nor keeps: parameters, parameters joined to one,
    whose gradient is cut into theirs, and dropout masks, which it makes again from the seed in the
    backward pass (popart, willow/src/op/dropout.cpp, getGradOps). Kept alive, none is reused.
    """

    def __init__(self, blocks: int, parameters: Iterable[torch.Tensor]):
        super().__init__()
        self.counts = [dict.fromkeys(_COUNTED, 0) for _ in range(blocks)]
        self.current = 0
        self.direction = "forward"
        self.free = {_storage(parameter): parameter for parameter in parameters}
        self.saved: Dict[int, torch.Tensor] = {}  # kept alive, too

    @property
    def block(self) -> Dict[str, int]:
        return self.counts[self.current]

    def begin(self, index: int, module: torch.nn.Module, args: Tuple[Any, ...]) -> None:
        self.current = index
        self.block["input_bytes"] = sum(_bytes(arg) for arg in args)
        self.block["handed_bytes"] = sum(
            _bytes(arg) for arg in args[1:] if arg.is_floating_point())

    def end(self, index: int, module: torch.nn.Module, args: Tuple[Any, ...],
            output: torch.Tensor) -> None:
        self.counts[index]["output_bytes"] = _bytes(output)

    def pack(self, tensor: torch.Tensor) -> Tuple[torch.Tensor, int]:
        key = _storage(tensor)
        if key not in self.free and key not in self.saved:
            self.saved[key] = tensor
            size = tensor.untyped_storage().nbytes()
            self.block["saved_bytes"] += size
            self.block["saved_results"] += size * (size == self.block["result_bytes"])
        return tensor, self.current

    def unpack(self, packed: Tuple[torch.Tensor, int]) -> torch.Tensor:
        tensor, self.current = packed
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        operation = function.overloadpacket
        first = result[0] if isinstance(result, (tuple, list)) else result
        place = _LEFT_OPERAND.get(operation)
        if place is not None:
            self._add_matmul(args[place], args[place + 1], result)
        if operation is _aten.bernoulli_:
            self.free[_storage(first)] = first
        if operation is _aten.cat and all(_storage(part) in self.free for part in args[0]):
            self.free[_storage(first)] = first
            self.block["backward_elements"] += first.numel()
        if (place in (None, 1) and operation not in _NO_WORK and _storage(first) not in self.free
                and not _is_view(function, first, args)):
            of = args[0] if operation is _aten.sum else first
            self.block[self.direction + "_elements"] += _PASSES.get(operation, 1) * of.numel()
        if self.direction == "forward" and _storage(first) not in self.free:
            self.block["result_bytes"] = max(self.block["result_bytes"], _bytes(first))
        return result

    def _add_matmul(self, left: torch.Tensor, right: torch.Tensor, result: torch.Tensor) -> None:
        block, flops = self.block, 2 * result.numel() * left.shape[-1]
        block[self.direction + "_flops"] += flops
        block[self.direction + "_matmuls"] += 1
        if flops > block["matmul_flops"]:
            block["matmul_flops"], block["large_flops"] = flops, 0
        block["large_flops"] += flops * (flops == block["matmul_flops"])
        if self.direction == "forward" and left.dim() == 2:
            block["linear_bytes"] = max(block["linear_bytes"], _bytes(result))


_aten = torch.ops.aten
# The position of the left operand among an operation's arguments; the right one follows it. Those
# that have another argument in front of it also add that one to the product.
_LEFT_OPERAND = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1}
# How often an operation passes over its data, if more than once. Softmax finds the maximum, takes
# exponentials, sums and divides; its gradient multiplies, sums, and subtracts a product.
# LayerNorm finds mean and variance, normalises and scales; its gradient takes one pass more.
_PASSES = {
    _aten._softmax: 4, _aten._log_softmax: 4, _aten._softmax_backward_data: 3,
    _aten._log_softmax_backward_data: 3, _aten.native_layer_norm: 4,
    _aten.native_layer_norm_backward: 5}
# These reserve memory and compute nothing; torch copies in the last two what PopART views.
_NO_WORK = (_aten.empty, _aten.empty_like, _aten.new_empty, _aten.detach, _aten._unsafe_view,
            _aten.clone, _aten.cat)


def _is_view(function, result: torch.Tensor, args: Sequence[Any]) -> bool:
    """Return whether an operation has only made a view of one of its arguments."""
    return not function._schema.is_mutable and any(
        isinstance(arg, torch.Tensor) and _storage(arg) == _storage(result) for arg in args)


def _storage(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's storage; data_ptr() is 0 for all on the meta device."""
    return tensor.untyped_storage()._cdata


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
