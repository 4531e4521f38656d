"""The settings of train.py and infer.py, read and checked before any work starts.

Sources, each of which takes precedence over those before it: a field's default; the named
configuration (YAML, `--config`) or the checkpoint's own files; `--ipu_config`; the flags. This
module does not import torch, so that `--help` and error messages take a fraction of a second.
"""
from __future__ import annotations

import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
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
from qa.checks import (
    assume_row_shape,
    check_clipping,
    check_infer,
    check_questions,
    check_train,
    read_text,
)
from runtime import processes
from runtime.errors import UsageError
from runtime.files import read_json_object, write_json
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
QA_SETTINGS = ("max_seq_length", "doc_stride", "pack", "max_windows_per_row", "max_answer_length",
               "version_2_with_negative", "null_score_diff_threshold", "precision",
               "eval_micro_batch_size")
# Flags of run_qa.py and Trainer that are no flags here: what does their work.
HINTS = {
    "lr": "the learning rate is --learning_rate here",
    "epochs": "the number of epochs is --num_train_epochs here",
    "batch_size": "rows of a micro-batch are --micro_batch_size here, and a weight update takes "
                  "--gradient_accumulation_steps x --replication_factor times as many",
    "fp16": "float16 is --precision float16 here, which is the default",
    "bf16": "an IPU has no bfloat16; --precision is float16 or float32",
    "do_predict": "--test_file is answered without further flags",
    "pad_to_max_length": "every row has --max_seq_length tokens; --pack fills them with windows",
    "evaluation_strategy": "evaluate with --eval_steps N or --evaluate_every_epoch",
    "eval_strategy": "evaluate with --eval_steps N or --evaluate_every_epoch",
    "save_strategy": "save with --save_steps N",
    "logging_dir": "the log is log.jsonl in the output folder",
    "use_fast_tokenizer": "the tokenizer is always a fast one",
    "use_auth_token": "the hub's token is --hub_token here",
    "lr_scheduler": "the schedule is --lr_scheduler_type here",
}


