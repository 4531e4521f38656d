"""Settings: what the flags, the named configurations and an ipu_config.json say, checked before any work starts.

The order of precedence: a field's default, then the named configuration (YAML, `--config`), then `--ipu_config`, then the
flags themselves. No torch and no transformers in here: `--help` and a refusal take a fraction of a second. (That is why
the flags come from these dataclasses through argparse; transformers' HfArgumentParser takes two seconds to import.)
"""
from __future__ import annotations

import argparse
import difflib
import json
import logging
import math
import re
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml

from ipu_options.config import POD_IPUS, IPUConfig, available_pod, flag, read_ipu_config
from ipu_options.errors import UsageError

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).parent / "configs"
DEFAULT_CONFIG = "squad_base_384"
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


@dataclass
class ModelSettings:
    """Which model, and how its answers are read off."""

    model_name_or_path: str = flag("roberta-base", "checkpoint of RoBERTa's family: a local folder or a name on the hub")
    tokenizer_name: Optional[str] = flag(None, "tokenizer, if it is not the checkpoint's own")
    precision: str = flag("float16", "type of weights and activations; a host without IPU computes float16 models in bfloat16 "
                          "where its processor has it, else in float32", choices=("float16", "float32"))
    max_seq_length: int = flag(384, "tokens of a row", min=16, max=4096)
    doc_stride: int = flag(128, "tokens by which the windows of a long context overlap", min=0)
    pack: bool = flag(False, "put several windows in one row")
    max_windows_per_row: int = flag(8, "most windows of a packed row", min=1, max=64)
    n_best_size: int = flag(20, "answers kept for each question", min=1, max=1000)
    max_answer_length: int = flag(30, "most tokens of an answer", min=1)
    version_2_with_negative: bool = flag(False, "some questions have no answer in their context (SQuAD v2)")
    null_score_diff_threshold: float = flag(0.0, "no answer is given where its score exceeds the best answer's by more than this")
    preprocessing_num_workers: Optional[int] = flag(None, "processes that make windows", type=int, min=1, max=256)
    overwrite_cache: bool = flag(False, "make the windows anew, whatever is cached")
    on_bad_row: str = flag("refuse", "a malformed row of the data set stops the run, or is skipped and counted", choices=("refuse", "skip"))


@dataclass
class DataSettings:
    """Which questions to train on and to evaluate."""

    dataset_name: str = flag("squad", "data set on the hub, with SQuAD's columns id, context, question, answers")
    dataset_config_name: Optional[str] = flag(None, "configuration of that data set")
    train_file: Optional[str] = flag(None, "local training questions: SQuAD's nested JSON, JSON Lines, CSV or Parquet")
    validation_file: Optional[str] = flag(None, "local validation questions, in any of the same formats")
    demo_data: bool = flag(False, "write a small data set and an untrained model to output_dir/demo_data, and use those")
    max_train_samples: Optional[int] = flag(None, "use the first so many training questions", type=int, min=1)
    max_eval_samples: Optional[int] = flag(None, "use the first so many validation questions", type=int, min=1)
    show_examples: int = flag(0, "print so many random examples of the training data", min=0)


