"""Counts what each block of a model needs, by running the model itself once, forward and backward.

On the meta device this needs neither weights nor arithmetic. In the forward pass, an operation is
counted for the block that began last, which is also PopTorch's rule ("operations after a BeginBlock
belong to the last one begun"). In the backward pass, it is counted for the block that saved the
tensors in use. Since the real model runs, the counts follow from the checkpoint, the row length and
any edit to a layer.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class CountedBlock:
    """The counts of one block for one micro-batch.

    Bytes are those of the model's own types. A multiply-add counts as two FLOPs.
    """

    name: str
    kind: str                # "embedding", "layer" or "head"
    parameters: int = 0
    largest_parameter: int = 0   # elements of the largest parameter tensor
    forward_flops: int = 0
    backward_flops: int = 0
    forward_matmuls: int = 0     # number of matrix multiplications
    backward_matmuls: int = 0
    # What autograd keeps for the backward pass: each storage once, without parameters.
    saved_bytes: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    matmul_bytes: int = 0    # operands and result of the largest matrix multiplication


def count_blocks(model: torch.nn.Module, blocks: Sequence[Tuple[str, str, torch.nn.Module]],
                 inputs: Dict[str, torch.Tensor]) -> List[CountedBlock]:
    """Run the model forward and backward once and return the counts of each of `blocks`.

    model: `model(**inputs)` must return the loss. blocks: (name, kind, module) in the order of
    execution; the model must call each module once. inputs: one micro-batch.
    """
    counts = [dict.fromkeys(_COUNTED, 0) for _ in blocks]
    current = [0]
    saved: Dict[int, torch.Tensor] = {}
    own = {_storage(p) for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> Tuple[torch.Tensor, int]:
        key = _storage(tensor)
        if key not in own and key not in saved:
            saved[key] = tensor  # kept alive, so that no other tensor can reuse its storage
            counts[current[0]]["saved_bytes"] += tensor.untyped_storage().nbytes()
        return tensor, current[0]

    def unpack(packed: Tuple[torch.Tensor, int]) -> torch.Tensor:
        current[0] = packed[1]
        return packed[0]

    handles = [
        handle for i, (_, _, module) in enumerate(blocks)
        for handle in _watch(module, i, counts[i], current)]
    mode = _MatmulCounter(lambda: counts[current[0]])
    try:
        with saved_tensors_hooks(pack, unpack), mode:
            loss = model(**inputs)
            mode.direction = "backward"
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return [CountedBlock(name, kind, sum(p.numel() for p in module.parameters()),
                         max(p.numel() for p in module.parameters()), **counted)
            for (name, kind, module), counted in zip(blocks, counts)]


def for_micro_batch(one: Sequence[CountedBlock], two: Sequence[CountedBlock],
                    micro_batch_size: int) -> List[CountedBlock]:
    """Return the counts for `micro_batch_size` rows, given those for one row and for two rows.

    Every count is linear in the number of rows: a constant and an amount per row.
    """
    def scaled(a: CountedBlock, b: CountedBlock) -> CountedBlock:
        values = {
            name: getattr(a, name) + (micro_batch_size - 1) * (getattr(b, name) - getattr(a, name))
            for name in _COUNTED}
        return replace(a, **values)
    return [scaled(a, b) for a, b in zip(one, two)]


_COUNTED = ("forward_flops", "backward_flops", "forward_matmuls", "backward_matmuls", "saved_bytes",
            "input_bytes", "output_bytes", "matmul_bytes")


class _MatmulCounter(TorchDispatchMode):
    """Adds the matrix multiplications that reach the dispatcher to the counts of a block.

    block(): returns the counts of the block at hand. torch.utils.flop_counter is not used because
    it came after torch 2.0.
    """

    def __init__(self, block: Callable[[], Dict[str, int]]):
        super().__init__()
        self.block = block
        self.direction = "forward"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        place = _LEFT_OPERAND.get(function.overloadpacket)
        if place is not None:
            left, right = args[place], args[place + 1]
            block = self.block()
            block[self.direction + "_flops"] += 2 * result.numel() * left.shape[-1]
            block[self.direction + "_matmuls"] += 1
            block["matmul_bytes"] = max(block["matmul_bytes"],
                                        _bytes(left) + _bytes(right) + _bytes(result))
        return result


_aten = torch.ops.aten
# The position of the left operand among an operation's arguments; the right one follows it.
_LEFT_OPERAND = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1}


def _watch(module: torch.nn.Module, index: int, count: Dict[str, int],
           current: List[int]) -> List[Any]:
    """Hook the module of block `index` and return the handles of the hooks.

    They set current[0] to `index` when the block begins, and count its input and output bytes.
    """
    def begin(module, args):
        current[0] = index
        count["input_bytes"] = sum(_bytes(arg) for arg in args)

    def end(module, args, output):
        count["output_bytes"] = _bytes(output)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def _storage(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's storage; data_ptr() is 0 for all on the meta device."""
    return tensor.untyped_storage()._cdata


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
