"""poptorch.Options and its parts.

They accept what PopTorch accepts and refuse what PopTorch refuses, in the same words. Options that
change results are obeyed: batching, reduction, output mode, seed, offline target. The others
control the Poplar compiler, and only their values are checked and kept.
"""
from __future__ import annotations

import copy
import inspect
import os
from typing import Any, Callable, Dict, List, Optional, Set, Union

import torch

from . import enums
from ._errors import refuse
from .blocks import PipelinedExecution


class OptionsDict:
    """A set of named values, accessible as attributes, that can be frozen.

    Names that start with an underscore are ordinary attributes, whose values are not checked.
    """

    _path = "Options."  # of the options' names in NOT_OFFERED

    def __init__(self, **values: Any):
        private = {name: values.pop(name) for name in list(values) if name.startswith("_")}
        self.__dict__.update(private, _values=values, _is_frozen=False)

    def exists(self, option: str) -> bool:
        return option in self._values

    def set(self, **values: Any) -> "OptionsDict":
        """Change existing values; AssertionError for another name or a value of another type."""
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

    def checkIsFrozen(self, option: Optional[str] = None) -> None:
        """Raise AttributeError if the options are frozen."""
        if self._is_frozen and option != "_is_frozen":
            raise AttributeError("Can't modify frozen Options")

    def _for_popart(self, key: str, value: Any) -> "OptionsDict":
        self._popart.set(key, value)
        return self

    def toDict(self) -> Dict[str, Any]:
        return dict(self._values)

    def __setattr__(self, name, value):
        self.checkIsFrozen(name)
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self.set(**{name: value})

    def __getattr__(self, name):
        values = self.__dict__.get("_values", {})
        if name not in values:
            refuse(self._path + name)
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


def _setter(option: str, parameter: Optional[str] = None, default: Any = inspect.Parameter.empty,
            popart: bool = False) -> Callable:
    """Return a method that keeps its one argument as the value of `option`, and returns self.

    parameter, default: of the method, by default named as the option. popart: of PopART's options.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([
        inspect.Parameter("self", kind),
        inspect.Parameter(parameter or option, kind, default=default)])

    def setter(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self, value = bound.args
        return (self._for_popart(option, value) if popart else
                self.createOrSet(**{option: value}))

    setter.__signature__ = signature
    return setter


class _PopartOptions(OptionsDict):
    """Options of PopART, by PopART's names."""

    def __init__(self) -> None:
        super().__init__(instrumentWithHardwareCycleCounter=False, rearrangeAnchorsOnHost=False)

    options = property(lambda self: self._values)

    def set(self, key: str, value: Union[int, float, str, List[str], Set[str]]) -> "_PopartOptions":
        """Keep an option of popart.SessionOptions, which is checked when a model is compiled."""
        self.checkIsFrozen()
        self._values[key] = value
        return self

    def setEngineOptions(self, engine_options: Dict[str, str]) -> "_PopartOptions":
        return self.set("engineOptions", engine_options)

    def setPatterns(self, patterns: Dict[str, bool], level: int = 2) -> "_PopartOptions":
        """Switch patterns of PopART's compiler on or off, starting from those of a level."""
        assert isinstance(level, int)
        assert isinstance(patterns, dict)
        return self.set("patterns_level", level).set("patterns", patterns)


class _PrecisionOptions(OptionsDict):
    """Options of number formats; the host has formats of its own (see _device.py)."""

    _path = "Options.Precision."

    def __init__(self, popart_options: _PopartOptions) -> None:
        super().__init__(_popart=popart_options)

    # without effect: the host's weights are float32
    enableStochasticRounding = _setter("enableStochasticRounding", "enabled", popart=True)

    def setPartialsType(self, dtype: torch.dtype) -> "_PrecisionOptions":
        """Set the type of the partial sums of multiplications (without effect: float32)."""
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(
                "parameter to setPartialsType should be either torch.float or torch.half")
        kind = "half" if dtype == torch.float16 else "float"
        self._popart.set("partialsTypeMatMuls", kind)
        return self._for_popart("convolutionOptions", {"partialsType": kind})