@dataclass
class TrainingSettings:
    """The fine-tuning run."""

    output_dir: Optional[str] = flag(None, "folder of everything the run writes (default: output/ and the configuration's name)")
    overwrite_output_dir: bool = flag(False, "start over in a folder that holds checkpoints")
    micro_batch_size: int = flag(1, "rows that a pipeline stage computes at once", min=1, max=4096)
    eval_micro_batch_size: int = flag(1, "the same for evaluation", min=1, max=4096)
    num_train_epochs: float = flag(3.0, "times every training window is seen", above=0)
    max_steps: Optional[int] = flag(None, "end after so many steps, whatever num_train_epochs says", type=int, min=1)
    learning_rate: float = flag(2e-5, "peak learning rate", above=0)
    lr_scheduler_type: str = flag("linear", "learning-rate schedule", choices=SCHEDULES)
    warmup_ratio: float = flag(0.25, "share of the run in which the learning rate rises", min=0, max=1)
    weight_decay: float = flag(0.01, "decoupled weight decay of the matrices (none on biases and LayerNorm)", min=0)
    optimizer: str = flag("adamw", "optimizer", choices=("adamw", "lamb"))
    adam_beta1: float = flag(0.9, "decay of the first moment", min=0, below=1)
    adam_beta2: float = flag(0.999, "decay of the second moment", min=0, below=1)
    adam_epsilon: float = flag(1e-8, "term that keeps the update finite", above=0)
    loss_scaling: float = flag(64.0, "factor on the loss that keeps float16 gradients from vanishing", above=0)
    on_nonfinite: str = flag("stop", "a loss or gradient that is not finite stops the run, or its step is passed over",
                             choices=("stop", "skip"))
    watch_gradients: Optional[bool] = flag(None, "look at the gradients of each step, not at its loss alone (default: where no IPU "
                                           "is used; there it returns one gradient of a LayerNorm to the host)", type=bool)
    seed: int = flag(42, "seed of data order, initial weights and dropout", min=0, max=2 ** 32 - 1)
    logging_steps: int = flag(20, "steps between two log lines", min=1)
    save_steps: Optional[int] = flag(None, "steps between two checkpoints (default: none but the final model)", type=int, min=1)
    save_total_limit: int = flag(2, "checkpoints kept", min=1)
    resume_from_checkpoint: Optional[str] = flag(None, "checkpoint folder to go on from, or auto: the newest whole one, if any")
    evaluate_every_epoch: bool = flag(False, "evaluate after each epoch, not only at the end")
    show_predictions: int = flag(5, "print so many validation questions with predicted and true answers", min=0)
    dataloader_num_workers: int = flag(0, "more processes that make rows, beside the asynchronous loader's own", min=0, max=256)
    push_to_hub: bool = flag(False, "upload the final model with a generated model card")
    hub_model_id: Optional[str] = flag(None, "repository to upload to (default: the output folder's name)")
    hub_private_repo: bool = flag(False, "create that repository as a private one")


@dataclass
class RunSettings:
    """How and where it runs."""

    pod_type: Optional[str] = flag(None, "IPUs available: chooses the replication (default: NUM_AVAILABLE_IPU, else pod4)",
                                   choices=tuple(POD_IPUS))
    compile_only: bool = flag(False, "compile the pipelines for an offline IPU target, run nothing")
    synthetic_data: bool = flag(False, "let the IPU make up its input: the device's speed without the host's")
    ipu_model: bool = flag(False, "use the IPU Model, a simulator, in place of hardware")
    profile_dir: Optional[str] = flag(None, "write PopVision reports of training and inference there")
    trace: Optional[str] = flag(None, "write the host's spans as a Chrome trace to this file")
    hub_token: Optional[str] = flag(None, "access token of the hub (default: the one huggingface_hub keeps)")
    debug: bool = flag(False, "show the traceback of an error")


@dataclass
class QuestionSettings:
    """What infer.py is asked."""

    checkpoint: Optional[str] = flag(None, "folder of the fine-tuned model")
    question: Optional[str] = flag(None, "one question, with --context or --context_file")
    context: Optional[str] = flag(None, "the text that holds its answer")
    context_file: Optional[str] = flag(None, "a text file that holds it")
    input_file: Optional[str] = flag(None, "questions in any format that train.py reads; answers are not needed")
    output_file: Optional[str] = flag(None, "write the answers there, one JSON object a line (default: print them)")
    n_best: int = flag(1, "answers shown for each question", min=1, max=1000)
    json: bool = flag(False, "print one JSON object a question")
    eval_micro_batch_size: int = flag(1, "rows that a pipeline stage computes at once", min=1, max=4096)


@dataclass
class TrainSettings(TrainingSettings, DataSettings, ModelSettings, RunSettings):
    """All settings of train.py."""

    config: str = field(default=DEFAULT_CONFIG)


@dataclass
class InferSettings(QuestionSettings, ModelSettings, RunSettings):
    """All settings of infer.py."""


def parse_train(argv: Optional[Sequence[str]] = None, parser: Optional[argparse.ArgumentParser] = None,
                ) -> Tuple[TrainSettings, IPUConfig, argparse.Namespace]:
    """train.py's settings and its IPU configuration with the by-pod values resolved; UsageError for what cannot be.

    parser: one to which a caller has added flags of its own; their values are in the third result, a namespace.
    """
    parser = parser or Parser("train.py", "Fine-tune RoBERTa for extractive question answering on Graphcore IPUs, or on this host.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="NAME",
                        help=f"named configuration ({', '.join(named_configs())}) or a YAML file (default: {DEFAULT_CONFIG})")
    _add_ipu_config_flag(parser)
    for group in (DataSettings, ModelSettings, TrainingSettings, RunSettings, IPUConfig):
        add_flags(parser, group)
    given = parser.parse_args(argv)
    values = read_config(given.config)
    name = Path(given.config).stem
    settings, ipu_config = _merge(TrainSettings, values, given)
    settings.config, settings.output_dir = name, settings.output_dir or f"output/{name}"
    settings.pod_type = available_pod(settings.pod_type)
    _check_train(settings)
    return settings, ipu_config.for_pod(settings.pod_type), given


