"""Makes the planner's Job from the settings of train.py: model, counts, pipeline and data."""
from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

from ipu_options.config import (
    IPUS_OF_A_HOST,
    POD_IPUS,
    IPUConfig,
    Pipeline,
    inference_pipeline,
    pod_of,
    reserved_ipus,
    training_pipeline,
)
from ipu_options.layout import in_ipus
from planner import calibrate
from planner.flags import MODELS, SHAPE, JobSettings
from planner.job import Job
from planner.machine import MACHINES
from planner.plan import Plan, make_plan
from planner.text import hosts_text, plan_dict
from qa.checks import check_row_length
from qa.data import demo
from qa.settings import TrainSettings
from runtime.errors import UsageError
from runtime.flags import Settings, check_field, flag

# Mean number of real tokens of a window, and number of windows of an epoch, for SQuAD at length 384
# and stride 128. v1: as in the published run of roberta-base; v2: as in that of
# roberta-base-squad2.
REAL_TOKENS = {"squad": 181, "squad_v2": 181}
WINDOWS = {"squad": 88568, "squad_v2": 131823}
# Windows of the validation questions, 10,570 and 11,873, of which some have long contexts.
EVAL_WINDOWS = {"squad": 10_800, "squad_v2": 12_200}
PACKING_EFFICIENCY = 0.97  # share of real tokens in the rows that best-fit decreasing packs


def make_job(settings: TrainSettings, ipu_config: IPUConfig, planning: JobSettings) -> Job:
    """Return the job that train.py would run with these settings.

    Of the model, only its configuration is needed (see `planned_model`). Raises UsageError for a
    model or a pipeline that is not possible, RunError if the model's configuration cannot be
    loaded.
    """
    layers = planned_model(settings, planning).num_hidden_layers
    pod = planned_pod(settings, ipu_config)
    job = _job(settings, planning, training_pipeline(ipu_config, layers, pod),
               settings.micro_batch_size)
    steps = settings.max_steps
    return replace(job, windows=_train_windows(settings, planning),
                   epochs=settings.num_train_epochs,
                   updates=None if steps is None else steps * job.config.device_iterations)


def make_inference_job(settings: TrainSettings, ipu_config: IPUConfig,
                       planning: JobSettings) -> Job:
    """Return the job of the pipeline with which train.py evaluates and infer.py answers.

    The arguments and exceptions are those of `make_job`.
    """
    layers = planned_model(settings, planning).num_hidden_layers
    pod = planned_pod(settings, ipu_config, inference=True)
    job = _job(settings, planning, inference_pipeline(ipu_config, layers, pod),
               settings.eval_micro_batch_size, training=False)
    return replace(job, windows=_eval_windows(settings, planning))


def planned(settings: TrainSettings, ipu_config: IPUConfig, planning: JobSettings,
            inference: bool = False) -> Plan:
    """Return the plan of train.py's run with these settings, or of its evaluation (`inference`).

    It is made with the user's calibration if there is one. Raises what `make_job` raises, and
    UsageError for a wrong calibration file.
    """
    job = (make_inference_job if inference else make_job)(settings, ipu_config, planning)
    return make_plan(job, calibrate.load(planning.calibration))


def described(plan: Plan, settings: TrainSettings, planning: JobSettings) -> Dict[str, Any]:
    """Return a plan as a dictionary for JSON, with the configuration and the model it is of."""
    from qa.model.families import family_of

    model = planned_model(settings, planning)
    own_names = family_of(model).own_names
    return {"title": planned_name(settings, planning), "config": settings.config,
            "model_name_or_path": None if planning.shape() or planning.config_json
            else settings.model_name_or_path,
            "model": {name: getattr(model, own_names.get(name, name)) for name in SHAPE},
            "pod_type": pod_of(plan.job.ipus), **plan_dict(plan)}


def pod_note(settings: TrainSettings, job: Job) -> Optional[str]:
    """Return a sentence on the pod that the job takes, if a run with these flags has a smaller one.

    A plan books nothing, so that it takes what its flags need unless they name a pod.
    """
    pod = pod_of(job.ipus)
    if job.ipus > IPUS_OF_A_HOST:
        return (f"That takes {pod} and several hosts; a run needs --pod_type {pod} as well.\n"
                f"{hosts_text(job)}")
    if job.ipus <= POD_IPUS[settings.pod_type]:
        return None
    here = os.environ.get("NUM_AVAILABLE_IPU") and "pod_type" not in settings.sources
    if here and reserved_ipus(job.config.num_ipus()) > POD_IPUS[settings.pod_type]:
        return (f"That takes {in_ipus(job.ipus)}, and NUM_AVAILABLE_IPU is "
                f"{POD_IPUS[settings.pod_type]}: `python -m planner search` with these flags "
                "finds what fits there.")
    return (f"That takes {pod}: a run needs --pod_type {pod} --replication_factor "
            f"{job.config.replication_factor} as well.")