@dataclass
class ModelSettings(Settings):
    """Which model, and how its answers are read off."""

    model_name_or_path: str = flag(
        "roberta-base", "checkpoint of a RoBERTa, XLM-RoBERTa, CamemBERT, BERT, DistilBERT or "
        "ELECTRA: a local folder or a name on the hub")
    model_revision: str = flag("main", "branch, tag or commit of a checkpoint on the hub")
    tokenizer_name: Optional[str] = flag(None, "tokenizer (default: the checkpoint's own)")
    precision: str = flag(
        "float16",
        "type of weights and activations; a host without IPU computes float16 models in bfloat16 "
        "if its processor supports it, else in float32", choices=("float16", "float32"))
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
    do_train: bool = flag(False, "train (default: train and evaluate)")
    do_eval: bool = flag(False, "evaluate; without --do_train only that (default: both)")
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
        64.0, "factor on the loss that prevents underflow of float16 gradients", above=0)
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
    """All settings of train.py. config: the name of the configuration, the YAML file's stem."""

    config: str = DEFAULT_CONFIG

    @property
    def needs_hub(self) -> bool:
        """Whether something may have to be fetched from the hub or sent there."""
        models = [self.model_name_or_path, self.tokenizer_name or self.model_name_or_path]
        local_model = self.demo_data or all(Path(name).is_dir() for name in models)
        return self.push_to_hub or not local_model or not (
            self.demo_data or self.train_file or self.validation_file)

    @property
    def trains(self) -> bool:
        """Whether the run trains: unless only --do_eval is given."""
        return self.do_train or not self.do_eval

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates: unless only --do_train is given."""
        return self.do_eval or not self.do_train


@dataclass
class InferSettings(QuestionSettings, ModelSettings, RunSettings):
    """All settings of infer.py.

    assumed: the files of train.py that the checkpoint lacks. v2_from: what says that some questions
    have no answer, of a checkpoint without qa_settings.json.
    """

    assumed: str = ""
    v2_from: str = ""

    def assumption(self) -> str:
        """Return the values that were taken for want of the files `assumed`."""
        taken = []
        if QA_SETTINGS_NAME in self.assumed:
            v2 = self.version_2_with_negative
            taken = [f"--max_seq_length {self.max_seq_length}", f"--doc_stride {self.doc_stride}",
                     f"--version_2_with_negative {str(v2).lower()}" + self.v2_from]
        if IPU_CONFIG_NAME in self.assumed:
            taken.append("--layers_per_ipu -1 -1")
        return " ".join(taken)


def parse_train(
    argv: Optional[Sequence[str]] = None, *more: type, program: str = "train.py",
    description: str = ("Fine-tune an encoder for extractive question answering on Graphcore IPUs, "
                        "or on this host."),
) -> Tuple[Any, ...]:
    """Return (TrainSettings, IPUConfig, one instance per dataclass in `more`).

    argv: by default sys.argv[1:]. more: dataclasses of further flags (runtime/flags.py), which
    only the command line can set. program, description: for --help. Raises UsageError for a value
    that is not allowed.
    """
    return train_settings(train_flags(argv, *more, program=program, description=description), *more)


def train_flags(argv: Optional[Sequence[str]], *more: type, program: str,
                description: str) -> Dict[str, Any]:
    """Return {name: value} of the flags in `argv`, as `train_settings` takes them."""
    parser = Parser(program, description, HINTS)
    parser.add_argument(
        "--config", metavar="NAME",
        help=f"named configuration ({', '.join(named_configs())}) or a YAML file "
             f"(default: {DEFAULT_CONFIG})")
    return _parse(parser, argv, DataSettings, ModelSettings, FineTuningSettings, RunSettings,
                  IPUConfig, *more).values


def train_settings(flags: Dict[str, Any], *more: type) -> Tuple[Any, ...]:
    """Return what `parse_train` does, for the values of flags."""
    given = Source(dict(flags))
    name = given.values.pop("config", DEFAULT_CONFIG)
    layers = [_read_config(name), *_ipu_config_layer(given), given]
    if given.values.get("do_eval") and not given.values.get("do_train"):  # as the model was trained
        layers.insert(1, _read_qa_settings(Path(given.values.get("model_name_or_path", ""))))
    settings, ipu_config = make_settings(TrainSettings, layers), make_settings(IPUConfig, layers)
    settings.config = Path(name).stem
    settings.output_dir = settings.output_dir or f"output/{settings.config}"
    settings.pod_type = available_pod(settings.pod_type)
    check_train(settings)
    check_clipping(settings, ipu_config)
    if settings.synthetic_data:  # such a run is only timed
        settings.save_steps, settings.evaluate_every_epoch, settings.eval_steps = None, False, None
    check_offline(settings, ipu_config.for_pod(settings.pod_type))
    return (settings, ipu_config, *(make_settings(group, [given]) for group in more))


def parse_infer(argv: Optional[Sequence[str]] = None) -> Tuple[InferSettings, IPUConfig]:
    """Return (InferSettings, IPUConfig) for infer.py.

    argv: by default sys.argv[1:]. Values in the checkpoint's qa_settings.json and ipu_config.json
    apply unless --ipu_config or a flag overrides them. For a checkpoint without these files usual
    values are taken, which `load_config` prints. A checkpoint on the hub is fetched. Raises
    UsageError for a value that is not allowed, RunError if the hub does not give the checkpoint.
    """
    parser = Parser(
        "infer.py",
        "Answer questions with a fine-tuned checkpoint: from flags, from a file, or interactively.")
    # What makes no sense without training is not offered.
    without = ("model_name_or_path", "compile_only", "synthetic_data")
    given = _parse(parser, argv, QuestionSettings, ModelSettings, RunSettings, IPUConfig,
                   without=without)
    _mean_inference(given)
    name = given.values.get("checkpoint")
    if name is None:
        raise UsageError(
            "--checkpoint is missing: name the folder of a fine-tuned model, for example "
            "--checkpoint output/demo, or one on the hub")
    check_questions(make_settings(InferSettings, [given]))  # before anything is downloaded
    folder = checkpoint_folder(name, "--checkpoint", *(
        given.values.get(key, default) for key, default in (
            ("model_revision", "main"), ("hub_token", None))))
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--checkpoint {name}: no config.json there; name a folder that train.py or "
            "save_pretrained has written")
    lacks = [file for file in (QA_SETTINGS_NAME, IPU_CONFIG_NAME) if not (folder / file).is_file()]
    layers, pipeline = [_read_qa_settings(folder)], _ipu_config_layer(given)
    if IPU_CONFIG_NAME not in lacks:
        layers.append(_read_pipeline(str(folder), str(folder / IPU_CONFIG_NAME)))
    elif pipeline or "layers_per_ipu" in given.values:
        lacks.remove(IPU_CONFIG_NAME)
    else:
        layers.append(Source({"inference_layers_per_ipu": [-1, -1]}, "the default"))
    layers += [*pipeline, given]
    settings, ipu_config = make_settings(InferSettings, layers), make_settings(IPUConfig, layers)
    settings.assumed = " and no ".join(lacks)
    if QA_SETTINGS_NAME in lacks:
        _assume(settings, folder)
    settings.model_name_or_path = name
    settings.sources["model_name_or_path"] = "--checkpoint"
    settings.pod_type = available_pod(settings.pod_type)
    refuse_several_hosts(settings)
    check_infer(settings)
    if settings.context_file is not None:
        settings.context = read_text(settings.context_file)
    return settings, ipu_config


def named_configs() -> List[str]:
    """Return the names that `--config` accepts, sorted."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def write_qa_settings(settings: ModelSettings, folder: Any) -> None:
    """Write `folder`/qa_settings.json, which `parse_infer` reads. Raises OSError.

    It holds the settings (QA_SETTINGS) that are needed to answer questions with the checkpoint.
    """
    write_json(
        Path(folder) / QA_SETTINGS_NAME, {name: getattr(settings, name) for name in QA_SETTINGS})


