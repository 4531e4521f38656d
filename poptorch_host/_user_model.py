"""The user's model while it is being trained.

If one of its weights is an argument of any PyTorch call, all weights are first copied from the
device to the host, unless the host already has the newest ones.
"""
from __future__ import annotations

import copy
import weakref
from typing import Any

import torch

from . import _structure


class _Watched:
    """A mixin for the user's tensors that copies newer weights to the host before their use."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        for tensor in _structure.flatten([args, kwargs]):
            if isinstance(tensor, _Watched):
                tensor._fetch()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def _fetch(self):
        executor = self.__dict__["_executor"]()
        if executor is not None:
            executor.copyWeightsToHostIfNeeded()

    def _plain(self):
        """Return a tensor of the plain class that shares this one's memory."""
        self._fetch()
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.detach()
            return torch.nn.Parameter(plain, self.requires_grad) if isinstance(
                self, torch.nn.Parameter) else plain

    # Pickles and copies are ordinary tensors.
    def __reduce_ex__(self, protocol):
        return self._plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return copy.deepcopy(self._plain(), memo)


class WatchedParameter(_Watched, torch.nn.Parameter):
    """A parameter of a model that is being trained."""


class WatchedBuffer(_Watched, torch.Tensor):
    """A buffer of a model that is being trained."""


def watch(model: torch.nn.Module, executor: Any) -> None:
    """Make `executor` copy newer weights to the host whenever a weight of `model` is used.

    The model gets a subclass of its class, with PopTorch's methods and name.
    """
    parent = weakref.ref(executor)

    class PoptorchModel(type(model)):
        def copyWeightsToHostIfNeeded(self):
            return parent() is not None and parent().copyWeightsToHostIfNeeded()

        def destroy(self):
            if parent() is not None:
                parent().destroy()

        # A pickle is of the user's class.
        def __reduce_ex__(self, protocol):
            return _restore, (type(self).__bases__[0], copy.copy(self.__dict__))

    PoptorchModel.__name__ = f"Poptorch{type(model).__name__}"
    PoptorchModel._is_poptorch_model = True
    model.__class__ = PoptorchModel
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.__class__ = (
            WatchedParameter if isinstance(tensor, torch.nn.Parameter) else WatchedBuffer)
        tensor._executor = parent


def unwatch(model: torch.nn.Module) -> None:
    """Undo watch(): restore the classes of the model and its weights."""
    if is_wrapped(model):
        model.__class__ = type(model).__bases__[0]
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, _Watched):
            tensor.__class__ = torch.nn.Parameter if isinstance(
                tensor, torch.nn.Parameter) else torch.Tensor
            del tensor._executor


def is_wrapped(model: torch.nn.Module) -> bool:
    """Return whether `model` is the user's model of a training executor."""
    return "_is_poptorch_model" in type(model).__dict__


def _restore(cls, state):
    model = cls.__new__(cls)
    model.__dict__.update(state)
    return model
