"""Checkpoints in Hugging Face's layout: the configuration, the tokenizer and the model, loaded and
saved.
"""
from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

from transformers import AutoConfig, AutoTokenizer

from ipu_options.config import IPUConfig
from ipu_options.errors import RunError, UsageError, first_line
from qa.model.parallelize import weights_of
from qa.model.roberta import RobertaForSpans
from qa.settings import TrainSettings, write_qa_settings

# Architectures that share RoBERTa's parameters (distilroberta is "roberta"), with the prefix of
# their classes in transformers.
FAMILY = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
          "intermediate_size", "max_position_embeddings", "type_vocab_size", "pad_token_id")


def load_config(name_or_path: str, token: Optional[str] = None,
                source: str = "--model_name_or_path"):
    """The configuration of a checkpoint of RoBERTa's family, from a local folder or the hub. No
    weights are read.

    source: the flag that names the checkpoint, for messages. Raises UsageError for another
    architecture or for sizes that no model has, RunError where the checkpoint cannot be had.
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
                f"{source} {name_or_path}: {name} is {size!r} in its config.json; it should be a whole number "
                f"from {least} on")
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise UsageError(f"{source} {name_or_path} has {config.position_embedding_type} positions; "
                         "only absolute ones are built")
    return config


def load_tokenizer(name_or_path: str, token: Optional[str] = None,
                   source: str = "--model_name_or_path"):
    """The tokenizer of a checkpoint, from a local folder or the hub.

    Raises UsageError unless it is a fast one, which alone knows the characters that its tokens
    stand for, and RunError where it cannot be had.
    """
    tokenizer = _fetch(AutoTokenizer, name_or_path, source, token=token, use_fast=True,
                       trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer of {name_or_path} is a slow one: answers need the character offsets of a fast tokenizer "
            "(a tokenizer.json file); name one with --tokenizer_name")
    return tokenizer


def load_model(name_or_path: Union[str, Path], model_config, token: Optional[str] = None,
               source: str = "--model_name_or_path",
               ) -> RobertaForSpans:
    """A model from a local folder or the hub, in float32. A QA head that the checkpoint does not
    have is initialised at random.

    model_config: what `load_config` gave.  Raises RunError where the checkpoint cannot be had or
    read.
    """
    return _fetch(RobertaForSpans, str(name_or_path), source, config=model_config, token=token)


def save_model(model: RobertaForSpans, folder: Union[str, Path]) -> None:
    """Write config.json and model.safetensors to `folder`, as
    AutoModelForQuestionAnswering.from_pretrained reads them.
    """
    model.save_pretrained(folder, state_dict=weights_of(model), safe_serialization=True)
    model.config._name_or_path = ""  # older transformers write the folder that the model came from
    # save_pretrained has written the name of this program's class, which transformers does not
    # know.
    model.config.architectures = [FAMILY[model.config.model_type] + "ForQuestionAnswering"]
    model.config.save_pretrained(folder)


def write_checkpoint_files(model: RobertaForSpans, tokenizer, ipu_config: IPUConfig,
                           settings: TrainSettings, folder: Union[str, Path],
                           ) -> None:
    """Write all that infer.py needs to `folder`: model, tokenizer, ipu_config.json and
    qa_settings.json.

    Raises OSError, or what safetensors and tokenizers raise in its place.
    """
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    ipu_config.write(folder)
    write_qa_settings(settings, folder)


def _fetch(kind, name_or_path: str, source: str, **options):
    try:
        return kind.from_pretrained(name_or_path, **options)
    except Exception as error:  # transformers, tokenizers and safetensors raise their own kinds, a damaged file any other
        where = "its files cannot be read" if Path(
            name_or_path).is_dir() else "no such folder, and the hub did not give it"
        raise RunError(
            f"{source} {name_or_path}: {where} ({first_line(error)}); name a local folder with config.json, "
            "model.safetensors and tokenizer.json, or run --config demo, which needs no download"
        ) from error
