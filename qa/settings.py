"""The settings of train.py and infer.py, read and checked before any work starts.

Later sources win: a field's default; the named configuration (YAML, `--config`) or the checkpoint's
own files; `--ipu_config`; the flags. Without torch, `--help` takes a fraction of a second.
"""
from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
import socket
import sys
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml

from ipu_options.config import (
    IPU_CONFIG_NAME,
    IPUS_OF_A_HOST,
    POD_IPUS,
    DeviceSettings,
    IPUConfig,
    available_pod,
    check_offline,
    read_ipu_config,
)
from qa.families import check_config, most_tokens
from runtime import processes
from runtime.errors import UsageError
from runtime.files import read_json_object
from runtime.flags import Parser, Settings, Source, add_flags, did_you_mean, flag, make_settings
from runtime.hub import checkpoint_folder

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).parent / "configs"
DEFAULT_CONFIG = "squad_base_384"
QA_SETTINGS_NAME = "qa_settings.json"
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
# The settings that a resumed run must share with the run that it continues, besides those of its
# data and its batches.
MUST_MATCH = ("learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay",
              "optimizer", "adam_beta1", "adam_beta2", "adam_epsilon", "loss_scaling", "precision",
              "max_grad_norm")
# The settings that qa_settings.json keeps beside a checkpoint, for answering questions with it.
QA_SETTINGS = ("max_seq_length", "doc_stride", "max_windows_per_row", "max_answer_length",
               "version_2_with_negative", "null_score_diff_threshold", "precision",
               "eval_micro_batch_size")
# (setting, another that it excludes, why)
EXCLUDES = (
    ("compile_only", "synthetic_data", "what is only compiled runs on no data"),
    ("compile_only", "ipu_model", "there is no offline target for the IPU Model"),
    ("synthetic_data", "resume_from_checkpoint", "such a run is only timed"),
    ("compile_only", "push_to_hub", "nothing is trained"),
    ("synthetic_data", "push_to_hub", "nothing is trained"),
    ("demo_data", "train_file", "the demo makes its own questions"),
    ("demo_data", "validation_file", "the demo makes its own questions"),
    ("demo_data", "dataset_name", "the demo makes its own questions"),
    ("demo_data", "model_name_or_path", "the demo makes its own model"),
    ("context", "context_file", "there is one text"),
    ("question", "input_file", "there is one source of questions"),
    ("web", "question", "the page asks for it"), ("web", "input_file", "the page asks for it"))
# {flag: the others without one of which it does nothing}
NEEDS = {
    "output_file": ("input_file",), "question": ("context", "context_file"),
    "hub_model_id": ("push_to_hub",), "hub_private_repo": ("push_to_hub",), "host": ("web",),
    "port": ("web",), "save_total_limit": ("save_steps", "load_best_model_at_end"),
    "metric_for_best_model": ("load_best_model_at_end",),
    "null_score_diff_threshold": ("version_2_with_negative",)}
INPUT_FILES = ("train_file", "validation_file", "test_file", "input_file", "context_file")
OUTPUT_FILES = ("output_file", "trace")
# Files that a checkpoint consists of, over which nothing else may be written.
_OF_A_CHECKPOINT = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
# Above this a learning rate is a mistake: fine-tuning takes 1e-5 to 1e-4 (Devlin et al. 2019,
# appendix A.3; Liu et al. 2019, table 10), and even LAMB's largest batches less (You et al. 2020).
LARGEST_RATE = 0.01
# {script: {what does the work here: flags of run_qa.py, Trainer and optimum-graphcore}}
HINTS = json.loads(Path(__file__).with_name("hints.json").read_text(encoding="utf-8"))


