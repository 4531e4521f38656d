"""poptorch.Options and its parts.

They accept what PopTorch accepts and refuse what PopTorch refuses, in the same words. Most options
control the Poplar compiler and have no meaning on the host. Such an option is described here as
"kept without effect": its value is checked and stored, so that it can be read back and printed.
The options that change results (batching, reduction, output mode, seed, offline target) are obeyed
by the executor and the data loader.
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
    """A set of named values, accessible as attributes.

    It refuses unknown names and values of another type, and any change once it is frozen. Values
    whose names start with an underscore are ordinary attributes and are not checked.
    """

    def __init__(self, **values: Any):
        private = {name: values.pop(name) for name in list(values) if name.startswith("_")}
        self.__dict__.update(private, _values=values, _is_frozen=False)

    def exists(self, option: str) -> bool:
        """Return whether `option` has a value."""
        return option in self._values

    def set(self, **values: Any) -> "OptionsDict":
        """Change existing values and return self.

        Raises AssertionError for an unknown name or a value of another type, and AttributeError if
        the options are frozen.
        """
        self.checkIsFrozen()
        for name, value in values.items():
            assert self.exists(name), (
                f"Invalid option {name}, valid options are {list(self._values)}")
            expected = type(self._values[name])
            assert isinstance(value, expected), (
                f"Unexpected type {type(value)} for option {name}. Expected {expected}")
            self._values[name] = value
        return self

    def createOrSet(self, **values: Any) -> "OptionsDict":
        """Change values as `set` does, but create those that do not exist yet."""
        self.checkIsFrozen()
        for name, value in values.items():
            self._values.setdefault(name, value)
        return self.set(**values)

    def deleteIfExists(self, option: str) -> None:
        """Remove `option` if it has a value."""
        self._values.pop(option, None)

    def checkIsFrozen(self, option: Optional[str] = None) -> None:
        """Raise AttributeError if the options are frozen."""
        if self._is_frozen and option != "_is_frozen":
            raise AttributeError(FROZEN)

    def update(self, other: Dict[str, Any]) -> Dict[str, Any]:
        """Add the values to `other` and return it; AssertionError if it has one of the names."""
        assert not self._values.keys() & other.keys(), (
            "Can't merge dictionaries, they have some keys in common")
        other.update(self._values)
        return other

    def _for_popart(self, key: str, value: Any) -> "OptionsDict":
        self._popart.set(key, value)
        return self

    def toDict(self) -> Dict[str, Any]:
        """Return the values by name."""
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
    """Options of PopART, by PopART's names. They are stored only to be read back."""

    def __init__(self) -> None:
        super().__init__(instrumentWithHardwareCycleCounter=False, rearrangeAnchorsOnHost=False)

    @property
    def options(self) -> Dict[str, Any]:
        """The options by name."""
        return self._values

    def set(self, key: str, value: Union[int, float, str, List[str], Set[str]]) -> "_PopartOptions":
        """Store an option of popart.SessionOptions and return self.

        A name that PopART does not have is refused when a model is compiled.
        """
        self.checkIsFrozen()
        self._values[key] = value
        return self

    def setEngineOptions(self, engine_options: Dict[str, str]) -> "_PopartOptions":
        """Store options of the Poplar engine."""
        return self.set("engineOptions", engine_options)

    def setPatterns(self, patterns: Dict[str, bool], level: int = 2) -> "_PopartOptions":
        """Switch patterns of PopART's compiler on or off, starting from those of a level."""
        assert isinstance(level, int)
        assert isinstance(patterns, dict)
        return self.set("patterns_level", level).set("patterns", patterns)


class _JitOptions(OptionsDict):
    """Options of torch.jit, which are deprecated in PopTorch."""

    def traceModel(self, trace_model: bool) -> "_JitOptions":
        """Raise ValueError for True, because PopTorch does not trace with torch.jit since 3.0."""
        logger.warning(
            "[Deprecated] options.Jit.traceModel() has no effect: the model is never traced by "
            "torch.jit")
        if trace_model:
            raise ValueError("options.Jit.traceModel(True) is no longer supported")
        return self


