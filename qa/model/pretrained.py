"""Loads and saves checkpoints in Hugging Face's layout: configuration, tokenizer and model."""
from __future__ import annotations

import json
import re
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Union

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from ipu_options.config import IPU_CONFIG_NAME, IPUConfig
from qa.data.tokenizer import QATokenizer
from qa.families import check_checkpoint, family_of, folder_and_name, row_kind
from qa.model.parallelize import weights_of
from qa.model.roberta import ForSpans, model_class
from qa.settings import QA_SETTINGS, QA_SETTINGS_NAME, TrainSettings
from runtime.errors import RunError, UsageError
from runtime.files import write_json
from runtime.flags import Settings

# Run no code of a checkpoint, and ask no hub: its files are in a folder already.
_LOCAL = {"trust_remote_code": False, "local_files_only": True}


def load_config(settings: Settings, weights: bool = True):
    """Return transformers' configuration of the checkpoint settings.model_name_or_path.

    weights: whether they are needed, too. Raises what `check_checkpoint` raises, UsageError for an
    unknown activation, and RunError if the checkpoint cannot be read.
    """
    check_checkpoint(settings, weights)
    folder, name = folder_and_name(settings, "model_name_or_path", weights)
    with _explained(name, "config.json"):
        config = AutoConfig.from_pretrained(str(folder), **_LOCAL)
    activation = getattr(config, family_of(config).own_names.get("hidden_act", "hidden_act"))
    if activation not in ACT2FN:
        raise UsageError(f"{name}: its config.json has the activation {activation!r}; it should be "
                         f"one of {', '.join(sorted(ACT2FN))}")
    config.num_labels = 2  # start and end, also if the encoder has been trained to classify
    return config


def load_tokenizer(settings: Settings, model_config) -> QATokenizer:
    """Return the tokenizer that settings.tokenizer_name names, or else the checkpoint's own.

    Raises UsageError unless it suits questions and the model; RunError if it cannot be fetched.
    """
    folder, name = folder_and_name(
        settings, "tokenizer_name" if settings.tokenizer_name else "model_name_or_path", False)
    if (folder / "tokenizer.json").is_file():
        tokenizer = QATokenizer.read(folder, name)
    else:
        _check_tokenizer_files(folder, name)
        with _explained(name, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, **_LOCAL)
        tokenizer = QATokenizer.of(tokenizer, name)
    largest = max(tokenizer.file.get_vocab().values())
    if largest >= model_config.vocab_size:
        raise UsageError(
            f"{name}: its tokenizer has ids up to {largest}, and the model embeddings for "
            f"{model_config.vocab_size} tokens; name the tokenizer that the model was trained "
            "with, by --tokenizer_name")
    if tokenizer.pad_token_id not in (None, model_config.pad_token_id):
        print(f"note: {name}: its tokenizer's padding token has the id {tokenizer.pad_token_id}, "
              f"config.json says {model_config.pad_token_id}, which rows are filled up with",
              file=sys.stderr)
    has_types = tokenizer.token_types and "token_types" in row_kind(model_config)
    return tokenizer._replace(token_types=has_types)  # transformers' model would refuse others


def load_model(settings: Settings, model_config, folder: Optional[Path] = None) -> ForSpans:
    """Return the model of `folder`, or else of settings.model_name_or_path, in float32.

    A QA head that the checkpoint lacks is initialised at random, which a note says. Raises RunError
    if the checkpoint cannot be read, if its weights are not those of its config.json, or if one is
    not finite.
    """
    if folder is None:
        folder, name = folder_and_name(settings, "model_name_or_path", True)
    else:
        name = f"--resume_from_checkpoint {folder}"
    with _explained(name, "model"):
        # Read here, because older transformers refuse files of other programs, without metadata.
        # The attention is that of qa/model/roberta.py, whatever config.json asks of transformers.
        model, info = model_class(model_config).from_pretrained(
            None, config=model_config, state_dict=_read_weights(folder), torch_dtype=torch.float32,
            attn_implementation="eager", ignore_mismatched_sizes=True, output_loading_info=True,
            **_LOCAL)
    _check_loaded(model, info, name)
    for parameter, weight in model.named_parameters():
        if not all_finite(weight):
            raise RunError(f"{name}: {parameter} is not finite; the checkpoint is damaged")
    if any(key.startswith("qa_outputs") for key in info["missing_keys"]):
        print(f"note: {name} has no trained head for question answering; a random one takes its "
              "place", file=sys.stderr)
    return model