def planned_pod(settings: TrainSettings, ipu_config: IPUConfig, inference: bool = False) -> str:
    """Return the pod to plan on: --pod_type if given, else one that is large enough.

    A plan books nothing. It takes the smallest pod, from the one that a run would take, with whose
    by-pod values the training or inference pipeline has enough IPUs. If there is none, because the
    replicas grow with the pod, it takes the smallest pod with the IPUs of one replica.
    """
    pods = [pod for pod in POD_IPUS if POD_IPUS[pod] >= POD_IPUS[settings.pod_type]]
    if "pod_type" in settings.sources:
        return settings.pod_type
    for pod in pods:
        config = ipu_config.for_pod(pod)
        config = config.inference() if inference else config
        replica = reserved_ipus(config.num_ipus())
        if config.replication_factor * replica <= POD_IPUS[pod]:
            return pod
    return pod_of(replica)


def _job(settings: TrainSettings, planning: JobSettings, pipeline: Pipeline,
         micro_batch_size: int, training: bool = True) -> Job:
    """Return the job of a checked pipeline, without its windows."""
    from planner.counting import make_counter
    from qa.model.families import most_tokens

    model_config = planned_model(settings, planning)
    check_row_length(settings, most_tokens(model_config))
    packed = _packed_windows_per_row(settings, planning)
    if settings.pack and packed is None:
        raise UsageError(
            f"{settings.source('pack')}: how many windows share a row of your own data is not "
            "known before it is read: give --windows_per_row (a run prints it)")
    config = pipeline.config
    if config.embedding_serialization_factor > model_config.vocab_size:
        raise UsageError(
            f"{config.source('embedding_serialization_factor')} "
            f"{config.embedding_serialization_factor} is more than the model's "
            f"{model_config.vocab_size} words")
    count = make_counter(model_config, max_seq_length=settings.max_seq_length,
                         windows_per_row=settings.row_capacity(), precision=settings.precision,
                         training=training)
    blocks = tuple(count(micro_batch_size, config.embedding_serialization_factor))
    return Job(blocks, pipeline.layout, config, MACHINES[planning.ipu], micro_batch_size,
               settings.max_seq_length, settings.precision, training,
               windows_per_row=packed if settings.pack else 1.0, packed_windows_per_row=packed,
               count=count)


def published(path: Path = calibrate.PUBLISHED) -> List[calibrate.PublishedRun]:
    """Return the published runs of a file with their blocks counted.

    A model that several runs have at the same length is counted once.
    """
    from planner.counting import make_counter

    @lru_cache(maxsize=None)
    def counter(sizes: str, max_seq_length: int, training: bool):
        return make_counter(_configuration(json.loads(sizes)), max_seq_length=max_seq_length,
                            training=training)

    def count(run):
        config = run["ipu_config"]
        sizes = _published_model(run["model"], pretraining=config.get("head_ipu") == 0)
        of = counter(json.dumps(sizes, sort_keys=True), run["max_seq_length"],
                     run.get("phase") != "inference")
        return of(run["micro_batch_size"], config.get("embedding_serialization_factor", 1),
                  "att_ffn_placement" in run)

    return calibrate.published_runs(count, path)


def _published_model(model: Any, pretraining: bool) -> dict:
    """Return the sizes of a published run's model: a name in MODELS, or sizes with or without one.

    Attention dropout is 0 in graphcore/examples' pretraining (nlp/bert, "no_attn_dropout" and
    attention_probs_dropout_prob).
    """
    sizes = {"base": model} if isinstance(model, str) else dict(model)
    sizes = {**MODELS.get(sizes.pop("base", None), {}), **sizes}
    if pretraining:
        sizes.setdefault("attention_probs_dropout_prob", 0.0)
    return {"model_type": "roberta", **sizes}


def planned_model(settings: TrainSettings, planning: JobSettings) -> Any:
    """Return transformers' configuration of the model to plan.

    In this order: the model of --config_json, of the shape flags, of the demo, a well-known
    checkpoint (MODELS), or the checkpoint of --model_name_or_path, in a folder or on the hub.
    Raises UsageError for an unsuitable model, RunError if its configuration cannot be loaded.
    """
    from transformers import RobertaConfig

    shape = planning.shape()
    if planning.config_json is not None:
        return _configuration(_from_json(planning.config_json, shape))
    if shape:
        sizes = {**MODELS["roberta-base"], **shape}
        heads, width = _heads(shape), sizes["hidden_size"]
        _check_heads("--hidden_size", width, heads)
        return RobertaConfig(**{**sizes, "num_attention_heads": heads,
                                "intermediate_size": shape.get("intermediate_size", 4 * width)})
    if settings.demo_data:
        return RobertaConfig(**demo.MODEL)
    if not planning.needs_checkpoint(settings):
        return _configuration(MODELS[settings.model_name_or_path.split("/")[-1]])
    from qa.model.pretrained import load_config
    return load_config(settings, weights=False)


