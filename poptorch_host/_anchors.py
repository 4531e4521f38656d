"""Anchored tensors: gradients of parameters that are kept while a model trains.

PoplarExecutor.getAnchoredTensor() returns them. PopTorch can anchor any tensor of PopART's graph by
its name. A host has no such graph, only gradients, which are named "Gradient___" plus the
parameter's name.
"""
from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, List

import torch

from ._errors import Error, NotOffered

PREFIX = "Gradient___"


class Anchors:
    """The anchors that Options.anchorTensor() requested for one compiled model."""

    def __init__(self, options: Any, weights: List[Any]):
        """Find the gradients to keep; weights: those on the device that the loss depends on.

        Raises Error for the gradient of anything else, and NotOffered for any other tensor of
        PopART's graph.
        """
        names = {PREFIX + weight.name: weight for weight in weights}
        self.weights: Dict[str, Any] = {}  # by the anchor's short name
        for short, (name, *_) in options.anchored_tensors.items():
            if not name.startswith(PREFIX):
                raise NotOffered(
                    "Options.anchorTensor",
                    f"'{short}' names '{name}', a tensor of PopART's graph. A host has no such "
                    f"graph, only the gradients of parameters: '{PREFIX}' and the parameter's name")
            if name not in names:
                raise Error(f"Anchor tensor `{name}' not in Ir Tensors. It is not the gradient of "
                            "a parameter that the loss depends on")
            self.weights[short] = names[name]
        self._latest: Dict[str, torch.Tensor] = {}  # of the current micro-batch

    @contextlib.contextmanager
    def collecting(self, factor: float) -> Iterator[None]:
        """Keep the gradients of each micro-batch, times `factor`, while the context lasts."""
        def keep(short):
            # The product is a new tensor. Autograd may go on accumulating into `gradient` itself.
            return lambda gradient: self._latest.__setitem__(short,
                                                             gradient.to_dense().float() * factor)

        hooks = [weight.working.register_hook(keep(short))
                 for short, weight in self.weights.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self) -> List[torch.Tensor]:
        """Return the gradients of the micro-batch whose backward pass has just ended."""
        return [self._latest[short] for short in self.weights]
