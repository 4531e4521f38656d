"""Checks of settings that concern several of them, or files: made before any work starts."""
from __future__ import annotations

import fnmatch
import logging
import os
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime import processes
from runtime.errors import UsageError
from runtime.flags import Settings

log = logging.getLogger(__name__)
# Files that a checkpoint consists of, over which nothing else may be written.
_OF_A_CHECKPOINT = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
_TABLES = "name a JSON, JSON Lines, CSV or Parquet file"
# Above this a learning rate is a mistake: fine-tuning takes 1e-5 to 1e-4 (Devlin et al. 2019,
# appendix A.3; Liu et al. 2019, table 10), and even LAMB's largest batches less (You et al. 2020).
LARGEST_RATE = 0.01
# Settings that do nothing without one of others; named only where the command line gives them.
_NEED = {
    "hub_model_id": ("push_to_hub",), "hub_private_repo": ("push_to_hub",),
    "save_total_limit": ("save_steps", "load_best_model_at_end"), "host": ("web",),
    "port": ("web",), "metric_for_best_model": ("load_best_model_at_end",),
    "null_score_diff_threshold": ("version_2_with_negative",)}


def check_train(settings: Any) -> None:
    """Raise UsageError for settings of train.py that exclude each other or name missing files."""
    source = settings.source
    _check_windows(settings)
    _check_output(settings, "trace")
    _check_needs(settings)
    _check_data(settings)
    if Path(settings.output_dir).exists() and not Path(settings.output_dir).is_dir():
        raise UsageError(f"{source('output_dir')} {settings.output_dir} is a file: name a folder")
    if settings.learning_rate > LARGEST_RATE and settings.trains and processes.is_first():
        log.warning("warning: %s %g destroys a model: fine-tuning takes 1e-05 to 0.0001",
                    source("learning_rate"), settings.learning_rate)
    resume = settings.resume_from_checkpoint
    if resume not in (None, "auto") and not Path(resume).is_dir():
        raise UsageError(
            f"{source('resume_from_checkpoint')} {resume}: no such folder; name a checkpoint "
            "folder, or auto")
    for one, other, why in (
            ("compile_only", "synthetic_data", "what is only compiled runs on no data"),
            ("synthetic_data", "resume_from_checkpoint", "such a run is only timed")):
        if getattr(settings, one) and getattr(settings, other):
            raise UsageError(f"{source(one)} and {source(other)} exclude each other: {why}; leave "
                             "one out")
    if set(settings.report_to) > {"none"}:
        raise UsageError(f"{source('report_to')} {' '.join(settings.report_to)}: none excludes "
                         "the others; leave it out")
    for package in settings.report_to:
        if package != "none" and find_spec(package) is None:
            raise UsageError(f"{source('report_to')} {package} needs the package {package}: pip "
                             f"install {package}, or leave it out")
    if settings.on_nonfinite == "skip" and not settings.save_steps:
        raise UsageError(f"{source('on_nonfinite')} skip goes back to a checkpoint: save some with "
                         "--save_steps")
    for name in ("load_best_model_at_end", "eval_steps", "evaluate_every_epoch"):
        if settings.sources.get(name) == f"--{name}" and getattr(
                settings, name) and not settings.evaluates:
            raise UsageError(f"--{name} does nothing in a run that only trains: add --do_eval")
    if settings.load_best_model_at_end and not (settings.eval_steps
                                                or settings.evaluate_every_epoch):
        raise UsageError(f"{source('load_best_model_at_end')} has only the last model to choose "
                         "from: add --eval_steps or --evaluate_every_epoch")


def check_clipping(settings: Any, ipu_config: Any) -> None:
    """Raise UsageError for a --max_grad_norm that an IPU could not keep, or not exactly.

    Of PopTorch's optimizers, LAMB takes no max_grad_norm (python/optim.py). PopART computes the
    norm in the type of the gradient that goes into the moments. It casts a float16 gradient to
    float32 only if both moments are float32 (popart, patterns/adamdecompose.cpp); in float16 a sum
    of squares beyond 65,504 would overflow.
    """
    clips = f"{settings.source('max_grad_norm')} {settings.max_grad_norm}"
    if settings.max_grad_norm is None:
        return
    if settings.optimizer == "lamb":
        raise UsageError(f"{clips}: PopTorch's LAMB has no clipping; use --optimizer adamw")
    if settings.precision == "float16" and ipu_config.enable_half_first_order_momentum:
        raise UsageError(
            f"{clips}: with {ipu_config.source('enable_half_first_order_momentum')} an IPU would "
            "compute the norm in float16, where it overflows; add "
            "--enable_half_first_order_momentum false")


def _check_data(settings: Any) -> None:
    source = settings.source
    for name in ("train_file", "validation_file", "test_file"):
        path = getattr(settings, name)
        if path is not None and not Path(path).is_file():
            what = "is a folder" if Path(path).is_dir() else "does not exist"
            raise UsageError(f"{source(name)} {path} {what}: {_TABLES}")
    files = settings.train_file or settings.validation_file
    if settings.train_file and not settings.validation_file and settings.evaluates:
        raise UsageError(
            f"{source('train_file')} comes without --validation_file: name the questions to "
            "evaluate on as well")
    if settings.validation_file and not settings.train_file and settings.trains:
        raise UsageError(
            f"{source('validation_file')} comes without --train_file: name the questions to train "
            "on as well, or evaluate only, with --do_eval")
    if settings.demo_data and files:
        raise UsageError(
            f"{source('demo_data')} and {source('train_file')} exclude each other: the demo makes "
            "its own questions; leave one out")
    if files and settings.sources.get("dataset_name") == "--dataset_name":
        raise UsageError("--dataset_name does nothing beside --train_file and --validation_file: "
                         "leave it out")