@dataclass
class ModelSettings(Settings):
    """Which model, and how its answers are read off."""

    model_name_or_path: str = flag(
        "roberta-base", "checkpoint of a RoBERTa, XLM-RoBERTa, CamemBERT, BERT, DistilBERT, "
        "ELECTRA or DeBERTa: a local folder or a name on the hub")
    model_revision: str = flag("main", "branch, tag or commit of a checkpoint on the hub")
    tokenizer_name: Optional[str] = flag(None, "tokenizer (default: the checkpoint's own)")
    precision: str = flag(
        "float16",
        "type of weights and activations; a host without IPU computes float16 models in float32",
        choices=("float16", "float32"))
    max_seq_length: int = flag(384, "tokens of a row", min=16, max=4096)
    doc_stride: int = flag(128, "tokens by which the windows of a long context overlap", min=0)
    pack: bool = flag(False, "put several windows in one row")
    max_windows_per_row: int = flag(8, "maximum number of windows in a packed row", min=1, max=64)
    n_best_size: int = flag(20, "answers kept for each question", min=1, max=1000)
    max_answer_length: int = flag(30, "maximum number of tokens in an answer", min=1)
    version_2_with_negative: bool = flag(
        False, "some questions have no answer in their context (SQuAD v2)")
    null_score_diff_threshold: float = flag(
        0.0, "give no answer if its score exceeds the best answer's by more than this")
    preprocessing_num_workers: Optional[int] = flag(
        None, "processes that make windows", type=int, min=1, max=256)
    overwrite_cache: bool = flag(False, "make the windows again even if they are cached")
    on_bad_row: str = flag(
        "refuse", "malformed questions: refuse the whole data set, or skip and count them",
        choices=("refuse", "skip"))

    def row_capacity(self) -> int:
        """Return how many windows a row can hold: max_windows_per_row with packing, else 1."""
        return self.max_windows_per_row if self.pack else 1


@dataclass
class DataSettings(Settings):
    """Which questions to train on and to evaluate."""

    dataset_name: str = flag(
        "squad", "data set on the hub with SQuAD's columns id, context, question, answers")
    dataset_config_name: Optional[str] = flag(None, "configuration of that data set")
    train_file: Optional[str] = flag(
        None, "file of training questions: SQuAD's nested JSON, JSON Lines, CSV or Parquet")
    validation_file: Optional[str] = flag(
        None, "file of validation questions, in any of the same formats")
    test_file: Optional[str] = flag(
        None, "file of questions that the final model answers too; answers are not needed")
    cache_dir: Optional[str] = flag(
        None, "folder for what is downloaded and for data sets (default: those of huggingface_hub "
        "and datasets)")
    demo_data: bool = flag(
        False, "write a small data set and an untrained model to output_dir/demo_data and use them")
    max_train_samples: Optional[int] = flag(
        None, "use only the first N training questions", type=int, min=1)
    max_eval_samples: Optional[int] = flag(
        None, "use only the first N validation questions", type=int, min=1)
    show_examples: int = flag(0, "print N random examples of the training data", min=0)


