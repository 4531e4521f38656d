"""From train.py's settings to a plan: which model, counted how, on which pipeline."""
from __future__ import annotations

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional, Tuple

from ipu_options.config import IPUConfig, available_pod, training_pipeline
from ipu_options.errors import UsageError
from ipu_options.plan.flags import SHAPE
from ipu_options.plan.job import Job
from ipu_options.plan.machine import MACHINES
from ipu_options.plan.planner import Plan, make_plan
from qa.settings import TrainSettings, check_row_length

# Shapes of well-known checkpoints (their config.json on the hub), so that planning them needs no network.
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 50265}
LARGE = {**BASE, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SHAPES = {"roberta-base": BASE, "roberta-large": LARGE, "distilroberta-base": {**BASE, "num_hidden_layers": 6},
          "xlm-roberta-base": {**BASE, "vocab_size": 250002}, "xlm-roberta-large": {**LARGE, "vocab_size": 250002},
          "camembert-base": {**BASE, "vocab_size": 32005}}
DEMO_SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 2000}
# Mean real tokens of a window, and windows of an epoch: SQuAD at length 384 and stride 128, v1 as in the published run of
# roberta-base, v2 as in that of roberta-base-squad2; the demo's as qa/demo.py writes them.
REAL_TOKENS = {"squad": 181, "squad_v2": 181}
WINDOWS = {"squad": 88568, "squad_v2": 131823}
DEMO_TOKENS, DEMO_WINDOWS = 62, 8000
PACKING_EFFICIENCY = 0.97  # share of a packed row's tokens that are real, by best-fit decreasing


def make_job(s: TrainSettings, ipu_config: IPUConfig, given: argparse.Namespace) -> Job:
    """The job that train.py would run with these settings. given: the planner's flags (ipu_options/plan/flags.py).

    Needs a model's configuration at most: --config_json, the shape flags, a checkpoint's folder, or a well-known name.
    Raises UsageError for a model or a layout that cannot be.
    """
    from qa.counting import make_counter
    from qa.rows import packed_accumulation

    config = model_config(s, given)
    check_row_length(s, config)
    pipeline = training_pipeline(ipu_config, config.num_hidden_layers, available_pod(s.pod_type))
    packed = _packed_windows_per_row(s, given)
    room = s.max_windows_per_row if s.pack else 1
    ipu, windows_per_row = pipeline.config, 1.0
    if s.pack:
        windows_per_row = packed or 1.0
        least = pipeline.layout.min_gradient_accumulation()
        accumulation = packed_accumulation(ipu.gradient_accumulation_steps, windows_per_row, least)
        ipu = IPUConfig(**{**vars(ipu), "gradient_accumulation_steps": accumulation})
    count = make_counter(config, max_seq_length=s.max_seq_length, windows_per_row=room, precision=s.precision)
    return Job(tuple(count(s.micro_batch_size, ipu.embedding_serialization_factor)), pipeline.layout, ipu,
               MACHINES[getattr(given, "ipu", None) or "mk2"], s.micro_batch_size, s.max_seq_length, s.precision, windows_per_row,
               packed_windows_per_row=packed, train_windows=_train_windows(s, given), epochs=s.num_train_epochs, count=count)


def planned(s: TrainSettings, ipu_config: IPUConfig, given: argparse.Namespace) -> Plan:
    """The plan of train.py's run with these settings, with the user's calibration where there is one."""
    from ipu_options.plan.calibrate import load
    return make_plan(make_job(s, ipu_config, given), load(getattr(given, "calibration", None)))


def show_plan(s: TrainSettings, ipu_config: IPUConfig, given: argparse.Namespace) -> int:
    """Print the plan of train.py's run with these settings, and draw or write what the planner's flags in `given` ask for."""
    from ipu_options.plan.calibrate import fit_table
    from ipu_options.plan.text import fit_text, plan_text

    made = planned(s, ipu_config, given)
    if getattr(given, "json", False):
        print(json.dumps(made.to_dict(), indent=2))
    else:
        print(plan_text(made, f"{s.config}, {model_name(s, given)}"))
    if getattr(given, "fit", False) and not getattr(given, "json", False):
        print("\n" + fit_text(fit_table(published(), made.efficiencies), made.efficiencies))
    if getattr(given, "plot", None):
        from ipu_options.plan.draw import draw_plan
        draw_plan(made, given.plot, f"{s.config}, {model_name(s, given)}")
    if s.trace:
        from ipu_options.plan.draw import write_timeline
        write_timeline(made, s.trace)
    return 0


