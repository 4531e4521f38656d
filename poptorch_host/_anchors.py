"""Anchored tensors: gradients of parameters that are kept while a model trains.

PoplarExecutor.getAnchoredTensor() returns them. PopTorch can anchor any tensor of PopART's graph by
its name. A host has no such graph, only gradients, which are named "Gradient___" plus the
parameter's name.
"""
from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, List, Tuple

import torch

from . import enums
from ._errors import Error, NotOffered
from ._outputs import Outputs

PREFIX = "Gradient___"


class Anchors:
    """The anchors that Options.anchorTensor() requested for one compiled model.

    An instance is false if no anchor was requested.
    """

    def __init__(self, options: Any, weights: List[Any], training: bool):
        """Find the gradients to keep; `weights` is the device's list of Weight.

        Raises Error for a gradient that this model does not have, and for an output period that
        does not divide the device iterations; NotOffered for any other tensor of PopART's graph.
        """
        trained = {PREFIX + w.name: w for w in weights if training and w.working.requires_grad}
        self._options = options
        self._wanted: Dict[str, Tuple[str, int, int]] = {}
        self._weights: Dict[str, Any] = {}
        for short, (name, as_outputs, mode, period) in options.anchored_tensors.items():
            if as_outputs or mode == enums.OutputMode.Default:
                mode, period = options.output_mode, options.output_return_period
            self._weights[name] = _gradient_of(trained, short, name, training)
            self._wanted[short] = name, mode, period
            if mode == enums.OutputMode.EveryN and options.device_iterations % period:
                raise Error(
                    f"The output return period ({period}) of the anchor '{short}' must be a "
                    "divisor of poptorch.Options().deviceIterations "
                    f"({options.device_iterations})")
        self._latest: Dict[str, torch.Tensor] = {}  # by name, of the current micro-batch
        self._outputs: Dict[str, Outputs] = {}

    def __bool__(self):
        return bool(self._wanted)

    @contextlib.contextmanager
    def collecting(self, factor: float) -> Iterator["Anchors"]:
        """Keep the gradients of each micro-batch, times `factor`, while the context lasts.

        The caller must call `add` after each micro-batch's backward pass.
        """
        def keep(name):
            # The product is a new tensor. Autograd may go on accumulating into `gradient` itself.
            return lambda gradient: self._latest.__setitem__(name,
                                                             gradient.to_dense().float() * factor)

        self._latest = {}
        self._outputs = {
            short: Outputs(self._options, mode, period, [self._weights[name].type])
            for short, (name, mode, period) in self._wanted.items()}
        hooks = [weight.working.register_hook(keep(name)) for name, weight in self._weights.items()]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, step: int, replica: int) -> None:
        """Add the gradients of the micro-batch whose backward pass has just ended to the outputs.

        `step` counts the micro-batches of a replica in the call and `replica` the replicas, both
        from 0. Raises Error if an anchored parameter received no gradient.
        """
        for short, (name, _, _) in self._wanted.items():
            if name not in self._latest:
                raise Error(f"Cannot anchor '{name}': the loss does not depend on this parameter")
            self._outputs[short].add(step, replica, [self._latest[name]])
        self._latest = {}

    def joined(self) -> Dict[str, torch.Tensor]:
        """Return {short name: gradient in its parameter's type}, micro-batches along dimension 0.

        The output mode of each anchor decides which of its micro-batches are included.
        """
        return {short: outputs.joined()[0] for short, outputs in self._outputs.items()}


def _gradient_of(trained: Dict[str, Any], short: str, name: str, training: bool) -> Any:
    if name in trained:
        return trained[name]
    if not name.startswith(PREFIX):
        raise NotOffered(
            "Options.anchorTensor",
            f"'{short}' names '{name}', a tensor of PopART's graph. A host has no such graph, only "
            f"the gradients of parameters: '{PREFIX}' and the parameter's name")
    why = ("it is not a trained parameter of the model"
           if training else "an inference model has no gradients")
    raise Error(f"Cannot anchor '{name}' as '{short}': {why}")
