"""Builds poptorch.Options from the IPU configuration, for training and for inference.

The PopART options are those that graphcore/examples (nlp/bert/pytorch) and optimum-graphcore
publish for BERT and RoBERTa.
"""
from __future__ import annotations

import functools
import os
from typing import Dict, Optional

import torch

from ipu_options import device, poptorch
from ipu_options.config import NO_CACHE, DeviceSettings, IPUConfig, Pipeline, reserved_ipus
from runtime import processes
from runtime.errors import UsageError
from runtime.signals import killable

OVERLAP_MEMORY_OPTIMIZED = 3  # popart.AccumulateOuterFragmentSchedule.OverlapMemoryOptimized
JUST_IN_TIME = 1              # popart.SubgraphCopyingStrategy.JustInTime
_WATCHED = "watched gradient"  # the name of our anchor, free to choose


def describe_poptorch(run: DeviceSettings) -> str:
    """Return which PopTorch runs, and on a line of its own that this host stands in for IPUs.

    Raises UsageError under torchrun with Graphcore's PopTorch. The IPUs' collectives need popdist
    and a V-IPU partition made for the processes, which poprun brings (popart, devicex.cpp).
    """
    here = processes.place()
    if device == "IPU" and here.launcher == "torchrun" and here.count > 1:
        raise UsageError("torchrun is for hosts without IPUs: start the processes with poprun")
    text = f"PopTorch: {poptorch.__name__} {poptorch.__version__}, torch {torch.__version__}"
    asked = [f"--{name}" for name in ("compile_only", "ipu_model", "synthetic_data", "profile_dir")
             if getattr(run, name)]
    if device == "host":
        text += "\nno IPU: this host's CPU stands in for the IPUs"
        text += f"; what {', '.join(asked)} shows is its" if asked else ""
    return text


def training_options(config: IPUConfig, run: DeviceSettings, *, seed: int,
                     watched: Optional[str] = None,
                     watch: Optional[bool] = None) -> "poptorch.Options":
    """Return the poptorch.Options of the training pipeline.

    config: with by-pod values resolved. watched: name of a parameter whose gradient
    `watched_gradient` returns after each call, if `watch` is true. watch: None means true unless an
    IPU will run the pipeline.

    Gradients are averaged over accumulation and replicas (Mean). Together with the rows' loss
    weights this gives the mean loss over the real windows of an update.

    Gradients are anchored under the names that PopTorch's user guide ("Inspecting tensors") and
    graphcore/examples (speech/fastpitch/pytorch/tests/unit_tester.py) use, and PopART's tests do so
    in pipelines with gradient accumulation (pipelining_tests/pipeline_grad_accl_test.py). It was
    not possible to try this pipeline on an IPU, and a refusal by the compiler wastes a booked
    machine: hence the default of `watch`.
    """
    # Without it a float16 number beyond 65,504 becomes 65,504, and no overflow is ever seen (Poplar
    # API reference, FloatingPointBehaviour::nanoo). PopTorch and PopART hand engine options on to
    # Poplar (popart_compiler/source/SessionOptions.cpp; popart, engineoptionscreator.cpp).
    # Stochastic rounding is another bit of the same register, which PopART sets by itself
    # (irlowering.cpp, setStochasticRoundingBehaviour). Automatic loss scaling needs 65,504: it
    # doubles its factor until elements come close to that, and skips no update (popart,
    # automaticlossscaling.hpp, popx/op/lossscaleupdatex.cpp).
    options = _common_options(config, run, "training", {} if config.auto_loss_scaling else {
        "debug.nanOverflowMode": "true"})
    if config.auto_loss_scaling:
        options.Training.setAutomaticLossScaling(True)
    options._Popart.setPatterns({
        "TiedGather": True, "TiedGatherAccumulate": True, "UpdateInplacePrioritiesForIpu": True})
    options.Training.gradientAccumulation(config.gradient_accumulation_steps)
    options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
    options.outputMode(getattr(poptorch.OutputMode, config.output_mode.capitalize()))
    options.randomSeed(seed)
    options.Precision.enableStochasticRounding(config.stochastic_rounding)
    options.TensorLocations.setOptimizerLocation(
        poptorch.TensorLocationSettings()
        .useOnChipStorage(not config.optimizer_state_offchip)
        .useReplicatedTensorSharding(  # over the replicas of one process
            config.replicated_tensor_sharding and options.replication_factor > 1))
    if watch is None:  # an executable that is compiled offline is meant for an IPU
        watch = not run.compile_only and not poptorch.ipuHardwareIsAvailable()
    if watched and watch:
        # The anchor gets no output mode of its own, because PopTorch 3.4's compiler always uses
        # that of the outputs (addOutputTensor(id) in LowerToPopart.cpp). With "all", our default,
        # the gradient of every micro-batch is returned.
        options.anchorTensor(_WATCHED, f"Gradient___{watched}")
    popart = options._Popart
    # Stream only those tensors to the host that it asks for.
    popart.set("disableGradAccumulationTensorStreams", True)
    # All IPUs update their weights at the same time.
    popart.set("accumulateOuterFragmentSettings.schedule", OVERLAP_MEMORY_OPTIMIZED)
    popart.set("accumulateOuterFragmentSettings.excludedVirtualGraphs", ["0"])
    popart.set("scheduleNonWeightUpdateGradientConsumersEarly", True)
    return options


def watched_gradient(options: "poptorch.Options",
                     training_model: "poptorch.PoplarExecutor") -> Dict[str, torch.Tensor]:
    """Return {PopART's name: gradient} of the watched parameter; {} if no parameter is watched.

    The gradient is that of the last call of `training_model`, multiplied by the loss scaling.
    """
    return {
        name: training_model.getAnchoredTensor(_WATCHED)
        for name, *_ in options.anchored_tensors.values()}


