"""Checks that refuse what PopTorch's front end or its compiler refuses, in PopTorch's words."""
from __future__ import annotations

import torch

from . import enums
from ._errors import Error, NotOffered
from .blocks import Recorder, ShardedExecution

MAX_IPUS = 64

# Options that PopTorch 3.4 passes to PopART (popart_compiler/source/SessionOptions.cpp). Options
# whose names contain a dot belong to the groups listed in POPART_SETTINGS.
POPART_OPTIONS = set("""
accumulationAndReplicationReductionType accumulationFactor aliasZeroCopy autoRecomputation cachePath
compilationProgressTotal compileEngine constantWeights convolutionOptions customCodeletCompileFlags
customCodelets decomposeGradSum defaultBufferingDepth defaultPrefetchBufferingDepth delayVarUpdates
disableGradAccumulationTensorStreams disableOptimizerStateTensorStreams dotChecks dotOpNames
enableDistributedReplicatedGraphs enableEngineCaching enableExplicitIR enableExplicitMainLoops
enableFloatingPointChecks enableFullyConnectedPass enableGradientAccumulation
enableInplaceAmbiguityChecking enableLoadAndOffloadRNGState enableMergeExchange
enableNonStableSoftmax enableOutlining enableOutliningCopyCostPruning enablePipelining
enablePrefetchDatastreams enableReplicatedGraphs enableSerializedMatmuls enableStableNorm
enableStochasticRounding enableSupportedDataTypeCasting engineOptions ensureFp32LossScaleTensor
explicitRecomputation exportPoplarComputationGraph exportPoplarVertexGraph finalDotOp firstDotOp
gclOptions globalReplicaOffset globalReplicationFactor groupHostSync groupNormStridedChannelGrouping
hardwareInstrumentations instrumentWithHardwareCycleCounter kahnTieBreaker logDir
looseThresholdAtPeak lstmOptions matmulOptions meanAccumulationAndReplicationReductionStrategy
mergeVarUpdate mergeVarUpdateMemThreshold numIOTiles opxAliasChecking opxModifyChecking
outlineSequenceBreakCost outlineThreshold partialsTypeMatMuls patterns patterns_level
rearrangeAnchorsOnHost rearrangeStreamsOnHost reportOptions saveInitializersToFile
scheduleNonWeightUpdateGradientConsumersEarly separateCallOpPdfs serializedPoprithmsShiftGraphsDir
strictOpVersions subgraphCopyingStrategy swapLimitScheduler syntheticDataMode timeLimitScheduler
transitiveClosureOptimizationThreshold updatableNamedBuffers useHostCopyOps virtualGraphMode
""".split())
POPART_SETTINGS = ("accumulateOuterFragmentSettings.", "autodiffSettings.",
                   "automaticLossScalingSettings.", "batchSerializationSettings.",
                   "executionPhaseSettings.", "replicatedCollectivesSettings.")


def popart_options(values: dict) -> None:
    """Raise Error for an option that PopART does not have or a value of an unsupported type.

    `values` maps names to values, which must be numbers, strings or collections.
    """
    for name, value in values.items():
        if name not in POPART_OPTIONS and not name.startswith(POPART_SETTINGS):
            raise Error(
                f"Unknown PopART option {name}: poptorch.Options._Popart.set() takes the names of "
                "popart.SessionOptions")
        if not isinstance(value, (bool, int, float, str, list, tuple, set, dict)):
            raise Error(f"Unknown value type {type(value)} for option {name}")


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
    """Choose the running mean if the optimizer accumulates gradients in float16, as PopTorch does.

    Raises ValueError if the model is already compiled with another strategy.
    """
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


def options(opts) -> None:
    """Raise Error for options that cannot be obeyed, whatever the model.

    Several processes (Options.Distributed) are refused with NotOffered, unless they have joined
    torch.distributed's default group.
    """
    processes = opts.Distributed.numProcesses
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if processes > 1 and not (joined and processes == torch.distributed.get_world_size()):
        raise NotOffered(
            "Options.Distributed",
            f"{processes} processes must first join torch.distributed's default group, by "
            "init_process_group; replicationFactor() gives the same result in one process")
    popart_options(opts._Popart.options)
    if (opts.connection_type == enums.ConnectionType.Never and opts.exists("use_model")
            and opts.use_model):
        raise Error(
            "ConnectionType.Never / poptorch.Options.useOfflineIpuTarget not supported for the IPU "
            "model")
    if (opts.output_mode == enums.OutputMode.EveryN and
            opts.device_iterations % opts.output_return_period):
        raise Error(f"The output return period ({opts.output_return_period}) must be a divisor of "
                    f"poptorch.Options().deviceIterations ({opts.device_iterations})")


def loss_scaling(opts, parameters) -> None:
    """Raise Error for automatic loss scaling of a model without trained float16 `parameters`."""
    if opts._Popart.options.get("automaticLossScalingSettings.enabled") and not any(
            parameter.requires_grad and parameter.dtype == torch.float16
            for parameter in parameters):
        raise Error("[AutomaticLossScale transform] No tracked gradient tensors of type fp16 were "
                    "found.")


def pipeline(recorder: Recorder, opts, training: bool) -> None:
    """Raise Error if the blocks need too many micro-batches or a number of IPUs that is refused.

    A pipeline needs at least as many micro-batches per weight update (in inference: per call) as it
    has stages. IPUs are reserved in powers of two, MAX_IPUS at most.
    """
    _check_ipus(recorder, opts)
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
    simulated = opts.exists("use_model") and opts.use_model
    reserved = count if simulated or opts.connection_type == enums.ConnectionType.Never else rounded
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
