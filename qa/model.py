"""RoBERTa for extractive question answering, as a pipeline of poptorch blocks.

The parameters, their names and the saved files are Hugging Face's own (RobertaForQuestionAnswering); the forward pass is
written out here, because an IPU needs fixed shapes, masks from the row format and one callable module for each block.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, RobertaForQuestionAnswering

from ipu_options import kernels, poptorch
from ipu_options.errors import RunError, UsageError, first_line
from ipu_options.ipu_kernels import MASKED
from ipu_options.layout import Layout

# Gradients flow back to the embedding last: what is not finite anywhere in a backward pass arrives in this small one too.
LAST_GRADIENT = "roberta.embeddings.LayerNorm.bias"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
          "type_vocab_size", "pad_token_id")
FAMILY = ("roberta", "xlm-roberta", "camembert")  # architectures that share RoBERTa's parameters; distilroberta is "roberta"


class Embeddings(nn.Module):
    """Word + position + token type embedding. The position ids come from the row format, the token type is always 0."""

    def __init__(self, embeddings: nn.Module):
        super().__init__()
        self.word_embeddings = embeddings.word_embeddings
        self.position_embeddings = embeddings.position_embeddings
        self.token_type_embeddings = embeddings.token_type_embeddings
        self.LayerNorm = embeddings.LayerNorm
        self.dropout = embeddings.dropout
        # PopTorch does not support padding_idx. No loss depends on a padding token, so its gradient is zero without it too.
        self.word_embeddings.padding_idx = self.position_embeddings.padding_idx = None

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """input_ids, position_ids: int [B, S]. Returns [B, S, hidden]."""
        total = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        return kernels.dropout(self.LayerNorm(total + self.token_type_embeddings.weight[0]), self.dropout.p, self.training)


class EncoderLayer(nn.Module):
    """One post-norm transformer layer (Vaswani et al. 2017) with query, key and value in one matrix multiplication."""

    def __init__(self, layer: nn.Module, heads: int):
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output
        self.heads = heads

    def forward(self, hidden: torch.Tensor, window_ids: torch.Tensor) -> torch.Tensor:
        """hidden: [B, S, hidden]; window_ids: int [B, S]. The mask is made in every layer, since a [S, S] mask handed from
        stage to stage would be stashed on every IPU. Returns [B, S, hidden]."""
        out = self.attention.output
        mixed = out.dense(self.self_attention(hidden, window_ids))
        hidden = out.LayerNorm(hidden + kernels.dropout(mixed, out.dropout.p, self.training))
        inner = self.intermediate.intermediate_act_fn(self.intermediate.dense(hidden))
        return self.output.LayerNorm(hidden + kernels.dropout(self.output.dense(inner), self.output.dropout.p, self.training))

    def self_attention(self, hidden: torch.Tensor, window_ids: torch.Tensor) -> torch.Tensor:
        """Multi-head attention within windows; query, key and value by one fused projection. [B, S, hidden] -> the same."""
        own = self.attention.self
        weight = torch.cat((own.query.weight, own.key.weight, own.value.weight))
        bias = torch.cat((own.query.bias, own.key.bias, own.value.bias))
        batch, length, width = hidden.shape
        fused = nn.functional.linear(hidden, weight, bias).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        mixed = kernels.attention(query, key, value, window_ids, own.dropout.p, self.training)
        return mixed.transpose(1, 2).reshape(batch, length, width)


class RobertaForSpans(RobertaForQuestionAnswering):
    """RobertaForQuestionAnswering over rows of one or several windows (the row format is described in qa/rows.py)."""

    def __init__(self, config):
        super().__init__(config)
        encoder = self.roberta.encoder
        self.roberta.embeddings = Embeddings(self.roberta.embeddings)
        encoder.layer = nn.ModuleList(EncoderLayer(layer, config.num_attention_heads) for layer in encoder.layer)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, window_ids: torch.Tensor,
                start_positions: Optional[torch.Tensor] = None, end_positions: Optional[torch.Tensor] = None,
                loss_weights: Optional[torch.Tensor] = None) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        """input_ids, position_ids, window_ids: int [B, S]; start_positions, end_positions: int [B, K]; loss_weights: [B, K].

        Without labels returns (start_logits, end_logits), float32 [B, S] each. With labels returns the micro-batch's loss,
        the sum over its windows of loss_weight x (start loss + end loss) / 2, marked for PopTorch by identity_loss.
        """
        hidden = self.roberta.embeddings(input_ids, position_ids)
        for layer in self.roberta.encoder.layer:
            hidden = layer(hidden, window_ids)
        logits = self.qa_outputs(hidden).float()
        start_logits, end_logits = logits[:, :, 0], logits[:, :, 1]
        if start_positions is None:
            return start_logits, end_logits
        losses = window_losses(start_logits, start_positions, window_ids) + window_losses(end_logits, end_positions, window_ids)
        return poptorch.identity_loss((loss_weights * losses).sum() / 2, reduction="none")


def window_losses(logits: torch.Tensor, positions: torch.Tensor, window_ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each window's position over that window's own tokens.

    logits: float [B, S]; positions: int [B, K], indices in the row; window_ids: int [B, S], 1..K. Returns [B, K]; an empty
    slot gives a finite number that means nothing (its loss weight is 0).
    """
    length, slots = logits.shape[1], positions.shape[1]
    slot = torch.arange(1, slots + 1, dtype=window_ids.dtype, device=window_ids.device).view(1, slots, 1)
    own = (window_ids.unsqueeze(1) == slot).to(logits.dtype)
    masked = logits.unsqueeze(1) + (1.0 - own) * MASKED
    losses = nn.functional.cross_entropy(masked.view(-1, length), positions.reshape(-1).long(), reduction="none")
    return losses.view(-1, slots)