def parse_infer(argv: Optional[Sequence[str]] = None) -> Tuple[InferSettings, IPUConfig]:
    """infer.py's settings and its inference configuration. What the checkpoint's qa_settings.json and ipu_config.json say
    stands, unless a flag says otherwise."""
    parser = Parser("infer.py", "Answer questions with a fine-tuned checkpoint: from flags, from a file, or interactively.")
    _add_ipu_config_flag(parser)
    for group in (QuestionSettings, ModelSettings, RunSettings, IPUConfig):
        add_flags(parser, group)
    given = parser.parse_args(argv)
    folder = vars(given).get("checkpoint")
    if folder is None:
        raise UsageError("--checkpoint is missing: name the folder of a fine-tuned model, for example --checkpoint output/demo")
    if not (Path(folder) / "config.json").is_file():
        raise UsageError(f"--checkpoint {folder}: no config.json there; name a folder that train.py or save_pretrained has written")
    values = read_qa_settings(folder)
    if (Path(folder) / "ipu_config.json").is_file():
        values.update(_read_pipeline(folder))
    settings, ipu_config = _merge(InferSettings, values, given)
    settings.model_name_or_path = folder
    settings.pod_type = available_pod(settings.pod_type)
    _check_infer(settings)
    return settings, ipu_config.for_pod(settings.pod_type)


def named_configs() -> List[str]:
    """The names that `--config` takes."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read_config(name_or_path: str) -> Dict[str, Any]:
    """The values of a named configuration or of a YAML file; UsageError for a name or a field that does not exist."""
    path = CONFIGS / f"{name_or_path}.yaml"
    if name_or_path not in named_configs():
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise UsageError(f"--config {name_or_path}: no such configuration; choose from {', '.join(named_configs())}, "
                             "or name a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {name_or_path}: not readable as YAML ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {name_or_path}: holds a {type(values).__name__}, it should map setting names to values")
    known = {f.name for group in (TrainSettings, IPUConfig) for f in fields(group)}
    for unknown in sorted(set(map(str, values)) - known):
        raise UsageError(f"--config {name_or_path}: there is no setting {unknown}{_did_you_mean(unknown, known)}")
    return values


def _read_pipeline(name_or_path: str) -> Dict[str, Any]:
    """What an ipu_config.json says, which may be someone else's: where it would have compiled executables written to (and read
    from) outside of the working directory is left out, with a warning."""
    values = read_ipu_config(name_or_path)
    cache = Path(str(values.get("executable_cache_dir") or "."))
    if cache.is_absolute() or ".." in cache.parts:
        log.warning("%s: executable_cache_dir %s is not used; if it is yours, give it with --executable_cache_dir", name_or_path, cache)
        del values["executable_cache_dir"]
    return values


def read_qa_settings(folder: str) -> Dict[str, Any]:
    """What train.py noted beside a checkpoint for those who answer with it (qa_settings.json); {} without that file."""
    path = Path(folder) / "qa_settings.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: values[name] for name in QA_SETTINGS if name in values}
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: not readable as a JSON object ({error})") from error


def write_qa_settings(settings: ModelSettings, folder: Any) -> None:
    """Note beside a checkpoint what those who answer with it need (read back by `read_qa_settings`)."""
    values = {name: getattr(settings, name) for name in QA_SETTINGS}
    (Path(folder) / "qa_settings.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# What a resumed run must have in common with the run it goes on with, beside its data and its batches.
MUST_MATCH = ("learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "optimizer", "adam_beta1", "adam_beta2", "adam_epsilon",
              "loss_scaling", "precision")
QA_SETTINGS = ("max_seq_length", "doc_stride", "pack", "max_windows_per_row", "max_answer_length", "version_2_with_negative",
               "null_score_diff_threshold", "precision")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are UsageErrors of one line, and which knows no abbreviated flags."""

    def __init__(self, program: str, description: str):
        super().__init__(program, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=42, width=120))
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")  # argparse's own takes -2e-5 for a flag

    def error(self, message: str):
        raise UsageError(message.replace("argument --", "--", 1).replace(": ", " ", 1))

    def parse_args(self, args=None, namespace=None):
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            raise UsageError(f"{unknown[0]}: there is no such flag{_did_you_mean(unknown[0], flags)}; --help lists them")
        return given