class _TrainingOptions(OptionsDict):
    _path = "Options.Training."

    def __init__(self, popart_options: _PopartOptions) -> None:
        super().__init__(
            _popart=popart_options, gradient_accumulation=1,
            accumulation_and_replication_reduction_type=enums.ReductionType.Mean,
            meanAccumulationAndReplicationReductionStrategy=enums.MeanReductionStrategy.Post)

    # micro-batches of one replica in one weight update
    gradientAccumulation = _setter("gradient_accumulation")
    # When gradients are divided to form the mean. With Running, what is not finite stays in
    # PopART's accumulators (see Device._keep_nonfinite); else it makes no difference on the host.
    setMeanAccumulationAndReplicationReductionStrategy = _setter(
        "meanAccumulationAndReplicationReductionStrategy", "mean_reduction_strategy")
    # Lets the device choose the loss scaling, which makes it variable in the optimizer. On the host
    # it keeps its value: it is there for float16 gradients, and the host's are float32.
    setAutomaticLossScaling = _setter(
        "automaticLossScalingSettings.enabled", "enabled", popart=True)

    def accumulationAndReplicationReductionType(
            self, reduction_type: enums.ReductionType) -> "_TrainingOptions":
        """Use the mean (default) or the sum of the gradients of all micro-batches of an update."""
        if reduction_type not in (enums.ReductionType.Mean,
                                  enums.ReductionType.Sum) or not isinstance(
                                      reduction_type, enums.ReductionType):
            raise ValueError(
                "accumulationAndReplicationReductionType must be set to "
                "poptorch.ReductionType.Mean or poptorch.ReductionType.Sum")
        return self.set(accumulation_and_replication_reduction_type=reduction_type)


class _DistributedOptions(OptionsDict):
    """The number of processes, and which of them this one is.

    The executor sums gradients over them. They must have joined torch.distributed's default group.
    """

    _path = "Options.Distributed."

    def __init__(self) -> None:
        super().__init__(num_distributed_processes=int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)),
                         distributed_process_id=int(os.environ.get("OMPI_COMM_WORLD_RANK", 0)))

    def configureProcessId(self, process_id: int, num_processes: int) -> "_DistributedOptions":
        """Set the number of this process, from 0, and of all; by default those of OpenMPI."""
        return self.set(distributed_process_id=process_id, num_distributed_processes=num_processes)

    processId = property(lambda self: self.distributed_process_id)
    numProcesses = property(lambda self: self.num_distributed_processes)


class TensorLocationSettings(OptionsDict):
    """Where one kind of tensor is stored; kept without effect."""

    _path = "TensorLocationSettings."

    def useOnChipStorage(self, use: bool = True) -> "TensorLocationSettings":
        """Store the tensor on chip (True) or off chip (False); None removes the setting."""
        if use is None:
            self._values.pop("onChip", None)
            return self
        assert isinstance(use, bool)
        return self.createOrSet(onChip=int(use))

    def useReplicatedTensorSharding(self, use: bool = True) -> "TensorLocationSettings":
        assert isinstance(use, bool)
        return self.createOrSet(useReplicatedTensorSharding=int(use))


class _TensorLocationOptions(OptionsDict):
    """Where the optimizer's state is stored; kept without effect."""

    _path = "Options.TensorLocations."

    def setOptimizerLocation(self, location: TensorLocationSettings) -> "_TensorLocationOptions":
        assert isinstance(location, TensorLocationSettings)
        return self.createOrSet(location_optimizer=location.toDict())


