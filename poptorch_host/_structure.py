"""Nested arguments and results of a model.

They hold tensors in lists, tuples, dictionaries and types for which a parser is registered.
"""
from __future__ import annotations

import abc
from typing import Any, Callable, Dict, Iterator, List, Optional, Type

import torch

from ._errors import Error

_parsers: Dict[type, "ICustomArgParser"] = {}


class ICustomArgParser(abc.ABC):
    """The interface of a parser, which extracts and replaces the tensors of a user-defined type."""

    @abc.abstractmethod
    def yieldTensors(self, struct: Any) -> Iterator[torch.Tensor]:
        """Yield every tensor in `struct`, always in the same order."""

    @abc.abstractmethod
    def reconstruct(self, original_structure: Any, tensor_iterator: Iterator[torch.Tensor]) -> Any:
        """Return a new object like `original_structure` with the tensors from `tensor_iterator`.

        The tensors come in the order of yieldTensors.
        """


def registerCustomArgParser(arg_data_type: Type, arg_parser: Optional[ICustomArgParser]) -> None:
    """Register a parser for a type; None removes the one that is registered."""
    if arg_parser is None:
        _parsers.pop(arg_data_type, None)
    elif isinstance(arg_parser, ICustomArgParser):
        _parsers[arg_data_type] = arg_parser
    else:
        raise Error("arg_parser must inherit from ICustomArgParser")


def parser_of(value: Any) -> Optional[ICustomArgParser]:
    """Return the parser registered for the type of `value` or its closest base class, or None."""
    return next((_parsers[kind]
                 for kind in type(value).__mro__ if kind in _parsers), None) if _parsers else None


def flatten(value: Any) -> List[torch.Tensor]:
    """Return all tensors in `value`, depth first."""
    if isinstance(value, torch.Tensor):
        return [value]
    if parser_of(value) is not None:
        return list(parser_of(value).yieldTensors(value))
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in flatten(item)] if isinstance(value, (list, tuple)) else []


def rebuild(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """Return a copy of `value` with its tensors replaced, in the order of `flatten`."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if parser_of(value) is not None:
        return parser_of(value).reconstruct(value, tensors)
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