def refuse_several_hosts(settings: DeviceSettings) -> None:
    """Raise UsageError for a pod with more IPUs than one host feeds, unless there are several."""
    if POD_IPUS[settings.pod_type] > IPUS_OF_A_HOST and processes.count() == 1:
        raise UsageError(
            f"{settings.source('pod_type')} {settings.pod_type} takes several hosts: start several "
            f"processes with poprun, or use at most pod{IPUS_OF_A_HOST}; --plan says how many")


def _parse(parser: Parser, argv: Optional[Sequence[str]], *groups: type,
           without: Sequence[str] = ()) -> Source:
    """Add --ipu_config and the flags of `groups` to the parser; return what `argv` gives."""
    parser.add_argument("--ipu_config", metavar="PATH",
                        help="ipu_config.json, a folder that holds one, or a repository on the hub")
    for group in groups:
        add_flags(parser, group, without)
    return Source(vars(parser.parse_args(argv)))


def _mean_inference(given: Source) -> None:
    """Let a flag of infer.py override the checkpoint's inference pipeline as well.

    The checkpoint's ipu_config.json may set inference_layers_per_ipu, for instance, which would
    take precedence over the flag --layers_per_ipu.
    """
    for f in fields(IPUConfig):
        twin = f"inference_{f.name}"
        if f.name in given.values and getattr(IPUConfig, twin, 0) is None:
            given.values.setdefault(twin, given.values[f.name])


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which otherwise lets the last of several values of a key win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return the mapping as a dictionary. Raises YAMLError if it has a key twice."""
        keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice} is given twice")
        return super().construct_mapping(node, deep)


def _read_config(name_or_path: str) -> Source:
    """Return the values of a named configuration or of a YAML file.

    Raises UsageError for an unknown name, an unreadable file or an unknown setting.
    """
    path = CONFIGS / f"{name_or_path}.yaml"
    if name_or_path not in named_configs():
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise UsageError(
                f"--config {name_or_path}: no such configuration; choose from "
                f"{', '.join(named_configs())}, or name a YAML file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys) or {}
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--config {name_or_path}: not readable as YAML "
                         f"({' '.join(str(error).split())[:200]})") from error
    if not isinstance(values, dict):
        raise UsageError(
            f"--config {name_or_path}: holds a {type(values).__name__}, it should map setting "
            "names to values")
    known = {f.name for group in (TrainSettings, IPUConfig)
             for f in fields(group)} - {"sources", "config"}
    for unknown in sorted(set(map(str, values)) - known):
        raise UsageError(
            f"--config {name_or_path}: there is no setting {unknown}{did_you_mean(unknown, known)}")
    for name in ("layers_per_ipu", "inference_layers_per_ipu"):
        if isinstance(values.get(name), int):
            values[name] = [values[name]]
    return Source(values, str(path))


def _ipu_config_layer(given: Source) -> List[Source]:
    path = given.values.pop("ipu_config", None)
    return [] if path is None else [_read_pipeline(path, f"--ipu_config {path}")]


def _read_pipeline(name_or_path: str, source: str) -> Source:
    """Return the values of an ipu_config.json, without an untrusted cache folder.

    The file may be someone else's, and compiled executables are read from executable_cache_dir. If
    that folder is outside of the working directory, it is left out with a warning.
    """
    values = read_ipu_config(name_or_path, source)
    cache = Path(str(values.get("executable_cache_dir") or "."))
    if cache.is_absolute() or ".." in cache.parts:
        log.warning(
            "%s: executable_cache_dir %s is not used; if it is yours, give it with "
            "--executable_cache_dir", name_or_path, cache)
        del values["executable_cache_dir"]
    return Source(values, source)


def _assume(settings: InferSettings, folder: Path) -> None:
    """Choose row length, stride and version for a checkpoint of another program.

    The tokenizer's limit bounds the length; the model's does as soon as it is known (load_config).
    Whether some questions have no answer is not in such a checkpoint's files, but in its name or
    its model card's data sets, if they are SQuAD v2.
    """
    path = folder / "tokenizer_config.json"
    limit = read_json_object(path, str(path)).get("model_max_length") if path.is_file() else None
    known = type(limit) is int and limit >= 16
    assume_row_shape(settings, limit if known else settings.max_seq_length)
    if "version_2_with_negative" in settings.sources:
        return
    card = folder / "README.md"
    head = card.read_text("utf-8", "replace").split("\n---")[0] if card.is_file() else ""
    for text, place in ((settings.checkpoint, "name"), (head, "model card")):
        if re.search(r"squad[-_ ]?v?2", text, re.IGNORECASE):
            settings.version_2_with_negative, settings.v2_from = True, f" (by its {place})"
            return


def _read_qa_settings(folder: Path) -> Source:
    path = folder / QA_SETTINGS_NAME
    values = read_json_object(path, str(path)) if path.is_file() else {}
    return Source({name: values[name] for name in QA_SETTINGS if name in values}, str(path))
