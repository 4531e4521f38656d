"""poptorch.Options and its parts: what PopTorch accepts is accepted, what it refuses is refused, in
the same words.

Most options steer the Poplar compiler and mean nothing on a host: they are checked and kept, so
that a script's configuration can be read back and printed, and otherwise change nothing. Those that
change results (batching, reduction, output mode, seed, offline target) are obeyed by the executor
and the data loader.
"""
from __future__ import annotations

import copy
import json
import os
from typing import Any, Dict, List, Optional, Set, Union

import torch

from . import enums
from ._errors import NotOffered
from ._logging import logger
from .blocks import ExecutionStrategy, PipelinedExecution

FROZEN = "Can't modify frozen Options"


class OptionsDict:
    """Named values that refuse unknown names, values of another type, and any change once they are
    frozen.
    """

    def __init__(self, **values: Any):
        private = {name: values.pop(name) for name in list(values) if name.startswith("_")}
        self.__dict__.update(private, _values=values, _is_frozen=False)

    def exists(self, option: str) -> bool:
        """True if `option` has a value."""
        return option in self._values

    def set(self, **values: Any) -> "OptionsDict":
        """Change values that exist; returns self. AssertionError for an unknown name or another
        type, AttributeError when frozen.
        """
        self.checkIsFrozen()
        for name, value in values.items():
            assert self.exists(
                name), f"Invalid option {name}, valid options are {list(self._values)}"
            expected = type(self._values[name])
            assert isinstance(
                value,
                expected), f"Unexpected type {type(value)} for option {name}. Expected {expected}"
            self._values[name] = value
        return self

    def createOrSet(self, **values: Any) -> "OptionsDict":
        """As `set`, for values that need not exist yet."""
        self.checkIsFrozen()
        for name, value in values.items():
            self._values.setdefault(name, value)
        return self.set(**values)

    def deleteIfExists(self, option: str) -> None:
        """Forget `option`."""
        self._values.pop(option, None)

    def checkIsFrozen(self, option: Optional[str] = None) -> None:
        """AttributeError if the options are frozen."""
        if self._is_frozen and option != "_is_frozen":
            raise AttributeError(FROZEN)

    def update(self, other: Dict[str, Any]) -> Dict[str, Any]:
        """Add the values to `other`, which may not have any of them, and return it."""
        assert not self._values.keys() & other.keys(
        ), "Can't merge dictionaries, they have some keys in common"
        other.update(self._values)
        return other

    def _for_popart(self, key: str, value: Any) -> "OptionsDict":
        self._popart.set(key, value)
        return self

    def toDict(self) -> Dict[str, Any]:
        """The values by name."""
        return dict(self._values)

    def __call__(self, option: str) -> Any:
        return getattr(self, option)

    def __setattr__(self, name, value):
        self.checkIsFrozen(name)
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self.set(**{name: value})

    def __getattr__(self, name):
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"Invalid attribute {name}.")
        return values[name]

    def __deepcopy__(self, memo):
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__dict__, memo), _is_frozen=False)
        return other

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._values.items())})"

    def _freeze(self, frozen: bool = True):
        for part in (self, *self.__dict__.values()):
            if isinstance(part, OptionsDict):
                part.__dict__["_is_frozen"] = frozen

    def _unfreeze(self):
        self._freeze(False)


class _PopartOptions(OptionsDict):
    """Options of the PopART compiler, by PopART's names; kept for inspection."""

    def __init__(self) -> None:
        super().__init__(instrumentWithHardwareCycleCounter=False, rearrangeAnchorsOnHost=False)

    @property
    def options(self) -> Dict[str, Any]:
        """The options by name."""
        return self._values

    def set(self, key: str, value: Union[int, float, str, List[str], Set[str]]) -> "_PopartOptions":
        """Keep one of popart.SessionOptions' options; a name PopART does not have is refused when a
        model is compiled.
        """
        self.checkIsFrozen()
        self._values[key] = value
        return self

    def setEngineOptions(self, engine_options: Dict[str, str]) -> "_PopartOptions":
        """Poplar engine options."""
        return self.set("engineOptions", engine_options)

    def setPatterns(self, patterns: Dict[str, bool], level: int = 2) -> "_PopartOptions":
        """Patterns of PopART's compiler to switch on or off."""
        assert isinstance(level, int)
        assert isinstance(patterns, dict)
        return self.set("patterns_level", level).set("patterns", patterns)


