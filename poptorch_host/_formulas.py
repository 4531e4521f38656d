"""The weight updates of PopTorch's optimizers, as formulas over lists of float32 tensors.

Where PyTorch has a fused kernel for the CPU, that kernel computes the update.
"""
from __future__ import annotations

from typing import Any, Dict, List

import torch

# PopART's names of each optimizer's state tensors
STATE = {
    "SGD": ("Accl1", ), "AdamW": ("Accl1", "Accl2", "Step"), "LAMB": ("Accl1", "Accl2", "Step")}
FUSED = torch.__version__ >= "2.4"  # whether it has fused kernels for the CPU


def new_state(settings: Dict[str, Any], weight: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Return the optimizer state of one weight before its first update, by PopART's names."""
    return {
        name: torch.zeros((), dtype=torch.float32) if name == "Step" else torch.zeros_like(weight)
        for name in STATE[settings["kind"]]}


def clip(gradients: List[torch.Tensor], max_norm: float) -> None:
    """Scale all gradients in place by one factor, so that their joint norm is at most max_norm."""
    norm = torch.norm(torch.stack(torch._foreach_norm(gradients)))
    if norm > max_norm:
        torch._foreach_mul_(gradients, float(max_norm / norm))


def apply(settings: Dict[str, Any], hyper: Dict[str, Any], weights: List[torch.Tensor],
          gradients: List[torch.Tensor], states: List[Dict[str, torch.Tensor]]) -> None:
    """Update `weights` (float32) and `states` in place.

    settings: see optim.snapshot. hyper: the hyperparameters of these weights' parameter group.
    """
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


def _adamw(weights, gradients, state, hyper, numbers):
    (beta1, beta2), decay, rate = hyper["betas"], hyper["weight_decay"], hyper["lr"]
    torch._foreach_add_(state["Step"], 1)
    if FUSED:
        torch._fused_adamw_(
            weights, gradients, state["Accl1"], state["Accl2"], [], state["Step"], lr=rate,
            beta1=beta1, beta2=beta2, weight_decay=decay, eps=hyper["eps"], amsgrad=False,
            maximize=False)
        return
    for w, g, m, v, step in zip(weights, gradients, state["Accl1"], state["Accl2"], state["Step"]):
        w.mul_(1 - rate * decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - torch.pow(beta2, step))).sqrt_().add_(hyper["eps"])
        w.addcdiv_(m, root, value=-rate / float(1 - torch.pow(beta1, step)))


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


_FORMULAS = {"SGD": _sgd, "AdamW": _adamw, "LAMB": _lamb}