class SerializedEmbedding(nn.Module):
    """An embedding kept and looked up in parts, so that the gradient of one part is live at a time.

    `weights_of` and `set_weights` join and split it: checkpoints do not depend on the number of parts.
    """

    def __init__(self, embedding: nn.Embedding, parts: int):
        super().__init__()
        self.rows = math.ceil(embedding.num_embeddings / parts)
        self.parts = nn.ParameterList(nn.Parameter(part.detach().clone()) for part in embedding.weight.split(self.rows))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int [B, S] -> [B, S, hidden]: each part contributes the rows it holds, and zeros for all others."""
        total = None
        for i, part in enumerate(self.parts):
            local = input_ids - i * self.rows
            inside = torch.logical_and(local >= 0, local < part.shape[0])
            found = nn.functional.embedding(local * inside.to(local.dtype), part) * inside.unsqueeze(-1).to(part.dtype)
            total = found if total is None else total + found
        return total

    def to_embedding(self) -> nn.Embedding:
        """The whole embedding again."""
        return nn.Embedding.from_pretrained(torch.cat([part.detach() for part in self.parts]), freeze=False)


@dataclass(frozen=True)
class Block:
    """One poptorch block: its name, the IPU it is on, and the module whose call begins it."""

    name: str
    ipu: int
    module: nn.Module


def annotate(model: RobertaForSpans, layout: Layout, *, recompute_checkpoint_every_layer: bool = True,
             embedding_serialization_factor: int = 1) -> List[Block]:
    """Put each block of `model` on the IPU that `layout` names; returns the blocks in the order of execution.

    Serialises the word embedding, keeps each layer's output as a recomputation checkpoint, and gives the embedding's
    LayerNorm an outlining attribute of its own: outlined together with the encoder's it would be laid out for them, which
    spoils the tile mapping of the stashes. Annotations of an earlier call are taken off first.
    """
    remove_annotations(model)
    embeddings = model.roberta.embeddings
    if embedding_serialization_factor > 1:
        embeddings.word_embeddings = SerializedEmbedding(embeddings.word_embeddings, embedding_serialization_factor)
    handles = _outline(embeddings.LayerNorm, "embedding")
    modules = [embeddings, *model.roberta.encoder.layer, model.qa_outputs]
    if recompute_checkpoint_every_layer:
        handles += [layer.register_forward_hook(_checkpoint_output) for layer in model.roberta.encoder.layer]
    blocks = [Block(name, ipu, module) for (name, ipu), module in zip(layout.blocks(), modules)]
    for block in blocks:
        poptorch.BeginBlock(block.module, block.name, ipu_id=block.ipu)
    model.annotation_handles = handles
    return blocks


def remove_annotations(model: RobertaForSpans) -> None:
    """Take off all that `annotate` added; the model is then plain PyTorch again."""
    for handle in model.__dict__.pop("annotation_handles", []):
        handle.remove()
    poptorch.removeBlocks(model)
    embeddings = model.roberta.embeddings
    if isinstance(embeddings.word_embeddings, SerializedEmbedding):
        embeddings.word_embeddings = embeddings.word_embeddings.to_embedding()


def load_config(name_or_path: str, token: Optional[str] = None):
    """The configuration of a checkpoint of RoBERTa's family, from a local folder or the hub (no weights are read).

    Raises UsageError for another architecture or for sizes that no model has, RunError where the checkpoint cannot be had.
    """
    config = _fetch(AutoConfig, name_or_path, token=token, trust_remote_code=False)
    if config.model_type not in FAMILY:
        raise UsageError(f"--model_name_or_path {name_or_path} is a {config.model_type} model; this program fine-tunes "
                         f"RoBERTa's family: {', '.join(FAMILY)}")
    for name in _SIZES:
        size, least = getattr(config, name, None), 0 if name == "pad_token_id" else 1
        if type(size) is not int or size < least:
            raise UsageError(f"--model_name_or_path {name_or_path}: {name} is {size!r} in its config.json; it should be a whole number "
                             f"from {least} on")
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise UsageError(f"--model_name_or_path {name_or_path} has {config.position_embedding_type} positions; "
                         "only absolute ones are built")
    return config


def load_tokenizer(name_or_path: str, token: Optional[str] = None):
    """The checkpoint's tokenizer; UsageError unless it is a fast one, which alone knows the characters of its tokens."""
    tokenizer = _fetch(AutoTokenizer, name_or_path, token=token, use_fast=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UsageError(f"the tokenizer of {name_or_path} is a slow one: answers need the character offsets of a fast tokenizer "
                         "(a tokenizer.json file); name one with --tokenizer_name")
    return tokenizer


def load_model(name_or_path: str, config=None, token: Optional[str] = None) -> RobertaForSpans:
    """A checkpoint of RoBERTa's family, from a local folder or the hub, in float32; a missing QA head is initialised.

    config: what `load_config` gave, to be read once.  Raises as `load_config` does.
    """
    return _fetch(RobertaForSpans, name_or_path, config=config or load_config(name_or_path, token), token=token)


def _fetch(kind, name_or_path: str, **options):
    try:
        return kind.from_pretrained(name_or_path, **options)
    except Exception as error:  # of transformers, tokenizers and safetensors, or whatever a damaged file led them to
        where = "its files cannot be read" if Path(name_or_path).is_dir() else "no such folder, and the hub did not give it"
        raise RunError(f"--model_name_or_path {name_or_path}: {where} ({first_line(error)}); name a local folder with config.json, "
                       "model.safetensors and tokenizer.json, or run --config demo, which needs no download") from error


WORD_EMBEDDING = "roberta.embeddings.word_embeddings."


def weights_of(model: RobertaForSpans) -> Dict[str, torch.Tensor]:
    """The model's state_dict under Hugging Face's names, a serialised word embedding joined to one tensor.

    A function and no state_dict hook, because PopTorch reads state_dict while the parameters are on the device.
    """
    weights = dict(model.state_dict())
    parts = sorted((name for name in weights if name.startswith(WORD_EMBEDDING + "parts.")), key=lambda name: int(name.split(".")[-1]))
    if parts:
        weights[WORD_EMBEDDING + "weight"] = torch.cat([weights.pop(name) for name in parts])
    return weights


def set_weights(model: RobertaForSpans, weights: Dict[str, torch.Tensor]) -> None:
    """Load what `weights_of` gave, whatever the number of parts of either model's word embedding."""
    words = model.roberta.embeddings.word_embeddings
    if isinstance(words, SerializedEmbedding):
        weights = dict(weights)
        for i, part in enumerate(weights.pop(WORD_EMBEDDING + "weight").split(words.rows)):
            weights[f"{WORD_EMBEDDING}parts.{i}"] = part
    model.load_state_dict(weights)


def save_model(model: RobertaForSpans, folder: Union[str, Path]) -> None:
    """Write `folder` in Hugging Face's layout (config.json, model.safetensors), to be loaded by AutoModelForQuestionAnswering."""
    model.save_pretrained(folder, state_dict=weights_of(model), safe_serialization=True)
    prefix = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}[model.config.model_type]
    model.config._name_or_path = ""  # older transformers write the folder that the model came from
    model.config.architectures = [prefix + "ForQuestionAnswering"]  # save_pretrained has put this program's class name
    model.config.save_pretrained(folder)


def _outline(module: nn.Module, name: str) -> list:
    attribute = poptorch.Attribute(__outline={"layer": name})

    def begin(*unused):
        attribute.__enter__()

    def end(*unused):
        attribute.__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def _checkpoint_output(module, inputs, output):
    return poptorch.recomputationCheckpoint(output)
