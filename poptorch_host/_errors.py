"""PopTorch's errors, and the names of PopTorch that poptorch_host leaves out, with the reasons."""
from __future__ import annotations


class Error(RuntimeError):
    """The error for what PopTorch refuses or cannot do.

    Its attributes `type`, `message` and `location` are those of PopTorch's class.
    """

    def __init__(self, message: str, kind: str = "poptorch_py_error"):
        super().__init__(f"'{kind}': {message}")
        self.type, self.message, self.location = kind, message, ""


class NotOffered(Error, AttributeError):
    """The error for the use of a part of PopTorch that poptorch_host leaves out.

    It is also an AttributeError: hasattr() returns False.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"poptorch.{name} is not offered by poptorch_host: {reason}")


# Names below Options, optim and PoplarExecutor are written with a dot, as a user writes them.
_LEFT_OUT = {
    "a model is put on IPUs by BeginBlock, a strategy and an AutoStage":
        "Stage BlockFunction LegacyBeginBlockFn",
    "phased execution keeps parts of a model off the chip, and this project pipelines":
        "Phase ParallelPhasedExecution SerialPhasedExecution Liveness",
    "no model here uses it":
        "MultiConv MultiConvPlanType ctc_beam_search_decoder fps nearest serializedMatMul "
        "MatMulSerializationMode ipu_print_tensor nop NameScope isRunningOnIpu",
    "control flow on the device is not executed on the host":
        "for_loop cond dynamic_slice dynamic_update",
    "it needs code compiled for an IPU": "custom_op CPU",
    "this project trains with AdamW or LAMB": "optim.Adam optim.RMSprop",
    "torch's own worker processes read ahead":
        "AsynchronousDataAccessor SharingStrategy DataLoaderMode.AsyncRebatched",
    "arguments and results are tensors in lists, tuples and dictionaries":
        "ICustomArgParser registerCustomArgParser registerGeometricCustomArgParsers",
    "nothing is compiled on a host":
        "registerPreCompileHook registerPostCompileHook PoplarExecutor.compilationTime "
        "Options.showCompilationProgressBar Options.updatableNamedBuffers "
        "PoplarExecutor.copyNamedBuffersToDevice",
    "only an IPU fails in these ways": "RecoverableError UnrecoverableError",
    "it counts or times what an IPU does":
        "Options.logCycleCount PoplarExecutor.cycleCount PoplarExecutor.getPerfCounters "
        "PoplarExecutor.getHostIpuLatency PoplarExecutor.getComputeLatency "
        "PoplarExecutor.getIpuHostLatency PoplarExecutor.getLatency",
    "it names tensors of PopART's graph": "PoplarExecutor.getTensorNames",
    "it runs the Python code of a file": "Options.loadFromFile ConfigFileError",
    "the device updates the weights": "optim.LAMB.step",
    "the options are called where they are needed": "Options.from_json",
    "POPTORCH_LOG_LEVEL sets it": "setLogLevel",
    "a host has no executable to keep, and a model is pickled code; save model.state_dict() and "
    "optimizer.state_dict()":
        "load PoplarExecutor.save PoplarExecutor.compileAndExport PoplarExecutor.loadExecutable",
    "all replicas have the same weights and buffers, each with its own input":
        "CommGroupType VariableRetrievalMode Parameter.replicaGrouping Options.broadcastBuffers "
        "Options.inputReplicaGrouping",
    "it is deprecated in PopTorch":
        "Options.Jit HalfFloatCastingBehavior Options.Precision.halfFloatCasting "
        "Options.Precision.runningStatisticsAlwaysFloat",
    "it would have no effect on a host":
        "OverlapMode set_overlap_for_input set_overlap_for_output set_available_memory "
        "SyncPattern Options.syncPattern Options.useIpuId Options.logDir Options.maxRepeatLogs "
        "Options.enableStableNorm Options.disableModuleNamescope Options.sourceLocationExcludes "
        "Options.appendToLocationExcludes Options.relaxOptimizerAttributesChecks "
        "Options.Precision.enableFloatingPointExceptions Options.Training.setConvolutionDithering "
        "Options.Distributed.disable Options.Distributed.setEnvVarNames "
        "Options.TensorLocations.numIOTiles Options.TensorLocations.setActivationLocation "
        "Options.TensorLocations.setWeightLocation Options.TensorLocations.setAccumulatorLocation "
        "TensorLocationSettings.minElementsForOffChip TensorLocationSettings.useIOTilesToLoad "
        "TensorLocationSettings.useIOTilesToStore "
        "TensorLocationSettings.minElementsForReplicatedTensorSharding",
}
NOT_OFFERED = {name: reason for reason, names in _LEFT_OUT.items() for name in names.split()}


def refuse(name: str) -> None:
    """Raise NotOffered if `name`, for example "optim.Adam", is left out."""
    if name in NOT_OFFERED:
        raise NotOffered(name, NOT_OFFERED[name])
