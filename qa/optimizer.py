"""Optimizer and learning-rate schedule."""
from __future__ import annotations

import warnings
from typing import Tuple

import torch
from transformers import get_scheduler

from ipu_options import poptorch


def make_optimizer(model: torch.nn.Module, *, name: str, learning_rate: float, weight_decay: float = 0.0,
                   betas: Tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8, loss_scaling: float = 1.0,
                   half_first_moment: bool = False) -> torch.optim.Optimizer:
    """poptorch.optim.AdamW ("adamw") or LAMB ("lamb") with weight decay on the matrices alone, not on biases and LayerNorm.

    Gradients are accumulated in the model's own type (float16 for a half model), moments in float32. Weight decay is
    marked as a constant, so that PopART can compile it in.  half_first_moment: keep the first moment in float16.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = {"adamw": poptorch.optim.AdamW, "lamb": poptorch.optim.LAMB}[name](
        groups, lr=learning_rate, betas=betas, eps=epsilon, loss_scaling=loss_scaling,
        accum_type=decayed[0].dtype, first_order_momentum_accum_type=torch.float16 if half_first_moment else torch.float32,
        second_order_momentum_accum_type=torch.float32)
    optimizer.variable_attrs.markAsConstant("weight_decay")
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, kind: str, warmup_steps: int, total_steps: int, steps_done: int = 0,
                  ) -> "torch.optim.lr_scheduler.LambdaLR":
    """Learning rate by step, a call of the device (transformers' get_scheduler names: linear, cosine, ...).

    The loop calls `schedule.step()` and then `training_model.setOptimizer(optimizer)`: on the device nothing changes before.
    """
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # the device updates: optimizer.step() is never called
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    for _ in range(steps_done):
        schedule.step()
    return schedule