class Options(OptionsDict):
    """How a model is compiled and run; frozen once an executor or a data loader has them."""

    def __init__(self) -> None:
        popart = _PopartOptions()
        super().__init__(
            _popart=popart, _graphProcessing=_PrecisionOptions(popart),
            _training=_TrainingOptions(popart), _distributed=_DistributedOptions(),
            _tensor_locations=_TensorLocationOptions(), _execution_strategy=PipelinedExecution(),
            replication_factor=1, device_iterations=1, auto_round_num_ipus=False,
            anchored_tensors={}, output_mode=enums.OutputMode.Default.value, output_return_period=1,
            connection_type=enums.ConnectionType.Always.value, available_memory_proportion={})
        if os.environ.get("POPTORCH_CACHE_DIR"):
            self.enableExecutableCaching(os.environ["POPTORCH_CACHE_DIR"])
        if os.environ.get("POPTORCH_DEFAULT_OPTIONS"):
            refuse("Options.from_json")

    TensorLocations = property(lambda self: self._tensor_locations)
    Distributed = property(lambda self: self._distributed)
    Precision = property(lambda self: self._graphProcessing)
    Training = property(lambda self: self._training)
    _Popart = property(lambda self: self._popart)

    # whether to round the number of IPUs up to a power of two instead of refusing other numbers
    autoRoundNumIPUs = _setter("auto_round_num_ipus", default=True)
    # weight updates in one call of a training model, micro-batches of a replica in inference
    deviceIterations = _setter("device_iterations")
    # On the host the micro-batches of replicas run one after the other, with the same result.
    replicationFactor = _setter("replication_factor")
    modelName = _setter("model_name", "name")  # in profiles
    useIpuModel = _setter("use_model")  # simulate an IPU: the host makes no difference

    def setExecutionStrategy(self, strategy: PipelinedExecution) -> "Options":
        """Use PipelinedExecution (default) or ShardedExecution."""
        assert isinstance(strategy, PipelinedExecution)
        self._execution_strategy = strategy
        return self

    def setAvailableMemoryProportion(
            self, available_memory_proportion: Dict[str, float]) -> "Options":
        """Set the share of each IPU's memory for temporary data, {"IPU0": 0.2, "IPU1": 0.3}."""
        for key in available_memory_proportion:
            assert key.startswith("IPU"), (
                'Available memory proportions are expected to be in a dictionary of {"IPU0": 0.5} '
                f"where the 0 in IPU is the index of the IPU. Invalid key: {key}")
        return self.createOrSet(available_memory_proportion={
            int(k[3:]): v for k, v in available_memory_proportion.items()})

    def enableExecutableCaching(self, path: str) -> "Options":
        """Set the folder of compiled executables, or None for no cache."""
        if path is not None:
            self._popart.set("cachePath", path)
        return self._for_popart("enableEngineCaching", path is not None)

    def connectionType(self, connection_type: enums.ConnectionType) -> "Options":
        assert isinstance(connection_type, enums.ConnectionType)
        return self.set(connection_type=connection_type.value)

    def useOfflineIpuTarget(self, ipu_version: int = 2) -> "Options":
        """Only compile, without a device; running the model is then refused."""
        self.connectionType(enums.ConnectionType.Never)
        return self.createOrSet(ipu_version=ipu_version)

    def anchorTensor(self, short_name: str, long_name: str,
                     output_mode: Optional[enums.OutputMode] = None,
                     output_return_period: Optional[int] = 1) -> None:
        """Keep a tensor of each call, to be read by PoplarExecutor.getAnchoredTensor(short_name).

        `long_name` is "Gradient___" followed by the name of a parameter. Other tensors of PopART's
        graph do not exist on the host; they are refused when the model is compiled. The tensor is
        returned in the outputs' mode: PopTorch ignores the two other arguments.
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
        return self.output_mode == enums.OutputMode.Default

    def randomSeed(self, random_seed: int) -> "Options":
        """Set the seed of the device's random numbers, and seed torch too, as PopTorch does."""
        assert isinstance(random_seed, int)
        torch.manual_seed(random_seed)
        return self.createOrSet(random_seed=random_seed)

    def enableSyntheticData(self, enabled: bool) -> "Options":
        """Replace inputs by normally distributed numbers (integers by zeros), for measurements.

        Nothing is transferred: outputs are memory that was never written (NaN here), and reading
        weights or optimizer state is refused, because PopART crashes.
        """
        return self._for_popart("syntheticDataMode", 2 if enabled else 0)

    def enableProfiling(self, profile_dir: Optional[str] = None) -> "Options":
        """Have the Poplar compiler write PopVision reports to `profile_dir`; a host has none."""
        engine = dict(self._popart.options.get("engineOptions", {}))
        engine.update({
            "debug.allowOutOfMemory": "true", "autoReport.directory": profile_dir or ".",
            "autoReport.all": "true"})
        self._popart.setEngineOptions(engine)
        return self

    def toDict(self) -> Dict[str, Any]:
        """Return all options in one dictionary, as PopTorch passes them to its compiler."""
        assert not self.defaultOutputMode(), "An output mode must be picked before serialisation"
        out = self._execution_strategy.backendOptions()
        for part in (self._popart, self, self._training, self._distributed, self._tensor_locations):
            out.update(part._values)
        return out

    def clone(self) -> "Options":
        """Return a deep copy that is not frozen."""
        return copy.deepcopy(self)
