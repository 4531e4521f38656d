"""An optimizer's hyperparameters on the device: constants, and PopART's names for them."""
from __future__ import annotations

from typing import Any, Dict, Iterator, Tuple

import torch

from . import optim
from ._errors import Error
from ._logging import logger

# In a torch optimizer, each of these is a constant only if it has this value (see `constants`).
CONSTANT_BY_VALUE = {
    "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "eps": 1e-8, "max_weight_norm": 65500.0}
POPART_NAMES = {
    "lr": "learningRate", "weight_decay": "weightDecay", "max_weight_norm": "maxWeightNorm"}


def warn(optimizer: torch.optim.Optimizer) -> None:
    """Warn that PopTorch ignores the step() of a class that the user has derived."""
    if not {torch.optim.Optimizer, optim.Optimizer} & set(
            type(optimizer).__bases__) and not type(optimizer).__module__.startswith("torch."):
        logger.warning(
            "Optimizer `%s` subclassed from classes in poptorch.optim or torch.optim are unlikely "
            "to behave as intended. Poptorch does not run Python optimizer code directly; but "
            "instead uses IPU native optimisers implemented in PopART.",
            type(optimizer).__name__)


def constants(optimizer: torch.optim.Optimizer, settings: Dict[str, Any]) -> Dict[tuple, Any]:
    """Return {(group, name): value} of the hyperparameters that are compiled in as constants.

    An optimizer of this package says in `variable_attrs` which ones are. Of a torch optimizer they
    are all except the learning rate and those in CONSTANT_BY_VALUE that differ from PyTorch's
    default. The loss scaling counts as a group of its own, after the last one.
    """
    marked = getattr(optimizer, "variable_attrs", None)
    out = {}
    for i, group in enumerate([*settings["groups"], {"loss_scaling": settings["loss_scaling"]}]):
        for name, value in group.items():
            default = (1e-2 if (settings["kind"], name) == ("AdamW", "weight_decay") else
                       CONSTANT_BY_VALUE.get(name, value))
            constant = marked.isConstant(name) if marked else name != "lr" and value == default
            if constant:
                out[i, name] = value
    return out


def check_constants(constant: Dict[tuple, Any], settings: Dict[str, Any]) -> None:
    """Raise Error if the value of a constant has changed."""
    groups = [*settings["groups"], {"loss_scaling": settings["loss_scaling"]}]
    for (i, name), value in constant.items():
        if i < len(groups) and groups[i].get(name, value) != value:
            raise Error(
                f"The optimizer's {name} was compiled as a constant ({value}) and cannot become "
                f"{groups[i][name]}: call optimizer.variable_attrs.markAsVariable('{name}') before "
                "the model is compiled.")


def _named(hyper: Dict[str, Dict[str, Any]]) -> Iterator[Tuple[dict, str, str]]:
    """Yield (hyperparameters of a weight, name of one of them, PopART's name for it)."""
    for weight, numbers in hyper.items():
        for name, value in numbers.items():
            if not isinstance(value, bool):
                yield numbers, name, f"{POPART_NAMES.get(name, name)}___specific___{weight}"


def parameters(settings: Dict[str, Any],
               hyper: Dict[str, Dict[str, Any]]) -> Dict[str, torch.Tensor]:
    """Return {"learningRate___specific___NAME": float32 tensor, ...}, by PopART's names.

    hyper: {NAME of a weight: its hyperparameters}.
    """
    out = {"lossScaling_FLOAT": torch.tensor(float(settings["loss_scaling"]))}
    for numbers, name, popart_name in _named(hyper):
        out[popart_name] = torch.tensor(numbers[name], dtype=torch.float32)
    return out


def set_parameters(settings: Dict[str, Any], hyper: Dict[str, Dict[str, Any]],
                   tensors: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """Restore in `hyper` what parameters() returned, and return the settings with its loss scaling.

    What has the float32 value of its tensor already is kept.
    """
    for numbers, name, popart_name in _named(hyper):
        value, tensor = numbers[name], tensors.get(popart_name)
        if tensor is not None and not torch.equal(tensor, torch.tensor(value, dtype=torch.float32)):
            numbers[name] = tuple(tensor.tolist()) if isinstance(value, tuple) else float(tensor)
    scaling = tensors.get("lossScaling_FLOAT", settings["loss_scaling"])
    return {**settings, "loss_scaling": float(scaling)}