def scales_loss_itself(options: "poptorch.Options") -> bool:
    """Return whether the device adjusts the loss scaling."""
    return bool(options._Popart.options.get("automaticLossScalingSettings.enabled"))


def compile_model(executor: "poptorch.PoplarExecutor", batch: Dict[str, torch.Tensor]) -> None:
    """Compile `executor` for the shapes of a combined batch, and take IPUs unless it is offline.

    This takes minutes in C++, where no signal handler in Python runs: signals end the process.
    """
    try:
        with killable():
            executor.compile(**batch)
    except poptorch.Error as error:
        # Compiling ends with one attempt to attach, which fails if others have the IPUs (popart,
        # devicex.cpp, loadEngineAndConnectStreams). What is compiled stays.
        if "Failed to attach to device" not in str(error):
            raise
    if executor.options.connection_type != poptorch.ConnectionType.Never:
        attach(executor)


def attach(executor: "poptorch.PoplarExecutor") -> None:
    """Take IPUs for a compiled model that has none, waiting as long as others have them.

    PopTorch waits in C++, too, since ipu_options/__init__.py sets POPTORCH_WAIT_FOR_IPU.
    """
    if not executor.isAttachedToDevice():
        with killable():
            executor.attachToDevice()


def inference_options(pipeline: Pipeline, run: DeviceSettings) -> "poptorch.Options":
    """Return the poptorch.Options of an inference pipeline; all logits are returned, in order."""
    options = _common_options(pipeline.config, run, "inference", {})
    if pipeline.sharded:
        options.setExecutionStrategy(poptorch.ShardedExecution(poptorch.AutoStage.AutoIncrement))
    options.outputMode(poptorch.OutputMode.All)
    options.Precision.enableStochasticRounding(False)
    return options


def _common_options(config: IPUConfig, run: DeviceSettings, phase: str,
                    engine_options: Dict[str, str]) -> "poptorch.Options":
    """Return what both pipelines set.

    phase: "training" or "inference". engine_options: Poplar's engine options of that phase alone.
    """
    options = _options_of_process(config)
    options.modelName(phase)
    options.autoRoundNumIPUs(True)
    options.deviceIterations(config.device_iterations)
    options.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement))
    options.setAvailableMemoryProportion({
        f"IPU{ipu}": float(share) for ipu, share in enumerate(config.matmul_shares())})
    if config.enable_half_partials:
        options.Precision.setPartialsType(torch.float16)
    cache = executable_cache(config, run)
    options.enableExecutableCaching(cache)
    if cache is None:  # or POPTORCH_CACHE_DIR would have processes wait for each other's compiling
        options._Popart.set("cachePath", "")
    if run.synthetic_data:
        options.enableSyntheticData(True)
    if run.ipu_model:
        options.useIpuModel(True)
    if run.compile_only:
        options.useOfflineIpuTarget()
    else:  # leave the IPUs to others while compiling
        options.connectionType(poptorch.ConnectionType.OnDemand)
    options._Popart.set("subgraphCopyingStrategy", JUST_IN_TIME)
    options._Popart.setEngineOptions({
        "opt.useAutoloader": "true", "target.syncReplicasIndependently": "true", **engine_options})
    if run.profile_dir:
        # After setEngineOptions, because it adds to the engine options. The report is written to a
        # sub-folder with the model's name (PopTorch, tests/options_test.py,
        # test_profile_report_with_model_name), which is `phase`.
        options.enableProfiling(processes.process_path(run.profile_dir))
    return options


def executable_cache(config: IPUConfig, run: DeviceSettings) -> Optional[str]:
    """Return the folder that caches compiled executables, or None if there is to be no cache.

    There is none for the IPU Model, of which PopTorch would warn (CompilerImpl.cpp), nor for a
    profile, whose memory report is made in compiling: graphcore/examples refuses the two together
    (tutorials/feature_examples/pytorch/octconv/octconv_example.py).

    Compiling takes minutes, so there is a cache by default: the folder that one of the two
    environment variables of IPU hosts names, else one in the user's cache folder (XDG Base
    Directory Specification).
    """
    if run.ipu_model or run.profile_dir or config.executable_cache_dir in NO_CACHE:
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return (config.executable_cache_dir or os.environ.get("POPLAR_EXECUTABLE_CACHE_DIR")
            or os.environ.get("POPTORCH_CACHE_DIR")  # PopTorch reads it too (python/options.py)
            or os.path.join(caches, "ipu_options", "executables"))


def _options_of_process(config: IPUConfig) -> "poptorch.Options":
    """Return new options for this process's share of the replicas.

    Under poprun they are popdist's, which set the replicas and the IPUs of each process and refuse
    to be told (PopTorch, tests/popdist_test.py; graphcore/examples, nlp/bert/pytorch/ipu_options.py
    and vision/cnns/pytorch/train/train.py, create_training_opts). popdist.init() comes first
    (nlp/bert/pytorch/args.py, init_popdist). Without poprun the number of processes is set even if
    it is 1, because PopTorch's own default is what Open MPI's environment says.
    """
    here = processes.place()
    if here.launcher == "poprun":
        import popdist.poptorch
        _initialise_popdist()
        return popdist.poptorch.Options(ipus_per_replica=reserved_ipus(config.num_ipus()))
    options = poptorch.Options()
    options.replicationFactor(config.replication_factor // here.count)
    options.Distributed.configureProcessId(here.index, here.count)
    return options


@functools.lru_cache(maxsize=None)
def _initialise_popdist() -> None:
    import popdist
    popdist.init()