class _JitOptions(OptionsDict):
    """Deprecated in PopTorch."""

    def traceModel(self, trace_model: bool) -> "_JitOptions":
        """Only False is possible since PopTorch 3.0."""
        logger.warning(
            "[Deprecated] options.Jit.traceModel() has no effect: the model is never traced by torch.jit"
        )
        if trace_model:
            raise ValueError("options.Jit.traceModel(True) is no longer supported")
        return self


class _PrecisionOptions(OptionsDict):
    """Number formats. On the host a float16 model computes in bfloat16 or float32, so these are
    kept without effect.
    """

    def __init__(self, popart_options: _PopartOptions) -> None:
        super().__init__(_popart=popart_options)

    def halfFloatCasting(self,
                         half_float_casting: enums.HalfFloatCastingBehavior) -> "_PrecisionOptions":
        """Deprecated: half is always cast up to float."""
        logger.warning(
            "[Deprecated] options.Precision.halfFloatCasting(): HalfUpcastToFloat is the only behaviour"
        )
        return self

    def runningStatisticsAlwaysFloat(self, value: bool) -> "_PrecisionOptions":
        """Deprecated: running statistics have the type PyTorch gives them."""
        if not isinstance(value, bool):
            raise ValueError("runningStatisticsAlwaysFloat needs to be set to a bool")
        logger.warning(
            "[Deprecated] options.Precision.runningStatisticsAlwaysFloat(): False is the only behaviour"
        )
        return self

    def enableFloatingPointExceptions(self, enabled: bool) -> "_PrecisionOptions":
        """Stop on invalid operations and overflows (kept without effect)."""
        assert isinstance(enabled, bool), "enableFloatingPointExceptions needs to be set to a bool"
        return self._for_popart("enableFloatingPointChecks", enabled)

    def enableStochasticRounding(self, enabled: bool) -> "_PrecisionOptions":
        """Stochastic rounding to float16 (kept without effect: the host's weights are float32)."""
        return self._for_popart("enableStochasticRounding", enabled)

    def setPartialsType(self, dtype: torch.dtype) -> "_PrecisionOptions":
        """Type of a matrix multiplication's partial sums (kept without effect: the host sums in
        float32).
        """
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(
                "parameter to setPartialsType should be either torch.float or torch.half")
        kind = "half" if dtype == torch.float16 else "float"
        self._popart.set("partialsTypeMatMuls", kind)
        return self._for_popart("convolutionOptions", {"partialsType": kind})


class _TrainingOptions(OptionsDict):
    """Options of training; an inference model takes none of them."""

    def __init__(self, popart_options: _PopartOptions) -> None:
        super().__init__(
            _popart=popart_options, gradient_accumulation=1,
            accumulation_and_replication_reduction_type=enums.ReductionType.Mean,
            meanAccumulationAndReplicationReductionStrategy=enums.MeanReductionStrategy.Post)

    def gradientAccumulation(self, gradient_accumulation: int) -> "_TrainingOptions":
        """Micro-batches of one replica in one weight update."""
        return self.set(gradient_accumulation=gradient_accumulation)

    def accumulationAndReplicationReductionType(
            self, reduction_type: enums.ReductionType) -> "_TrainingOptions":
        """Gradients of an update are the mean (default) or the sum over its micro-batches and
        replicas.
        """
        if reduction_type not in (enums.ReductionType.Mean,
                                  enums.ReductionType.Sum) or not isinstance(
                                      reduction_type, enums.ReductionType):
            raise ValueError(
                "accumulationAndReplicationReductionType must be set to poptorch.ReductionType.Mean or "
                "poptorch.ReductionType.Sum")
        return self.set(accumulation_and_replication_reduction_type=reduction_type)

    def setMeanAccumulationAndReplicationReductionStrategy(
            self, mean_reduction_strategy: enums.MeanReductionStrategy) -> "_TrainingOptions":
        """When the mean's division happens; in float32, which the host accumulates in, it makes no
        difference.
        """
        return self.set(meanAccumulationAndReplicationReductionStrategy=mean_reduction_strategy)

    def setAutomaticLossScaling(self, enabled: bool) -> "_TrainingOptions":
        """Let the device choose the loss scaling, which becomes variable in the optimizer. On the
        host the scaling keeps its value: it is there to keep float16 gradients in range, and the
        host's gradients have float32's range.
        """
        return self._for_popart("automaticLossScalingSettings.enabled", enabled)

    def setConvolutionDithering(self, enabled: bool) -> "_TrainingOptions":
        """Spread convolutions over tiles (kept without effect)."""
        return self._for_popart("convolutionOptions", {"enableConvDithering": enabled})


