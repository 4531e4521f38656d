"""poptorch.Options from the IPU configuration: one function for training, one for inference.

PopART's options are those that graphcore/examples (nlp/bert/pytorch) and optimum-graphcore publish
for BERT and RoBERTa.
"""
from __future__ import annotations

import os
from typing import Dict, Optional

import torch

from ipu_options import poptorch
from ipu_options.config import DeviceSettings, IPUConfig

OUTPUT_MODES = {"final": "Final", "all": "All", "sum": "Sum", "default": "Default"}
OVERLAP_MEMORY_OPTIMIZED = 3  # popart.AccumulateOuterFragmentSchedule.OverlapMemoryOptimized
JUST_IN_TIME = 1              # popart.SubgraphCopyingStrategy.JustInTime
_WATCHED = "watched gradient"  # our name for the anchor


def training_options(config: IPUConfig, run: DeviceSettings, *, seed: int,
                     watched: Optional[str] = None,
                     watch: Optional[bool] = None) -> "poptorch.Options":
    """Options of the training pipeline. Gradients are averaged over accumulation and replicas
    (Mean), which together with the rows' loss weights gives the mean loss over an update's real
    windows.

    watched: a parameter whose gradient `watched_gradient` is to give after each call, if `watch` is
    true. Where that is None, it does so unless an IPU is going to run this. PopTorch's user guide
    ("Inspecting tensors") and graphcore/examples (speech/fastpitch/pytorch/tests/unit_tester.py)
    anchor gradients under these names, and PopART's tests do so in pipelines with gradient
    accumulation (pipelining_tests/pipeline_grad_accl_test.py); but nobody here could try it on this
    pipeline, and what the compiler refuses costs a booked machine.
    """
    options = _common_options(config, run, "training")
    options.Training.gradientAccumulation(config.gradient_accumulation_steps)
    options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
    if config.auto_loss_scaling:
        options.Training.setAutomaticLossScaling(True)
    options.outputMode(getattr(poptorch.OutputMode, OUTPUT_MODES[config.output_mode]))
    options.randomSeed(seed)
    options.Precision.enableStochasticRounding(config.stochastic_rounding)
    options.TensorLocations.setOptimizerLocation(poptorch.TensorLocationSettings().useOnChipStorage(
        not config.optimizer_state_offchip).useReplicatedTensorSharding(
            config.replicated_tensor_sharding and config.replication_factor > 1))
    if watch is None:  # what is compiled offline is meant for an IPU
        watch = not run.compile_only and not poptorch.ipuHardwareIsAvailable()
    if watched and watch:
        # No output mode of its own: PopTorch 3.4's compiler gives an anchor that of the outputs
        # whatever is asked for (addOutputTensor(id) in LowerToPopart.cpp). "all", our default, then
        # returns the gradient of every micro-batch.
        options.anchorTensor(_WATCHED, f"Gradient___{watched}")
    popart = options._Popart
    popart.set("disableGradAccumulationTensorStreams",
               True)  # stream to the host what it asks for, nothing more
    popart.set("accumulateOuterFragmentSettings.schedule",
               OVERLAP_MEMORY_OPTIMIZED)  # all IPUs update their weights at once
    popart.set("accumulateOuterFragmentSettings.excludedVirtualGraphs", ["0"])
    popart.set("scheduleNonWeightUpdateGradientConsumersEarly", True)
    return options


def watched_gradient(options: "poptorch.Options",
                     training_model: "poptorch.PoplarExecutor") -> Dict[str, torch.Tensor]:
    """{name in PopART: gradient of the last call, times the loss scaling} of the parameter that is
    watched; {} if none is.
    """
    return {
        name: training_model.getAnchoredTensor(_WATCHED)
        for name, *_ in options.anchored_tensors.values()}


def mean_loss(output: torch.Tensor, config: IPUConfig) -> float:
    """The mean loss of a step's micro-batches, from what a call of the training model returns under
    `config.output_mode`.
    """
    losses_in_a_sum = config.gradient_accumulation_steps * config.device_iterations if config.output_mode == "sum" else 1
    return output.float().mean().item() / losses_in_a_sum


def inference_options(config: IPUConfig, run: DeviceSettings) -> "poptorch.Options":
    """Options of the inference pipeline; `config` is `IPUConfig.inference()`. All logits are
    returned, in order.
    """
    options = _common_options(config, run, "inference")
    options.outputMode(poptorch.OutputMode.All)
    options.Precision.enableStochasticRounding(False)
    return options


def _common_options(config: IPUConfig, run: DeviceSettings, phase: str) -> "poptorch.Options":
    options = poptorch.Options()
    options.modelName(phase)
    options.autoRoundNumIPUs(True)
    options.replicationFactor(config.replication_factor)
    options.deviceIterations(config.device_iterations)
    options.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement))
    options.setAvailableMemoryProportion(memory_proportions(config))
    if config.enable_half_partials:
        options.Precision.setPartialsType(torch.float16)
    cache = config.executable_cache_dir or os.environ.get("POPLAR_EXECUTABLE_CACHE_DIR")
    if cache:
        options.enableExecutableCaching(cache)
    if run.synthetic_data:
        options.enableSyntheticData(True)
    if run.ipu_model:
        options.useIpuModel(True)
    if run.compile_only:
        options.useOfflineIpuTarget()
    options._Popart.set("subgraphCopyingStrategy", JUST_IN_TIME)
    options._Popart.setPatterns({
        "TiedGather": True, "TiedGatherAccumulate": True, "UpdateInplacePrioritiesForIpu": True})
    options._Popart.setEngineOptions({
        "opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"})
    if run.profile_dir:
        options.enableProfiling(os.path.join(
            run.profile_dir, phase))  # after setEngineOptions: it adds to what is there
    return options


def memory_proportions(config: IPUConfig) -> Dict[str, float]:
    """matmul_proportion as PopTorch takes it: {"IPU0": share, ...}, one entry for each IPU of a
    replica.
    """
    return {f"IPU{ipu}": float(share) for ipu, share in enumerate(config.matmul_shares())}
