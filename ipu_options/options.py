"""poptorch.Options from the IPU configuration: one function for training, one for inference.

PopART's options are those that graphcore/examples (nlp/bert/pytorch) and optimum-graphcore publish for BERT and RoBERTa.
"""
from __future__ import annotations

import os
from typing import Optional

import torch

from ipu_options import poptorch
from ipu_options.config import IPUConfig

OUTPUT_MODES = {"final": "Final", "all": "All", "sum": "Sum", "default": "Default"}
OVERLAP_MEMORY_OPTIMIZED = 3  # popart.AccumulateOuterFragmentSchedule.OverlapMemoryOptimized
JUST_IN_TIME = 1              # popart.SubgraphCopyingStrategy.JustInTime


def training_options(config: IPUConfig, *, seed: int, compile_only: bool = False, synthetic_data: bool = False,
                     ipu_model: bool = False, profile_dir: Optional[str] = None) -> "poptorch.Options":
    """Options of the training pipeline. Gradients are averaged over accumulation and replicas (Mean), which together with
    the rows' loss weights gives the mean loss over an update's real windows."""
    options = _common_options(config, "training", compile_only, synthetic_data, ipu_model, profile_dir)
    options.Training.gradientAccumulation(config.gradient_accumulation_steps)
    options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
    if config.auto_loss_scaling:
        options.Training.setAutomaticLossScaling(True)
    options.outputMode(getattr(poptorch.OutputMode, OUTPUT_MODES[config.output_mode]))
    options.randomSeed(seed)
    options.Precision.enableStochasticRounding(config.stochastic_rounding)
    options.TensorLocations.setOptimizerLocation(
        poptorch.TensorLocationSettings()
        .useOnChipStorage(not config.optimizer_state_offchip)
        .useReplicatedTensorSharding(config.replicated_tensor_sharding and config.replication_factor > 1))
    popart = options._Popart
    popart.set("disableGradAccumulationTensorStreams", True)  # stream to the host what it asks for, nothing more
    popart.set("accumulateOuterFragmentSettings.schedule", OVERLAP_MEMORY_OPTIMIZED)  # all IPUs update their weights at once
    popart.set("accumulateOuterFragmentSettings.excludedVirtualGraphs", ["0"])
    popart.set("scheduleNonWeightUpdateGradientConsumersEarly", True)
    return options


def inference_options(config: IPUConfig, *, compile_only: bool = False, synthetic_data: bool = False, ipu_model: bool = False,
                      profile_dir: Optional[str] = None) -> "poptorch.Options":
    """Options of the inference pipeline; `config` is `IPUConfig.inference()`. All logits are returned, in order."""
    options = _common_options(config, "inference", compile_only, synthetic_data, ipu_model, profile_dir)
    options.outputMode(poptorch.OutputMode.All)
    options.Precision.enableStochasticRounding(False)
    return options


def _common_options(config, phase, compile_only, synthetic_data, ipu_model, profile_dir):
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
    if synthetic_data:
        options.enableSyntheticData(True)
    if ipu_model:
        options.useIpuModel(True)
    if compile_only:
        options.useOfflineIpuTarget()
    options._Popart.set("subgraphCopyingStrategy", JUST_IN_TIME)
    options._Popart.setPatterns({"TiedGather": True, "TiedGatherAccumulate": True, "UpdateInplacePrioritiesForIpu": True})
    options._Popart.setEngineOptions({"opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"})
    if profile_dir:
        options.enableProfiling(os.path.join(profile_dir, phase))  # after setEngineOptions: it adds to what is there
    return options


def memory_proportions(config: IPUConfig) -> dict:
    """matmul_proportion as PopTorch takes it: {"IPU0": share, ...}, one entry for each IPU of a replica."""
    shares, ipus = config.matmul_proportion, config.num_ipus()
    shares = shares if isinstance(shares, list) else [shares]
    return {f"IPU{i}": float(share) for i, share in enumerate(shares * ipus if len(shares) == 1 else shares)}