@dataclass
class FineTuningSettings(Settings):
    """The fine-tuning run."""

    output_dir: Optional[str] = flag(
        None, "folder for all that the run writes (default: output/ and the configuration's name)")
    overwrite_output_dir: bool = flag(
        False, "start over in a folder that holds checkpoints or a finished model")
    do_train: Optional[bool] = flag(
        None, "train; without --do_eval only that (default: both)", type=bool)
    do_eval: Optional[bool] = flag(
        None, "evaluate; without --do_train only that (default: both)", type=bool)
    micro_batch_size: int = flag(1, "rows that a pipeline stage computes at once", min=1, max=4096,
                                 aliases=("per_device_train_batch_size",))
    eval_micro_batch_size: int = flag(1, "micro_batch_size in evaluation", min=1, max=4096,
                                      aliases=("per_device_eval_batch_size",))
    num_train_epochs: float = flag(3.0, "passes over the training windows", above=0,
                                   max=1_000_000)
    max_steps: Optional[int] = flag(
        None, "end after N steps (calls of the device), whatever num_train_epochs is", type=int,
        min=1, max=10 ** 9)
    learning_rate: float = flag(2e-5, "peak learning rate", above=0)
    lr_scheduler_type: str = flag("linear", "learning-rate schedule", choices=SCHEDULES)
    warmup_ratio: float = flag(
        0.25, "share of the run in which the learning rate rises to its peak", min=0, max=1)
    warmup_steps: Optional[int] = flag(
        None, "steps in which it does so (default: warmup_ratio of the run)", type=int, min=0,
        max=10 ** 9)
    weight_decay: float = flag(
        0.01, "decoupled weight decay of matrices (biases and LayerNorm have none)", min=0,
        max=100)
    optimizer: str = flag("adamw", "optimizer", choices=("adamw", "lamb"))
    adam_beta1: float = flag(0.9, "decay of the first moment", min=0, below=1)
    adam_beta2: float = flag(0.999, "decay of the second moment", min=0, below=1)
    adam_epsilon: float = flag(
        1e-8, "term added to the denominator, which keeps the update finite", min=1e-30)
    max_grad_norm: Optional[float] = flag(
        None, "clip the gradient of an update to this norm (default: it is not clipped; 1 is "
        "run_qa's default)", type=float, above=0)
    loss_scaling: float = flag(
        64.0, "factor on the loss that prevents underflow of float16 gradients; less so with "
        "enable_half_first_order_momentum, with which they are divided by it in float16", above=0)
    on_nonfinite: str = flag(
        "stop", "if a loss or gradient is not finite: stop, or go back to the last checkpoint and "
        "skip the step", choices=("stop", "skip"))
    watch_gradients: Optional[bool] = flag(
        None, "also check the gradients of each step, by that of one LayerNorm, which an IPU has "
        "to return to the host (default: only where no IPU is used)", type=bool)
    seed: int = flag(42, "seed of data order, initial weights and dropout", min=0, max=2 ** 32 - 1)
    logging_steps: int = flag(20, "steps between two log lines", min=1)
    report_to: List[str] = flag(
        ["none"], "who gets the numbers of log.jsonl too, in the output folder: tensorboard, wandb",
        type=str, nargs="+", choices=("tensorboard", "wandb", "none"))
    save_steps: Optional[int] = flag(
        None, "steps between two checkpoints (default: only the final model)", type=int, min=1)
    save_total_limit: int = flag(2, "number of checkpoints to keep", min=1)
    resume_from_checkpoint: Optional[str] = flag(
        None, "checkpoint folder to continue from, or auto: the newest complete one, if any")
    evaluate_every_epoch: bool = flag(False, "evaluate after each epoch, not only at the end")
    eval_steps: Optional[int] = flag(
        None, "steps between two evaluations (default: only one at the end)", type=int, min=1)
    load_best_model_at_end: bool = flag(
        False, "keep the model of the best evaluation in place of the last")
    metric_for_best_model: str = flag(
        "f1", "metric that decides which is best", choices=("f1", "exact_match"))
    show_predictions: int = flag(
        5, "print N validation questions with predicted and true answers", min=0)
    dataloader_num_workers: int = flag(
        0, "processes that make rows, in addition to the asynchronous loader's own", min=0, max=256)
    push_to_hub: bool = flag(False, "upload the final model with a generated model card")
    hub_model_id: Optional[str] = flag(
        None, "repository to upload to (default: the output folder's name)")
    hub_private_repo: bool = flag(False, "create that repository as private")


@dataclass
class RunSettings(DeviceSettings):
    """How and where it runs."""

    hub_token: Optional[str] = flag(
        None, "access token of the hub (default: the one that huggingface_hub has stored)",
        aliases=("token",))
    debug: bool = flag(False, "show the traceback of an error")


