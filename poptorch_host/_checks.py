"""Checks that refuse what PopTorch's front end or its compiler refuses, in PopTorch's words."""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Dict, Iterable

import torch

from . import enums
from ._errors import Error, NotOffered
from .blocks import Recorder, ShardedExecution

MAX_IPUS = 64
PATTERN_LEVELS = 3
UNSUPPORTED_TYPES = {torch.bfloat16: "BFloat16", torch.complex64: "ComplexFloat",
                     torch.complex128: "ComplexDouble"}
# What PopTorch's compiler takes (tests/tools/poptorch_compiler.py)
COMPILER = json.loads(Path(__file__).with_name("compiler.json").read_text(encoding="utf-8"))
# (type of a value, the compiler's list of options with it, its word for it); a bool is an int
ENUMERATIONS = {**COMPILER["enumerations"], "accumulateOuterFragmentSettings.schedule": (
    "popart::AccumulateOuterFragmentSchedule", 4)}
KINDS = ((bool, "bool", "bool"), (int, "uint64", "uint64"), (float, "double", "floating point"),
         (str, "string", "string"), ((list, tuple, set), "container", "set / vector"),
         (dict, "container", "map"))


def popart_options(values: dict) -> None:
    """Raise Error for an option that PopART does not have or a value that it does not take."""
    for name, value in values.items():
        kind, word = next(((kind, word) for types, kind, word in KINDS if isinstance(value, types)),
                          (None, None))
        if kind is None:
            raise Error(f"Unknown value type {type(value)} for option {name}")
        if name == "patterns":
            for pattern in value:
                if pattern not in COMPILER["patterns"]:
                    raise Error(f"Unknown pattern {pattern}.")
        elif name == "patterns_level":
            if value > PATTERN_LEVELS:
                raise Error("level > static_cast<std::uint64_t>(popart::PatternsLevel::All)")
        elif name not in COMPILER["options"][kind]:
            raise Error(f"Unknown {word} option {name}")
        enumeration, members = ENUMERATIONS.get(name, (None, math.inf))
        if enumeration and value >= members:
            raise Error(f"Value for {enumeration} out of range")


def inference_options(options) -> None:
    """Raise Error if an inference model is given gradient accumulation."""
    if options.Training.gradient_accumulation != 1:
        sharded = isinstance(options._execution_strategy, ShardedExecution)
        raise Error(
            "You must set poptorch.Options().Training.gradientAccumulation to 1 or leave it as its "
            "default value (1) when running a poptorch.inferenceModel()." +
            ("" if sharded else
             " Use poptorch.Options().deviceIterations to process a sufficient number of batches "
             "each run for pipelined execution instead."))


def accumulation_type(optimizer, options, compiled: bool) -> None:
    """Choose the running mean for an optimizer that accumulates gradients in float16."""
    running = enums.MeanReductionStrategy.Running
    half = getattr(optimizer, "accum_type", None) == torch.float16
    if half and not compiled:
        options._freeze(False)
        options.Training.setMeanAccumulationAndReplicationReductionStrategy(running)
        options._freeze()
    elif half and options.Training.meanAccumulationAndReplicationReductionStrategy != running:
        raise ValueError(
            "Invalid optimizer: the new optimizer would require changing options.Training."
            "meanAccumulationAndReplicationReductionStrategy to "
            "poptorch.MeanReductionStrategy.Running but the executable is already compiled.")


def types(tensors: Iterable[torch.Tensor]) -> None:
    """Raise Error for a type that PopTorch's compiler lacks (toCompilerType, Tensor.cpp)."""
    for tensor in tensors:
        if tensor.dtype in UNSUPPORTED_TYPES:
            raise Error(f"Unsupported tensor input type from pytorch: "
                        f"{UNSUPPORTED_TYPES[tensor.dtype]}")


