"""The IPU configuration: ipu_config.json's fields, read and written in the format published with
Graphcore's models.

Every field is also a command-line flag of the same name. Some values may be dictionaries by pod
type ({"pod4": 1, "pod16": 4, "default": 1}); `for_pod` resolves them. Torch-free, so that flags are
checked before torch is imported.
"""
from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from ipu_options.errors import UsageError
from ipu_options.files import write_json
from ipu_options.flags import Settings, flag
from ipu_options.layout import Layout, make_layout

IPU_CONFIG_NAME = "ipu_config.json"
POD_IPUS = {"pod4": 4, "pod8": 8, "pod16": 16, "pod32": 32, "pod64": 64}
OUTPUT_MODES = ("final", "all", "sum", "default")


@dataclass
class DeviceSettings(Settings):
    """The device: what it runs on, and what it is to show."""

    pod_type: Optional[str] = flag(
        None, "IPUs available: chooses the replication (default: NUM_AVAILABLE_IPU, else pod4)",
        choices=tuple(POD_IPUS))
    compile_only: bool = flag(False, "compile the pipelines for an offline IPU target, run nothing")
    synthetic_data: bool = flag(
        False, "let the IPU make up its input: the device's speed without the host's")
    ipu_model: bool = flag(False, "use the IPU Model, a simulator, in place of hardware")
    profile_dir: Optional[str] = flag(None,
                                      "write PopVision reports of training and inference there")
    trace: Optional[str] = flag(None, "write the host's spans as a Chrome trace to this file")


