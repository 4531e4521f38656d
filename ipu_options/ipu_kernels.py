"""Attention for the IPU, in operations that PopTorch 3.4 supports and with fixed shapes only.

Source of the supported operations: PopTorch user guide, "Supported PyTorch operations".
"""
from __future__ import annotations

from typing import Any, Callable, NamedTuple

import torch
from torch.nn import functional

# Added to the score of a masked position. It is finite in float16, and its exponential is 0 in
# float16, bfloat16 and float32.
MASKED = -10000.0


def window_mask(window_ids: torch.Tensor, dtype: torch.dtype, stage: int = 0) -> torch.Tensor:
    """Return what is added to attention's scores: tokens then see their own window alone.

    window_ids: int [B, S], 0 for padding; padding attends to padding, which leaves every row of the
    softmax an unmasked entry. stage: see `stage_scalar`. Returns [B, 1, S, S] of type `dtype`.
    """
    mask = (window_ids.unsqueeze(2) != window_ids.unsqueeze(1)).unsqueeze(1).to(dtype)
    return mask * stage_scalar(MASKED, mask, stage)


def stage_scalar(value: float, like: torch.Tensor, stage: int) -> torch.Tensor:
    """Return `value` as a tensor of one element and the type of `like` that no other stage has.

    PopTorch makes one tensor of all constants of the same type, shape and value (popart_compiler,
    CompilerImpl.cpp, tensorConstant). PopART would copy one that several stages use from IPU to IPU
    in every step, and stash it (transforms/interipucopy.cpp, pipeline.cpp). Those of two stages
    therefore differ in their number of dimensions.
    """
    return like.new_full((1,) * (stage + 1), value)


class Kernels(NamedTuple):
    """The functions that a model calls for attention and dropout.

    Their signatures are those of `attention` and `window_mask` in this file and of
    torch.nn.functional.dropout. The result of window_mask is only passed on to attention.

    take_tokens, put_tokens: which tokens the encoder computes. An IPU computes all; the host's
    host_kernels.take_tokens and put_tokens leave the padding out.
    """

    attention: Callable[..., torch.Tensor]
    dropout: Callable[..., torch.Tensor]
    window_mask: Callable[[torch.Tensor, torch.dtype, int], Any] = window_mask
    take_tokens: Callable[..., Any] = lambda *rows: rows
    put_tokens: Callable[..., torch.Tensor] = lambda values, window_ids: values


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Dropout that costs nothing with p = 0.

    PopTorch lowers torch's whatever p is (popart_canonicalization/DropoutOps.cpp), to random
    numbers, a mask and a copy of `x` (poplibs, poprand/RandomGen.cpp).
    """
    return functional.dropout(x, p, training) if p else x


def attention(qkv: torch.Tensor, heads: int, mask: torch.Tensor, dropout_p: float = 0.0,
              training: bool = False, stage: int = 0, *by_distance: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) within each window of a row.

    qkv: [B, S, 3 * width], query, key and value. mask: of `window_mask`. dropout_p: dropout of the
    probabilities, applied if `training`. by_distance: nothing, or DeBERTa's keys and queries of
    distances, see `with_distances`; the scale is then (3 d) ** -0.5. Returns [B, S, width].
    """
    batch, length, width = qkv.shape
    # split becomes slices. unbind would become gathers, which PopTorch joins to a single one over
    # three copies of its input (SliceOps.cpp, unbindHandler; GNNOptimizations.cpp).
    query, key, value = (part.view(batch, length, heads, -1).transpose(1, 2)
                         for part in qkv.split(width // 3, dim=-1))
    scale = stage_scalar((query.shape[-1] * (1 + len(by_distance))) ** -0.5, query, stage)
    scores = torch.matmul(query, key.transpose(-1, -2))
    if by_distance:
        scores = with_distances(scores, query, key, *by_distance)
    scores = scores * scale + mask
    probabilities = dropout(torch.softmax(scores, dim=-1), dropout_p, training)
    mixed = torch.matmul(probabilities, value)
    return mixed.transpose(-3, -2).reshape(batch, length, width // 3)


def with_distances(scores: torch.Tensor, query: torch.Tensor, key: torch.Tensor,
                   keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Return scores[i, j] + query_i . keys[i - j] + key_j . queries[i - j] (He et al. 2021, eq. 4).

    scores: [B, H, S, S]. query, key: [B, H, S, d]. keys, queries: [2 S, H * d], of the distances
    S - 1 to -S and -S to S - 1, which tokens of a window have in a packed row, too.

    All 2 S distances are multiplied, of which `skew` takes S: 0.9 GFLOP and 14 MB in a row of 384
    tokens (12 heads of 64, float16). A gather along the last dimension would move scores one by
    one, by an index of 4 bytes each; products with one-hot matrices take 4 to 6 times the FLOPs.
    """
    def products(content: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        batch, heads, length, size = content.shape
        product = torch.matmul(content.transpose(0, 1).reshape(heads, batch * length, size),
                               rows.view(-1, heads, size).permute(1, 2, 0))
        return product.view(heads, batch, length, -1).transpose(0, 1)

    length = query.shape[2]
    scores = scores + skew(products(query, keys), length - 1)  # one after the other, for memory
    return scores + skew(products(key, queries), length).transpose(-1, -2)


def skew(products: torch.Tensor, zero: int) -> torch.Tensor:
    """Return the elements [..., i, zero + j - i] of [..., S, 2 S], as [..., i, j] of [..., S, S].

    Rows joined end to end are cut anew, one element shorter (Huang et al. 2019, Music Transformer).
    """
    length = products.shape[-2]
    joined = products.flatten(-2)[..., zero:zero + length * (2 * length - 1)]
    return joined.view(*products.shape[:-1], 2 * length - 1)[..., :length]


IPU_KERNELS = Kernels(attention, dropout)
