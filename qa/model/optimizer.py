"""The optimizer and the learning-rate schedule."""
from __future__ import annotations

import math
import warnings
from typing import Any, Dict

import torch
from transformers import get_scheduler

from ipu_options import poptorch
from ipu_options.config import IPUConfig
from qa.model.parallelize import join_parts, split_parts
from qa.settings import TrainSettings

_DEVICE_STATE = ("ipu_state", "ipu_param")  # the keys that PopTorch adds to an optimizer's state


def make_optimizer(model: torch.nn.Module, settings: TrainSettings,
                   ipu_config: IPUConfig) -> torch.optim.Optimizer:
    """Return poptorch.optim.AdamW or LAMB for the parameters of `model` that require gradients.

    Weight decay applies to matrices only, not to biases and LayerNorm. Gradients are accumulated in
    the model's own type (float16 for a half model). Moments are float32; with
    enable_half_first_order_momentum the first is float16.

    With max_grad_norm, the gradient of all weights is scaled so that its norm is at most that, as
    by torch.nn.utils.clip_grad_norm_. It is the mean gradient of the whole update: PopART clips
    what goes into the moments (transforms/clipweightgradientsbynorm.cpp, getGrads), after the
    gradient was accumulated, reduced over the replicas and freed of the loss scaling
    (patterns/adamdecompose.cpp, AdamDecompose::apply), over all stages (copyToSameVGraph) and
    shards (op/reducesumsquare.cpp, configureForReplicatedTensorSharding). Unlike torch, it adds no
    1e-6 to the norm. accumulateOuterFragmentSettings.schedule must not be Serial for it.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    kind = {"adamw": poptorch.optim.AdamW, "lamb": poptorch.optim.LAMB}[settings.optimizer]
    half_first_moment = ipu_config.enable_half_first_order_momentum
    clipping = {"max_grad_norm": settings.max_grad_norm} if settings.max_grad_norm else {}
    optimizer = kind(
        groups, lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon, loss_scaling=settings.loss_scaling, accum_type=decayed[0].dtype,
        first_order_momentum_accum_type=torch.float16 if half_first_moment else torch.float32,
        second_order_momentum_accum_type=torch.float32, **clipping)
    # PopART compiles constants in (popx/op/adamupdaterx.cpp); PopTorch takes every argument that is
    # given for a variable (python/optim.py, _parseArgs).
    for name in ("weight_decay", "betas", "eps"):
        optimizer.variable_attrs.markAsConstant(name)
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """Return optimizer.state_dict(), with the parts of a serialised word embedding joined."""
    state = optimizer.state_dict()
    return {name: join_parts(value) if name in _DEVICE_STATE and value else value
            for name, value in state.items()}


def set_optimizer_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module,
                        state: Dict[str, Any]) -> None:
    """Load what `optimizer_state` returned, also for another number of embedding parts.

    model: the one whose parameters `optimizer` updates. PopTorch would leave state that it does not
    find under a parameter's name as it is, with only a warning (poptorch.cpp, writeOptimizerState).
    """
    divided = {name: split_parts(model, value) if name in _DEVICE_STATE and value else value
               for name, value in state.items()}
    # PyTorch compares the numbers of parameters in each group, which depend on that of the parts.
    own = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
    divided["param_groups"] = [
        {**group, "params": mine["params"]} for group, mine in zip(state["param_groups"], own)]
    optimizer.load_state_dict(divided)


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, total_steps: int,
                  steps_done: int = 0) -> "torch.optim.lr_scheduler.LambdaLR":
    """Return transformers' learning-rate schedule (get_scheduler), advanced by `steps_done` steps.

    A step is a call of the device. total_steps: their number in the whole run. The loop has to call
    `schedule.step()` and then `training_model.setOptimizer(optimizer)`: only the latter passes the
    new learning rate to the device.
    """
    # torch warns that optimizer.step() was not called; the device updates the weights instead.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(settings.warmup_ratio * total_steps)  # as Trainer
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, num_training_steps=total_steps,
                             num_warmup_steps=warmup)
    for _ in range(steps_done):
        schedule.step()
    return schedule