def add_flags(parser: argparse.ArgumentParser, group: type) -> None:
    """One flag for each field of the dataclass `group`; a boolean takes an optional true/false, and has a --no_ twin if it
    is true by default. No flag has a default of its own, so that only what was given is in the result."""
    section = parser.add_argument_group((group.__doc__ or group.__name__).strip().splitlines()[0])
    for f in fields(group):
        default, kind = _default_and_kind(f)
        shown = "" if default is None or isinstance(default, dict) else f" (default: {_text(default)})"
        options = dict(help=f.metadata["help"].replace("%", "%%") + shown, type=_reader(kind), dest=f.name)
        if kind is bool:
            options.update(nargs="?", const=True, metavar="true|false")
        elif "choices" in f.metadata:
            options.update(metavar="|".join(map(str, f.metadata["choices"])))
        else:
            options.update(metavar={int: "N", float: "X"}.get(kind, "TEXT"), nargs=f.metadata.get("nargs"))
        section.add_argument("--" + f.name, **options)
        if default is True:
            section.add_argument("--no_" + f.name, dest=f.name, action="store_false", help=argparse.SUPPRESS)


def check_field(group: type, name: str, value: Any) -> None:
    """UsageError unless `value` has the type, the range and the choices of that field."""
    f = next(f for f in fields(group) if f.name == name)
    default, kind = _default_and_kind(f)
    if value is None or isinstance(value, dict):
        if value is None and default is not None and "None" not in str(f.type) and "Optional" not in str(f.type):
            raise UsageError(f"--{name} has no value: give {_article(kind)}")
        for by_pod in (value or {}).values():
            check_field(group, name, by_pod)
        return
    if f.metadata.get("nargs") == "+" and isinstance(value, list):
        if not value:
            raise UsageError(f"--{name} is an empty list: give at least one value")
        for one in value:
            check_field(group, name, one)
        return
    choices = f.metadata.get("choices")
    if isinstance(value, list):  # not printed: a few aliases of YAML write out to more than fits in memory
        raise UsageError(f"--{name} is a list: it should be {_article(kind)}" + (f", one of {', '.join(choices)}" if choices else ""))
    if choices and value not in choices:
        raise UsageError(f"--{name} {value}: choose from {', '.join(map(str, choices))}")
    if not isinstance(value, kind) and not (kind is float and isinstance(value, int)) or (kind is not bool and isinstance(value, bool)):
        raise UsageError(f"--{name} {value!r}: it should be {_article(kind)}")
    low, high, above, below = (f.metadata.get(bound) for bound in ("min", "max", "above", "below"))
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"--{name} {value}: it should be a finite number")
    if low is not None and value < low or above is not None and value <= above:
        right = f"at least {low}" if low is not None else f"more than {above}"
        raise UsageError(f"--{name} {value} is too small: it should be {right}")
    if high is not None and value > high or below is not None and value >= below:
        right = f"at most {high}" if high is not None else f"less than {below}"
        raise UsageError(f"--{name} {value} is too large: it should be {right}")


def _default_and_kind(f: Field) -> Tuple[Any, type]:
    default = f.default_factory() if callable(f.default_factory) else f.default
    return default, f.metadata.get("type") or (str if default is None else type(default))


def _merge(group: type, values: Dict[str, Any], given: argparse.Namespace) -> Tuple[Any, IPUConfig]:
    flags = {name: value for name, value in vars(given).items()}
    if "ipu_config" in flags:
        values = {**values, **_read_pipeline(flags["ipu_config"])}
    merged = {**values, **flags}
    results = []
    for kind in (group, IPUConfig):
        known = {f.name for f in fields(kind)}
        own = {name: value for name, value in merged.items() if name in known}
        for name in ("layers_per_ipu", "inference_layers_per_ipu"):  # ipu_config.json may hold one number
            if isinstance(own.get(name), int):
                own[name] = [own[name]]
        for name, value in own.items():
            if name != "config":
                check_field(kind, name, value)
        results.append(kind(**own))
    return tuple(results)