def planned_name(settings: TrainSettings, planning: JobSettings) -> str:
    """Return what to call the planned job in a heading: its configuration and its model."""
    if planning.config_json:
        model = planning.config_json
    elif planning.shape():
        model = "a model of the given shape"
    else:
        model = "the demo's model" if settings.demo_data else settings.model_name_or_path
    return f"{settings.config}, {model}"


def _from_json(path: str, shape: dict) -> dict:
    """Return the values of --config_json, changed by the shape flags.

    Raises UsageError unless they are those of a model of a family that is built here.
    """
    from qa.model.families import family_of
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--config_json {path}: not a readable config.json ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config_json {path}: holds a {type(values).__name__}, it should be a "
                         "JSON object")
    values.setdefault("model_type", "roberta")
    own_names = family_of(SimpleNamespace(**values), f"--config_json {path}").own_names
    values = {**{name: values[own] for name, own in own_names.items() if own in values}, **values}
    for name in SHAPE:
        if name not in values and name not in shape:
            raise UsageError(f"--config_json {path}: has no {own_names.get(name, name)}; name the "
                             "config.json of a checkpoint")
    for name in (*SHAPE, "max_position_embeddings", "type_vocab_size", "pad_token_id"):
        if name in values:
            check_field(JobSettings if name in SHAPE else _OtherSizes, name, values[name],
                        f"--config_json {path}: {own_names.get(name, name)}")
    sizes = {name: value for name, value in {**values, **shape}.items()
             if name not in own_names.values()}
    _check_heads(f"--config_json {path}: hidden_size", sizes["hidden_size"],
                 sizes["num_attention_heads"])
    return sizes


@dataclass
class _OtherSizes(Settings):
    """Bounds of the sizes in a config.json that have no flag."""

    max_position_embeddings: int = flag(514, "", min=1, max=1_000_000)
    type_vocab_size: int = flag(1, "", min=1, max=1_000_000)
    pad_token_id: int = flag(1, "", min=0, max=1_000_000)


def _configuration(values: dict) -> Any:
    """Return transformers' configuration with these values, among them a model_type."""
    from transformers import AutoConfig

    from qa.model.families import family_of
    names = family_of(SimpleNamespace(**values)).own_names
    return AutoConfig.for_model(**{names.get(name, name): value for name, value in values.items()})


def _heads(shape: dict) -> int:
    """Return the number of attention heads of a model of that shape: by default 64 wide ones."""
    width = shape.get("hidden_size", 768)
    return shape.get("num_attention_heads") or next(
        n for n in range(max(1, width // 64), 0, -1) if width % n == 0)


def _check_heads(source: str, width: int, heads: int) -> None:
    """Raise UsageError, which names `source`, unless the width is a multiple of the heads."""
    if width % heads:
        raise UsageError(
            f"{source} {width} is not a multiple of the {heads} attention heads: "
            f"the nearest is {max(1, round(width / heads)) * heads}")


def _packed_windows_per_row(settings: TrainSettings, planning: JobSettings) -> Optional[float]:
    """Return the mean number of windows in a packed row; None if it is not known.

    It is --windows_per_row if given, else estimated from the mean number of real tokens of a window
    for a known data set.
    """
    if planning.windows_per_row is not None:
        if planning.windows_per_row > settings.max_windows_per_row:
            raise UsageError(
                f"--windows_per_row {planning.windows_per_row:g}: it should be between 1 and "
                f"--max_windows_per_row, which is {settings.max_windows_per_row}")
        return planning.windows_per_row
    if settings.demo_data:
        tokens = demo.MEAN_TOKENS
    else:
        tokens = REAL_TOKENS.get(settings.dataset_name) if settings.train_file is None else None
    if tokens is None:
        return None
    return max(1.0, min(PACKING_EFFICIENCY * settings.max_seq_length / tokens,
                        float(settings.max_windows_per_row)))


def _train_windows(settings: TrainSettings, planning: JobSettings) -> Optional[int]:
    """Return the number of windows of an epoch; None if it is not known."""
    if planning.train_windows is not None:
        return planning.train_windows
    if settings.max_train_samples is not None:
        return None
    return demo.TRAIN_QUESTIONS if settings.demo_data else _known(WINDOWS, settings)


def _eval_windows(settings: TrainSettings, planning: JobSettings) -> Optional[int]:
    """Return the number of windows that an evaluation answers; None if it is not known."""
    if planning.eval_windows is not None:
        return planning.eval_windows
    if settings.max_eval_samples is not None:
        return None
    return demo.VALIDATION_QUESTIONS if settings.demo_data else _known(EVAL_WINDOWS, settings)


def _known(windows: Dict[str, int], settings: TrainSettings) -> Optional[int]:
    """Return the entry of `windows` for the data set; None for one's own files or other windows."""
    if settings.train_file is not None:
        return None
    if (settings.max_seq_length, settings.doc_stride) != (384, 128):
        return None
    return windows.get(settings.dataset_name)
