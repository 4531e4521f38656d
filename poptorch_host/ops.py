"""PopTorch's operations: on the host, ordinary PyTorch with PopTorch's checks of the arguments."""
from __future__ import annotations

import contextlib
import functools
from typing import Callable, List, Optional, Tuple

import torch

# (loss, whether identity_loss marked it) for each loss of the running forward pass
marked_losses: Optional[List[Tuple[torch.Tensor, bool]]] = None
unchecked = False  # whether a function of the host's own is running


def for_the_host(function: Callable) -> Callable:
    """Let `function`, which a host runs in place of an IPU's operations, read tensors' values.

    It may use all of PyTorch. (PopTorch has no such decorator.)
    """
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        global unchecked
        before, unchecked = unchecked, True
        try:
            return function(*args, **kwargs)
        finally:
            unchecked = before
    return wrapper


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


class Attribute(contextlib.nullcontext):
    """A context manager that sets attributes of operations, which only PopTorch's compiler reads.

    Each keyword argument maps the name of an attribute to a dictionary: attribute={"key": value}.
    """

    def __init__(self, **kwargs):
        super().__init__()