@dataclass
class QuestionSettings(Settings):
    """Which questions infer.py answers."""

    checkpoint: Optional[str] = flag(None, "fine-tuned model: a local folder or a name on the hub")
    question: Optional[str] = flag(None, "one question, with --context or --context_file")
    context: Optional[str] = flag(None, "the text to find the answer in")
    context_file: Optional[str] = flag(None, "file with the text to find the answer in")
    input_file: Optional[str] = flag(
        None, "file of questions in any format that train.py reads; answers are not needed")
    output_file: Optional[str] = flag(
        None, "write the answers to this file, one JSON object per line (default: print them)")
    n_best: int = flag(1, "answers shown for each question", min=1, max=1000)
    json: bool = flag(False, "print one JSON object per question")
    web: bool = flag(False, "answer on a page and to programs, on this machine alone")
    host: str = flag("127.0.0.1", "address that the page is served on; 0.0.0.0 is every one, for "
                     "whoever can reach this machine")
    port: int = flag(8050, "port of the page; 0 is any that is free", min=0, max=65535)
    eval_micro_batch_size: int = flag(
        1, "rows of --input_file that a pipeline stage computes at once", min=1, max=4096)


@dataclass
class TrainSettings(FineTuningSettings, DataSettings, ModelSettings, RunSettings):
    """All settings of train.py."""

    config: str = DEFAULT_CONFIG  # the name of the configuration, the YAML file's stem

    @property
    def needs_hub(self) -> bool:
        """Whether something may have to be fetched from the hub or sent there."""
        models = [self.model_name_or_path, self.tokenizer_name or self.model_name_or_path]
        local_model = self.demo_data or all(Path(name).is_dir() for name in models)
        return self.push_to_hub or not local_model or not (
            self.demo_data or self.train_file or self.validation_file)

    @property
    def trains(self) -> bool:
        """Whether the run trains: without --do_train, if it is not for evaluating only."""
        return not self.do_eval if self.do_train is None else self.do_train

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates: without --do_eval, if it is not for training only."""
        return not self.do_train if self.do_eval is None else self.do_eval


@dataclass
class InferSettings(QuestionSettings, ModelSettings, RunSettings):
    """All settings of infer.py."""


def parse_train(
    argv: Optional[Sequence[str]] = None, *more: type, program: str = "train.py",
    description: str = ("Fine-tune an encoder for extractive question answering on Graphcore IPUs, "
                        "or on this host."),
) -> Tuple[Any, ...]:
    """Return (TrainSettings, IPUConfig, one instance per dataclass in `more`).

    argv: by default sys.argv[1:]. more: dataclasses of further flags, which only the command line
    can set. Raises UsageError for a value that is not allowed.
    """
    return train_settings(train_flags(argv, *more, program=program, description=description), *more)


def train_flags(argv: Optional[Sequence[str]], *more: type, program: str,
                description: str) -> Dict[str, Any]:
    """Return {name: value} of the flags in `argv`, as `train_settings` takes them."""
    parser = Parser(program, description, HINTS["train.py"])
    parser.add_argument(
        "--config", metavar="NAME",
        help=f"named configuration ({', '.join(named_configs())}) or a YAML file "
             f"(default: {DEFAULT_CONFIG})")
    return _parse(parser, argv, DataSettings, ModelSettings, FineTuningSettings, RunSettings,
                  IPUConfig, *more)


def train_settings(flags: Dict[str, Any], *more: type) -> Tuple[Any, ...]:
    """Return what `parse_train` does, for the values of flags."""
    name = flags.get("config", DEFAULT_CONFIG)
    sources = [_read_config(name), *_pipeline_sources(flags)]
    if not make_settings(TrainSettings, sources).trains:  # evaluate as the model was trained
        sources[1:1] = _read_qa_settings(Path(flags.get("model_name_or_path", "")))
    settings, ipu_config = make_settings(TrainSettings, sources), make_settings(IPUConfig, sources)
    settings.config = Path(name).stem
    settings.output_dir = settings.output_dir or f"output/{settings.config}"
    settings.pod_type = available_pod(settings.pod_type)
    _check_files(settings)
    _check_values(settings)
    _check_training(settings)
    check_numbers(settings, ipu_config)
    if settings.synthetic_data:  # such a run is only timed
        settings.save_steps, settings.evaluate_every_epoch, settings.eval_steps = None, False, None
    check_offline(settings, ipu_config, settings.pod_type)
    return (settings, ipu_config, *(make_settings(group, sources[-1:]) for group in more))


def parse_infer(argv: Optional[Sequence[str]] = None) -> Tuple[InferSettings, IPUConfig]:
    """Return (InferSettings, IPUConfig) for infer.py. argv: by default sys.argv[1:].

    A checkpoint on the hub is fetched. Raises UsageError for a value that is not allowed, RunError
    if the hub does not give the checkpoint.
    """
    parser = Parser(
        "infer.py",
        "Answer questions with a fine-tuned checkpoint: from flags, from a file, or interactively.",
        HINTS["infer.py"])
    # What makes no sense without training is not offered.
    without = ("model_name_or_path", "pack", "compile_only", "synthetic_data")
    flags = _parse(parser, argv, QuestionSettings, ModelSettings, RunSettings, IPUConfig,
                   without=without)
    return infer_settings(flags)


def infer_settings(flags: Dict[str, Any]) -> Tuple[InferSettings, IPUConfig]:
    """Return what `parse_infer` does, for {name: value} of the flags."""
    flags = dict(flags)
    for f in fields(IPUConfig):  # a flag overrides the checkpoint's inference pipeline as well
        if f.name in flags and getattr(IPUConfig, f"inference_{f.name}", 0) is None:
            flags.setdefault(f"inference_{f.name}", flags[f.name])
    name = flags.get("checkpoint")
    if name is None:
        raise UsageError(
            "--checkpoint is missing: name the folder of a fine-tuned model, for example "
            "--checkpoint output/demo, or one on the hub")
    for text in ("question", "context"):
        if text in flags:
            # Python has surrogates for the bytes that its locale has no name for (PEP 383).
            flags[text] = _text(f"--{text}", flags[text].encode("utf-8", "surrogateescape"))
    _check_files(make_settings(InferSettings, [Source(flags)]))  # before anything is downloaded
    sources = [*_checkpoint_sources(name, flags), *_pipeline_sources(flags)]
    settings, ipu_config = make_settings(InferSettings, sources), make_settings(IPUConfig, sources)
    settings.model_name_or_path = name
    settings.sources["model_name_or_path"] = "--checkpoint"
    settings.pod_type = available_pod(settings.pod_type)
    refuse_several_hosts(settings)
    _check_values(settings)
    if settings.context_file is not None:
        settings.context = _text(settings.named("context_file"),
                                 Path(settings.context_file).read_bytes())
    return settings, ipu_config


def _checkpoint_sources(name: str, flags: Dict[str, Any]) -> List[Source]:
    """Return what the files of --checkpoint `name` say of answering questions with it.

    Usual values, which a note lists, take the place of a qa_settings.json or ipu_config.json that
    is not there.
    """
    folder = checkpoint_folder(name, "--checkpoint", flags.get("model_revision", "main"),
                               flags.get("hub_token"))
    source, config_path = f"--checkpoint {name}", folder / "config.json"
    if not config_path.is_file():
        raise UsageError(f"{source}: no config.json there; name a folder that train.py or "
                         "save_pretrained has written")
    config = SimpleNamespace(**read_json_object(config_path, f"{source}: config.json"))
    if hasattr(config, "model_type"):
        check_config(config, source)
    sources, lacks, assumed = _read_qa_settings(folder), [], {}
    if not sources:
        lacks.append(QA_SETTINGS_NAME)
        assumed = _usual_settings(name, folder, config, flags)
    if (folder / IPU_CONFIG_NAME).is_file():
        sources.append(read_ipu_config(str(folder), str(folder / IPU_CONFIG_NAME)))
    elif "ipu_config" not in flags and "layers_per_ipu" not in flags:
        lacks.append(IPU_CONFIG_NAME)
        assumed["inference_layers_per_ipu"] = [-1, -1]
    if lacks and processes.is_first():
        shown = [f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                 for key, value in assumed.items() if key not in flags]
        print(f"note: {name} has no {' and no '.join(lacks)}; assumed: {' '.join(shown)}; flags "
              "change that", file=sys.stderr)
    return [Source(assumed, "assumed"), *sources]


def _usual_settings(name: str, folder: Path, config: SimpleNamespace, flags: Dict[str, Any],
                    ) -> Dict[str, Any]:
    """Return the settings for a checkpoint of another program.

    Only its name or the model card tells whether some questions have no answer.
    """
    path, lengths = folder / "tokenizer_config.json", [ModelSettings.max_seq_length]
    limit = read_json_object(path, str(path)).get("model_max_length") if path.is_file() else None
    if type(limit) is int and limit >= 16:
        lengths.append(limit)
    if hasattr(config, "model_type"):
        lengths.append(most_tokens(config))
    card = folder / "README.md"
    head = card.read_text("utf-8", "replace").split("\n---")[0] if card.is_file() else ""
    length = flags.get("max_seq_length", min(lengths))
    return {"max_seq_length": length, "doc_stride": min(ModelSettings.doc_stride, length // 3),
            "version_2_with_negative": bool(re.search("squad[-_ ]?v?2", name + head, re.I))}


def named_configs() -> List[str]:
    """Return the names that `--config` accepts, sorted."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _parse(parser: Parser, argv: Optional[Sequence[str]], *groups: type,
           without: Sequence[str] = ()) -> Dict[str, Any]:
    parser.add_argument("--ipu_config", metavar="PATH",
                        help="ipu_config.json, a folder that holds one, or a repository on the hub")
    for group in groups:
        add_flags(parser, group, without)
    return vars(parser.parse_args(argv))


