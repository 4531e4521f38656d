"""The IPU configuration: ipu_config.json in the format published with Graphcore's models.

Every field is also a command-line flag of the same name. Some values may be dictionaries keyed by
pod type ({"pod4": 1, "pod16": 4, "default": 1}); `IPUConfig.for_pod` resolves them. This module
does not import torch, so that flags are checked before torch is loaded.
"""
from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Dict, List, Optional, Union

from ipu_options.layout import Layout, in_ipus, make_layout
from runtime import processes
from runtime.errors import UsageError
from runtime.files import read_json_object, write_json
from runtime.flags import Settings, Source, flag
from runtime.hub import hub_cause, offline_unless_reachable

log = logging.getLogger(__name__)
IPU_CONFIG_NAME = "ipu_config.json"
# Keys of published files that say nothing about the pipeline.
_OF_OTHERS = {"optimum_version", "transformers_version", "ipu_version", "seed"}
NO_CACHE = ("", "disabled")  # values of executable_cache_dir; optimum-graphcore's is "disabled"
# pod1 and pod2 are partitions of those sizes.
POD_IPUS = {"pod1": 1, "pod2": 2, "pod4": 4, "pod8": 8, "pod16": 16, "pod32": 32, "pod64": 64,
            "pod128": 128, "pod256": 256}
# The IPUs that one host feeds. Larger pods take several hosts (poprun).
IPUS_OF_A_HOST = 64
OUTPUT_MODES = ("final", "all", "sum", "default")


@dataclass
class DeviceSettings(Settings):
    """The device to run on, and what to record about the run."""

    pod_type: Optional[str] = flag(
        None, "size of the pod; selects the replication (default: NUM_AVAILABLE_IPU, else pod4)",
        choices=tuple(POD_IPUS))
    compile_only: bool = flag(False, "compile for an offline IPU target and run nothing")
    synthetic_data: bool = flag(
        False, "generate the input on the IPU, to measure its speed without the host's")
    ipu_model: bool = flag(False, "use the IPU Model, a simulator, instead of hardware")
    profile_dir: Optional[str] = flag(
        None, "folder for PopVision reports of training and inference")
    trace: Optional[str] = flag(
        None, "write a Chrome trace of the host's phases (or of the plan) to this file")
    process_timeout: float = flag(
        processes.TIMEOUT, "seconds after which a process that does not answer the others ends the "
        "run of all: longer than compiling, saving and evaluating take", above=0)

    @property
    def dry_run(self) -> bool:
        """Whether nothing is trained: the run only compiles, or is only timed."""
        return self.compile_only or self.synthetic_data