def check_infer(settings: Any) -> None:
    """Raise UsageError for settings of infer.py that exclude each other or name missing files."""
    _check_windows(settings)
    _check_needs(settings)
    check_questions(settings)


def check_questions(settings: Any) -> None:
    """Raise UsageError for questions of infer.py that are incomplete or in missing files."""
    for one, other in (("context", "context_file"), ("question", "input_file")):
        if getattr(settings, one) is not None and getattr(settings, other) is not None:
            raise UsageError(f"--{one} and --{other} exclude each other: leave one out")
    if settings.web:
        for name in ("question", "input_file"):
            if getattr(settings, name) is not None:
                raise UsageError(f"--web and --{name} exclude each other: leave one out")
        check_page("--web", settings.host, settings.port)
    if settings.question is not None and settings.context is None and settings.context_file is None:
        raise UsageError("--question comes without its text: add --context or --context_file")
    if processes.count() > 1 and settings.input_file is None:
        raise UsageError("only the questions of an --input_file can be shared out over processes: "
                         "name one, or start a single process")
    if settings.output_file is not None and settings.input_file is None:
        raise UsageError("--output_file comes without --input_file: name the file of questions")
    for name in ("context_file", "input_file"):
        path = getattr(settings, name)
        if path is not None and not Path(path).is_file():
            raise UsageError(f"--{name} {path}: no such file")
    _check_output(settings, "output_file")
    _check_output(settings, "trace")
    for name in ("question", "context"):
        text = getattr(settings, name)
        if text is None:
            continue
        if not text.strip():
            raise UsageError(f"--{name} is empty: give its text")
        try:  # Python represents the bytes that its locale has no name for by surrogates (PEP 383)
            setattr(settings, name, text.encode("utf-8", "surrogateescape").decode("utf-8"))
        except UnicodeError:
            raise UsageError(f"--{name} is not valid UTF-8: give its text in that "
                             f"encoding") from None


def check_page(what: str, host: str, port: int) -> None:
    """Raise UsageError if `what` cannot serve its page on host:port.

    It is found out early, because to load or to count a model takes seconds.
    """
    if find_spec("dash") is None:
        raise UsageError(f"{what} needs the package dash: pip install -r requirements-pages.txt")
    listen(host, port).close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on host:port. Raises UsageError if that cannot be had."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        where = f"--port {port}" if host == "127.0.0.1" else f"--host {host} --port {port}"
        raise UsageError(f"{where}: cannot listen there ({error.strerror}); choose another port, "
                         "or 0 for any that is free") from error


def read_text(path: str) -> str:
    """Return the content of --context_file. Raises UsageError if it is not text, or empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--context_file {path}: not readable as UTF-8 text ({error})") from error
    if not text.strip():
        raise UsageError(f"--context_file {path}: is empty; it should hold the text to look in")
    return text


def check_row_length(settings: Any, most: int) -> None:
    """Raise UsageError unless the model's `most` positions suffice for max_seq_length tokens."""
    if settings.max_seq_length > most:
        raise UsageError(
            f"{settings.source('max_seq_length')} {settings.max_seq_length}: "
            f"{settings.model_name_or_path} has positions for {most} tokens; use at most {most}")


def assume_row_shape(settings: Any, most: int) -> None:
    """Set what is not given of max_seq_length and doc_stride, for windows of up to `most` tokens.

    They get their usual values, or less: a model that train.py has not written does not say.
    """
    if "max_seq_length" not in settings.sources:
        settings.max_seq_length = min(settings.max_seq_length, most)
    if "doc_stride" not in settings.sources:
        settings.doc_stride = min(settings.doc_stride, settings.max_seq_length // 3)


def _check_needs(settings: Settings) -> None:
    """Raise UsageError for a flag that does nothing without another one."""
    for name, others in _NEED.items():
        if settings.sources.get(name) == f"--{name}" and not any(
                getattr(settings, other, True) for other in others):
            raise UsageError(f"--{name} {getattr(settings, name)} does nothing without "
                             f"--{' or --'.join(others)}: add it")


def _check_output(settings: Settings, name: str) -> None:
    """Raise UsageError unless the file that the setting `name` names may be written.

    It is written at the end of a run, perhaps after hours: an unsuitable path must be found early.
    """
    if getattr(settings, name) is None:
        return
    path, source = Path(getattr(settings, name)), settings.source(name)
    if path.is_dir():
        raise UsageError(f"{source} {path} is no file that can be replaced: name another")
    if not path.parent.is_dir():
        raise UsageError(
            f"{source} {path}: there is no folder {path.parent}; make it, or name another")
    if not path.exists():
        return
    for other in ("train_file", "validation_file", "test_file", "input_file", "context_file"):
        given = getattr(settings, other, None)
        if given is not None and os.path.samefile(given, path):
            raise UsageError(f"{source} {path} is the file that --{other} reads: name another")
    folder = getattr(settings, "checkpoint", None) or getattr(settings, "model_name_or_path", "")
    if (os.path.isdir(folder) and os.path.samefile(folder, path.resolve().parent)
            and any(fnmatch.fnmatch(path.name, pattern) for pattern in _OF_A_CHECKPOINT)):
        raise UsageError(f"{source} {path} belongs to the checkpoint: name another")


def _check_windows(settings: Any) -> None:
    """Raise UsageError unless each window of a long context begins after the one before it."""
    length, stride = settings.max_seq_length, settings.doc_stride
    if stride >= length - 4:
        raise UsageError(
            f"{settings.source('doc_stride')} {stride} leaves a window of "
            f"{settings.source('max_seq_length')} {length} no room to move on: "
            f"use at most {length // 2}")