class _PrecisionOptions(OptionsDict):
    """Options of number formats.

    They are kept without effect, because a float16 model computes in bfloat16 or float32 on the
    host.
    """

    def __init__(self, popart_options: _PopartOptions) -> None:
        super().__init__(_popart=popart_options)

    def halfFloatCasting(self,
                         half_float_casting: enums.HalfFloatCastingBehavior) -> "_PrecisionOptions":
        """Log a warning: the option is deprecated, and half is always cast up to float."""
        logger.warning(
            "[Deprecated] options.Precision.halfFloatCasting(): HalfUpcastToFloat is the only "
            "behaviour")
        return self

    def runningStatisticsAlwaysFloat(self, value: bool) -> "_PrecisionOptions":
        """Log a warning: deprecated, since running statistics have the type PyTorch gives them."""
        if not isinstance(value, bool):
            raise ValueError("runningStatisticsAlwaysFloat needs to be set to a bool")
        logger.warning(
            "[Deprecated] options.Precision.runningStatisticsAlwaysFloat(): False is the only "
            "behaviour")
        return self

    def enableFloatingPointExceptions(self, enabled: bool) -> "_PrecisionOptions":
        """Stop at invalid operations and overflows (kept without effect)."""
        assert isinstance(enabled, bool), "enableFloatingPointExceptions needs to be set to a bool"
        return self._for_popart("enableFloatingPointChecks", enabled)

    def enableStochasticRounding(self, enabled: bool) -> "_PrecisionOptions":
        """Round to float16 stochastically (kept without effect: the weights here are float32)."""
        return self._for_popart("enableStochasticRounding", enabled)

    def setPartialsType(self, dtype: torch.dtype) -> "_PrecisionOptions":
        """Set the type of the partial sums of matrix multiplications and convolutions.

        Kept without effect, because the host sums in float32. Raises ValueError for another type
        than float32 and float16.
        """
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(
                "parameter to setPartialsType should be either torch.float or torch.half")
        kind = "half" if dtype == torch.float16 else "float"
        self._popart.set("partialsTypeMatMuls", kind)
        return self._for_popart("convolutionOptions", {"partialsType": kind})


class _TrainingOptions(OptionsDict):
    """Options of training, none of which apply to an inference model."""

    def __init__(self, popart_options: _PopartOptions) -> None:
        super().__init__(
            _popart=popart_options, gradient_accumulation=1,
            accumulation_and_replication_reduction_type=enums.ReductionType.Mean,
            meanAccumulationAndReplicationReductionStrategy=enums.MeanReductionStrategy.Post)

    def gradientAccumulation(self, gradient_accumulation: int) -> "_TrainingOptions":
        """Set the number of micro-batches of one replica in one weight update."""
        return self.set(gradient_accumulation=gradient_accumulation)

    def accumulationAndReplicationReductionType(
            self, reduction_type: enums.ReductionType) -> "_TrainingOptions":
        """Use the mean (default) or the sum of the gradients of all micro-batches of an update.

        Raises ValueError for any other `reduction_type`.
        """
        if reduction_type not in (enums.ReductionType.Mean,
                                  enums.ReductionType.Sum) or not isinstance(
                                      reduction_type, enums.ReductionType):
            raise ValueError(
                "accumulationAndReplicationReductionType must be set to "
                "poptorch.ReductionType.Mean or poptorch.ReductionType.Sum")
        return self.set(accumulation_and_replication_reduction_type=reduction_type)

    def setMeanAccumulationAndReplicationReductionStrategy(
            self, mean_reduction_strategy: enums.MeanReductionStrategy) -> "_TrainingOptions":
        """Choose when gradients are divided to form the mean.

        It makes no difference to finite gradients on the host, which accumulates in float32. With
        Running, what is not finite stays in PopART's accumulators (see Device._keep_nonfinite).
        """
        return self.set(meanAccumulationAndReplicationReductionStrategy=mean_reduction_strategy)

    def setAutomaticLossScaling(self, enabled: bool) -> "_TrainingOptions":
        """Let the device choose the loss scaling, which makes it variable in the optimizer.

        On the host the loss scaling keeps its value. It serves to keep float16 gradients in range,
        and the host's gradients have the range of float32.
        """
        return self._for_popart("automaticLossScalingSettings.enabled", enabled)

    def setConvolutionDithering(self, enabled: bool) -> "_TrainingOptions":
        """Spread convolutions over the tiles of an IPU (kept without effect)."""
        return self._for_popart("convolutionOptions", {"enableConvDithering": enabled})


