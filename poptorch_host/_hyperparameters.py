"""The numbers of an optimizer on their way to the device: which are constants, which were changed,
and PopART's names for them.
"""
from __future__ import annotations

import logging
from typing import Any, Dict, Optional

import torch

from . import optim
from ._errors import Error
from ._logging import logger

CONSTANT_BY_VALUE = {
    "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "eps": 1e-8, "max_weight_norm": 65500.0}
POPART_NAMES = {
    "lr": "learningRate", "weight_decay": "weightDecay", "max_weight_norm": "maxWeightNorm"}


def warn_subclass(optimizer: torch.optim.Optimizer) -> None:
    """A class of one's own is probably meant to change step(), which is never called."""
    if not {torch.optim.Optimizer, optim.Optimizer} & set(
            type(optimizer).__bases__) and not type(optimizer).__module__.startswith("torch."):
        logger.warning(
            "Optimizer `%s` subclassed from classes in poptorch.optim or torch.optim are unlikely to behave as intended. "
            "Poptorch does not run Python optimizer code directly; but instead uses IPU native optimisers implemented in "
            "PopART.",
            type(optimizer).__name__)


class AttributeCheck:
    """Reports attributes that an optimizer and its groups did not have at the first call, since the
    device ignores them. Each report is made once: a warning, or at debug level if `relaxed`.
    """

    def __init__(self, relaxed: bool):
        self._level = logging.DEBUG if relaxed else logging.WARNING
        self._first: Optional[Dict[str, set]] = None
        self._reported: set = set()

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        own = optimizer.__dict__.keys() - {"defaults", "state", "param_groups", "variable_attrs"}
        now = {
            "optimizer": own,
            "group": set(optimizer.defaults).union(*optimizer.param_groups) - {"params"}}
        first = self._first = self._first or now
        self._report("optimizer attribute", optimizer, own - first["optimizer"])
        for i, group in enumerate(optimizer.param_groups):
            self._report(f"group {i} attribute", optimizer,
                         group.keys() - {"params"} - first["group"])

    def _report(self, what, optimizer, unexpected):
        message = f"Ignoring unexpected {what} in {optim.kind_of(optimizer)} optimizer: {sorted(unexpected)}"
        if unexpected and message not in self._reported:
            self._reported.add(message)
            logger.log(self._level, message)


def constants(optimizer: torch.optim.Optimizer, settings: Dict[str, Any]) -> Dict[tuple, Any]:
    """The numbers compiled in as constants, by (group, name): those marked so, or of a torch
    optimizer those at PyTorch's default.
    """
    marked = getattr(optimizer, "variable_attrs", None)
    out = {}
    for i, group in enumerate([*settings["groups"], {"loss_scaling": settings["loss_scaling"]}]):
        for name, value in group.items():
            default = 1e-2 if (settings["kind"],
                               name) == ("AdamW",
                                         "weight_decay") else CONSTANT_BY_VALUE.get(name, value)
            constant = marked.isConstant(name) if marked else name != "lr" and value == default
            if constant:
                out[i, name] = value
    return out


def check_constants(constant: Dict[tuple, Any], settings: Dict[str, Any]) -> None:
    """Error if a constant has another value now."""
    groups = [*settings["groups"], {"loss_scaling": settings["loss_scaling"]}]
    for (i, name), value in constant.items():
        if i < len(groups) and groups[i].get(name, value) != value:
            raise Error(
                f"The optimizer's {name} was compiled as a constant ({value}) and cannot become {groups[i][name]}: call "
                f"optimizer.variable_attrs.markAsVariable('{name}') before the model is compiled.")


def _real(numbers):
    return [(name, value) for name, value in numbers.items() if not isinstance(value, bool)]


def parameters(settings: Dict[str, Any], hyper: Dict[str, Dict[str,
                                                               Any]]) -> Dict[str, torch.Tensor]:
    """The numbers of every weight as tensors, by PopART's names: learningRate___specific___NAME."""
    out = {"lossScaling_FLOAT": torch.tensor(float(settings["loss_scaling"]))}
    for weight, numbers in hyper.items():
        for name, value in _real(numbers):
            out[f"{POPART_NAMES.get(name, name)}___specific___{weight}"] = torch.tensor(
                value, dtype=torch.float32)
    return out


def set_parameters(settings: Dict[str, Any], hyper: Dict[str, Dict[str, Any]],
                   tensors: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The reverse: numbers that differ from those in `hyper`, read as float32, are taken over.
    Returns the new settings.
    """
    for weight, numbers in hyper.items():
        for name, value in _real(numbers):
            tensor = tensors.get(f"{POPART_NAMES.get(name, name)}___specific___{weight}")
            if tensor is not None and not torch.equal(tensor,
                                                      torch.tensor(value, dtype=torch.float32)):
                numbers[name] = tuple(tensor.tolist()) if isinstance(value,
                                                                     tuple) else float(tensor)
    return {
        **settings, "loss_scaling": float(tensors.get("lossScaling_FLOAT",
                                                      settings["loss_scaling"]))}
