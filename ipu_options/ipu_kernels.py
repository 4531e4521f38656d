"""Attention for the IPU, in operations that PopTorch 3.4 supports and with fixed shapes only.

Source of the supported operations: PopTorch user guide, "Supported PyTorch operations".
"""
from __future__ import annotations

from typing import Callable, NamedTuple

import torch
from torch.nn.functional import dropout

# Added to the score of a masked position. It is finite in float16, and its exponential is 0 in
# float16, bfloat16 and float32.
MASKED = -10000.0


class Kernels(NamedTuple):
    """The functions that a model calls for attention and dropout.

    Their signatures are those of `attention` in this file and of torch.nn.functional.dropout.
    """

    attention: Callable[..., torch.Tensor]
    dropout: Callable[..., torch.Tensor]


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window_ids: torch.Tensor,
              dropout_p: float = 0.0, training: bool = False) -> torch.Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) within each window of a row.

    query, key, value: [B, heads, S, head_dim]. window_ids: int [B, S], 0 for padding; padding
    attends to padding, so that every row of the softmax has an unmasked entry. dropout_p: dropout
    of the probabilities, applied if `training`. Returns [B, heads, S, head_dim].
    """
    same_window = window_ids.unsqueeze(2) == window_ids.unsqueeze(1)
    mask = (1.0 - same_window.unsqueeze(1).to(query.dtype)) * MASKED
    scores = torch.matmul(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5 + mask
    probabilities = dropout(torch.softmax(scores, dim=-1), dropout_p, training)
    return torch.matmul(probabilities, value)


IPU_KERNELS = Kernels(attention, dropout)
