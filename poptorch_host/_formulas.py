"""The weight updates of PopTorch's optimizers, as formulas over lists of float32 tensors.

Where PyTorch has a fused kernel for the CPU, that kernel computes the update. Otherwise the same
formula is computed tensor by tensor.
"""
from __future__ import annotations

from typing import Any, Dict, List

import torch

# PopART's names of each optimizer's state tensors. A centered RMSprop also has Accl2.
STATE = {
    "SGD": ("Accl1", ), "Adam": ("Accl1", "Accl2", "Step"), "AdamW": ("Accl1", "Accl2", "Step"),
    "LAMB": ("Accl1", "Accl2", "Step"),
    "RMSprop": ("Accl1", "Accl3")}


def has_fused_kernels(version: str) -> bool:
    """Return whether this version of torch has fused kernels for the CPU: 2.4 and later."""
    return tuple(int(number) for number in version.split(".")[:2]) >= (2, 4)


FUSED = has_fused_kernels(torch.__version__)


def new_state(settings: Dict[str, Any], weight: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Return the optimizer state of one weight before its first update, by PopART's names."""
    kind = settings["kind"]
    names = STATE[kind] + (
        ("Accl2", ) if any(group.get("centered") for group in settings["groups"]) else ())
    state = {
        name: torch.zeros((), dtype=torch.float32) if name == "Step" else torch.zeros_like(weight)
        for name in names}
    if kind == "RMSprop" and settings["use_tf_variant"]:
        state["Accl1"].fill_(1.0)
    return state


def clip(gradients: List[torch.Tensor], max_norm: float) -> None:
    """Scale all gradients in place by one factor, so that their joint norm is at most max_norm."""
    norm = torch.norm(torch.stack(torch._foreach_norm(gradients)))
    if norm > max_norm:
        torch._foreach_mul_(gradients, float(max_norm / norm))


def apply(settings: Dict[str, Any], hyper: Dict[str, Any], weights: List[torch.Tensor],
          gradients: List[torch.Tensor], states: List[Dict[str, torch.Tensor]]) -> None:
    """Update `weights` (float32) and `states` in place.

    settings: the optimizer's settings (see optim.snapshot).
    hyper: the hyperparameters of the parameter group that all these weights belong to.
    """
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
        gradients = torch._foreach_add(gradients, velocity,
                                       alpha=hyper["momentum"]) if hyper["nesterov"] else velocity
    torch._foreach_add_(weights, gradients, alpha=-hyper["lr"])


def _adam(weights, gradients, state, hyper, numbers, fused=FUSED and
          getattr(torch, "_fused_adam_", None), decoupled=False):
    (beta1, beta2), decay, rate = hyper["betas"], hyper["weight_decay"], hyper["lr"]
    torch._foreach_add_(state["Step"], 1)
    if fused:
        fused(weights, gradients, state["Accl1"], state["Accl2"], [], state["Step"], lr=rate,
              beta1=beta1, beta2=beta2, weight_decay=decay, eps=hyper["eps"], amsgrad=False,
              maximize=False)
        return
    for w, g, m, v, step in zip(weights, gradients, state["Accl1"], state["Accl2"], state["Step"]):
        if decay and decoupled:
            w.mul_(1 - rate * decay)
        elif decay:
            g = g.add(w, alpha=decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - torch.pow(beta2, step))).sqrt_().add_(hyper["eps"])
        w.addcdiv_(m, root, value=-rate / float(1 - torch.pow(beta1, step)))


def _adamw(weights, gradients, state, hyper, numbers):
    _adam(weights, gradients, state, hyper, numbers, FUSED and
          getattr(torch, "_fused_adamw_", None), decoupled=True)


def _lamb(weights, gradients, state, hyper, numbers):
    beta1, beta2 = hyper["betas"]
    torch._foreach_add_(state["Step"], 1)
    for w, g, m, v, step in zip(weights, gradients, state["Accl1"], state["Accl2"], state["Step"]):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        # An infinite step turns the correction off, because beta ** inf is 0.
        step = step if numbers["bias_correction"] else torch.tensor(float("inf"))
        root = (v / (1 - torch.pow(beta2, step))).sqrt_().add_(hyper["eps"])
        change = (m / (1 - torch.pow(beta1, step))).div_(root).add_(w, alpha=hyper["weight_decay"])
        weight_norm, change_norm = float(w.norm().clamp(max=hyper["max_weight_norm"])), float(
            change.norm())
        trust = weight_norm / change_norm if weight_norm and change_norm else 1.0
        w.add_(change, alpha=-hyper["lr"] * trust)


def _rmsprop(weights, gradients, state, hyper, numbers):
    tf, rate, momentum = numbers["use_tf_variant"], hyper["lr"], hyper["momentum"]
    means = state.get("Accl2", [None] * len(weights))
    for w, g, square, velocity, mean in zip(weights, gradients, state["Accl1"], state["Accl3"],
                                            means):
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