class _DistributedOptions(OptionsDict):
    """Which of several processes this one is. The data loader obeys it; the executor refuses more
    than one process.
    """

    def __init__(self) -> None:
        super().__init__(num_distributed_processes=1, distributed_process_id=0, ipuof_configs={},
                         _gcd_mappings={})
        self.setEnvVarNames("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")

    def disable(self) -> "_DistributedOptions":
        """One process, whatever the environment says."""
        return self.configureProcessId(0, 1)

    def setEnvVarNames(self, var_num_processes: str, var_process_id: str) -> "_DistributedOptions":
        """Read number of processes and process id from these environment variables (default:
        OpenMPI's).
        """
        return self.configureProcessId(int(os.environ.get(var_process_id, "0")),
                                       int(os.environ.get(var_num_processes, "1")))

    def configureProcessId(self, process_id: int, num_processes: int) -> "_DistributedOptions":
        """This process is number `process_id` of `num_processes`."""
        return self.set(distributed_process_id=process_id, num_distributed_processes=num_processes)

    @property
    def processId(self) -> int:
        """Number of this process, from 0."""
        return self.distributed_process_id

    @property
    def numProcesses(self) -> int:
        """Number of processes."""
        return self.num_distributed_processes


class TensorLocationSettings(OptionsDict):
    """Where a kind of tensor is kept: on or off chip, whole or sharded over replicas. Kept without
    effect.
    """

    def minElementsForOffChip(self, min_elements: int) -> "TensorLocationSettings":
        """Smaller tensors stay on chip."""
        return self._keep("minElementsForOffChip", min_elements, int)

    def minElementsForReplicatedTensorSharding(self, min_elements: int) -> "TensorLocationSettings":
        """Smaller tensors are not sharded."""
        return self._keep("minElementsForReplicatedTensorSharding", min_elements, int)

    def useOnChipStorage(self, use: bool = True) -> "TensorLocationSettings":
        """On chip, off chip, or (None) unsaid."""
        if use is None:
            self.deleteIfExists("onChip")
            return self
        return self._keep("onChip", use, bool)

    def useReplicatedTensorSharding(self, use: bool = True) -> "TensorLocationSettings":
        """Shard the tensor over replicas."""
        return self._keep("useReplicatedTensorSharding", use, bool)

    def useIOTilesToLoad(self, use: bool = True) -> "TensorLocationSettings":
        """Load through IO tiles."""
        return self._keep("useIOTilesToLoad", use, bool)

    def useIOTilesToStore(self, use: bool = True) -> "TensorLocationSettings":
        """Store through IO tiles."""
        return self._keep("useIOTilesToStore", use, bool)

    def _keep(self, name, value, kind):
        assert isinstance(value, kind)
        return self.createOrSet(**{name: int(value)})