def _check_train(s: TrainSettings) -> None:
    _check_windows(s)
    _check_new_file(s, "trace")
    for name in ("train_file", "validation_file"):
        path = getattr(s, name)
        if path is not None and not Path(path).is_file():
            what = "is a folder" if Path(path).is_dir() else "does not exist"
            raise UsageError(f"--{name} {path} {what}: name a JSON, JSON Lines, CSV or Parquet file")
    if s.train_file and not s.validation_file:
        raise UsageError("--train_file comes without --validation_file: name the questions to evaluate on as well")
    if s.validation_file and not s.train_file:
        raise UsageError("--validation_file comes without --train_file: name the questions to train on as well")
    if s.demo_data and s.train_file:
        raise UsageError("--demo_data and --train_file exclude each other: the demo makes its own questions; leave one out")
    if Path(s.output_dir).exists() and not Path(s.output_dir).is_dir():
        raise UsageError(f"--output_dir {s.output_dir} is a file: name a folder")
    if s.resume_from_checkpoint not in (None, "auto") and not Path(s.resume_from_checkpoint).is_dir():
        raise UsageError(f"--resume_from_checkpoint {s.resume_from_checkpoint}: no such folder; name a checkpoint folder, or auto")
    if s.compile_only and s.synthetic_data:
        raise UsageError("--compile_only and --synthetic_data exclude each other: what is only compiled runs on no data; leave one out")
    if s.hub_model_id and not s.push_to_hub:
        raise UsageError(f"--hub_model_id {s.hub_model_id} does nothing without --push_to_hub: add it")


def check_row_length(settings: ModelSettings, config: Any) -> None:
    """UsageError unless the model has positions for a row's longest window. RoBERTa counts positions from padding_idx + 1."""
    most = config.max_position_embeddings - config.pad_token_id - 1
    if settings.max_seq_length > most:
        raise UsageError(f"--max_seq_length {settings.max_seq_length}: {settings.model_name_or_path} has positions for {most} tokens; "
                         f"use at most {most}")


def _check_infer(s: InferSettings) -> None:
    _check_windows(s)
    if s.context is not None and s.context_file is not None:
        raise UsageError("--context and --context_file exclude each other: leave one out")
    if s.question is not None and s.input_file is not None:
        raise UsageError("--question and --input_file exclude each other: leave one out")
    if s.question is not None and s.context is None and s.context_file is None:
        raise UsageError("--question comes without its text: add --context or --context_file")
    if s.output_file is not None and s.input_file is None:
        raise UsageError("--output_file comes without --input_file: name the file of questions")
    for name in ("context_file", "input_file"):
        path = getattr(s, name)
        if path is not None and not Path(path).is_file():
            raise UsageError(f"--{name} {path}: no such file")
    _check_new_file(s, "output_file")
    _check_new_file(s, "trace")
    for name in ("question", "context"):
        text = getattr(s, name)
        if text is not None and not text.strip():
            raise UsageError(f"--{name} is empty: give its text")
        if text is not None and re.search("[\ud800-\udfff]", text):  # what Python makes of other bytes on a command line (PEP 383)
            raise UsageError(f"--{name} is not valid UTF-8: give its text in that encoding")


def _check_new_file(s: Any, name: str) -> None:
    """That what is written at the end has a place, since hours may lie before it."""
    if getattr(s, name) is None:
        return
    path = Path(getattr(s, name))
    if path.exists() and not path.is_file():
        raise UsageError(f"--{name} {path} is no file that can be replaced: name another")
    if not path.parent.is_dir():
        raise UsageError(f"--{name} {path}: there is no folder {path.parent}; make it, or name another")


def _check_windows(s: ModelSettings) -> None:
    if s.doc_stride >= s.max_seq_length - 4:
        raise UsageError(f"--doc_stride {s.doc_stride} leaves a window of --max_seq_length {s.max_seq_length} no room to move on: "
                         f"use at most {s.max_seq_length // 2}")


def _add_ipu_config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ipu_config", metavar="PATH", help="ipu_config.json, a folder that holds one, or a repository on the hub")


def _reader(kind: type):
    """argparse's `type`: like `kind`, with a refusal that says what would be right."""
    def read(text: str) -> Any:
        if kind is bool:
            if text.lower() in ("true", "yes", "1", "false", "no", "0"):
                return text.lower() in ("true", "yes", "1")
            raise argparse.ArgumentTypeError(f"{text}: it should be true or false")
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: it should be {_article(kind)}") from None
    return read


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""
