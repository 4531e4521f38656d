"""Makes the planner's Job from the settings of train.py: model, counts, pipeline and data."""
from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, List, Optional

from ipu_options.config import IPUConfig, training_pipeline
from ipu_options.errors import UsageError
from ipu_options.plan import calibrate
from ipu_options.plan.job import Job
from ipu_options.plan.machine import MACHINES
from ipu_options.plan.planner import Plan, make_plan
from qa.checks import check_row_length
from qa.data import demo
from qa.planning.flags import SHAPE, PlanSettings
from qa.settings import TrainSettings

# Sizes of well-known checkpoints, from their config.json on the hub. With these, planning such a
# checkpoint needs no network.
MODELS = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
# Mean number of real tokens of a window, and number of windows of an epoch, for SQuAD at length 384
# and stride 128. v1: as in the published run of roberta-base; v2: as in that of
# roberta-base-squad2.
REAL_TOKENS = {"squad": 181, "squad_v2": 181}
WINDOWS = {"squad": 88568, "squad_v2": 131823}
PACKING_EFFICIENCY = 0.97  # share of real tokens in the rows that best-fit decreasing packs


def make_job(settings: TrainSettings, ipu_config: IPUConfig, planning: PlanSettings) -> Job:
    """Return the job that train.py would run with these settings.

    Of the model, only its configuration is needed (see `planned_model`). Raises UsageError for a
    model or a pipeline that is not possible, RunError if the model's configuration cannot be
    loaded.
    """
    from qa.data.packing import packed_accumulation
    from qa.planning.counting import make_counter

    model_config = planned_model(settings, planning)
    check_row_length(settings, model_config)
    pipeline = training_pipeline(ipu_config, model_config.num_hidden_layers, settings.pod_type)
    packed = _packed_windows_per_row(settings, planning)
    windows_per_row = (packed or 1.0) if settings.pack else 1.0
    config = pipeline.config
    if settings.pack:
        least = pipeline.layout.min_gradient_accumulation()
        accumulation = packed_accumulation(config.gradient_accumulation_steps, windows_per_row,
                                           least)
        config = replace(config, gradient_accumulation_steps=accumulation)
    count = make_counter(model_config, max_seq_length=settings.max_seq_length,
                         windows_per_row=settings.row_capacity(), precision=settings.precision)
    blocks = tuple(count(settings.micro_batch_size, config.embedding_serialization_factor))
    return Job(blocks, pipeline.layout, config, MACHINES[planning.ipu], settings.micro_batch_size,
               settings.max_seq_length, settings.precision, windows_per_row,
               packed_windows_per_row=packed, train_windows=_train_windows(settings, planning),
               epochs=settings.num_train_epochs, count=count)


def planned(settings: TrainSettings, ipu_config: IPUConfig, planning: PlanSettings) -> Plan:
    """Return the plan of train.py's run with these settings.

    It is made with the user's calibration if there is one. Raises what `make_job` raises, and
    UsageError for a wrong calibration file.
    """
    return make_plan(make_job(settings, ipu_config, planning), calibrate.load(planning.calibration))


def published() -> List[calibrate.PublishedRun]:
    """Return the published runs with their blocks counted.

    A model that several runs have at the same length is counted once.
    """
    from transformers import RobertaConfig

    from qa.planning.counting import make_counter

    @lru_cache(maxsize=None)
    def counter(model: str, max_seq_length: int):
        return make_counter(RobertaConfig(**MODELS[model]), max_seq_length=max_seq_length)

    return calibrate.published_runs(lambda model, config, length, micro_batch_size: counter(
        model, length)(micro_batch_size, config.embedding_serialization_factor))


def planned_model(settings: TrainSettings, planning: PlanSettings) -> Any:
    """Return transformers' configuration of the model to plan.

    In this order: the model of --config_json, of the shape flags, of the demo, a well-known
    checkpoint (MODELS), or the checkpoint of --model_name_or_path, in a folder or on the hub.
    Raises UsageError for an unsuitable model, RunError if its configuration cannot be loaded.
    """
    from transformers import RobertaConfig

    shape = planning.shape()
    if planning.config_json is not None:
        return _config_from_json(planning.config_json, shape)
    if shape:
        return RobertaConfig(**{**MODELS["roberta-base"], **_derived(shape), **shape})
    if settings.demo_data:
        return RobertaConfig(**demo.MODEL)
    name = settings.model_name_or_path.split("/")[-1]
    if name in MODELS and not Path(settings.model_name_or_path).is_dir():
        return RobertaConfig(**MODELS[name])
    from qa.model.pretrained import load_config
    return load_config(settings, weights=False)


def planned_name(settings: TrainSettings, planning: PlanSettings) -> str:
    """Return what to call the planned job in a heading: its configuration and its model."""
    if planning.config_json:
        model = planning.config_json
    elif planning.shape():
        model = "a model of the given shape"
    else:
        model = "the demo's model" if settings.demo_data else settings.model_name_or_path
    return f"{settings.config}, {model}"


def _config_from_json(path: str, shape: dict) -> Any:
    from transformers import RobertaConfig
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [name for name in SHAPE if name not in values and name not in shape]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--config_json {path}: not a readable config.json ({error})") from error
    if missing:
        raise UsageError(
            f"--config_json {path}: has no {missing[0]}; name the config.json of a RoBERTa "
            "checkpoint")
    if ("roberta" not in values.get("model_type", "roberta") and
            values.get("model_type") != "camembert"):
        # BERT counts positions from 0, RoBERTa from padding_idx + 1 = 2.
        values.update(pad_token_id=1,
                      max_position_embeddings=values.get("max_position_embeddings", 512) + 2)
    return RobertaConfig(**{**values, **shape})


def _derived(shape: dict) -> dict:
    """Return the sizes that follow from the width in the usual proportions.

    Heads are 64 wide and feed-forward layers four times as wide as the model. Raises UsageError if
    the given width is not a multiple of the number of heads.
    """
    width = shape.get("hidden_size", 768)
    heads = shape.get("num_attention_heads") or next(
        n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
    if width % heads:
        raise UsageError(
            f"--hidden_size {width} is not a multiple of --num_attention_heads {heads}: "
            f"the nearest is {max(1, round(width / heads)) * heads}")
    return {"num_attention_heads": heads, "intermediate_size": 4 * width}


def _packed_windows_per_row(settings: TrainSettings, planning: PlanSettings) -> Optional[float]:
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


def _train_windows(settings: TrainSettings, planning: PlanSettings) -> Optional[int]:
    """Return the number of windows of an epoch; None if it is not known."""
    if planning.train_windows is not None:
        return planning.train_windows
    if settings.demo_data:
        return demo.TRAIN_QUESTIONS
    known = settings.train_file is None and settings.max_train_samples is None
    known = known and (settings.max_seq_length, settings.doc_stride) == (384, 128)
    return WINDOWS.get(settings.dataset_name) if known else None