class _DistributedOptions(OptionsDict):
    """The number of processes, and which of them this one is.

    The data loader obeys these options. The executor sums gradients over the processes if they have
    joined torch.distributed's default group, and refuses more than one process otherwise.
    """

    def __init__(self) -> None:
        super().__init__(num_distributed_processes=1, distributed_process_id=0, ipuof_configs={},
                         _gcd_mappings={})
        self.setEnvVarNames("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")

    def disable(self) -> "_DistributedOptions":
        """Use one process, whatever the environment variables say."""
        return self.configureProcessId(0, 1)

    def setEnvVarNames(self, var_num_processes: str, var_process_id: str) -> "_DistributedOptions":
        """Read the number of processes and the process id from these environment variables.

        The constructor reads those of OpenMPI.
        """
        return self.configureProcessId(int(os.environ.get(var_process_id, "0")),
                                       int(os.environ.get(var_num_processes, "1")))

    def configureProcessId(self, process_id: int, num_processes: int) -> "_DistributedOptions":
        """Set the number of this process, from 0, and the number of all processes."""
        return self.set(distributed_process_id=process_id, num_distributed_processes=num_processes)

    @property
    def processId(self) -> int:
        """The number of this process, from 0."""
        return self.distributed_process_id

    @property
    def numProcesses(self) -> int:
        """The number of processes."""
        return self.num_distributed_processes


class TensorLocationSettings(OptionsDict):
    """Where one kind of tensor is stored: on or off chip, whole or sharded over replicas.

    All of these settings are kept without effect.
    """

    def minElementsForOffChip(self, min_elements: int) -> "TensorLocationSettings":
        """Set the number of elements below which a tensor stays on chip."""
        return self._keep("minElementsForOffChip", min_elements, int)

    def minElementsForReplicatedTensorSharding(self, min_elements: int) -> "TensorLocationSettings":
        """Set the number of elements below which a tensor is not sharded."""
        return self._keep("minElementsForReplicatedTensorSharding", min_elements, int)

    def useOnChipStorage(self, use: bool = True) -> "TensorLocationSettings":
        """Store the tensor on chip (True) or off chip (False); None removes the setting."""
        if use is None:
            self.deleteIfExists("onChip")
            return self
        return self._keep("onChip", use, bool)

    def useReplicatedTensorSharding(self, use: bool = True) -> "TensorLocationSettings":
        """Shard the tensor over the replicas."""
        return self._keep("useReplicatedTensorSharding", use, bool)

    def useIOTilesToLoad(self, use: bool = True) -> "TensorLocationSettings":
        """Load the tensor through IO tiles."""
        return self._keep("useIOTilesToLoad", use, bool)

    def useIOTilesToStore(self, use: bool = True) -> "TensorLocationSettings":
        """Store the tensor through IO tiles."""
        return self._keep("useIOTilesToStore", use, bool)

    def _keep(self, name, value, kind):
        assert isinstance(value, kind)
        return self.createOrSet(**{name: int(value)})