def _pipeline_sources(flags: Dict[str, Any]) -> List[Source]:
    path = flags.get("ipu_config")
    return [*([] if path is None else [read_ipu_config(path)]), Source(flags)]


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which otherwise lets the last of several values of a key win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice} is given twice")
        return super().construct_mapping(node, deep)


def _read_config(name_or_path: str) -> Source:
    path, source = CONFIGS / f"{name_or_path}.yaml", f"--config {name_or_path}"
    if name_or_path not in named_configs():
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise UsageError(f"{source}: no such configuration; choose from "
                             f"{', '.join(named_configs())}, or name a YAML file")
    try:
        values = yaml.load(path.read_bytes(), _UniqueKeys) or {}
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{source}: not readable as YAML "
                         f"({' '.join(str(error).split())[:200]})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{source}: holds a {type(values).__name__}, it should map setting names "
                         "to values")
    known = {f.name for group in (TrainSettings, IPUConfig)
             for f in fields(group)} - {"sources", "config"}
    for unknown in sorted(set(map(str, values)) - known):
        raise UsageError(f"{source}: there is no setting {unknown}{did_you_mean(unknown, known)}")
    return Source(values, str(path))


def _read_qa_settings(folder: Path) -> List[Source]:
    path = folder / QA_SETTINGS_NAME
    if not path.is_file():
        return []
    values = read_json_object(path, str(path))
    return [Source({name: values[name] for name in QA_SETTINGS if name in values}, str(path))]


