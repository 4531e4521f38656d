"""The IPU configuration: ipu_config.json's fields, read and written in the format published with Graphcore's models.

Every field is also a command-line flag of the same name. Some values may be dictionaries by pod type ({"pod4": 1,
"pod16": 4, "default": 1}); `for_pod` resolves them. Torch-free, so that flags are checked before torch is imported.
"""
from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from ipu_options.errors import UsageError
from ipu_options.layout import Layout, make_layout

IPU_CONFIG_NAME = "ipu_config.json"
POD_IPUS = {"pod4": 4, "pod8": 8, "pod16": 16, "pod32": 32, "pod64": 64}
OUTPUT_MODES = ("final", "all", "sum", "default")


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command-line flag; metadata may hold `min`, `max`, `choices`, `type` and `nargs`."""
    metadata["help"] = help
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class IPUConfig:
    """How the job is mapped to IPUs. A field `inference_X` left at None takes the value of its training twin X."""

    layers_per_ipu: List[int] = flag([0, -1, -1, -1], "encoder layers on each IPU of a replica; -1: an equal share of what is left",
                                     type=int, nargs="+", min=-1)
    ipus_per_replica: Optional[int] = flag(None, "IPUs of one pipeline (default: as many as layers_per_ipu names)", type=int, min=1)
    embedding_ipu: int = flag(0, "IPU of the embedding", type=int, min=0)
    head_ipu: Optional[int] = flag(None, "IPU of the QA head (default: the last)", type=int, min=0)
    replication_factor: Union[int, Dict[str, int]] = flag(
        {"pod4": 1, "pod8": 2, "pod16": 4, "pod32": 8, "pod64": 16, "default": 1}, "pipelines trained in parallel", type=int, min=1)
    gradient_accumulation_steps: Union[int, Dict[str, int]] = flag(
        32, "micro-batches of a weight update on each replica", type=int, min=1, max=65_536)
    device_iterations: int = flag(1, "weight updates in one call of the device", type=int, min=1, max=65_536)
    matmul_proportion: Union[float, List[float]] = flag(
        0.25, "share of an IPU's memory offered to matrix multiplications as temporary, one number or one for each IPU",
        type=float, nargs="+", min=0.0, max=1.0)
    embedding_serialization_factor: int = flag(1, "parts in which the word embedding is looked up one after the other", type=int, min=1)
    recompute_checkpoint_every_layer: bool = flag(True, "keep each layer's input and recompute the rest in the backward pass", type=bool)
    optimizer_state_offchip: bool = flag(False, "keep the optimizer's state in the host's streaming memory", type=bool)
    enable_half_first_order_momentum: bool = flag(False, "keep the optimizer's first moment in float16", type=bool)
    replicated_tensor_sharding: bool = flag(True, "share the optimizer's state out over the replicas (with more than one)", type=bool)
    enable_half_partials: bool = flag(True, "accumulate matrix multiplications in float16", type=bool)
    stochastic_rounding: bool = flag(True, "round float16 results at random while training", type=bool)
    auto_loss_scaling: bool = flag(False, "let the device adjust the loss scaling", type=bool)
    output_mode: str = flag("all", "what a training call returns: the loss of every micro-batch, the last one's, or their sum",
                            choices=OUTPUT_MODES)
    executable_cache_dir: Optional[str] = flag(None, "folder that keeps compiled executables (default: POPLAR_EXECUTABLE_CACHE_DIR)")

    inference_layers_per_ipu: Optional[List[int]] = flag(None, "layers_per_ipu of the inference pipeline", type=int, nargs="+", min=-1)
    inference_ipus_per_replica: Optional[int] = flag(None, "ipus_per_replica of the inference pipeline", type=int, min=1)
    inference_replication_factor: Union[int, Dict[str, int], None] = flag(None, "pipelines that answer in parallel", type=int, min=1)
    inference_device_iterations: int = flag(
        5, "micro-batches of one inference call; at least the number of pipeline stages", type=int, min=1, max=65_536)
    inference_matmul_proportion: Union[float, List[float], None] = flag(
        None, "matmul_proportion of the inference pipeline", type=float, nargs="+", min=0.0, max=1.0)
    inference_embedding_serialization_factor: Optional[int] = flag(
        None, "embedding_serialization_factor of the inference pipeline", type=int, min=1)

    def for_pod(self, pod: str) -> "IPUConfig":
        """The same with every by-pod dictionary replaced by its value for `pod` ("pod4", ...; else its "default")."""
        return replace(self, **{f.name: _for_pod(getattr(self, f.name), pod, f.name) for f in fields(self)})

    def inference(self) -> "IPUConfig":
        """The inference pipeline's own configuration: each `inference_X` that is set takes the place of X."""
        twins = {f.name[len("inference_"):]: getattr(self, f.name) for f in fields(self) if f.name.startswith("inference_")}
        twins = {name: value for name, value in twins.items() if value is not None}
        if "layers_per_ipu" in twins:  # a layout of its own: what was said of the training pipeline's IPUs no longer holds
            twins.setdefault("ipus_per_replica", None)
            twins.update(embedding_ipu=0, head_ipu=None)
        return replace(self, gradient_accumulation_steps=1, **twins)

    def layout(self, num_layers: int, flag: str = "--layers_per_ipu") -> Layout:
        """The blocks of a model of `num_layers` encoder layers on the IPUs of one replica; UsageError if it does not add up."""
        return make_layout(self.layers_per_ipu, num_layers, self.ipus_per_replica, self.embedding_ipu, self.head_ipu, flag)

    def num_ipus(self) -> int:
        """IPUs of one replica."""
        return self.ipus_per_replica or len(self.layers_per_ipu)

    def to_dict(self) -> Dict[str, Any]:
        """All fields, as ipu_config.json holds them."""
        return asdict(self)

    def write(self, folder: Union[str, Path]) -> None:
        """Write `folder`/ipu_config.json."""
        (Path(folder) / IPU_CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Pipeline:
    """One pipeline, ready to be built: its configuration with every value resolved, and where its blocks are."""

    config: IPUConfig
    layout: Layout


def training_pipeline(config: IPUConfig, num_layers: int, pod: str) -> Pipeline:
    """The training pipeline of a model with `num_layers` encoder layers on `pod`.

    Raises UsageError, naming the nearest setting that would work, for a layout that does not add up, more IPUs than the pod
    has, or too little gradient accumulation for the number of stages.
    """
    pipeline = Pipeline(config, config.layout(num_layers))
    stages, needed = len(pipeline.layout.stages()), pipeline.layout.min_gradient_accumulation()
    if config.gradient_accumulation_steps < needed:
        raise UsageError(f"--gradient_accumulation_steps {config.gradient_accumulation_steps} is too small: training over {stages} "
                         f"pipeline stages needs at least {needed}, one micro-batch for each forward and backward stage")
    _check_ipus(pipeline, pod, "--")
    return pipeline


def inference_pipeline(config: IPUConfig, num_layers: int, pod: str) -> Pipeline:
    """The same for inference, which needs a device iteration for each stage; `config` is the whole one, with its training values."""
    prefix = "--inference_" if config.inference_layers_per_ipu else "--"
    config = config.inference()
    pipeline = Pipeline(config, config.layout(num_layers, prefix + "layers_per_ipu"))
    stages = len(pipeline.layout.stages())
    if stages > 1 and config.device_iterations < stages:
        raise UsageError(f"--inference_device_iterations {config.device_iterations} is too small: the inference pipeline has {stages} "
                         f"stages; use at least {stages}")
    _check_ipus(pipeline, pod, prefix)
    return pipeline


def _check_ipus(pipeline: Pipeline, pod: str, prefix: str) -> None:
    config = pipeline.config
    replica = 1 << (config.num_ipus() - 1).bit_length()  # IPUs are reserved in powers of two
    replicas, ipus = config.replication_factor, POD_IPUS[pod]
    if replica > ipus:
        raise UsageError(f"{prefix}layers_per_ipu {' '.join(map(str, config.layers_per_ipu))} takes {replica} IPUs, {pod} has {ipus}: "
                         f"name at most {ipus} IPUs, or a larger --pod_type")
    if replica * replicas > ipus:
        raise UsageError(f"--replication_factor {replicas} takes {replica * replicas} IPUs, {pod} has {ipus}: use at most "
                         f"{ipus // replica}, or a larger --pod_type")
    shares = config.matmul_proportion
    if isinstance(shares, list) and len(shares) not in (1, config.num_ipus()):
        raise UsageError(f"{prefix}matmul_proportion {' '.join(map(str, shares))} has {len(shares)} values: give one, or one for each of "
                         f"the {config.num_ipus()} IPUs of a replica")


def read_ipu_config(name_or_path: str) -> Dict[str, Any]:
    """The fields of an ipu_config.json: a file, a folder that holds one, or the name of a repository on the hub.

    Keys that belong to other programs (optimum-graphcore's versions, generation settings ...) are left out.
    Raises UsageError for a file that is not there or not such JSON.
    """
    path = Path(name_or_path)
    path = path / IPU_CONFIG_NAME if path.is_dir() else path
    if not path.exists():
        path = _from_hub(name_or_path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--ipu_config {name_or_path}: not a readable ipu_config.json ({error})")
    if not isinstance(values, dict):
        raise UsageError(f"--ipu_config {name_or_path}: holds a {type(values).__name__}, it should be a JSON object")
    known = {f.name for f in fields(IPUConfig)}
    return {name: value for name, value in values.items() if name in known}


def available_pod(pod_type: Optional[str] = None) -> str:
    """The pod to run on: `--pod_type`, else the pod of NUM_AVAILABLE_IPU IPUs (PopTorch hosts set it; 4 if unset)."""
    if pod_type is not None:
        return pod_type
    given = os.environ.get("NUM_AVAILABLE_IPU", "4")
    for pod, ipus in POD_IPUS.items():
        if given == str(ipus):
            return pod
    raise UsageError(f"NUM_AVAILABLE_IPU={given}: it should be one of {', '.join(str(n) for n in POD_IPUS.values())}")


def _for_pod(value: Any, pod: str, name: str) -> Any:
    if not isinstance(value, dict):
        return value
    if pod not in value and "default" not in value:
        raise UsageError(f"{name} has no value for {pod} and no default: add one, or choose a pod of {', '.join(value)}")
    return value.get(pod, value.get("default"))


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(name, IPU_CONFIG_NAME))
    except Exception as error:  # every way a hub can fail: offline, no such repository, no such file, a malformed name
        raise UsageError(f"--ipu_config {name}: no such file or folder, and the hub did not give it "
                         f"({type(error).__name__}): name a local ipu_config.json or a folder that holds one")
