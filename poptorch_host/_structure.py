"""Nested arguments and results of a model: tensors in lists, tuples and dictionaries."""
from __future__ import annotations

from typing import Any, Callable, Iterator, List

import torch


def flatten(value: Any) -> List[torch.Tensor]:
    """Return all tensors in `value`, depth first."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in flatten(item)] if isinstance(value, (list, tuple)) else []


def rebuild(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """Return a copy of `value` with its tensors replaced, in the order of `flatten`."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return type(value)({key: rebuild(item, tensors) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rebuild(item, tensors) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(rebuild(item, tensors) for item in value)
    return value


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return a copy of `value` with `function` applied to each of its tensors."""
    return rebuild(value, iter([function(t) for t in flatten(value)]))
