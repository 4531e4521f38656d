"""The device's weight update: PopTorch's optimizers as formulas over lists of float32 tensors.

Where PyTorch has a fused kernel for the CPU it is used; otherwise the same formula runs tensor by tensor.
"""
from __future__ import annotations

import inspect
import logging
from typing import Any, Dict, List, Optional

import torch

from . import optim
from ._logging import logger
from .poptorch_core import Error

CONSTANT_BY_VALUE = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "eps": 1e-8, "max_weight_norm": 65500.0}
STATE = {"SGD": ("Accl1",), "Adam": ("Accl1", "Accl2", "Step"), "AdamW": ("Accl1", "Accl2", "Step"),
         "LAMB": ("Accl1", "Accl2", "Step"), "RMSprop": ("Accl1", "Accl3")}  # and Accl2 if it is centered
HYPER = {"SGD": ("lr", "momentum", "dampening", "weight_decay", "nesterov"), "Adam": ("lr", "betas", "eps", "weight_decay"),
         "AdamW": ("lr", "betas", "eps", "weight_decay"), "LAMB": ("lr", "betas", "eps", "weight_decay", "max_weight_norm"),
         "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")}
GLOBAL = ("loss_scaling", "bias_correction", "use_tf_variant", "max_grad_norm")
FUSED = "fused" in inspect.signature(torch.optim.AdamW.__init__).parameters and int(torch.__version__.split(".")[1]) >= 4


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Name of the formula. AssertionError for an optimizer that PopTorch does not support."""
    for kind, parents in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW), ("Adam", torch.optim.Adam),
                          ("RMSprop", torch.optim.RMSprop), ("LAMB", optim.LAMB)):
        if isinstance(optimizer, parents):
            return kind
    raise AssertionError(f"Unsupported optimizer type {type(optimizer).__name__}. Types supported {', '.join(HYPER)}")


def warn_subclass(optimizer: torch.optim.Optimizer) -> None:
    """A class of one's own is probably meant to change step(), which is never called."""
    if not {torch.optim.Optimizer, optim.Optimizer} & set(type(optimizer).__bases__) and not type(optimizer).__module__.startswith("torch."):
        logger.warning("Optimizer `%s` subclassed from classes in poptorch.optim or torch.optim are unlikely to behave as intended. "
                       "Poptorch does not run Python optimizer code directly; but instead uses IPU native optimisers implemented in "
                       "PopART.", type(optimizer).__name__)


class AttributeCheck:
    """Reports attributes that an optimizer and its groups did not have at the first call, since the device ignores them.
    Each report is made once: a warning, or at debug level if `relaxed`."""

    def __init__(self, relaxed: bool):
        self._level = logging.DEBUG if relaxed else logging.WARNING
        self._first: Optional[Dict[str, set]] = None
        self._reported: set = set()

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        own = optimizer.__dict__.keys() - {"defaults", "state", "param_groups", "variable_attrs"}
        now = {"optimizer": own, "group": set(optimizer.defaults).union(*optimizer.param_groups) - {"params"}}
        first = self._first = self._first or now
        self._report("optimizer attribute", optimizer, own - first["optimizer"])
        for i, group in enumerate(optimizer.param_groups):
            self._report(f"group {i} attribute", optimizer, group.keys() - {"params"} - first["group"])

    def _report(self, what, optimizer, unexpected):
        message = f"Ignoring unexpected {what} in {kind_of(optimizer)} optimizer: {sorted(unexpected)}"
        if unexpected and message not in self._reported:
            self._reported.add(message)
            logger.log(self._level, message)