class _TensorLocationOptions(OptionsDict):
    """TensorLocationSettings for activations, weights, optimizer state and gradient accumulators.

    All of these settings are kept without effect.
    """

    def numIOTiles(self, num_tiles: int) -> "_TensorLocationOptions":
        """Set the number of tiles reserved for input and output: even, from 32 to 192."""
        assert isinstance(num_tiles, int)
        assert 32 <= num_tiles <= 192 and num_tiles % 2 == 0, (
            "numIOTiles must be an even number between 32 and 192.")
        return self.createOrSet(numIOTiles=num_tiles)

    def setActivationLocation(self, location: TensorLocationSettings) -> "_TensorLocationOptions":
        """Set where activations are stored."""
        return self._keep("location_activation", location)

    def setWeightLocation(self, location: TensorLocationSettings) -> "_TensorLocationOptions":
        """Set where weights are stored."""
        return self._keep("location_weight", location)

    def setOptimizerLocation(self, location: TensorLocationSettings) -> "_TensorLocationOptions":
        """Set where the optimizer's state is stored."""
        return self._keep("location_optimizer", location)

    def setAccumulatorLocation(self, location: TensorLocationSettings) -> "_TensorLocationOptions":
        """Set where accumulated gradients are stored."""
        return self._keep("location_accumulator", location)

    def _keep(self, name, location):
        assert isinstance(location, TensorLocationSettings)
        return self.createOrSet(**{name: location.toDict()})