@dataclass
class IPUConfig(Settings):
    """How the job is mapped to IPUs.

    A field `inference_X` left at None takes the value of its training twin X.
    """

    layers_per_ipu: List[int] = flag(
        [0, -1, -1, -1],
        "encoder layers on each IPU of a replica; -1: an equal share of what is left", type=int,
        nargs="+", min=-1)
    ipus_per_replica: Optional[int] = flag(
        None, "IPUs of one pipeline (default: as many as layers_per_ipu names)", type=int, min=1)
    embedding_ipu: int = flag(0, "IPU of the embedding", type=int, min=0)
    head_ipu: Optional[int] = flag(None, "IPU of the QA head (default: the last)", type=int, min=0)
    replication_factor: Union[int, Dict[str, int]] = flag(
        {"pod4": 1, "pod8": 2, "pod16": 4, "pod32": 8, "pod64": 16, "default": 1},
        "pipelines trained in parallel", type=int, min=1)
    gradient_accumulation_steps: Union[int, Dict[str, int]] = flag(
        32, "micro-batches of a weight update on each replica", type=int, min=1, max=65_536)
    device_iterations: int = flag(1, "weight updates in one call of the device", type=int, min=1,
                                  max=65_536)
    matmul_proportion: Union[float, List[float]] = flag(
        0.25,
        "share of an IPU's memory offered to matrix multiplications as temporary, one number or one for each IPU",
        type=float, nargs="+", min=0.0, max=1.0)
    embedding_serialization_factor: int = flag(
        1, "parts in which the word embedding is looked up one after the other", type=int, min=1)
    recompute_checkpoint_every_layer: bool = flag(
        True, "keep each layer's input and recompute the rest in the backward pass", type=bool)
    optimizer_state_offchip: bool = flag(
        False, "keep the optimizer's state in the host's streaming memory", type=bool)
    enable_half_first_order_momentum: bool = flag(
        False, "keep the optimizer's first moment in float16", type=bool)
    replicated_tensor_sharding: bool = flag(
        True, "share the optimizer's state out over the replicas (with more than one)", type=bool)
    enable_half_partials: bool = flag(True, "accumulate matrix multiplications in float16",
                                      type=bool)
    stochastic_rounding: bool = flag(True, "round float16 results at random while training",
                                     type=bool)
    auto_loss_scaling: bool = flag(False, "let the device adjust the loss scaling", type=bool)
    output_mode: str = flag(
        "all",
        "what a training call returns: the loss of every micro-batch, the last one's, or their sum",
        choices=OUTPUT_MODES)
    executable_cache_dir: Optional[str] = flag(
        None, "folder that keeps compiled executables (default: POPLAR_EXECUTABLE_CACHE_DIR)")

    inference_layers_per_ipu: Optional[List[int]] = flag(
        None, "layers_per_ipu of the inference pipeline", type=int, nargs="+", min=-1)
    inference_ipus_per_replica: Optional[int] = flag(
        None, "ipus_per_replica of the inference pipeline", type=int, min=1)
    inference_replication_factor: Union[int, Dict[str, int], None] = flag(
        None, "pipelines that answer in parallel", type=int, min=1)
    inference_device_iterations: int = flag(
        5, "micro-batches of one inference call; at least the number of pipeline stages", type=int,
        min=1, max=65_536)
    inference_matmul_proportion: Union[float, List[float], None] = flag(
        None, "matmul_proportion of the inference pipeline", type=float, nargs="+", min=0.0,
        max=1.0)
    inference_embedding_serialization_factor: Optional[int] = flag(
        None, "embedding_serialization_factor of the inference pipeline", type=int, min=1)

    def for_pod(self, pod: str) -> "IPUConfig":
        """The same configuration with every by-pod dictionary replaced by its value for `pod`
        ("pod4", ...), else its "default".

        Raises UsageError where a dictionary has neither.
        """
        values = {}
        for name, value in self.values().items():
            if isinstance(value, dict):
                if pod not in value and "default" not in value:
                    raise UsageError(
                        f"{self.source(name)} has no value for {pod} and no default: add one, or choose a pod of "
                        f"{', '.join(value)}")
                values[name] = value.get(pod, value.get("default"))
        return replace(self, **values)

    def inference(self) -> "IPUConfig":
        """The configuration of the inference pipeline: each `inference_X` that is set takes the
        place of X.
        """
        twins = {name[len("inference_"):]: value for name, value in self.values().items()
                 if name.startswith("inference_") and value is not None}
        sources = {**self.sources, **{name: self.source("inference_" + name) for name in twins}}
        # a layout of its own: what was said of the training pipeline's IPUs no longer holds
        if "layers_per_ipu" in twins:
            twins.setdefault("ipus_per_replica", None)
            twins.update(embedding_ipu=0, head_ipu=None)
        return replace(self, gradient_accumulation_steps=1, sources=sources, **twins)

    def layout(self, num_layers: int) -> Layout:
        """The blocks of a model of `num_layers` encoder layers on the IPUs of one replica;
        UsageError if it does not add up.
        """
        return make_layout(self.layers_per_ipu, num_layers, self.ipus_per_replica,
                           self.embedding_ipu, self.head_ipu, self.source)

    def num_ipus(self) -> int:
        """IPUs of one replica."""
        return self.ipus_per_replica or len(self.layers_per_ipu)

    def matmul_shares(self) -> List[float]:
        """The matmul_proportion of each IPU of one replica."""
        given = self.matmul_proportion
        shares = list(given) if isinstance(given, (list, tuple)) else [given]
        return shares * self.num_ipus() if len(shares) == 1 else shares

    def to_dict(self) -> Dict[str, Any]:
        """All fields, as ipu_config.json holds them."""
        return self.values()

    def write(self, folder: Union[str, Path]) -> None:
        """Write `folder`/ipu_config.json. Raises OSError."""
        write_json(Path(folder) / IPU_CONFIG_NAME, dict(sorted(self.to_dict().items())))


@dataclass(frozen=True)
class Pipeline:
    """One pipeline, ready to be built: its configuration with every value resolved, and where its
    blocks are.
    """

    config: IPUConfig
    layout: Layout


def training_pipeline(config: IPUConfig, num_layers: int, pod: str) -> Pipeline:
    """The training pipeline of a model with `num_layers` encoder layers on `pod`.

    Raises UsageError, naming the nearest setting that would work, for a layout that does not add
    up, more IPUs than the pod has, or too little gradient accumulation for the number of stages.
    """
    pipeline = Pipeline(config, config.layout(num_layers))
    stages, needed = len(pipeline.layout.stages()), pipeline.layout.min_gradient_accumulation()
    if config.gradient_accumulation_steps < needed:
        raise UsageError(
            f"{config.source('gradient_accumulation_steps')} {config.gradient_accumulation_steps} is too small: training over {stages} "
            f"pipeline stages needs at least {needed}, one micro-batch for each forward and backward stage"
        )
    _check_ipus(pipeline, pod)
    return pipeline


