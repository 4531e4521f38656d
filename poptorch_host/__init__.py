"""PopTorch's interface executed on the host, in plain PyTorch. See README.md in this folder."""
from __future__ import annotations

import copy
from typing import Optional

import torch

from . import enums, ops, optim, options, poptorch_core, profiling  # noqa: F401
from ._dataloader import AsynchronousDataAccessor, DataLoader
from ._errors import Error, NotOffered, RecoverableError, UnrecoverableError
from ._logging import setLogLevel
from ._memory import keep_freed_memory
from ._poplar_executor import (
    EXECUTABLE,
    PoplarExecutor,
    registerPostCompileHook,
    registerPreCompileHook,
)
from ._structure import ICustomArgParser, registerCustomArgParser
from ._user_model import is_wrapped, module_repr  # noqa: F401
from .blocks import (
    BeginBlock,
    Block,
    BlockFunction,
    LegacyBeginBlockFn,
    PipelinedExecution,
    ShardedExecution,
    Stage,
    removeBlocks,
)
from .enums import *  # noqa: F401,F403
from .ops import (
    Attribute,
    NameScope,
    identity_loss,
    ipu_print_tensor,
    isRunningOnIpu,
    nop,
    recomputationCheckpoint,
    serializedMatMul,
    set_available_memory,
)
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
    """Return False: a host has no IPUs."""
    return False


def ipuHardwareVersion() -> int:
    """Raise AssertionError: a host has no IPUs, hence no version of them."""
    raise AssertionError("No IPU hardware available on this system")


# Names of PopTorch that are left out here, each with the reason that the error message gives.
NOT_OFFERED = {
    **dict.fromkeys(
        ("Phase", "ParallelPhasedExecution", "SerialPhasedExecution", "Liveness"),
        "phased execution keeps parts of a model off the chip, and this project pipelines"),
    **dict.fromkeys(
        ("MultiConv", "MultiConvPlanType", "ctc_beam_search_decoder", "fps", "nearest"),
        "no model here uses it"),
    **dict.fromkeys(
        ("for_loop", "cond", "dynamic_slice", "dynamic_update"),
        "control flow on the device is not executed on the host"),
    **dict.fromkeys(("custom_op", "CPU"), "it needs code compiled for an IPU"),
    **dict.fromkeys(
        ("set_overlap_for_input", "set_overlap_for_output"), "there are no transfers to overlap"),
    "VariableRetrievalMode": "every replica has the same weights",
    "load": EXECUTABLE,
}


def __getattr__(name):
    if name in NOT_OFFERED:
        raise NotOffered(name, NOT_OFFERED[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
