"""Loads and saves checkpoints in Hugging Face's layout: configuration, tokenizer and model."""
from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Optional, Union

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from ipu_options.bars import in_terminal
from ipu_options.config import IPUConfig
from ipu_options.errors import RunError, UsageError, first_line
from ipu_options.flags import Settings
from ipu_options.hub import checkpoint_folder
from qa.checks import assume_row_shape, check_row_length
from qa.data.windows import check_tokenizer
from qa.model.families import SIZES, family_of, most_tokens
from qa.model.parallelize import weights_of
from qa.model.roberta import ForSpans, model_class
from qa.settings import TrainSettings, write_qa_settings

if not in_terminal():  # a bar would fill a file with lines
    transformers_logging.disable_progress_bar()


def load_config(settings: Settings, weights: bool = True):
    """Return the configuration of the checkpoint that settings.model_name_or_path names.

    It is a local folder or a name on the hub. weights: whether they are needed as well, in
    safetensors. Raises UsageError for another architecture, for sizes that no model has, for
    weights in other formats only, and if the model has too few positions for max_seq_length;
    RunError if the checkpoint cannot be fetched.

    The settings of infer.py for a checkpoint without qa_settings.json get a row length that the
    model has positions for, and what was assumed is said in one line.
    """
    name, source = settings.model_name_or_path, settings.source("model_name_or_path")
    config = _fetch(AutoConfig, settings, name, weights)
    family = family_of(config, f"{source} {name}")
    for field in family.sizes:
        size, least = getattr(config, field, None), SIZES.get(field, 1)
        if type(size) is not int or size < least:
            raise UsageError(f"{source} {name}: {field} is {size!r} in its config.json; it should "
                             f"be a whole number from {least} on")
    for field in family.fractions:
        number = getattr(config, field, 0.0)
        if type(number) not in (int, float) or not 0 <= number < 1:
            raise UsageError(f"{source} {name}: {field} is {number!r} in its config.json; it "
                             "should be a number from 0 to 1")
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise UsageError(f"{source} {name} has {config.position_embedding_type} positions; "
                         "only absolute ones are built")
    most = most_tokens(config)
    if getattr(settings, "assumed", None):
        assume_row_shape(settings, most)
        print(f"note: {name} has no {settings.assumed}; taken: {settings.assumption()}; flags "
              "change that", file=sys.stderr)
    check_row_length(settings, most)
    return config


def load_tokenizer(settings: Settings, model_config):
    """Return the tokenizer that settings.tokenizer_name names, or else the checkpoint's own.

    Raises UsageError unless it is a fast one that joins two texts with special tokens and knows
    fewer tokens than the model has embeddings; RunError if it cannot be fetched.
    """
    kind = "tokenizer_name" if settings.tokenizer_name else "model_name_or_path"
    name, source = getattr(settings, kind), settings.source(kind)
    tokenizer = _fetch(AutoTokenizer, settings, name, weights=False, kind=kind, use_fast=True)
    check_tokenizer(tokenizer, f"{source} {name}")
    largest = max(tokenizer.get_vocab().values())
    if largest >= model_config.vocab_size:
        raise UsageError(
            f"{source} {name}: its tokenizer has ids up to {largest}, and the model embeddings for "
            f"{model_config.vocab_size} tokens; name the tokenizer that the model was trained "
            "with, by --tokenizer_name")
    return tokenizer


def load_model(settings: Settings, model_config, folder: Optional[Path] = None) -> ForSpans:
    """Return the model of `folder`, or else of settings.model_name_or_path, in float32.

    model_config: the return value of `load_config`. A QA head that the checkpoint lacks is
    initialised at random, which is said in one line. Raises RunError if the checkpoint cannot be
    had or read, or if one of its weights is not finite.
    """
    name, source = str(folder or settings.model_name_or_path), settings.source("model_name_or_path")
    model, found = _fetch(model_class(model_config), settings, name, config=model_config,
                          output_loading_info=True)
    for parameter, weight in model.named_parameters():
        if not all_finite(weight):
            raise RunError(f"{source} {name}: {parameter} is not finite; the checkpoint is damaged")
    if any(key.startswith("qa_outputs") for key in found["missing_keys"]):
        print(f"note: {name} has no trained head for question answering; a random one takes its "
              "place", file=sys.stderr)
    return model


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether all elements of a floating-point tensor are finite.

    Their sum is finite only if they are, and takes a tenth of the time.
    """
    return bool(tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all())


def save_model(model: ForSpans, folder: Union[str, Path]) -> None:
    """Write config.json and model.safetensors to `folder`.

    AutoModelForQuestionAnswering.from_pretrained can read them. Raises OSError, or what safetensors
    raises in its place.
    """
    model.save_pretrained(folder, state_dict=weights_of(model), safe_serialization=True)
    # Older transformers would write the folder that the model was loaded from.
    model.config._name_or_path = ""
    # save_pretrained has written the name of this program's class, unknown to transformers.
    kind = model.config.model_type
    model.config.architectures = [MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES[kind]]
    model.config.save_pretrained(folder)


def write_checkpoint_files(model: ForSpans, tokenizer, ipu_config: IPUConfig,
                           settings: TrainSettings, folder: Union[str, Path]) -> None:
    """Write all that infer.py needs to `folder`.

    This is the model, the tokenizer, ipu_config.json and qa_settings.json. Raises OSError, or what
    safetensors and tokenizers raise in its place.
    """
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    ipu_config.write(folder)
    write_qa_settings(settings, folder)


def _fetch(loader, settings: Settings, name: str, weights: bool = True,
           kind: str = "model_name_or_path", **options):
    """Return loader.from_pretrained(name) without running code of the checkpoint.

    weights: whether the checkpoint has to have some. kind: the setting that the name came from.
    Raises UsageError for weights in other formats than safetensors; RunError, which begins with the
    cause.
    """
    revision = settings.model_revision if kind == "model_name_or_path" else "main"
    folder = checkpoint_folder(name, settings.source(kind), revision, settings.hub_token,
                               getattr(settings, "cache_dir", None), weights)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it has to say is said here, in one line
    try:
        return loader.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True,
                                      **options)
    # transformers, tokenizers and safetensors raise errors of their own, and a damaged file may
    # cause any other.
    except Exception as error:
        raise RunError(f"{settings.source(kind)} {name}: {_cause(error)}") from error
    finally:
        transformers_logging.set_verbosity(level)


def _cause(error: Exception) -> str:
    """Return why a checkpoint could not be loaded, and what to do about it, in one line."""
    text = " ".join(str(error).split())
    package = re.search(r"requires the (\S+) library|No module named '?([\w.]+)|"
                        r"`pip install ([\w-]+)", text)
    if package or isinstance(error, ImportError):
        missing = next((group for group in package.groups() if group), "a package") if package \
            else getattr(error, "name", None) or "a package"
        return f"it needs {missing}, which is not installed: pip install {missing}"
    if "size mismatch" in text:
        which = re.search(r"size mismatch for (\S+?):?\s", text)
        return (f"{which.group(1) if which else 'a weight'} has another size than config.json "
                "says: the files do not belong together")
    return (f"{first_line(error)[:200]}; its folder should hold config.json, model.safetensors "
            "and tokenizer.json")
