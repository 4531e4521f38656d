"""RoBERTa for extractive question answering: forward pass and loss, in operations for an IPU.

The parameters, their names and the saved files are those of Hugging Face's
RobertaForQuestionAnswering. The forward pass is written out here, because an IPU needs fixed
shapes, masks made from the row format, and one callable module for each block.

BERT, DistilBERT, ELECTRA and DeBERTa run through the same code, which finds their parts by the
tables in qa/families.py. What DeBERTa's attention has beyond theirs is in qa/model/deberta.py.
"""
from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import Any, Dict, Optional, Tuple, Type, Union

import torch
import transformers
from torch import nn
from transformers import activations

import ipu_options
from ipu_options import poptorch
from ipu_options.ipu_kernels import MASKED, Kernels
from qa.families import ROBERTA, LayerParts, family_of
from qa.model import deberta

# GELU's approximation by tanh in six operations. PopTorch makes one of nn.GELU (ActivationOps.cpp,
# geluHandler); the constants of six would be copied from stage to stage.
WRITTEN_OUT = (activations.NewGELUActivation, activations.FastGELUActivation,
               activations.AccurateGELUActivation)


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, with LayerNorm and dropout.

    Position ids and token types come from the row format (qa/data/rows.py). Rows without token
    types have tokens of type 0; DistilBERT has no token types at all, DeBERTa often neither.
    """

    def __init__(self, embeddings: nn.Module, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.word_embeddings = embeddings.word_embeddings
        self.position_embeddings = embeddings.position_embeddings
        self.token_type_embeddings = getattr(embeddings, "token_type_embeddings", None)
        self.LayerNorm = embeddings.LayerNorm
        self.dropout = embeddings.dropout
        # PopTorch does not support padding_idx. It is not needed: no loss depends on a padding
        # token, so that its gradient is zero anyway.
        for embedding in filter(None, (self.word_embeddings, self.position_embeddings)):
            embedding.padding_idx = None

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor,
                token_type_ids: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Return the embeddings, [B, S, width]. The arguments are int [B, S]."""
        total = self.word_embeddings(input_ids)
        if self.position_embeddings is not None:
            total = total + self.position_embeddings(position_ids)
        if token_type_ids is not None:
            total = total + self.token_type_embeddings(token_type_ids)
        elif self.token_type_embeddings is not None:
            total = total + self.token_type_embeddings.weight[0]
        return self.kernels.dropout(self.LayerNorm(total), self.dropout.p, self.training)


class EncoderLayer(nn.Module):
    """One post-norm transformer layer (Vaswani et al. 2017).

    Query, key and value are computed by one matrix multiplication. stage: the pipeline stage of the
    layer, which qa/model/parallelize.py sets. layer: transformers' own. paths: of its parts in it.
    """

    stage = 0

    def __init__(self, layer: nn.Module, paths: LayerParts, heads: int, kernels: Kernels):
        super().__init__()
        for name, module in layer.named_children():  # under the names of its parameters
            self.add_module(name, module)
        # A tuple's modules are not registered once more.
        self.parts = LayerParts(*(path and attrgetter(path)(layer) for path in paths))
        if isinstance(self.parts.activation, WRITTEN_OUT):
            self.parts = self.parts._replace(activation=nn.GELU(approximate="tanh"))
        self.heads, self.kernels = heads, kernels

    def forward(self, hidden: torch.Tensor, window_ids: torch.Tensor, *distances: torch.Tensor,
                masks: Optional[Dict[int, Any]] = None) -> torch.Tensor:
        """Return the output, [B, S, hidden]. hidden: [B, S, hidden]; window_ids: int [B, S].

        distances: nothing, or the embeddings of distances, [2 S, hidden]. masks: {stage: (attention
        mask, *distances)} of the layers before this one in the same forward pass.

        The first layer of a stage makes the mask and adds it to `masks`. If it were handed on to
        the next stage, its [S, S] numbers would be stashed on every IPU. Within a stage it costs no
        stash: PopART stashes what is produced on the same IPU only at recomputation checkpoints
        (popart, transforms/pipeline.cpp, getStashCandidateTensors), and otherwise makes it again.
        """
        masks = {} if masks is None else masks
        if self.stage not in masks:
            # Without flip, each layer's gradient of distances would go to the embeddings' IPU.
            masks[self.stage] = (self.kernels.window_mask(window_ids, hidden.dtype, self.stage),
                                 *(embeddings.flip(0) for embeddings in distances))
        parts = self.parts
        mixed = parts.mixed(self.self_attention(hidden, *masks[self.stage]))
        if parts.mixed_dropout:
            mixed = self.kernels.dropout(mixed, parts.mixed_dropout.p, self.training)
        hidden = parts.mixed_norm(hidden + mixed)
        inner = parts.activation(parts.inner(hidden))
        return parts.outer_norm(
            hidden + self.kernels.dropout(parts.outer(inner), parts.outer_dropout.p, self.training))

    def self_attention(self, hidden: torch.Tensor, mask: Any,
                       *distances: torch.Tensor) -> torch.Tensor:
        """Return the multi-head attention within windows, [B, S, hidden], before its output layer.

        hidden: [B, S, hidden]; mask: of the kernels' window_mask; distances: turned round.
        """
        parts = self.parts
        if parts.fused:
            weight, bias = deberta.split_projection(parts.fused, self.heads)
        else:
            weight = torch.cat((parts.query.weight, parts.key.weight, parts.value.weight))
            bias = torch.cat((parts.query.bias, parts.key.bias, parts.value.bias))
        by_distance = deberta.keys_and_queries(parts, *(
            self.kernels.dropout(rows, parts.position_dropout.p, self.training)
            for rows in distances)) if distances else ()
        return self.kernels.attention(nn.functional.linear(hidden, weight, bias), self.heads, mask,
                                      parts.attention_dropout.p, self.training, self.stage,
                                      *by_distance)