def loss_scaling(settings: Dict[str, Any], opts, has_half: bool) -> None:
    """Raise Error for a loss scaling of 0 and an automatic one without float16 gradients.

    settings: the optimizer's (see optim.snapshot). has_half: whether a trained weight is float16.
    """
    if not settings["loss_scaling"]:
        raise Error("Loss scaling cannot be 0")
    if opts._Popart.options.get("automaticLossScalingSettings.enabled") and not has_half:
        raise Error("[AutomaticLossScale transform] No tracked gradient tensors of type fp16 were "
                    "found.")


def options(opts) -> None:
    """Raise Error for options that cannot be obeyed, whatever the model."""
    processes = opts.Distributed.numProcesses
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if processes > 1 and not (joined and processes == torch.distributed.get_world_size()):
        raise NotOffered(
            "Options.Distributed",
            f"{processes} processes must first join torch.distributed's default group, by "
            "init_process_group; replicationFactor() gives the same result in one process")
    popart_options(opts._Popart.options)
    if opts.connection_type == enums.ConnectionType.Never and opts.toDict().get("use_model"):
        raise Error(
            "ConnectionType.Never / poptorch.Options.useOfflineIpuTarget not supported for the IPU "
            "model")
    if (opts.output_mode == enums.OutputMode.EveryN and
            opts.device_iterations % opts.output_return_period):
        raise Error("Return period must be a factor of the number of batches per step")


def pipeline(recorder: Recorder, opts, training: bool) -> None:
    """Raise Error for blocks or IPUs that are refused, and if a pipeline has too few micro-batches.

    It needs at least as many per weight update (in inference: per call) as it has stages.
    """
    _check_ipus(recorder, opts)
    ipu_of: Dict[int, int] = {}
    for _, stage, ipu in recorder.blocks:
        if ipu_of.setdefault(stage, ipu) != ipu:
            raise Error(
                f"Ops have the same pipeline stage {stage}, but different virtual graph ids "
                f"[{ipu_of[stage]} {ipu}]. All ops with the same pipeline stage must also have the "
                "same virtual graph id")
    for ipu in set(recorder.ipus()):
        if not 0 < opts.available_memory_proportion.get(ipu, 1) <= 1:
            raise Error("availableMemoryProportion must be in (0,1]")
    if isinstance(opts._execution_strategy, ShardedExecution):
        return
    order = recorder.ipus()
    # PopTorch starts on IPU 0 and counts every change of IPU (Compiler::setActiveIpu).
    forward = len(order) + (order[0] != 0)
    stages = 2 * forward - 1 if training else forward
    if training and opts.Training.gradient_accumulation < stages:
        raise Error(
            "poptorch.Options().Training.gradientAccumulation must be greater than or equal to the "
            f"number of pipeline stages ({stages}) when using poptorch.PipelinedExecution. Please "
            f"note that a model with {forward} pipeline stages in PopTorch will have an additional "
            f"{forward - 1} stages when training.")
    if not training and opts.device_iterations < stages:
        raise Error(
            "poptorch.Options().deviceIterations must be greater than or equal to the number of "
            f"pipeline stages ({stages}) when using PopTorch.PipelinedExecution.")


def _check_ipus(recorder: Recorder, opts) -> None:
    used = set(recorder.ipus())
    count = max(len(used), max(used) + 1) * opts.replication_factor
    rounded = 1 << (count - 1).bit_length()
    any_number = (opts.toDict().get("use_model") or
                  opts.connection_type == enums.ConnectionType.Never)
    reserved = count if any_number else rounded
    if count > MAX_IPUS or reserved > MAX_IPUS:
        raise Error(
            f"Too many IPUs requested ({count}). Experiments that need more than {MAX_IPUS} IPUs "
            "require distributed execution.")
    if reserved != count and not opts.auto_round_num_ipus:
        raise Error(
            f"The model specifies the use of {count} IPUs, however PopTorch must reserve a minimum "
            f"of {rounded} in order to allow the model to run, because PopTorch must reserve a "
            f"power of 2 or maximum of {MAX_IPUS} IPUs per process. "
            "Please reconfigure your model to use a different number of IPUs or set "
            "poptorch.Options().autoRoundNumIPUs(True).")