class _TensorLocationOptions(OptionsDict):
    """TensorLocationSettings for activations, weights, optimizer state and gradient accumulators.
    Kept without effect.
    """

    def numIOTiles(self, num_tiles: int) -> "_TensorLocationOptions":
        """Tiles set aside for input and output."""
        assert isinstance(num_tiles, int)
        assert 32 <= num_tiles <= 192 and num_tiles % 2 == 0, "numIOTiles must be an even number between 32 and 192."
        return self.createOrSet(numIOTiles=num_tiles)

    def setActivationLocation(self, location: TensorLocationSettings) -> "_TensorLocationOptions":
        """Where activations are kept."""
        return self._keep("location_activation", location)

    def setWeightLocation(self, location: TensorLocationSettings) -> "_TensorLocationOptions":
        """Where weights are kept."""
        return self._keep("location_weight", location)

    def setOptimizerLocation(self, location: TensorLocationSettings) -> "_TensorLocationOptions":
        """Where the optimizer's state is kept."""
        return self._keep("location_optimizer", location)

    def setAccumulatorLocation(self, location: TensorLocationSettings) -> "_TensorLocationOptions":
        """Where gradients are accumulated."""
        return self._keep("location_accumulator", location)

    def _keep(self, name, location):
        assert isinstance(location, TensorLocationSettings)
        return self.createOrSet(**{name: location.toDict()})