class ForSpans:
    """Makes transformers' model for question answering one over rows of one or several windows.

    It comes before that model's class in the bases of a class, see `model_class`. qa/data/rows.py
    describes the row format. kernels: the attention and dropout functions to use; by default those
    for this machine's PopTorch.
    """

    def __init__(self, config, kernels: Optional[Kernels] = None):
        super().__init__(config)
        self.family, self.kernels = family_of(config), kernels or ipu_options.kernels
        encoder = self.base_model
        deberta.use_torchs_modules(encoder)
        encoder.embeddings = Embeddings(encoder.embeddings, self.kernels)
        for index, layer in enumerate(self.layers):
            self.layers[index] = EncoderLayer(layer, self.family.parts, config.num_attention_heads,
                                              self.kernels)

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder layers, in order."""
        return attrgetter(self.family.layers)(self.base_model)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, window_ids: torch.Tensor,
        start_positions: Optional[torch.Tensor] = None,
        end_positions: Optional[torch.Tensor] = None, loss_weights: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None
    ) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        """Return the logits, or with labels the loss, of a micro-batch of B rows.

        input_ids, position_ids, window_ids: int [B, S]. start_positions, end_positions: int [B, K],
        the labels of up to K windows in a row. loss_weights: [B, K]. token_type_ids: int [B, S], of
        models with several token types; last, so that other models' arguments are as without it.
        PopTorch takes arguments that stay None at any place (python/_args_parser.py).

        Without labels, returns (start_logits, end_logits), float32 [B, S] each. With labels,
        returns the sum over the windows of loss_weight x (start loss + end loss) / 2, a scalar that
        is marked for PopTorch by identity_loss.
        """
        encoder, masks = self.base_model, {}
        types = () if token_type_ids is None else (token_type_ids, )
        windows, *tokens = self.kernels.take_tokens(window_ids, input_ids, position_ids, *types)
        hidden = encoder.embeddings(*tokens)
        if self.family.projection and hasattr(encoder, self.family.projection):
            hidden = getattr(encoder, self.family.projection)(hidden)
        distances = (deberta.embeddings_of_distances(encoder.encoder, self.config, input_ids),
                     ) if self.family.distances else ()
        for layer in self.layers:
            hidden = layer(hidden, windows, *distances, masks=masks)
        if self.family.head_dropout:
            hidden = self.kernels.dropout(hidden, getattr(self.config, self.family.head_dropout),
                                          self.training)
        logits = self.kernels.put_tokens(self.qa_outputs(hidden).float(), window_ids)
        both_logits = logits[..., 0], logits[..., 1]
        if start_positions is None:
            return both_logits
        losses = window_losses(torch.stack(both_logits, 1),
                               torch.stack((start_positions, end_positions), 1), window_ids)
        # The factor makes loss_weights an operand of the last IPU's own operations. An input that
        # meets the loss directly is detached on the first IPU, from which it would be copied
        # (poptorch/source/AddDetachOperations.cpp).
        return poptorch.identity_loss((0.5 * loss_weights * losses.sum(1)).sum(), reduction="none")


def model_class(config: Any) -> Type[ForSpans]:
    """Return the class of the model over rows with this configuration of transformers."""
    return _with_spans(family_of(config).model)


@lru_cache(maxsize=None)
def _with_spans(name: str) -> Type[ForSpans]:
    """Return the class with the bases ForSpans and transformers' class of this name."""
    return type(name.replace("QuestionAnswering", "Spans"),
                (ForSpans, getattr(transformers, name)), {"__module__": __name__})


RobertaForSpans = _with_spans(ROBERTA.model)


def window_losses(logits: torch.Tensor, positions: torch.Tensor,
                  window_ids: torch.Tensor) -> torch.Tensor:
    """Return the cross entropies of each window's start and end over its tokens, [B, 2, K].

    logits: float [B, 2, S], of start and end. positions: int [B, 2, K], the labels as indices in
    the row. window_ids: int [B, S], from 1 to K, 0 for padding. Where a row has fewer than K
    windows, the remaining values are finite but have no meaning; their loss weight is 0.
    """
    slot = torch.arange(1, positions.shape[2] + 1, dtype=window_ids.dtype,
                        device=window_ids.device).view(1, -1, 1)
    others = (window_ids.unsqueeze(1) != slot).to(logits.dtype)  # [B, K, S]
    masked = logits.unsqueeze(2) + (others * MASKED).unsqueeze(1)
    losses = nn.functional.cross_entropy(masked.view(-1, logits.shape[2]),
                                         positions.reshape(-1).long(), reduction="none")
    return losses.view(positions.shape)