def _check_files(settings: Settings) -> None:
    source, count = settings.source, processes.count()
    for one, other, why in EXCLUDES:
        _refuse(_is_set(settings, one) and _is_set(settings, other)
                and getattr(settings, other) != getattr(type(settings), other),
                f"{source(one)} and {source(other)} exclude each other: {why}; leave one out")
    _check_needs(settings, "output_file", "question")
    for name in filter(partial(_is_set, settings), INPUT_FILES):
        path, file = Path(getattr(settings, name)), settings.named(name)
        kind = "a text" if name == "context_file" else "a JSON, JSON Lines, CSV or Parquet"
        _refuse(path.is_dir(), f"{file} is a folder: name {kind} file")
        _refuse(not path.exists(), f"{file} does not exist (no such file): name {kind} file")
        _refuse(count > 1 and not path.is_file(), f"{file} is a pipe, which only one of {count} "
                "processes can read: name a file")
    for name in filter(partial(_is_set, settings), OUTPUT_FILES):
        _check_output(settings, name)
    if isinstance(settings, QuestionSettings):
        if settings.web:
            check_page("--web", settings.host, settings.port)
        _refuse(count > 1 and settings.input_file is None, "only the questions of an --input_file "
                "can be shared out over processes: name one, or start a single process")


def _check_values(settings: ModelSettings) -> None:
    _check_needs(settings, *NEEDS)
    length = settings.max_seq_length
    _refuse(settings.doc_stride >= length - 4,
            f"{settings.named('doc_stride')} leaves a window of {settings.named('max_seq_length')} "
            f"no room to move on: use at most {length // 2}")


