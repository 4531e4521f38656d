"""PopTorch's operations.

On the host each of them is ordinary PyTorch, with PopTorch's checks of its arguments.
"""
from __future__ import annotations

import copy
import sys
from typing import List, Optional, Tuple

import torch

from . import enums
from ._errors import Error

# (loss, whether identity_loss marked it) for each loss of the running forward pass
marked_losses: Optional[List[Tuple[torch.Tensor, bool]]] = None
_running = False  # True while the executor runs a model


def isRunningOnIpu() -> bool:
    """Return whether an executor is running the model.

    This is also True on the host, so that a model takes the same branch as on an IPU.
    """
    return _running


def identity_loss(x: torch.Tensor, reduction: str) -> torch.Tensor:
    """Mark `x` as the loss from which the backward pass starts, and return the reduced loss.

    `reduction` is "sum", "mean" or "none".
    """
    assert reduction in ("sum", "mean", "none"), "Unsupported reduction type!"
    loss = x.sum() if reduction == "sum" else x.mean() if reduction == "mean" else x.clone()
    if marked_losses is not None:
        marked_losses.append((loss, True))
    return loss


def recomputationCheckpoint(*tensors: List[torch.Tensor]) -> List[torch.Tensor]:
    """Keep these activations for the backward pass instead of recomputing them.

    The host recomputes nothing and returns them unchanged: a single tensor, list or tuple as it is,
    several tensors as a tuple. Raises ValueError for anything that is not a tensor.
    """
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        return type(tensors[0])(recomputationCheckpoint(*tensors[0]))
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        raise ValueError("All inputs must be tensors")
    return tensors[0] if len(tensors) == 1 else tensors


def serializedMatMul(lhs: torch.Tensor, rhs: torch.Tensor, mode: enums.MatMulSerializationMode,
                     factor: int = 0, keep_precision: bool = False) -> torch.Tensor:
    """Return torch.matmul(lhs, rhs), which an IPU computes in `factor` parts to save memory.

    Raises Error if `factor` does not divide the dimension that `mode` splits.
    """
    assert isinstance(keep_precision, bool)
    assert isinstance(factor, int)
    assert isinstance(mode, enums.MatMulSerializationMode)
    split = {
        enums.MatMulSerializationMode.InputChannels: lhs.shape[-2],
        enums.MatMulSerializationMode.ReducingDim: lhs.shape[-1],
        enums.MatMulSerializationMode.OutputChannels: rhs.shape[-1]}.get(mode)
    if split is not None and (factor < 1 or split % factor):
        raise Error(
            f"serializedMatMul: factor ({factor}) must be a positive divisor of the dimension "
            f"split by {mode.name} ({split})")
    return torch.matmul(lhs, rhs)


def set_available_memory(tensor: torch.Tensor, available_memory_proportion: float) -> torch.Tensor:
    """Set the share of memory for temporary data of the operation that computed `tensor`.

    Returns `tensor`; on the host there is no other effect.
    """
    if not isinstance(tensor, torch.Tensor):
        raise Error(
            f"You may only set available memory for torch.tensor values. {type(tensor)} is not "
            "supported.")
    return tensor


def ipu_print_tensor(tensor: torch.Tensor, title: str = "", print_gradient: bool = True,
                     summarise_threshold: int = 1000, edge_items: int = 3, max_line_width: int = 80,
                     digits: int = 4, float_format: str = "auto", separator: str = ", ",
                     open_bracket: str = "(", close_bracket: str = ")") -> torch.Tensor:
    """Print `tensor` and its gradient whenever they are computed. Returns `tensor`.

    The host prints to standard error, in torch's format: the arguments after `print_gradient` have
    no effect.
    """
    if not isinstance(tensor, torch.Tensor):
        raise Error(
            f"ipu print tensor must take a torch.tensor argument. {type(tensor)} is not supported.")
    print(f"{title}: {tensor.detach()}", file=sys.stderr)
    if print_gradient and tensor.requires_grad:
        tensor.register_hook(
            lambda gradient: print(f"{title}_gradient: {gradient}", file=sys.stderr))
    return tensor


def nop(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`."""
    if not isinstance(tensor, torch.Tensor):
        raise Error(f"nop must take a torch.tensor argument. {type(tensor)} is not supported.")
    return tensor


class NameScope:
    """A context manager that prefixes operation names in PopART's graph; no effect on the host."""

    def __init__(self, name: str):
        assert isinstance(name, str), "Parameter to NameScope must be a string"
        self.name = name

    def __enter__(self):
        pass

    def __exit__(self, type, value, traceback):
        pass


class Attribute:
    """A context manager that sets attributes of operations, which only PopTorch's compiler reads.

    Each keyword argument maps the name of an attribute to a dictionary: attribute={"key": value}.
    """

    _current_attrs: dict = {}

    def __init__(self, **kwargs):
        self._kwargs = kwargs
        self._saved: list = []

    def __enter__(self):
        self._saved.append(Attribute._current_attrs)
        Attribute._current_attrs = copy.deepcopy(Attribute._current_attrs)
        for attribute, values in self._kwargs.items():
            Attribute._current_attrs.setdefault(attribute, {}).update(values)

    def __exit__(self, type, value, traceback):
        Attribute._current_attrs = self._saved.pop()