@dataclass
class IPUConfig(Settings):
    """How the job is mapped to IPUs.

    A field `inference_X` that is None takes the value of the training field X.
    """

    layers_per_ipu: List[int] = flag(
        [0, -1, -1, -1], "encoder layers on each IPU of a replica; -1: an equal share of the "
        "remaining layers", type=int, nargs="+", min=-1)
    ipus_per_replica: Optional[int] = flag(
        None, "IPUs of one replica (default: the length of layers_per_ipu)", type=int, min=1)
    embedding_ipu: int = flag(0, "IPU of the embedding", min=0)
    head_ipu: Optional[int] = flag(None, "IPU of the QA head (default: the last)", type=int, min=0)
    replication_factor: Union[int, Dict[str, int]] = flag(
        {"pod4": 1, "pod8": 2, "pod16": 4, "pod32": 8, "pod64": 16, "pod128": 32, "pod256": 64,
         "default": 1},
        "replicas of the pipeline that train in parallel", type=int, min=1, by_pod=True)
    gradient_accumulation_steps: Union[int, Dict[str, int]] = flag(
        32, "micro-batches per weight update on each replica; --pack divides it by the windows a "
        "row holds, so that an update keeps its windows", min=1, max=65_536, by_pod=True)
    device_iterations: Union[int, Dict[str, int]] = flag(
        1, "weight updates per call of the device, which are the same whatever their number; a run "
        "ends with a whole call", min=1, max=65_536, by_pod=True)
    matmul_proportion: Union[float, List[float]] = flag(
        0.25, "share of an IPU's memory for temporaries of matrix multiplications: one number, or "
        "one for each IPU", nargs="+", min=0.0, max=1.0)
    embedding_serialization_factor: int = flag(
        1, "parts into which the word embedding is split, to save memory", min=1, max=256)
    recompute_checkpoint_every_layer: bool = flag(
        True, "keep the output of each layer but the last for the backward pass, and recompute the "
        "rest; if false, keep only what enters a stage")
    optimizer_state_offchip: bool = flag(
        False, "keep the optimizer state off chip, in streaming memory")
    enable_half_first_order_momentum: bool = flag(
        False, "keep the optimizer's first moment in float16")
    replicated_tensor_sharding: bool = flag(
        True, "shard the optimizer state over the replicas, if there are several")
    enable_half_partials: bool = flag(
        True, "accumulate the partial sums of matrix multiplications in float16")
    stochastic_rounding: bool = flag(True, "round float16 results stochastically in training")
    auto_loss_scaling: bool = flag(False, "let the device adjust the loss scaling")
    output_mode: str = flag(
        "all", "losses that a training call returns: of all micro-batches, of the final one, or "
        "their sum (over device_iterations the printed loss is then the mean of the updates' "
        "means)", choices=OUTPUT_MODES)
    executable_cache_dir: Optional[str] = flag(
        None, "folder that caches compiled executables; an empty text switches the cache off "
        "(default: POPLAR_EXECUTABLE_CACHE_DIR, POPTORCH_CACHE_DIR, else a folder in ~/.cache)")

    inference_layers_per_ipu: Optional[List[int]] = flag(
        None, "layers_per_ipu of the inference pipeline", type=int, nargs="+", min=-1)
    inference_ipus_per_replica: Optional[int] = flag(
        None, "ipus_per_replica of the inference pipeline", type=int, min=1)
    inference_replication_factor: Union[int, Dict[str, int], None] = flag(
        None, "replicas of the inference pipeline (default: as many as fit on the IPUs that "
        "training uses)", type=int, min=1, by_pod=True)
    inference_device_iterations: Union[int, Dict[str, int]] = flag(
        16, "micro-batches per inference call, at least the number of pipeline stages", min=1,
        max=65_536, by_pod=True)
    inference_matmul_proportion: Union[float, List[float], None] = flag(
        None, "matmul_proportion of the inference pipeline", type=float, nargs="+", min=0.0,
        max=1.0)
    inference_embedding_serialization_factor: Optional[int] = flag(
        None, "embedding_serialization_factor of the inference pipeline", type=int, min=1, max=256)

    def for_pod(self, pod: str) -> "IPUConfig":
        """Return a copy in which every by-pod dictionary is replaced by its value for `pod`.

        pod: a key of POD_IPUS. Raises UsageError for a dictionary that has neither this key nor a
        "default". Published files name no smaller pod than pod4 and mean their default for larger
        ones; pod1 and pod2 therefore use pod4's value.
        """
        values = {}
        for name, value in self.values().items():
            if isinstance(value, dict):
                key = "pod4" if POD_IPUS[pod] < 4 and pod not in value and "pod4" in value else pod
                if key not in value and "default" not in value:
                    raise UsageError(
                        f"{self.source(name)} has no value for {pod} and no default: add one, or "
                        f"choose a pod of {', '.join(value)}")
                values[name] = value.get(key, value.get("default"))
        if "replication_factor" in values and "replication_factor" not in self.sources:
            # The default is meant for replicas of 4 IPUs.
            values["replication_factor"] = min(values["replication_factor"],
                                               _replicas_of(pod, self.num_ipus()))
        # A file's shares are for the IPUs of its own layout, which the flag replaces.
        if (self.sources.get("layers_per_ipu") == "--layers_per_ipu"
                and self.sources.get("matmul_proportion") != "--matmul_proportion"
                and len(self.matmul_shares()) != self.num_ipus()):
            values["matmul_proportion"] = IPUConfig().matmul_proportion
        return replace(self, **values)

    def inference(self) -> "IPUConfig":
        """Return the inference pipeline's configuration: each `inference_X` that is set replaces X.

        The copy's `sources` name the `inference_X` that a value came from, for error messages.
        By-pod values must have been resolved (`for_pod`).

        Where inference has its own layout, two values follow from it unless they are set: the
        replicas share the IPUs that training uses (as in graphcore/examples,
        nlp/bert/pytorch/run_squad.py), and a matmul_proportion with one value for each training IPU
        is replaced by the default (as in optimum-graphcore, ipu_configuration.py).
        """
        twins = {name[len("inference_"):]: value for name, value in self.values().items()
                 if name.startswith("inference_") and value is not None}
        sources = {**self.sources, **{name: self.source("inference_" + name) for name in twins}}
        if "layers_per_ipu" in twins:  # a separate layout: the training layout's IPUs say nothing
            # of it, unless both only say "equal shares" (optimum-graphcore, ipu_configuration.py).
            shares = (twins["layers_per_ipu"] == [-1]
                      and self.ipus_per_replica != len(self.layers_per_ipu))
            twins.setdefault("ipus_per_replica", self.ipus_per_replica if shares else None)
            twins.update(embedding_ipu=0, head_ipu=None)
        config = replace(self, gradient_accumulation_steps=1, sources=sources, **twins)
        if "replication_factor" not in twins:
            config.replication_factor = max(
                1, self.replication_factor * reserved_ipus(self.num_ipus())
                // reserved_ipus(config.num_ipus()))
        if "matmul_proportion" not in twins and config.num_ipus() != self.num_ipus() and isinstance(
                self.matmul_proportion, list):
            config.matmul_proportion = IPUConfig().matmul_proportion
        return config

    def layout(self, num_layers: int) -> Layout:
        """Return the Layout of a model with `num_layers` encoder layers on one replica's IPUs.

        Raises UsageError if layers_per_ipu does not add up to `num_layers` or names a wrong IPU.
        """
        return make_layout(self.layers_per_ipu, num_layers, self.ipus_per_replica,
                           self.embedding_ipu, self.head_ipu, self.source)

    def num_ipus(self) -> int:
        """Return the number of IPUs of one replica."""
        return self.ipus_per_replica or len(self.layers_per_ipu)

    def matmul_shares(self) -> List[float]:
        """Return matmul_proportion as a list, where one number is repeated for each IPU."""
        shares = self.matmul_proportion
        shares = list(shares) if isinstance(shares, (list, tuple)) else [shares]
        return shares * self.num_ipus() if len(shares) == 1 else shares  # others are checked later

    def write(self, path: Union[str, Path]) -> None:
        """Write the file `path`, an ipu_config.json. Raises OSError."""
        write_json(path, dict(sorted(self.values().items())))


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline."""

    config: IPUConfig  # with every by-pod value resolved
    layout: Layout
    # Whether a micro-batch runs through all stages before the next one enters the first.
    sharded: bool = False


def training_pipeline(config: IPUConfig, num_layers: int, pod: str) -> Pipeline:
    """Return the training pipeline of a model with `num_layers` encoder layers on `pod`.

    Raises UsageError, which names the nearest setting that would work, if the layout does not add
    up, if the pod has too few IPUs, if matmul_proportion has a wrong number of values, or if
    gradient accumulation is too small for the number of pipeline stages.
    """
    config = training_config(config, pod)
    pipeline = Pipeline(config, config.layout(num_layers))
    stages, needed = len(pipeline.layout.stages()), pipeline.layout.min_gradient_accumulation()
    if config.gradient_accumulation_steps < needed:
        raise UsageError(
            f"{config.named('gradient_accumulation_steps')} is too small: training over {stages} "
            f"pipeline stages needs at least {needed}, one micro-batch for each forward and "
            "backward stage")
    _check_ipus(config, pod)
    return pipeline


def inference_pipeline(config: IPUConfig, num_layers: int, pod: str,
                       single_rows: bool = False) -> Pipeline:
    """Return the inference pipeline of a model with `num_layers` encoder layers on `pod`.

    A pipeline of several stages needs at least one device iteration for each of them. Raises
    UsageError for too few, and otherwise as `training_pipeline` does.

    single_rows: return the pipeline that answers a single row in the least time, on one replica. A
    row takes S steps through S stages with poptorch.ShardedExecution. Pipelined execution needs at
    least S rows a call, which take 2S - 1 steps. optimum-graphcore answers single questions in the
    same way (pipelines/__init__.py, get_poplar_executor).
    """
    if single_rows:
        config = replace(config, inference_replication_factor=1, inference_device_iterations=1)
    config = inference_config(config, pod)
    pipeline = Pipeline(config, config.layout(num_layers), sharded=single_rows)
    stages = len(pipeline.layout.stages())
    if not single_rows and stages > 1 and config.device_iterations < stages:
        raise UsageError(
            f"{config.named('device_iterations')} is too small: the inference pipeline has "
            f"{stages} stages; use at least {stages}")
    _check_ipus(config, pod)
    return pipeline


def training_config(config: IPUConfig, pod: str) -> IPUConfig:
    """Return the training pipeline's values on `pod`, with poprun's replicas if there are any."""
    return _of_launcher(config.for_pod(pod))


def inference_config(config: IPUConfig, pod: str) -> IPUConfig:
    """Return the inference pipeline's values on `pod`, with poprun's replicas if there are any.

    More replicas than the pod has IPUs for are only kept if a flag asks for them, and are refused
    later: a model that was trained on a larger pod answers on a smaller one.
    """
    training, here = config.for_pod(pod), processes.place()
    inference = training.inference()
    # poprun reserves its IPUs once, for replicas of one size (popdist.checkNumIpusPerReplica). If a
    # configuration's inference layout needs another size and the training layout has the right
    # one, inference uses the training layout. A layout given as a flag is kept, and refused later.
    layout = ("layers_per_ipu", "ipus_per_replica", "matmul_proportion")
    if (reserved_ipus(training.num_ipus()) == here.ipus_per_replica
            != reserved_ipus(inference.num_ipus())
            and not any(_is_flag(inference, name) for name in layout)):
        inference = replace(training, **{f"inference_{name}": None for name in layout}).inference()
    if not _is_flag(inference, "replication_factor"):
        most = min(inference.replication_factor, _replicas_of(pod, inference.num_ipus()))
        inference.replication_factor = most - most % here.count or most
    return _of_launcher(inference)


def _is_flag(inference: IPUConfig, name: str) -> bool:
    """Return whether the inference pipeline's value has the command line's flag for inference."""
    return inference.sources.get(name) == f"--inference_{name}"


def _of_launcher(config: IPUConfig) -> IPUConfig:
    """Under poprun, return `config` with --num-replicas as its replicas; otherwise unchanged.

    Raises UsageError if a flag contradicts poprun's number (graphcore/examples override the flag
    instead, nlp/bert/pytorch/args.py, init_popdist), which is one for all pipelines:
    popdist.poptorch.Options refuses to be told another (PopTorch, tests/popdist_test.py).
    """
    replicas, source = processes.place().replicas, config.sources.get("replication_factor", "")
    if replicas is None or replicas == config.replication_factor:
        return config
    if source in ("--replication_factor", "--inference_replication_factor"):
        raise UsageError(
            f"{source} {config.replication_factor}: poprun --num-replicas is "
            f"{replicas}; leave the flag out, or start poprun with the same number")
    return replace(config, replication_factor=replicas,
                   sources={**config.sources, "replication_factor": "poprun --num-replicas"})


def packed_accumulation(accumulation: int, windows_per_row: float, minimum: int = 1) -> int:
    """Return the gradient accumulation with which packed rows keep the windows of an update.

    accumulation: of unpacked rows. minimum: what fills the pipeline, 2 S - 1 for S stages.
    """
    return max(minimum, round(accumulation / windows_per_row))


def reserved_ipus(ipus: int) -> int:
    """Return how many IPUs are reserved for `ipus` IPUs: the next power of two."""
    return 1 << (ipus - 1).bit_length()


def _replicas_of(pod: str, ipus: int) -> int:
    """Return how many replicas of `ipus` IPUs fit in the pod, at least 1."""
    return max(1, POD_IPUS[pod] // reserved_ipus(ipus))


def pod_of(ipus: int) -> str:
    """Return the smallest pod that has `ipus` IPUs, or the largest one if none has so many."""
    return next((pod for pod in POD_IPUS if POD_IPUS[pod] >= ipus), max(POD_IPUS, key=POD_IPUS.get))


def _check_ipus(config: IPUConfig, pod: str) -> None:
    """Raise UsageError for replicas that the pod or the processes cannot hold.

    Each process gets the same number of whole replicas, of at most 64 IPUs
    (popart_compiler/source/CompilerImpl.cpp, assertSingleInstanceMaxNumIPUs). matmul_proportion has
    one value, or one for each IPU.
    """
    here, replicas = processes.place(), config.replication_factor
    replica, ipus = reserved_ipus(config.num_ipus()), POD_IPUS[pod]
    if replicas % here.count:
        raise UsageError(
            f"{config.named('replication_factor')} cannot be shared out over {here.count} "
            "processes: it is the number of all replicas, and has to be a multiple of "
            f"{here.count}")
    in_process = replica * replicas // here.count
    if here.count > 1 and in_process > IPUS_OF_A_HOST:
        raise UsageError(
            f"{config.named('replication_factor')} takes {in_ipus(in_process)} in each of "
            f"{here.count} processes, which is more than the {IPUS_OF_A_HOST} that a process can "
            f"have: start at least {here.count * -(-in_process // IPUS_OF_A_HOST)} processes")
    if here.ipus_per_replica not in (None, replica):
        raise UsageError(
            f"{config.named('layers_per_ipu')} takes {in_ipus(replica)}, poprun --ipus-per-replica "
            f"is {here.ipus_per_replica}: start poprun with the same number")
    if replica > ipus:
        raise UsageError(
            f"{config.named('layers_per_ipu')} takes {in_ipus(replica)}, {pod} has {ipus}: name no "
            f"more than that, as in {' '.join(['-1'] * ipus)} (equal shares), or a larger "
            f"--pod_type; python -m planner search --ipus {ipus} finds what fits")
    if replica * replicas > ipus:
        raise UsageError(
            f"{config.named('replication_factor')} takes {in_ipus(replica * replicas)}, {pod} has "
            f"{ipus}: use at most {_replicas_of(pod, config.num_ipus())}, or a larger --pod_type")
    if len(config.matmul_shares()) != config.num_ipus():
        raise UsageError(
            f"{config.named('matmul_proportion')} has {len(config.matmul_shares())} values: give "
            f"one, or one for each of a replica's IPUs, {config.num_ipus()}")


def check_offline(run: DeviceSettings, config: IPUConfig, pod: str) -> None:
    """Raise UsageError if --compile_only could not compile, or if nothing could use the result.

    popdist's options name the IPUs of a process (PopTorch, popdist_test.py), which an offline
    target refuses (popart_compiler, CompilerImpl.cpp, createDevice). Such a target has as many IPUs
    as the model needs, whereas a run reserves a power of two. The key of a cached executable
    contains that number (popart, devicemanager.cpp, std::hash<DeviceInfo>), and the run would
    compile again.
    """
    if not run.compile_only:
        return
    offline = run.source("compile_only")
    if processes.place().launcher == "poprun":
        raise UsageError(f"{offline}: under poprun nothing can be compiled ahead; leave out one of "
                         "the two")
    if config.executable_cache_dir in NO_CACHE and not run.profile_dir:
        raise UsageError(
            f"{offline} keeps nothing without a cache: name a folder with "
            f"{config.source('executable_cache_dir')}, or leave it out")
    for pipeline in (training_config(config, pod), inference_config(config, pod)):
        ipus = pipeline.num_ipus() * pipeline.replication_factor
        if ipus != reserved_ipus(ipus):
            raise UsageError(
                f"{offline}: {pipeline.named('layers_per_ipu')} takes "
                f"{in_ipus(pipeline.num_ipus())}, with replication {pipeline.replication_factor} "
                f"{ipus} in all, but a run reserves {reserved_ipus(ipus)} and would not find what "
                f"was compiled for {ipus}: use a power of two")


def read_ipu_config(name_or_path: str, source: Optional[str] = None) -> Source:
    """Return the IPUConfig fields of an ipu_config.json; their values are not checked here.

    name_or_path: a file, a folder that holds an ipu_config.json, or a repository on the hub.
    source: what error messages call the file; by default --ipu_config and its value.

    A null counts as not given, and `training_X` of optimum-graphcore as X. Unknown keys, which
    belong to other programs, are left out with a warning. So is a cache folder outside of the
    working directory: the file may be someone else's, and executables are read from there. Raises
    UsageError if the file cannot be found or is not a JSON object.
    """
    source = source or f"--ipu_config {name_or_path}"
    path = Path(name_or_path)
    path = path / IPU_CONFIG_NAME if path.is_dir() else path
    if not path.exists():
        path = _from_hub(name_or_path)
    values = {name[len("training_"):] if name.startswith("training_") else name: value
              for name, value in read_json_object(path, source).items() if value is not None}
    known = {f.name for f in fields(IPUConfig)} - {"sources"}
    unknown = sorted(set(values) - known - _OF_OTHERS)
    if unknown:
        log.warning("%s: not used here: %s", source, ", ".join(unknown))
    cache = Path(str(values.get("executable_cache_dir", "")))
    if cache.is_absolute() or ".." in cache.parts:
        log.warning("%s: executable_cache_dir %s is not used; if it is yours, give it with "
                    "--executable_cache_dir", name_or_path, cache)
        del values["executable_cache_dir"]
    return Source({name: value for name, value in values.items() if name in known}, source)


def available_pod(pod_type: Optional[str] = None) -> str:
    """Return the pod to run on: `pod_type` if given, else the pod with NUM_AVAILABLE_IPU IPUs.

    PopTorch hosts set this environment variable; unset, it counts as 4. Raises UsageError if no pod
    has that number of IPUs.
    """
    pods = {str(ipus): pod for pod, ipus in POD_IPUS.items()}
    available = os.environ.get("NUM_AVAILABLE_IPU") or "4"
    if pod_type is None and available not in pods:
        raise UsageError(f"NUM_AVAILABLE_IPU={available}: it should be one of {', '.join(pods)}")
    return pod_type or pods[available]


def _from_hub(name: str) -> Path:
    offline_unless_reachable()
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(name, IPU_CONFIG_NAME))
    # The hub fails in many ways: offline, no such repository, no such file, a malformed name.
    except Exception as error:
        raise UsageError(
            f"--ipu_config {name}: no such file or folder, and the hub did not give it "
            f"({hub_cause(error)}): name a local ipu_config.json or a folder that holds one")
