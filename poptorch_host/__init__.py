"""PopTorch's interface executed on the host, in plain PyTorch. See README.md in this folder."""
from __future__ import annotations

import copy
from functools import partial
from typing import Optional

import torch

from . import enums, ops, optim, options, profiling  # noqa: F401
from ._dataloader import DataLoader
from ._errors import NOT_OFFERED, Error, NotOffered, refuse
from ._memory import keep_freed_memory
from ._poplar_executor import PoplarExecutor
from ._user_model import is_wrapped
from .blocks import BeginBlock, Block, PipelinedExecution, ShardedExecution, removeBlocks
from .enums import *  # noqa: F401,F403
from .ops import Attribute, identity_loss, recomputationCheckpoint
from .options import Options, TensorLocationSettings

__version__ = "3.4.0-host"
keep_freed_memory()  # before a model is loaded, whose memory serves for the device's tensors


def trainingModel(model: torch.nn.Module, options: Optional[Options] = None,
                  optimizer: Optional[torch.optim.Optimizer] = None,
                  ) -> PoplarExecutor:
    """Return an executor whose call runs forward, backward and weight updates of `model`.

    `optimizer` defaults to SGD with a learning rate of 0.01. Raises RuntimeError if a training
    executor already wraps `model`.
    """
    if isinstance(model, PoplarExecutor):
        model = model._user_model
    if is_wrapped(model):
        raise RuntimeError(
            "Model has already been wrapped in 'poptorch.trainingModel'. Call model.destroy() on "
            "the model to unwrap before wrapping again.")
    return PoplarExecutor(copy.copy(model), options, True, __version__, optimizer, user_model=model)


def inferenceModel(model: torch.nn.Module, options: Optional[Options] = None) -> PoplarExecutor:
    """Return an executor whose call runs `model` forward."""
    if isinstance(model, PoplarExecutor):
        model = model._user_model
    return PoplarExecutor(copy.copy(model), options, False, __version__)


def ipuHardwareIsAvailable(num_ipus: int = 1) -> bool:
    return False


def ipuHardwareVersion() -> int:
    raise AssertionError("No IPU hardware available on this system")


def _missing(module: str, path: str, name: str) -> None:
    refuse(path + name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


__getattr__ = partial(_missing, __name__, "")
optim.__getattr__ = partial(_missing, optim.__name__, "optim.")
