"""Nested arguments and results: tensors in lists, tuples, dictionaries and types with a parser of
their own.
"""
from __future__ import annotations

import abc
from typing import Any, Callable, Dict, Iterator, List, Optional, Type

import torch

from ._errors import Error

_parsers: Dict[type, "ICustomArgParser"] = {}


class ICustomArgParser(abc.ABC):
    """How to take tensors out of a type of one's own and put others in."""

    @abc.abstractmethod
    def yieldTensors(self, struct: Any) -> Iterator[torch.Tensor]:
        """Every tensor in `struct`, always in the same order."""

    @abc.abstractmethod
    def reconstruct(self, original_structure: Any, tensor_iterator: Iterator[torch.Tensor]) -> Any:
        """A new object like `original_structure`, with tensors from `tensor_iterator` in the order
        of yieldTensors.
        """


def registerCustomArgParser(arg_data_type: Type, arg_parser: Optional[ICustomArgParser]) -> None:
    """Use `arg_parser` for this type from now on, or, with None, no longer."""
    if arg_parser is None:
        _parsers.pop(arg_data_type, None)
    elif isinstance(arg_parser, ICustomArgParser):
        _parsers[arg_data_type] = arg_parser
    else:
        raise Error("arg_parser must inherit from ICustomArgParser")


def parser_of(value: Any) -> Optional[ICustomArgParser]:
    """The parser registered for the type of `value` or for a class it comes from."""
    return next((_parsers[kind]
                 for kind in type(value).__mro__ if kind in _parsers), None) if _parsers else None


def flatten(value: Any) -> List[torch.Tensor]:
    """All tensors in `value`, depth first."""
    if isinstance(value, torch.Tensor):
        return [value]
    if parser_of(value) is not None:
        return list(parser_of(value).yieldTensors(value))
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in flatten(item)] if isinstance(value, (list, tuple)) else []


def rebuild(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """`value` with its tensors replaced, in the order of `flatten`."""
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
    """`value` with `function` applied to each of its tensors."""
    return rebuild(value, iter([function(t) for t in flatten(value)]))