def _read_weights(folder: Path) -> Dict[str, torch.Tensor]:
    """Return the tensors of model.safetensors, or of all parts that its index names."""
    files, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        files = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    weights: Dict[str, torch.Tensor] = {}
    for file in sorted(files):
        weights.update(load_file(folder / file))
    return weights


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether all elements are finite: only then their sum is, in a tenth of the time."""
    return bool(tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all())


def save_model(model: ForSpans, folder: Union[str, Path],
               optimizer_state: Optional[Dict[str, Any]] = None) -> None:
    """Write config.json and model.safetensors to `folder`, for transformers' from_pretrained.

    The weights are float32: a program that trains on computes in the file's type unless it is told
    otherwise, and in float16 most updates of a small learning rate are rounded away. Raises
    OSError, or what safetensors raises in its place.
    """
    with _quiet_transformers():
        model.save_pretrained(folder, state_dict=_float32_weights(model, optimizer_state or {}),
                              safe_serialization=True)
        # save_pretrained has written the type in which the model computes, and the name of this
        # program's class, unknown to transformers; older releases also the folder it came from.
        model.config.dtype = model.config.torch_dtype = "float32"  # of transformers 5 and 4
        model.config._name_or_path = ""
        model.config.architectures = [
            MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES[model.config.model_type]]
        model.config.save_pretrained(folder)


def _float32_weights(model: ForSpans, optimizer_state: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """Return the weights under Hugging Face's names.

    An IPU updates float16 weights in float16, with stochastic rounding. poptorch_host updates them
    in float32, unrounded in the optimizer's state unless others were put into the model since.
    """
    unrounded = optimizer_state.get("ipu_state", {})
    weights = {}
    for name, weight in weights_of(model).items():
        weights[name] = unrounded.get(f"Master___{name}", weight).float()
        if not torch.equal(weights[name].to(weight.dtype), weight):
            weights[name] = weight.float()
    return weights


def write_checkpoint_files(model: ForSpans, folder: Union[str, Path],
                           optimizer_state: Dict[str, Any], tokenizer: QATokenizer,
                           ipu_config: IPUConfig, settings: TrainSettings) -> None:
    """Write all that infer.py needs to `folder`. Raises as `save_model` and `tokenizer.save`."""
    save_model(model, folder, optimizer_state)
    tokenizer.save(folder)
    ipu_config.write(Path(folder) / IPU_CONFIG_NAME)
    write_json(Path(folder, QA_SETTINGS_NAME), {name: getattr(settings, name)
                                                for name in QA_SETTINGS})


@contextmanager
def _explained(name: str, part: str) -> Iterator[None]:
    """Silence transformers in the block, and turn its errors into a RunError of one line.

    name: what to call the checkpoint. part: what of it is loaded.
    """
    try:
        with _quiet_transformers():
            yield
    except Exception as error:
        raise RunError(f"{name}: {_cause(error, part)}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers in the block, its bars too; callers report what matters in one line."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_tokenizer_files(folder: Path, name: str) -> None:
    # transformers would name another package, or make a tokenizer that knows nothing.
    pieces = sorted(path.name for path in folder.glob("*.model"))
    if pieces and find_spec("sentencepiece") is None:
        raise RunError(f"{name}: has its tokenizer only in {pieces[0]}, which needs the package "
                       "sentencepiece: pip install sentencepiece protobuf")
    if not pieces and not any((folder / file).is_file() for file in ("vocab.txt", "vocab.json")):
        raise RunError(f"{name}: has no tokenizer.json; name a tokenizer by --tokenizer_name")


def _check_loaded(model: ForSpans, info: Dict[str, Any], name: str) -> None:
    """Raise RunError unless the weights were those that config.json describes.

    A head may be missing. Layers that config.json does not count are left out, with a note.
    """
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        sizes = " and ".join(" x ".join(map(str, shape)) for shape in (stored, wanted))
        if key.startswith("qa_outputs"):
            raise RunError(f"{name}: its head {key} has not 2 outputs, start and end ({sizes}): it "
                           "is not one for extractive question answering; name a checkpoint "
                           "without a head or with such a one")
        raise RunError(f"{name}: {key} has another size than config.json says ({sizes}): the files "
                       "do not belong together")
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("qa_outputs"))
    if missing:
        raise RunError(f"{name}: its weights lack {missing[0]} and {len(missing) - 1} more of what "
                       "its config.json describes: the files do not belong together")
    layers = f"{model.base_model_prefix}.{model.family.layers}."
    if any(key.startswith(layers) for key in info["unexpected_keys"]):
        print(f"note: {name} has weights of more layers than the {len(model.layers)} of its "
              "config.json; they are left out", file=sys.stderr)


def _cause(error: Exception, part: str) -> str:
    text = " ".join(str(error).split())
    package = re.search(r"requires the (\S+) library|No module named '?([\w.]+)|"
                        r"`pip install (\w[\w-]*)", text)
    if package:
        missing = next(group for group in package.groups() if group)
        return f"it needs {missing}, which is not installed: pip install {missing}"
    if isinstance(error, OSError):
        return (f"{text[:200]}; its folder should hold config.json, model.safetensors and "
                "tokenizer.json")
    return f"its {part} cannot be loaded ({type(error).__name__}: {text[:200]})"