class Options(OptionsDict):
    """How a model is compiled and run; frozen once a model or a data loader has been made with it.
    """

    def __init__(self) -> None:
        popart = _PopartOptions()
        super().__init__(
            _jit=_JitOptions(), _popart=popart, _graphProcessing=_PrecisionOptions(popart),
            _training=_TrainingOptions(popart), _distributed=_DistributedOptions(),
            _tensor_locations=_TensorLocationOptions(), _execution_strategy=PipelinedExecution(),
            _source_location_excludes=[], _relax_optimizer_checks=False,
            _show_compilation_progress_bar=True, _module_namescope_enabled=True,
            replication_factor=1, input_group_size=1, input_cgt=enums.CommGroupType.Consecutive,
            broadcast_buffers=True, device_iterations=1, log_dir=".", max_repeat_logs=4,
            auto_round_num_ipus=False, anchored_tensors={},
            output_mode=enums.OutputMode.Default.value, output_return_period=1,
            connection_type=enums.ConnectionType.Always.value,
            sync_pattern=enums.SyncPattern.Full.value, available_memory_proportion={})
        if os.environ.get("POPTORCH_CACHE_DIR"):
            self.enableExecutableCaching(os.environ["POPTORCH_CACHE_DIR"])
        self.from_json(os.environ.get("POPTORCH_DEFAULT_OPTIONS", "{}"))

    def from_json(self, string: str) -> "Options":
        """Set options from JSON: {"deviceIterations": 4, "connectionType": "ConnectionType.Never",
        "_Popart.set": ["name", 1]}.
        """
        for option, value in json.loads(string).items():
            setter = self
            for name in option.split("."):
                setter = getattr(setter, name)
            if isinstance(value, str) and value.count(".") == 1:
                kind, member = value.split(".")
                value = getattr(getattr(enums, kind, None), member, value)
            setter(*value) if isinstance(value, list) else setter(value)
        return self

    def loadFromFile(self, filepath: str) -> "Options":
        """Set options from a file of Python code. Always NotOffered: the file could do anything."""
        raise NotOffered("Options.loadFromFile",
                         "it runs the file's Python code; call the options, or from_json()")

    def sourceLocationExcludes(self, excludes: List[str]) -> "Options":
        """Frames left out of the compiler's source locations (kept without effect)."""
        self._source_location_excludes = excludes
        return self

    def appendToLocationExcludes(self, *excludes: str) -> "Options":
        """More frames left out of the compiler's source locations."""
        self._source_location_excludes = [*self._source_location_excludes, *excludes]
        return self

    def showCompilationProgressBar(self, show: bool = True) -> "Options":
        """A progress bar while compiling; the host compiles too quickly for one."""
        self._show_compilation_progress_bar = show
        return self

    def relaxOptimizerAttributesChecks(self, relax: bool = True) -> "Options":
        """Report attributes that an optimizer gets after compilation at debug level instead of
        warning.
        """
        self._relax_optimizer_checks = relax
        return self

    @property
    def TensorLocations(self) -> _TensorLocationOptions:
        """Where tensors are kept."""
        return self._tensor_locations

    @property
    def Distributed(self) -> _DistributedOptions:
        """Which process of several this is."""
        return self._distributed

    @property
    def Jit(self) -> _JitOptions:
        """Deprecated."""
        return self._jit

    @property
    def Precision(self) -> _PrecisionOptions:
        """Number formats."""
        return self._graphProcessing

    @property
    def Training(self) -> _TrainingOptions:
        """Options of training."""
        return self._training

    @property
    def _Popart(self) -> _PopartOptions:
        return self._popart

    def autoRoundNumIPUs(self, auto_round_num_ipus: bool = True) -> "Options":
        """Round the number of IPUs up to a power of two instead of refusing another number."""
        return self.set(auto_round_num_ipus=auto_round_num_ipus)

    def deviceIterations(self, device_iterations: int) -> "Options":
        """Weight updates (training) or micro-batches of one replica (inference) in one call of the
        model.
        """
        return self.set(device_iterations=device_iterations)

    def setExecutionStrategy(self, strategy: ExecutionStrategy) -> "Options":
        """PipelinedExecution (default) or ShardedExecution."""
        assert isinstance(strategy, ExecutionStrategy)
        self._execution_strategy = strategy
        return self

    def setAvailableMemoryProportion(self, available_memory_proportion: Dict[str,
                                                                             float]) -> "Options":
        """Share of an IPU's memory for temporary data: {"IPU0": 0.2, ...} (kept without effect)."""
        for key in available_memory_proportion:
            assert key.startswith("IPU"), (
                'Available memory proportions are expected to be in a dictionary of {"IPU0": 0.5} '
                f"where the 0 in IPU is the index of the IPU. Invalid key: {key}")
        return self.createOrSet(available_memory_proportion={
            int(k[3:]): v for k, v in available_memory_proportion.items()})

    def replicationFactor(self, replication_factor: int) -> "Options":
        """Number of replicas. On the host their micro-batches run one after the other, with the
        same result.
        """
        return self.set(replication_factor=replication_factor)

    def inputReplicaGrouping(self, input_group_size: int,
                             input_group_type: enums.CommGroupType) -> "Options":
        """Give the same input to the replicas of a group of this size."""
        if input_group_type == enums.CommGroupType.NoGrouping:
            input_group_size, input_group_type = 1, enums.CommGroupType.Consecutive
        if input_group_type == enums.CommGroupType.All:
            raise ValueError("input_group_type cannot be All")
        if self.replication_factor < input_group_size:
            raise ValueError("input_group_size cannot be larger than replication_factor")
        if self.replication_factor % input_group_size:
            raise ValueError("input_group_size must be a factor of replication_factor")
        return self.set(input_group_size=input_group_size, input_cgt=input_group_type)

    def broadcastBuffers(self, broadcast_buffers: bool = True) -> "Options":
        """One set of buffers for all replicas (True; a model that changes them is refused), or one
        each; the first is read back.
        """
        return self.set(broadcast_buffers=broadcast_buffers)

    def logDir(self, log_dir: str) -> "Options":
        """Folder of log files (kept without effect)."""
        return self.set(log_dir=log_dir)

    def maxRepeatLogs(self, max_lines: Optional[int]) -> "Options":
        """How often the same log line is printed (kept without effect)."""
        return self.set(max_repeat_logs=(1 << 64) - 1 if max_lines is None else max_lines)

    def modelName(self, name: str) -> "Options":
        """Name of the model in profiles."""
        return self.createOrSet(model_name=name)

    def enableExecutableCaching(self, path: str) -> "Options":
        """Folder of compiled executables (kept without effect); None switches it off."""
        if path is not None:
            self._popart.set("cachePath", path)
        return self._for_popart("enableEngineCaching", path is not None)

    def useIpuModel(self, use_model: bool) -> "Options":
        """Simulate an IPU. The host runs the model the same way either way."""
        return self.createOrSet(use_model=use_model)

    def connectionType(self, connection_type: enums.ConnectionType) -> "Options":
        """When to attach to a device."""
        assert isinstance(connection_type, enums.ConnectionType)
        return self.set(connection_type=connection_type.value)

    def syncPattern(self, sync_pattern: enums.SyncPattern) -> "Options":
        """Synchronisation of IPUs (kept without effect)."""
        assert isinstance(sync_pattern, enums.SyncPattern)
        return self.set(sync_pattern=sync_pattern.value)

    def useIpuId(self, ipu_id: int) -> "Options":
        """Run on this device (kept without effect)."""
        assert isinstance(ipu_id, int)
        return self.createOrSet(ipu_id=ipu_id)

    def useOfflineIpuTarget(self, ipu_version: int = 2) -> "Options":
        """Compile only: running the model is refused."""
        self.connectionType(enums.ConnectionType.Never)
        return self.createOrSet(ipu_version=ipu_version)

    def anchorTensor(self, short_name: str, long_name: str,
                     output_mode: Optional[enums.OutputMode] = None,
                     output_return_period: Optional[int] = 1) -> None:
        """Keep a tensor of each call for PoplarExecutor.getAnchoredTensor(short_name). `long_name`
        is "Gradient___" and the name of a parameter; other tensors of PopART's graph do not exist
        here and are refused when the model is compiled. Without an output mode the anchor has that
        of the outputs.
        """
        period = output_return_period if output_mode == enums.OutputMode.EveryN else 1
        self.anchored_tensors[short_name] = [long_name, output_mode is None, output_mode, period]

    def outputMode(self, output_mode: enums.OutputMode,
                   output_return_period: Optional[int] = None) -> "Options":
        """Which micro-batches' outputs a call returns; EveryN needs the period, in device
        iterations.
        """
        assert isinstance(output_mode, enums.OutputMode)
        if output_mode == enums.OutputMode.EveryN:
            assert output_return_period and output_return_period > 0, (
                "EveryN anchor must have output_return_period set to valid positive integer")
        return self.set(output_mode=output_mode.value, output_return_period=output_return_period or
                        1)

    def defaultOutputMode(self) -> bool:
        """True if outputMode has not been set to anything but Default."""
        return self.output_mode == enums.OutputMode.Default

    def randomSeed(self, random_seed: int) -> "Options":
        """Seed of the device's random numbers; seeds torch too, as PopTorch does."""
        assert isinstance(random_seed, int)
        torch.manual_seed(random_seed)
        return self.createOrSet(random_seed=random_seed)

    def enableStableNorm(self, enabled: bool) -> "Options":
        """A slower and more accurate norm (kept without effect: torch's is used)."""
        return self._for_popart("enableStableNorm", enabled)

    def enableSyntheticData(self, enabled: bool) -> "Options":
        """Normally distributed random inputs instead of the caller's, for measurements."""
        return self._for_popart("syntheticDataMode", 2 if enabled else 0)

    def logCycleCount(self, log_cycle_count: bool) -> "Options":
        """Count IPU cycles; without an IPU, asking for the count is refused."""
        return self._for_popart("instrumentWithHardwareCycleCounter", log_cycle_count)

    def enableProfiling(self, profile_dir: Optional[str] = None) -> "Options":
        """Write PopVision reports to `profile_dir`. They are the Poplar compiler's, so a host run
        leaves none.
        """
        engine = dict(self._popart.options.get("engineOptions", {}))
        engine.update({
            "debug.allowOutOfMemory": "true", "autoReport.directory": profile_dir or ".",
            "autoReport.all": "true"})
        self._popart.setEngineOptions(engine)
        return self

    def disableModuleNamescope(self) -> "Options":
        """Leave module names out of the compiler's graph (kept without effect)."""
        self._module_namescope_enabled = False
        return self

    def updatableNamedBuffers(self, buffers: List[str]) -> "Options":
        """Buffers that copyNamedBuffersToDevice() may update."""
        return self._for_popart("updatableNamedBuffers", buffers)

    def toDict(self) -> Dict[str, Any]:
        """All options in one dictionary, as PopTorch hands them to its compiler."""
        assert not self.defaultOutputMode(), "An output mode must be picked before serialisation"
        out = {**self._execution_strategy.backendOptions(), **self._popart.options}
        for part in (self, self._training, self._distributed, self._tensor_locations):
            out = part.update(out)
        return out

    def clone(self) -> "Options":
        """An unfrozen deep copy."""
        return copy.deepcopy(self)

    def __repr__(self):
        parts = (self._tensor_locations, self._distributed, self._training, self._popart,
                 self._execution_strategy)
        return f"{super().__repr__()[:-1]}, {', '.join(map(repr, parts))})"