def snapshot(optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """The numbers of `optimizer` as they are now: what setOptimizer() hands to the device."""
    kind = kind_of(optimizer)
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError("Only non-amsgrad Adam/AdamW optimizers are supported.")
    numbers = {name: getattr(optimizer, name, optim.OWN_DEFAULTS[name]) for name in GLOBAL}
    groups = [{name: _number(group[name], name) for name in HYPER[kind]} for group in optimizer.param_groups]
    return {"kind": kind, **numbers, "groups": groups}


def _number(value, name):
    values = value if isinstance(value, (tuple, list)) else (value,)
    assert all(isinstance(v, (int, float)) for v in values), f"Expected a number for {name} but got {value} instead"
    return tuple(values) if name == "betas" else value


def constants(optimizer: torch.optim.Optimizer, settings: Dict[str, Any]) -> Dict[tuple, Any]:
    """The numbers compiled in as constants, by (group, name): those marked so, or of a torch optimizer those at PyTorch's default."""
    marked = getattr(optimizer, "variable_attrs", None)
    out = {}
    for i, group in enumerate([*settings["groups"], {"loss_scaling": settings["loss_scaling"]}]):
        for name, value in group.items():
            default = 1e-2 if (settings["kind"], name) == ("AdamW", "weight_decay") else CONSTANT_BY_VALUE.get(name, value)
            constant = marked.isConstant(name) if marked else name != "lr" and value == default
            if constant:
                out[i, name] = value
    return out


def check_constants(constant: Dict[tuple, Any], settings: Dict[str, Any]) -> None:
    """Error if a constant has another value now."""
    groups = [*settings["groups"], {"loss_scaling": settings["loss_scaling"]}]
    for (i, name), value in constant.items():
        if i < len(groups) and groups[i].get(name, value) != value:
            raise Error(f"The optimizer's {name} was compiled as a constant ({value}) and cannot become {groups[i][name]}: call "
                        f"optimizer.variable_attrs.markAsVariable('{name}') before the model is compiled.")


def new_state(settings: Dict[str, Any], weight: torch.Tensor) -> Dict[str, torch.Tensor]:
    """The optimizer state of one weight before its first update."""
    kind = settings["kind"]
    names = STATE[kind] + (("Accl2",) if any(group.get("centered") for group in settings["groups"]) else ())
    state = {name: torch.zeros((), dtype=torch.float32) if name == "Step" else torch.zeros_like(weight) for name in names}
    if kind == "RMSprop" and settings["use_tf_variant"]:
        state["Accl1"].fill_(1.0)
    return state


POPART_NAMES = {"lr": "learningRate", "weight_decay": "weightDecay", "max_weight_norm": "maxWeightNorm"}


def _real(numbers):
    return [(name, value) for name, value in numbers.items() if not isinstance(value, bool)]


def parameters(settings: Dict[str, Any], hyper: Dict[str, Dict[str, Any]]) -> Dict[str, torch.Tensor]:
    """The numbers of every weight as tensors, by PopART's names: learningRate___specific___NAME."""
    out = {"lossScaling_FLOAT": torch.tensor(float(settings["loss_scaling"]))}
    for weight, numbers in hyper.items():
        for name, value in _real(numbers):
            out[f"{POPART_NAMES.get(name, name)}___specific___{weight}"] = torch.tensor(value, dtype=torch.float32)
    return out


def set_parameters(settings: Dict[str, Any], hyper: Dict[str, Dict[str, Any]], tensors: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The reverse: numbers that differ from those in `hyper`, read as float32, are taken over. Returns the new settings."""
    for weight, numbers in hyper.items():
        for name, value in _real(numbers):
            tensor = tensors.get(f"{POPART_NAMES.get(name, name)}___specific___{weight}")
            if tensor is not None and not torch.equal(tensor, torch.tensor(value, dtype=torch.float32)):
                numbers[name] = tuple(tensor.tolist()) if isinstance(value, tuple) else float(tensor)
    return {**settings, "loss_scaling": float(tensors.get("lossScaling_FLOAT", settings["loss_scaling"]))}


def clip(gradients: List[torch.Tensor], max_norm: float) -> None:
    """Scale all gradients together so that their joint norm is at most `max_norm`."""
    norm = torch.norm(torch.stack(torch._foreach_norm(gradients)))
    if norm > max_norm:
        torch._foreach_mul_(gradients, float(max_norm / norm))


def apply(settings: Dict[str, Any], hyper: Dict[str, Any], weights: List[torch.Tensor], gradients: List[torch.Tensor],
          states: List[Dict[str, torch.Tensor]]) -> None:
    """Update `weights` (float32) and `states` in place; `hyper` are the numbers of their group."""
    if not weights:
        return
    columns = {name: [state[name] for state in states] for name in states[0]}
    _FORMULAS[settings["kind"]](weights, gradients, columns, hyper, settings)


def _sgd(weights, gradients, state, hyper, numbers):
    if hyper["weight_decay"]:
        gradients = torch._foreach_add(gradients, weights, alpha=hyper["weight_decay"])
    if hyper["momentum"]:
        velocity = state["Accl1"]
        torch._foreach_mul_(velocity, hyper["momentum"])
        torch._foreach_add_(velocity, gradients, alpha=1 - hyper["dampening"])
        gradients = torch._foreach_add(gradients, velocity, alpha=hyper["momentum"]) if hyper["nesterov"] else velocity
    torch._foreach_add_(weights, gradients, alpha=-hyper["lr"])


def _adam(weights, gradients, state, hyper, numbers, fused=FUSED and getattr(torch, "_fused_adam_", None), decoupled=False):
    (beta1, beta2), decay, rate = hyper["betas"], hyper["weight_decay"], hyper["lr"]
    torch._foreach_add_(state["Step"], 1)
    steps = state["Step"] if numbers["bias_correction"] else [torch.tensor(float("inf"))] * len(weights)  # beta ** inf is 0
    if fused:
        fused(weights, gradients, state["Accl1"], state["Accl2"], [], steps, lr=rate, beta1=beta1, beta2=beta2, weight_decay=decay,
              eps=hyper["eps"], amsgrad=False, maximize=False)
        return
    for w, g, m, v, step in zip(weights, gradients, state["Accl1"], state["Accl2"], steps):
        if decay and decoupled:
            w.mul_(1 - rate * decay)
        elif decay:
            g = g.add(w, alpha=decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - torch.pow(beta2, step))).sqrt_().add_(hyper["eps"])
        w.addcdiv_(m, root, value=-rate / float(1 - torch.pow(beta1, step)))


def _adamw(weights, gradients, state, hyper, numbers):
    _adam(weights, gradients, state, hyper, numbers, FUSED and getattr(torch, "_fused_adamw_", None), decoupled=True)


def _lamb(weights, gradients, state, hyper, numbers):
    beta1, beta2 = hyper["betas"]
    torch._foreach_add_(state["Step"], 1)
    for w, g, m, v, step in zip(weights, gradients, state["Accl1"], state["Accl2"], state["Step"]):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        step = step if numbers["bias_correction"] else torch.tensor(float("inf"))
        root = (v / (1 - torch.pow(beta2, step))).sqrt_().add_(hyper["eps"])
        change = (m / (1 - torch.pow(beta1, step))).div_(root).add_(w, alpha=hyper["weight_decay"])
        weight_norm, change_norm = float(w.norm().clamp(max=hyper["max_weight_norm"])), float(change.norm())
        trust = weight_norm / change_norm if weight_norm and change_norm else 1.0
        w.add_(change, alpha=-hyper["lr"] * trust)


def _rmsprop(weights, gradients, state, hyper, numbers):
    tf, rate, momentum = numbers["use_tf_variant"], hyper["lr"], hyper["momentum"]
    means = state.get("Accl2", [None] * len(weights))
    for w, g, square, velocity, mean in zip(weights, gradients, state["Accl1"], state["Accl3"], means):
        g = g.add(w, alpha=hyper["weight_decay"])
        square.mul_(hyper["alpha"]).addcmul_(g, g, value=1 - hyper["alpha"])
        variance = square
        if hyper["centered"]:
            mean.lerp_(g, 1 - hyper["alpha"])
            variance = square - mean * mean
        change = g / ((variance + hyper["eps"]).sqrt() if tf else variance.sqrt() + hyper["eps"])
        if not momentum:
            w.add_(change, alpha=-rate)
            continue
        velocity.mul_(momentum).add_(change, alpha=rate if tf else 1.0)
        w.add_(velocity, alpha=-1.0 if tf else -rate)


_FORMULAS = {"SGD": _sgd, "Adam": _adam, "AdamW": _adamw, "LAMB": _lamb, "RMSprop": _rmsprop}