def _check_needs(settings: Settings, *names: str) -> None:
    for name in names:
        if settings.sources.get(name) == f"--{name}" and _is_set(settings, name):
            _refuse(not any(_is_set(settings, other) for other in NEEDS[name]),
                    f"{settings.named(name)} does nothing without --{' or --'.join(NEEDS[name])}: "
                    "add it")


def _check_training(settings: TrainSettings) -> None:
    source, named, trains, evaluates = (settings.source, settings.named, settings.trains,
                                        settings.evaluates)
    output_dir, resume = Path(settings.output_dir), settings.resume_from_checkpoint
    _refuse(not trains and not evaluates,
            "--do_train false and --do_eval false leave nothing to do: leave one of them out")
    _refuse(settings.train_file and not settings.validation_file and evaluates,
            f"{source('train_file')} comes without --validation_file: name the questions to "
            "evaluate on as well, or train only, with --do_train")
    _refuse(settings.validation_file and not settings.train_file and trains,
            f"{source('validation_file')} comes without --train_file: name the questions to train "
            "on as well, or evaluate only, with --do_eval")
    _refuse(settings.train_file and settings.sources.get("dataset_name") == "--dataset_name",
            "--dataset_name does nothing beside --train_file and --validation_file: leave it out")
    _refuse(output_dir.exists() and not output_dir.is_dir(),
            f"{named('output_dir')} is a file: name a folder")
    _refuse(resume not in (None, "auto") and not Path(resume).is_dir(),
            f"{named('resume_from_checkpoint')}: no such folder; name a checkpoint folder, or auto")
    _refuse(set(settings.report_to) > {"none"},
            f"{named('report_to')}: none excludes the others; leave it out")
    for package in set(settings.report_to) - {"none"}:
        _refuse(find_spec(package) is None,
                f"{source('report_to')} {package} needs the package {package}: pip install "
                f"{package}, or leave it out")
    _refuse(settings.on_nonfinite == "skip" and not settings.save_steps,
            f"{named('on_nonfinite')} goes back to a checkpoint: save some with --save_steps")
    for name in ("load_best_model_at_end", "eval_steps", "evaluate_every_epoch"):
        _refuse(settings.sources.get(name) == f"--{name}" and _is_set(settings, name)
                and not evaluates,
                f"--{name} does nothing in a run that only trains: add --do_eval")
    for name in ("compile_only", "synthetic_data"):
        _refuse(_is_set(settings, name) and not trains,
                f"{source(name)} is for runs that train: add --do_train")
    _refuse(settings.load_best_model_at_end
            and not (settings.eval_steps or settings.evaluate_every_epoch),
            f"{source('load_best_model_at_end')} has only the last model to choose from: add "
            "--eval_steps or --evaluate_every_epoch")
    if settings.learning_rate > LARGEST_RATE and trains and processes.is_first():
        log.warning("warning: %s %g destroys a model: fine-tuning takes 1e-05 to 0.0001",
                    source("learning_rate"), settings.learning_rate)


