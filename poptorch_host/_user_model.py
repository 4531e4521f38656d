"""The user's model while it is trained: reading one of its weights, in any PyTorch call, first
fetches them all from the device.
"""
from __future__ import annotations

import copy
import weakref
from typing import Any

import torch

from . import _structure
from ._errors import NotOffered


class _Watched:
    """Mixed into the class of a user's tensor: any PyTorch call on it fetches the weights from the
    device if need be.
    """

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
        """The same memory without this class."""
        self._fetch()
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.detach()
            return torch.nn.Parameter(plain, self.requires_grad) if isinstance(
                self, torch.nn.Parameter) else plain

    def replicaGrouping(self, *args, **kwargs):
        """PopTorch's way to give groups of replicas weights of their own: always NotOffered."""
        raise NotOffered("Parameter.replicaGrouping", "every replica has the same weights")

    def __reduce_ex__(self, protocol):  # pickled and copied, it is an ordinary tensor
        return self._plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return copy.deepcopy(self._plain(), memo)


class WatchedParameter(_Watched, torch.nn.Parameter):
    """A parameter of a model that is being trained."""


class WatchedBuffer(_Watched, torch.Tensor):
    """A buffer of a model that is being trained."""


def watch(model: torch.nn.Module, executor: Any) -> None:
    """Let the model's weights notice when they are read. The model's class gets PopTorch's methods
    and name.
    """
    parent = weakref.ref(executor)

    class PoptorchModel(type(model)):
        def copyWeightsToHostIfNeeded(self):
            return parent() is not None and parent().copyWeightsToHostIfNeeded()

        def destroy(self):
            if parent() is not None:
                parent().destroy()

        def __reduce_ex__(self, protocol):  # pickled, it is of the user's class
            return _restore, (type(self).__bases__[0], copy.copy(self.__dict__))

    PoptorchModel.__name__ = f"Poptorch{type(model).__name__}"
    PoptorchModel._is_poptorch_model = True
    model.__class__ = PoptorchModel
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.__class__ = WatchedParameter if isinstance(tensor,
                                                          torch.nn.Parameter) else WatchedBuffer
        tensor._executor = parent


def unwatch(model: torch.nn.Module) -> None:
    """Make the model and its weights what they were before watch()."""
    if is_wrapped(model):
        model.__class__ = type(model).__bases__[0]
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, _Watched):
            tensor.__class__ = torch.nn.Parameter if isinstance(
                tensor, torch.nn.Parameter) else torch.Tensor
            del tensor._executor


def is_wrapped(model: torch.nn.Module) -> bool:
    """True if `model` is the user's model of a training executor."""
    return "_is_poptorch_model" in type(model).__dict__


def _restore(cls, state):
    model = cls.__new__(cls)
    model.__dict__.update(state)
    return model


def module_repr(module: torch.nn.Module) -> str:
    """repr() of a module that shows its blocks."""
    hooks = "".join(f"{hook!r} " for hook in module._forward_pre_hooks.values())
    lines = module.extra_repr().split("\n") if module.extra_repr() else []
    children = [
        f"({name}): " + module_repr(child).replace("\n", "\n  ")
        for name, child in module._modules.items()]
    if not children and len(lines) <= 1:
        return f"{hooks}{module._get_name()}({''.join(lines)})"
    body = "".join(f"\n  {line}" for line in lines + children)
    return f"{hooks}{module._get_name()}({body}\n)"