class Options(OptionsDict):
    """How a model is compiled and run.

    The options are frozen once an executor or a data loader has been created with them.
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
        """Call the setters named in a JSON object, with its values as arguments.

        For example: {"deviceIterations": 4, "connectionType": "ConnectionType.Never",
        "_Popart.set": ["name", 1]}. Returns self.
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
        """Raise NotOffered: PopTorch runs the Python code in the file, which could do anything."""
        raise NotOffered("Options.loadFromFile",
                         "it runs the file's Python code; call the options, or from_json()")

    def sourceLocationExcludes(self, excludes: List[str]) -> "Options":
        """Set which stack frames are excluded from source locations (kept without effect)."""
        self._source_location_excludes = excludes
        return self

    def appendToLocationExcludes(self, *excludes: str) -> "Options":
        """Exclude more stack frames from source locations (kept without effect)."""
        self._source_location_excludes = [*self._source_location_excludes, *excludes]
        return self

    def showCompilationProgressBar(self, show: bool = True) -> "Options":
        """Show a progress bar while compiling. The host shows none, as it compiles too quickly."""
        self._show_compilation_progress_bar = show
        return self

    def relaxOptimizerAttributesChecks(self, relax: bool = True) -> "Options":
        """Report attributes that an optimizer gains later at debug level, not as warnings."""
        self._relax_optimizer_checks = relax
        return self

    @property
    def TensorLocations(self) -> _TensorLocationOptions:
        """Options that say where tensors are stored."""
        return self._tensor_locations

    @property
    def Distributed(self) -> _DistributedOptions:
        """Options for several processes."""
        return self._distributed

    @property
    def Jit(self) -> _JitOptions:
        """Options of torch.jit, which are deprecated in PopTorch."""
        return self._jit

    @property
    def Precision(self) -> _PrecisionOptions:
        """Options of number formats."""
        return self._graphProcessing

    @property
    def Training(self) -> _TrainingOptions:
        """Options of training."""
        return self._training

    @property
    def _Popart(self) -> _PopartOptions:
        return self._popart

    def autoRoundNumIPUs(self, auto_round_num_ipus: bool = True) -> "Options":
        """Round the number of IPUs up to a power of two instead of refusing other numbers."""
        return self.set(auto_round_num_ipus=auto_round_num_ipus)

    def deviceIterations(self, device_iterations: int) -> "Options":
        """Set the number of device iterations in one call of the model.

        An iteration is a weight update in training, and a micro-batch of one replica in inference.
        """
        return self.set(device_iterations=device_iterations)

    def setExecutionStrategy(self, strategy: ExecutionStrategy) -> "Options":
        """Use PipelinedExecution (default) or ShardedExecution."""
        assert isinstance(strategy, ExecutionStrategy)
        self._execution_strategy = strategy
        return self

    def setAvailableMemoryProportion(
            self, available_memory_proportion: Dict[str, float]) -> "Options":
        """Set the share of each IPU's memory that is available for temporary data.

        `available_memory_proportion` is, for example, {"IPU0": 0.2, "IPU1": 0.3}. Kept without
        effect.
        """
        for key in available_memory_proportion:
            assert key.startswith("IPU"), (
                'Available memory proportions are expected to be in a dictionary of {"IPU0": 0.5} '
                f"where the 0 in IPU is the index of the IPU. Invalid key: {key}")
        return self.createOrSet(available_memory_proportion={
            int(k[3:]): v for k, v in available_memory_proportion.items()})

    def replicationFactor(self, replication_factor: int) -> "Options":
        """Set the number of replicas.

        On the host their micro-batches run one after the other, with the same result.
        """
        return self.set(replication_factor=replication_factor)

    def inputReplicaGrouping(self, input_group_size: int,
                             input_group_type: enums.CommGroupType) -> "Options":
        """Give the same input to all replicas of a group of `input_group_size`.

        Raises ValueError if groups of this size and type cannot be formed.
        """
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
        """Give all replicas the same buffers (True) or each its own (False).

        With True and several replicas, a model that changes its buffers is refused. With False, the
        buffers of the first replica are copied back to the host.
        """
        return self.set(broadcast_buffers=broadcast_buffers)

    def logDir(self, log_dir: str) -> "Options":
        """Set the folder of log files (kept without effect)."""
        return self.set(log_dir=log_dir)

    def maxRepeatLogs(self, max_lines: Optional[int]) -> "Options":
        """Set how often the same log line is printed; None for no limit (kept without effect)."""
        return self.set(max_repeat_logs=(1 << 64) - 1 if max_lines is None else max_lines)

    def modelName(self, name: str) -> "Options":
        """Set the name of the model in profiles (kept without effect)."""
        return self.createOrSet(model_name=name)

    def enableExecutableCaching(self, path: str) -> "Options":
        """Set the folder of compiled executables, or None for no cache (kept without effect)."""
        if path is not None:
            self._popart.set("cachePath", path)
        return self._for_popart("enableEngineCaching", path is not None)

    def useIpuModel(self, use_model: bool) -> "Options":
        """Simulate an IPU, which makes no difference to how the host runs the model."""
        return self.createOrSet(use_model=use_model)

    def connectionType(self, connection_type: enums.ConnectionType) -> "Options":
        """Set when to attach to a device."""
        assert isinstance(connection_type, enums.ConnectionType)
        return self.set(connection_type=connection_type.value)

    def syncPattern(self, sync_pattern: enums.SyncPattern) -> "Options":
        """Set how IPUs are synchronised (kept without effect)."""
        assert isinstance(sync_pattern, enums.SyncPattern)
        return self.set(sync_pattern=sync_pattern.value)

    def useIpuId(self, ipu_id: int) -> "Options":
        """Run on the device with this id (kept without effect)."""
        assert isinstance(ipu_id, int)
        return self.createOrSet(ipu_id=ipu_id)

    def useOfflineIpuTarget(self, ipu_version: int = 2) -> "Options":
        """Only compile, without a device; running the model is then refused."""
        self.connectionType(enums.ConnectionType.Never)
        return self.createOrSet(ipu_version=ipu_version)

    def anchorTensor(self, short_name: str, long_name: str,
                     output_mode: Optional[enums.OutputMode] = None,
                     output_return_period: Optional[int] = 1) -> None:
        """Keep a tensor of each call, to be read by PoplarExecutor.getAnchoredTensor(short_name).

        `long_name` is "Gradient___" followed by the name of a parameter. Other tensors of PopART's
        graph do not exist on the host; they are refused when the model is compiled. The default
        output mode is that of the model's outputs. `output_return_period` applies to EveryN, and
        counts device iterations.
        """
        period = output_return_period if output_mode == enums.OutputMode.EveryN else 1
        self.anchored_tensors[short_name] = [long_name, output_mode is None, output_mode, period]

    def outputMode(self, output_mode: enums.OutputMode,
                   output_return_period: Optional[int] = None) -> "Options":
        """Set which micro-batches' outputs a call returns.

        EveryN requires `output_return_period`, a number of device iterations.
        """
        assert isinstance(output_mode, enums.OutputMode)
        if output_mode == enums.OutputMode.EveryN:
            assert output_return_period and output_return_period > 0, (
                "EveryN anchor must have output_return_period set to valid positive integer")
        return self.set(output_mode=output_mode.value,
                        output_return_period=output_return_period or 1)

    def defaultOutputMode(self) -> bool:
        """Return whether the output mode is still Default."""
        return self.output_mode == enums.OutputMode.Default

    def randomSeed(self, random_seed: int) -> "Options":
        """Set the seed of the device's random numbers, and seed torch too, as PopTorch does."""
        assert isinstance(random_seed, int)
        torch.manual_seed(random_seed)
        return self.createOrSet(random_seed=random_seed)

    def enableStableNorm(self, enabled: bool) -> "Options":
        """Use slower, more accurate normalisation (kept without effect: torch's is used)."""
        return self._for_popart("enableStableNorm", enabled)

    def enableSyntheticData(self, enabled: bool) -> "Options":
        """Replace inputs by normally distributed numbers (integers by zeros), for measurements.

        Nothing is transferred: outputs are memory that was never written (NaN here), and reading
        weights or optimizer state is refused, because PopART crashes.
        """
        return self._for_popart("syntheticDataMode", 2 if enabled else 0)

    def logCycleCount(self, log_cycle_count: bool) -> "Options":
        """Count IPU cycles. The host has none: reading the count is refused."""
        return self._for_popart("instrumentWithHardwareCycleCounter", log_cycle_count)

    def enableProfiling(self, profile_dir: Optional[str] = None) -> "Options":
        """Write PopVision reports to `profile_dir`.

        The Poplar compiler writes them; a run on the host produces none.
        """
        engine = dict(self._popart.options.get("engineOptions", {}))
        engine.update({
            "debug.allowOutOfMemory": "true", "autoReport.directory": profile_dir or ".",
            "autoReport.all": "true"})
        self._popart.setEngineOptions(engine)
        return self

    def disableModuleNamescope(self) -> "Options":
        """Omit module names from the compiler's graph (kept without effect)."""
        self._module_namescope_enabled = False
        return self

    def updatableNamedBuffers(self, buffers: List[str]) -> "Options":
        """Name the buffers that PoplarExecutor.copyNamedBuffersToDevice() copies."""
        return self._for_popart("updatableNamedBuffers", buffers)

    def toDict(self) -> Dict[str, Any]:
        """Return all options in one dictionary, as PopTorch passes them to its compiler."""
        assert not self.defaultOutputMode(), "An output mode must be picked before serialisation"
        out = {**self._execution_strategy.backendOptions(), **self._popart.options}
        for part in (self, self._training, self._distributed, self._tensor_locations):
            out = part.update(out)
        return out

    def clone(self) -> "Options":
        """Return a deep copy that is not frozen."""
        return copy.deepcopy(self)

    def __repr__(self):
        parts = (self._tensor_locations, self._distributed, self._training, self._popart,
                 self._execution_strategy)
        return f"{super().__repr__()[:-1]}, {', '.join(map(repr, parts))})"
