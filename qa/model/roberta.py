"""RoBERTa for extractive question answering: forward pass and loss, in operations for an IPU.

The parameters, their names and the saved files are those of Hugging Face's
RobertaForQuestionAnswering. The forward pass is written out here, because an IPU needs fixed
shapes, masks made from the row format, and one callable module for each block.
"""
from __future__ import annotations

from typing import Any, Dict, Optional, Tuple, Union

import torch
from torch import nn
from transformers import RobertaForQuestionAnswering

import ipu_options
from ipu_options import poptorch
from ipu_options.ipu_kernels import MASKED, Kernels


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, with LayerNorm and dropout.

    Position ids come from the row format (qa/data/rows.py); the token type is always 0.
    """

    def __init__(self, embeddings: nn.Module, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.word_embeddings = embeddings.word_embeddings
        self.position_embeddings = embeddings.position_embeddings
        self.token_type_embeddings = embeddings.token_type_embeddings
        self.LayerNorm = embeddings.LayerNorm
        self.dropout = embeddings.dropout
        # PopTorch does not support padding_idx. It is not needed: no loss depends on a padding
        # token, so that its gradient is zero anyway.
        self.word_embeddings.padding_idx = self.position_embeddings.padding_idx = None

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, [B, S, hidden]. input_ids, position_ids: int [B, S]."""
        total = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        return self.kernels.dropout(self.LayerNorm(total + self.token_type_embeddings.weight[0]),
                                    self.dropout.p, self.training)


class EncoderLayer(nn.Module):
    """One post-norm transformer layer (Vaswani et al. 2017).

    Query, key and value are computed by one matrix multiplication. stage: the pipeline stage of the
    layer, which qa/model/parallelize.py sets.
    """

    stage = 0

    def __init__(self, layer: nn.Module, heads: int, kernels: Kernels):
        super().__init__()
        self.attention, self.intermediate, self.output = (layer.attention, layer.intermediate,
                                                          layer.output)
        self.heads, self.kernels = heads, kernels

    def forward(self, hidden: torch.Tensor, window_ids: torch.Tensor,
                masks: Optional[Dict[int, Any]] = None) -> torch.Tensor:
        """Return the output, [B, S, hidden]. hidden: [B, S, hidden]; window_ids: int [B, S].

        masks: {stage: attention mask} of the layers before this one in the same forward pass.

        The first layer of a stage makes the mask and adds it to `masks`. If it were handed on to
        the next stage, its [S, S] numbers would be stashed on every IPU. Within a stage it costs no
        stash: PopART stashes what is produced on the same IPU only at recomputation checkpoints
        (popart, transforms/pipeline.cpp, getStashCandidateTensors), and otherwise makes it again.
        """
        masks = {} if masks is None else masks
        if self.stage not in masks:
            masks[self.stage] = self.kernels.window_mask(window_ids, hidden.dtype)
        out = self.attention.output
        mixed = out.dense(self.self_attention(hidden, masks[self.stage]))
        hidden = out.LayerNorm(hidden + self.kernels.dropout(mixed, out.dropout.p, self.training))
        inner = self.intermediate.intermediate_act_fn(self.intermediate.dense(hidden))
        return self.output.LayerNorm(
            hidden +
            self.kernels.dropout(self.output.dense(inner), self.output.dropout.p, self.training))

    def self_attention(self, hidden: torch.Tensor, mask: Any) -> torch.Tensor:
        """Return the multi-head attention within windows, [B, S, hidden], before its output layer.

        hidden: [B, S, hidden]; mask: of the kernels' window_mask.
        """
        own = self.attention.self
        weight = torch.cat((own.query.weight, own.key.weight, own.value.weight))
        bias = torch.cat((own.query.bias, own.key.bias, own.value.bias))
        batch, length, width = hidden.shape
        # split becomes slices. unbind would become gathers, which PopTorch joins to a single one
        # over three copies of its input (SliceOps.cpp, unbindHandler; GNNOptimizations.cpp).
        fused = nn.functional.linear(hidden, weight, bias).split(width, dim=-1)
        query, key, value = (part.view(batch, length, self.heads, -1).transpose(1, 2)
                             for part in fused)
        mixed = self.kernels.attention(query, key, value, mask, own.dropout.p, self.training)
        return mixed.transpose(1, 2).reshape(batch, length, width)


class RobertaForSpans(RobertaForQuestionAnswering):
    """RobertaForQuestionAnswering over rows of one or several windows.

    qa/data/rows.py describes the row format. kernels: the attention and dropout functions to use;
    by default those for this machine's PopTorch.
    """

    def __init__(self, config, kernels: Optional[Kernels] = None):
        super().__init__(config)
        kernels = kernels or ipu_options.kernels
        encoder = self.roberta.encoder
        self.roberta.embeddings = Embeddings(self.roberta.embeddings, kernels)
        encoder.layer = nn.ModuleList(
            EncoderLayer(layer, config.num_attention_heads, kernels) for layer in encoder.layer)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, window_ids: torch.Tensor,
        start_positions: Optional[torch.Tensor] = None,
        end_positions: Optional[torch.Tensor] = None, loss_weights: Optional[torch.Tensor] = None
    ) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        """Return the logits, or with labels the loss, of a micro-batch of B rows.

        input_ids, position_ids, window_ids: int [B, S]. start_positions, end_positions: int [B, K],
        the labels of up to K windows in a row. loss_weights: [B, K].

        Without labels, returns (start_logits, end_logits), float32 [B, S] each. With labels,
        returns the sum over the windows of loss_weight x (start loss + end loss) / 2, a scalar that
        is marked for PopTorch by identity_loss.
        """
        hidden, masks = self.roberta.embeddings(input_ids, position_ids), {}
        for layer in self.roberta.encoder.layer:
            hidden = layer(hidden, window_ids, masks=masks)
        logits = self.qa_outputs(hidden).float()
        start_logits, end_logits = logits[:, :, 0], logits[:, :, 1]
        if start_positions is None:
            return start_logits, end_logits
        losses = window_losses(start_logits, start_positions, window_ids) + window_losses(
            end_logits, end_positions, window_ids)
        return poptorch.identity_loss((loss_weights * losses).sum() / 2, reduction="none")


def window_losses(logits: torch.Tensor, positions: torch.Tensor,
                  window_ids: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of each window's label over the tokens of that window, [B, K].

    logits: float [B, S]. positions: int [B, K], the labels as indices in the row. window_ids: int
    [B, S], from 1 to K, 0 for padding. Where a row has fewer than K windows, the remaining values
    are finite but have no meaning; their loss weight is 0.
    """
    length, slots = logits.shape[1], positions.shape[1]
    slot = torch.arange(1, slots + 1, dtype=window_ids.dtype, device=window_ids.device).view(
        1, slots, 1)
    own = (window_ids.unsqueeze(1) == slot).to(logits.dtype)
    masked = logits.unsqueeze(1) + (1.0 - own) * MASKED
    losses = nn.functional.cross_entropy(masked.view(-1, length),
                                         positions.reshape(-1).long(), reduction="none")
    return losses.view(-1, slots)