def published() -> list:
    """The published runs, counted; models that appear several times are counted once."""
    from transformers import RobertaConfig

    from ipu_options.plan.calibrate import published_runs
    from qa.counting import make_counter

    @lru_cache(maxsize=None)
    def counter(shape: Tuple, max_seq_length: int):
        return make_counter(RobertaConfig(**dict(shape)), max_seq_length=max_seq_length)

    return published_runs(lambda shape, config, length, micro_batch_size:
                          counter(tuple(shape.items()), length)(micro_batch_size, config.embedding_serialization_factor))


def model_config(s: TrainSettings, given: argparse.Namespace) -> Any:
    """transformers' configuration of the model to plan."""
    from transformers import RobertaConfig

    path = getattr(given, "config_json", None)
    shape = {name: getattr(given, name) for name in SHAPE if hasattr(given, name)}
    if path is not None:
        return _config_from_json(path, shape)
    if shape:
        return RobertaConfig(**_positions({**BASE, **_derived(shape), **shape}))
    if s.demo_data:
        return RobertaConfig(**_positions(DEMO_SHAPE), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    folder = Path(s.model_name_or_path)
    name = s.model_name_or_path.split("/")[-1]
    if not folder.is_dir() and name in SHAPES:
        return RobertaConfig(**_positions(SHAPES[name]))
    from qa.model import load_config
    return load_config(s.model_name_or_path, s.hub_token)


def model_name(s: TrainSettings, given: argparse.Namespace) -> str:
    """What to call the planned model in a heading."""
    if getattr(given, "config_json", None):
        return given.config_json
    if any(hasattr(given, name) for name in SHAPE):
        return "a model of the given shape"
    return "the demo's model" if s.demo_data else s.model_name_or_path


def _config_from_json(path: str, shape: dict) -> Any:
    from transformers import RobertaConfig
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [name for name in SHAPE if name not in values and name not in shape]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--config_json {path}: not a readable config.json ({error})")
    if missing:
        raise UsageError(f"--config_json {path}: has no {missing[0]}; name the config.json of a RoBERTa checkpoint")
    if "roberta" not in values.get("model_type", "roberta") and values.get("model_type") != "camembert":
        values.update(pad_token_id=1, max_position_embeddings=values.get("max_position_embeddings", 512) + 2)  # BERT counts from 0
    return RobertaConfig(**{**values, **shape})


def _derived(shape: dict) -> dict:
    """The usual proportions for what is not given: 64 wide heads, an inner layer four times as wide."""
    width = shape.get("hidden_size", 768)
    heads = shape.get("num_attention_heads")
    if heads is None:
        heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
    if heads > 0 and width % heads:
        raise UsageError(f"--hidden_size {width} is not a multiple of --num_attention_heads {heads}: the nearest is "
                         f"{max(1, round(width / heads)) * heads}")
    return {"num_attention_heads": heads, "intermediate_size": 4 * width}


def _positions(shape: dict) -> dict:
    for name, value in shape.items():
        if value < 1:
            raise UsageError(f"--{name} {value}: it should be at least 1")
    return {**shape, "max_position_embeddings": 514, "type_vocab_size": 1}


def _packed_windows_per_row(s: TrainSettings, given: argparse.Namespace) -> Optional[float]:
    """Windows of a packed row: as given, or estimated from the mean real length where the data set is known."""
    if getattr(given, "windows_per_row", None) is not None:
        if not 1 <= given.windows_per_row <= s.max_windows_per_row:
            raise UsageError(f"--windows_per_row {given.windows_per_row:g}: it should be between 1 and --max_windows_per_row, "
                             f"which is {s.max_windows_per_row}")
        return given.windows_per_row
    tokens = DEMO_TOKENS if s.demo_data else REAL_TOKENS.get(s.dataset_name) if s.train_file is None else None
    if tokens is None:
        return None
    return max(1.0, min(PACKING_EFFICIENCY * s.max_seq_length / tokens, float(s.max_windows_per_row)))


def _train_windows(s: TrainSettings, given: argparse.Namespace) -> Optional[int]:
    if getattr(given, "train_windows", None) is not None:
        return given.train_windows
    if s.demo_data:
        return DEMO_WINDOWS
    known = s.train_file is None and s.max_train_samples is None and (s.max_seq_length, s.doc_stride) == (384, 128)
    return WINDOWS.get(s.dataset_name) if known else None
