"""The arguments of a model's call: bound to forward(), checked, and cut into micro-batches."""
from __future__ import annotations

import inspect
from typing import Any, Callable, Dict, List, Tuple

import torch

from . import _structure
from ._errors import Error
from ._logging import logger

MISMATCH = (
    "\nThis error occurred because the inputs passed at runtime don't match the inputs used to "
    "compile the model.\n"
    "To recompile the model for the new inputs create a new inferenceModel / trainingModel wrapper "
    "or call destroy() on the current one and try again.")


class Arguments:
    """The positional and keyword arguments of one call."""

    def __init__(self, named: Dict[str, Any], call: Tuple[tuple, dict]):
        self.named, self.call = named, call  # by forward()'s parameters, and as (args, kwargs)
        self.tensors: List[torch.Tensor] = _structure.flatten(call)

    def check_batch(self, options, parts: int) -> None:
        """Raise AssertionError unless every tensor can be cut into `parts` along dimension 0."""
        for tensor in self.tensors:
            size = tensor.shape[0] if tensor.dim() else 1
            assert size % parts == 0, (
                f"Invalid batch dimension: In the input {tensor.shape}, the batch dimension "
                f"({size}) must be a multiple of "
                f"Options.deviceIterations({options.device_iterations}) * "
                f"(Options.replicationFactor({options.replication_factor}) / "
                "Options.inputReplicaGrouping.input_group_size(1)) * "
                f"Options.Training.gradientAccumulation({options.Training.gradient_accumulation})"
                f" = {parts} because it is used to calculate the batch size which will be executed "
                "on the device in any given iteration. For a full explanation see the batching "
                "semantics page of the documentation.")

    def micro_batches(self, convert: Callable, count: int) -> Callable[[int], Tuple[tuple, dict]]:
        """Return a function from the number of a micro-batch, below `count`, to its (args, kwargs).

        Its tensors are views of those that `convert` returns. A scalar or empty tensor is passed
        whole to every micro-batch.
        """
        parts = [
            [t] * count if t.dim() == 0 else
            t.split(t.shape[0] // count) if t.shape[0] else [t] * count
            for t in (convert(t.detach()).contiguous() for t in self.tensors)]
        return lambda number: _structure.rebuild(self.call, iter([part[number] for part in parts]))

    def compiled(self) -> "Arguments":
        """Return a copy without data, to compare the arguments of later calls with."""
        empty = _structure.map_tensors(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"),
                                       (self.named, self.call))
        return Arguments(*empty)

    def check_same(self, other: "Arguments") -> None:
        """Raise Error unless `other` has the same shapes, dtypes, structure and constants."""
        old, new = len(self.call[0]), len(other.call[0])
        if old != new:
            raise Error(
                f"Number of positional arguments mismatch: expected {old} arguments but got {new}."
                f"{MISMATCH}")
        for name in self.named:
            _check_same(name, self.named[name], other.named[name])


def _check_same(name: str, old: Any, new: Any) -> None:
    if type(old) is not type(new) and not (isinstance(old, torch.Tensor) and
                                           isinstance(new, torch.Tensor)):
        raise Error(
            f"Type mismatch for {name}: expected {type(old)} but got {type(new)}.{MISMATCH}")
    if isinstance(old, torch.Tensor):
        if old.dtype != new.dtype:
            raise Error(
                f"Data type mismatch for {name}: expected {old.dtype} but got {new.dtype}."
                f"{MISMATCH}")
        if old.shape != new.shape:
            raise Error(
                f"Shape mismatch for {name}: expected {old.shape} but got {new.shape}.{MISMATCH}")
    elif isinstance(old, (tuple, list)):
        if len(old) != len(new):
            raise Error(
                f"Length mismatch for {name}: expected {len(old)} elements but got {len(new)}."
                f"{MISMATCH}")
        for i, (a, b) in enumerate(zip(old, new)):
            _check_same(f"{name}[{i}]", a, b)
    elif isinstance(old, dict):
        details = [
            f"{text} arguments: {', '.join(sorted(map(str, keys)))}"
            for text, keys in (("Unexpected", new.keys() - old.keys()),
                               ("Missing", old.keys() - new.keys())) if keys]
        if details:
            raise Error(f"Keys mismatch for {name}: {'. '.join(details)}.{MISMATCH}")
        for key in old:
            _check_same(str(key) if name == "kwargs" else f"{name}[{key}]", old[key], new[key])
    elif old != new:
        raise Error(f"Value mismatch for {name}: expected {old} but got {new}.{MISMATCH}")


class Parser:
    """Binds the arguments of calls to the parameters of a model's forward()."""

    def __init__(self, model: torch.nn.Module):
        if not callable(model):
            raise TypeError("Expected a torch.nn.Module or a callable")
        try:
            self.signature = inspect.signature(
                model.forward if isinstance(model, torch.nn.Module) else model)
        except ValueError:  # a function written in C has no signature
            self.signature = inspect.signature(lambda *args, **kwargs: None)
        self.warned = False

    def __call__(self, args: tuple, kwargs: dict) -> Arguments:
        """Return the arguments of a call, completed with the defaults of forward().

        Raises Error or AssertionError, as PopTorch does, for those that do not fit. Warns, once, of
        tensors that are not contiguous.
        """
        parameters = self.signature.parameters
        kinds = {p.kind for p in parameters.values()}
        names = list(parameters)
        if not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            assert len(args) + len(kwargs) <= len(names), (
                f"Too many arguments provided: expected {names} ({len(names)}) but got "
                f"{len(args) + len(kwargs)}")
            for key in kwargs:
                assert key in names, f"{key} is not a valid parameter.Allowed values are {names}"
        for i, (name, p) in enumerate(parameters.items()):
            if p.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD:
                assert i >= len(args) or name not in kwargs, (
                    f"Parameter {name} was passed more than once")
                if p.default is p.empty and i >= len(args) and name not in kwargs:
                    raise Error(f"Mandatory parameter {name} missing")
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = Arguments(dict(bound.arguments), (bound.args, bound.kwargs))
        if not self.warned and any(not t.is_contiguous() for t in arguments.tensors):
            logger.warning(
                "At least one input tensor is not contiguous: non-contiguous tensors will be "
                "converted.")
            self.warned = True
        return arguments
