"""Loads and saves checkpoints in Hugging Face's layout: configuration, tokenizer and model."""
from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

from transformers import AutoConfig, AutoTokenizer

from ipu_options.config import IPUConfig
from ipu_options.errors import RunError, UsageError, first_line
from qa.model.parallelize import weights_of
from qa.model.roberta import RobertaForSpans
from qa.settings import TrainSettings, write_qa_settings

# The model types that share RoBERTa's parameters, with the prefix of their classes in transformers.
# distilroberta has the type "roberta".
FAMILY = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
          "intermediate_size", "max_position_embeddings", "type_vocab_size", "pad_token_id")


def load_config(name_or_path: str, token: Optional[str] = None,
                source: str = "--model_name_or_path"):
    """Return the configuration of a checkpoint of RoBERTa's family, from a folder or the hub.

    token: access token of the hub. source: the flag that names the checkpoint, for error messages.
    No weights are read. Raises UsageError for another architecture or impossible sizes, RunError if
    the checkpoint is not found or cannot be read.
    """
    config = _fetch(AutoConfig, name_or_path, source, token=token, trust_remote_code=False)
    if config.model_type not in FAMILY:
        raise UsageError(
            f"{source} {name_or_path} is a {config.model_type} model; this program fine-tunes "
            f"RoBERTa's family: {', '.join(FAMILY)}")
    for name in _SIZES:
        size, least = getattr(config, name, None), 0 if name == "pad_token_id" else 1
        if type(size) is not int or size < least:
            raise UsageError(
                f"{source} {name_or_path}: {name} is {size!r} in its config.json; it should be a "
                f"whole number from {least} on")
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise UsageError(f"{source} {name_or_path} has {config.position_embedding_type} positions; "
                         "only absolute ones are built")
    return config


def load_tokenizer(name_or_path: str, token: Optional[str] = None,
                   source: str = "--model_name_or_path"):
    """Return the tokenizer of a checkpoint, from a folder or the hub.

    The arguments are those of `load_config`. Raises UsageError unless it is a fast tokenizer, since
    only these give the character offsets of tokens, and RunError if it is not found or cannot be
    read.
    """
    tokenizer = _fetch(AutoTokenizer, name_or_path, source, token=token, use_fast=True,
                       trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer of {name_or_path} is a slow one: answers need the character offsets "
            "of a fast tokenizer (a tokenizer.json file); name one with --tokenizer_name")
    return tokenizer


def load_model(name_or_path: Union[str, Path], model_config, token: Optional[str] = None,
               source: str = "--model_name_or_path") -> RobertaForSpans:
    """Return the model of a checkpoint, from a folder or the hub, in float32.

    model_config: what `load_config` returned; the other arguments are those of `load_config`. If
    the checkpoint has no QA head, it is initialised at random. Raises RunError if the checkpoint is
    not found or cannot be read.
    """
    return _fetch(RobertaForSpans, str(name_or_path), source, config=model_config, token=token)


def save_model(model: RobertaForSpans, folder: Union[str, Path]) -> None:
    """Write config.json and model.safetensors to `folder`.

    AutoModelForQuestionAnswering.from_pretrained can read them. Raises OSError, or what safetensors
    raises in its place.
    """
    model.save_pretrained(folder, state_dict=weights_of(model), safe_serialization=True)
    # Older transformers would write the folder that the model was loaded from.
    model.config._name_or_path = ""
    # save_pretrained has written the name of this program's class, unknown to transformers.
    model.config.architectures = [FAMILY[model.config.model_type] + "ForQuestionAnswering"]
    model.config.save_pretrained(folder)


def write_checkpoint_files(model: RobertaForSpans, tokenizer, ipu_config: IPUConfig,
                           settings: TrainSettings, folder: Union[str, Path]) -> None:
    """Write all that infer.py needs to `folder`.

    This is the model, the tokenizer, ipu_config.json and qa_settings.json. Raises OSError, or what
    safetensors and tokenizers raise in its place.
    """
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    ipu_config.write(folder)
    write_qa_settings(settings, folder)


def _fetch(kind, name_or_path: str, source: str, **options):
    """Return kind.from_pretrained(name_or_path, **options); raises RunError if that fails."""
    try:
        return kind.from_pretrained(name_or_path, **options)
    # transformers, tokenizers and safetensors raise exceptions of their own, a damaged file any.
    except Exception as error:
        where = ("its files cannot be read" if Path(name_or_path).is_dir() else
                 "no such folder, and the hub did not give it")
        raise RunError(
            f"{source} {name_or_path}: {where} ({first_line(error)}); name a local folder with "
            "config.json, model.safetensors and tokenizer.json, or run --config demo, which needs "
            "no download") from error
