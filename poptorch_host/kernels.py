"""Host kernels for what a model does most, in place of operations that suit an IPU."""
from __future__ import annotations

import torch


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window_ids: torch.Tensor,
              dropout_p: float = 0.0, training: bool = False) -> torch.Tensor:
    """Scaled dot-product attention in which a token sees its own window alone.

    query, key, value: [B, heads, S, head_dim].  window_ids: int [B, S], 0 for padding, which sees padding.
    Returns [B, heads, S, head_dim].
    """
    same_window = (window_ids.unsqueeze(2) == window_ids.unsqueeze(1)).unsqueeze(1)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=same_window,
                                                            dropout_p=dropout_p if training else 0.0)
