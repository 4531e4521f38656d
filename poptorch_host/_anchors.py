"""Anchored tensors: gradients of parameters, kept while a model trains for
PoplarExecutor.getAnchoredTensor().

PopTorch anchors any tensor of PopART's graph by its name. Of those a host has the gradients:
"Gradient___" and a parameter's name.
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
    """What Options.anchorTensor() asked for, of one compiled model. False if that is nothing."""

    def __init__(self, options: Any, weights: List[Any], training: bool):
        """`weights`: the device's. Error for a name that is not that of a gradient which this model
        has, and for a period that does not divide the device iterations.
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
                    f"The output return period ({period}) of the anchor '{short}' must be a divisor of "
                    f"poptorch.Options().deviceIterations ({options.device_iterations})")
        self._latest: Dict[str, torch.Tensor] = {}  # gradients of a micro-batch
        self._outputs: Dict[str, Outputs] = {}

    def __bool__(self):
        return bool(self._wanted)

    @contextlib.contextmanager
    def collecting(self, factor: float) -> Iterator["Anchors"]:
        """Keep gradients while the context lasts, times `factor`; after each micro-batch `add` is
        to be called.
        """
        def keep(name):
            # the product is a new tensor: autograd goes on to accumulate in the one it gave us
            return lambda gradient: self._latest.__setitem__(name,
                                                             gradient.to_dense().float() * factor)

        self._latest = {}
        self._outputs = {
            short: Outputs(mode, period) for short, (_, mode, period) in self._wanted.items()}
        hooks = [weight.working.register_hook(keep(name)) for name, weight in self._weights.items()]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, iteration: int, replica: int) -> None:
        """A micro-batch has run backward. Error if an anchored parameter got no gradient."""
        for short, (name, _, _) in self._wanted.items():
            if name not in self._latest:
                raise Error(f"Cannot anchor '{name}': the loss does not depend on this parameter")
            self._outputs[short].add(iteration, replica, [self._latest[name]])
        self._latest = {}

    def joined(self) -> Dict[str, torch.Tensor]:
        """{short name: float32 tensor}: the micro-batches that the anchor's output mode keeps,
        along dimension 0.
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
    why = "it is not a trained parameter of the model" if training else "an inference model has no gradients"
    raise Error(f"Cannot anchor '{name}' as '{short}': {why}")