def _refuse(wrong: Any, message: str) -> None:
    if wrong:
        raise UsageError(message)


def _is_set(settings: Settings, name: str) -> bool:
    """Return whether a setting that is off or absent by default is set."""
    return getattr(settings, name, None) not in (None, False)


def check_numbers(settings: TrainSettings, ipu_config: IPUConfig) -> None:
    """Raise UsageError for what an IPU could not compute, or not exactly."""
    # PopTorch's LAMB takes no max_grad_norm (python/optim.py). PopART casts a float16 gradient to
    # float32 before its norm only if both moments are float32 (patterns/adamdecompose.cpp); a sum
    # of squares overflows in float16. Automatic loss scaling tracks float16 gradients alone
    # (automaticlossscaling.cpp, getToTrackTensorsAuto).
    clips, half = settings.max_grad_norm is not None, settings.precision == "float16"
    norm, moment = (settings.named("max_grad_norm"),
                    ipu_config.source("enable_half_first_order_momentum"))
    _refuse(clips and settings.optimizer == "lamb",
            f"{norm}: PopTorch's LAMB has no clipping; use --optimizer adamw")
    _refuse(clips and half and ipu_config.enable_half_first_order_momentum,
            f"{norm}: with {moment} an IPU would compute the norm in float16, where it overflows; "
            "add --enable_half_first_order_momentum false")
    _refuse(ipu_config.auto_loss_scaling and not half, f"{ipu_config.source('auto_loss_scaling')} "
            "needs float16 gradients: leave it out, or add --precision float16")


def _check_output(settings: Settings, name: str) -> None:
    path, file = Path(getattr(settings, name)), settings.named(name)
    check_writable(path, file)
    for other in filter(partial(_is_set, settings), INPUT_FILES):
        _refuse(path.exists() and os.path.samefile(getattr(settings, other), path),
                f"{file} is the file that --{other} reads: name another")
    folder = getattr(settings, "checkpoint", None) or getattr(settings, "model_name_or_path", "")
    _refuse(folder and path.exists() and Path(folder).resolve() == path.resolve().parent
            and any(fnmatch.fnmatch(path.name, pattern) for pattern in _OF_A_CHECKPOINT),
            f"{file} belongs to the checkpoint: name another")


def check_writable(path: Path, file: str) -> None:
    """Raise UsageError, which calls it `file`, unless `path` can be written: found early."""
    _refuse(path.is_dir(), f"{file} is no file that can be replaced: name another")
    _refuse(not path.parent.is_dir(),
            f"{file}: there is no folder {path.parent}; make it, or name another")
    _refuse(not os.access(path if path.exists() else path.parent, os.W_OK),
            f"{file}: it cannot be written there (permission denied); name another")


def refuse_several_hosts(settings: DeviceSettings) -> None:
    """Raise UsageError for a pod with more IPUs than one host feeds, unless there are several."""
    _refuse(POD_IPUS[settings.pod_type] > IPUS_OF_A_HOST and processes.count() == 1,
            f"{settings.named('pod_type')} takes several hosts: start several processes with "
            f"poprun, or use at most pod{IPUS_OF_A_HOST}; --plan says how many")


def check_page(what: str, host: str, port: int) -> None:
    """Raise UsageError if `what` cannot serve its page on host:port."""
    _refuse(find_spec("dash") is None,
            f"{what} needs the package dash: pip install -r requirements-pages.txt")
    listen(host, port).close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on host:port. Raises UsageError if that cannot be had."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        where = f"--port {port}" if host == "127.0.0.1" else f"--host {host} --port {port}"
        raise UsageError(f"{where}: cannot listen there ({error.strerror}); choose another port, "
                         "or 0 for any that is free") from error


def _text(source: str, data: bytes) -> str:
    try:
        text = data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not valid UTF-8 ({error.reason}): give its text in that "
                         "encoding") from None
    if not text.strip():
        raise UsageError(f"{source} is empty: give its text")
    return text