def inference_pipeline(config: IPUConfig, num_layers: int, pod: str) -> Pipeline:
    """The inference pipeline, from the whole configuration with its training values. It needs a
    device iteration for each stage.

    Raises UsageError as `training_pipeline` does.
    """
    config = config.inference()
    pipeline = Pipeline(config, config.layout(num_layers))
    stages = len(pipeline.layout.stages())
    if stages > 1 and config.device_iterations < stages:
        raise UsageError(
            f"{config.source('device_iterations')} {config.device_iterations} is too small: the inference pipeline has "
            f"{stages} stages; use at least {stages}")
    _check_ipus(pipeline, pod)
    return pipeline


def _check_ipus(pipeline: Pipeline, pod: str) -> None:
    config = pipeline.config
    replica = 1 << (config.num_ipus() - 1).bit_length()  # IPUs are reserved in powers of two
    replicas, ipus = config.replication_factor, POD_IPUS[pod]
    if replica > ipus:
        raise UsageError(
            f"{config.source('layers_per_ipu')} {' '.join(map(str, config.layers_per_ipu))} takes {replica} IPUs, {pod} has "
            f"{ipus}: name at most {ipus} IPUs, or a larger --pod_type")
    if replica * replicas > ipus:
        raise UsageError(
            f"{config.source('replication_factor')} {replicas} takes {replica * replicas} IPUs, {pod} has {ipus}: use at "
            f"most {ipus // replica}, or a larger --pod_type")
    shares = config.matmul_shares()
    if len(shares) != config.num_ipus():
        raise UsageError(
            f"{config.source('matmul_proportion')} {' '.join(map(str, shares))} has {len(shares)} values: give one, or one "
            f"for each of the {config.num_ipus()} IPUs of a replica")


def read_ipu_config(name_or_path: Union[str, Path], source: Optional[str] = None) -> Dict[str, Any]:
    """The fields of an ipu_config.json: a file, a folder that holds one, or the name of a
    repository on the hub.

    Keys that belong to other programs (optimum-graphcore's versions, generation settings ...) are
    left out. source: what to call the file in a message; by default --ipu_config and its value.
    Raises UsageError for a file that is not there or not such JSON.
    """
    source = source or f"--ipu_config {name_or_path}"
    path = Path(name_or_path)
    path = path / IPU_CONFIG_NAME if path.is_dir() else path
    if not path.exists():
        path = _from_hub(str(name_or_path))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: not a readable ipu_config.json ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{source}: holds a {type(values).__name__}, it should be a JSON object")
    known = {f.name for f in fields(IPUConfig)} - {"sources"}
    values = {name: value for name, value in values.items() if name in known}
    for name in ("layers_per_ipu",
                 "inference_layers_per_ipu"):  # the published format allows one number
        if isinstance(values.get(name), int):
            values[name] = [values[name]]
    return values


def available_pod(pod_type: Optional[str] = None) -> str:
    """The pod to run on: `--pod_type`, else the pod of NUM_AVAILABLE_IPU IPUs (PopTorch hosts set
    it; 4 if unset).
    """
    if pod_type is not None:
        return pod_type
    given = os.environ.get("NUM_AVAILABLE_IPU", "4")
    for pod, ipus in POD_IPUS.items():
        if given == str(ipus):
            return pod
    raise UsageError(
        f"NUM_AVAILABLE_IPU={given}: it should be one of {', '.join(str(n) for n in POD_IPUS.values())}"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(name, IPU_CONFIG_NAME))
    except Exception as error:  # every way a hub can fail: offline, no such repository, no such file, a malformed name
        raise UsageError(
            f"--ipu_config {name}: no such file or folder, and the hub did not give it "
            f"({type(error).__name__}): name a local ipu_config.json or a folder that holds one")
