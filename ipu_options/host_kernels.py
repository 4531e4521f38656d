"""Attention and dropout for poptorch_host.

Nothing is compiled on the host, so that, unlike on an IPU, the operations may depend on the data.
"""
from __future__ import annotations

from typing import List, NamedTuple, Optional, Tuple

import numpy
import torch

from ipu_options.ipu_kernels import MASKED, Kernels

# The time of one more iteration of the loop over windows, as the number of attention scores that
# are computed in the same time (measured, 1 thread).
LOOP_COST = 25_000


class Windows(NamedTuple):
    """The windows of some rows: int [B, S] with a number for each token, and `_spans` of it."""

    ids: torch.Tensor
    spans: List[Tuple[int, int, int]]


def window_mask(window_ids: torch.Tensor, dtype: torch.dtype) -> Windows:
    """Return the windows that attention is restricted to.

    window_ids: int [B, S]; the tokens of a window are consecutive and share a number, 0 is padding.
    """
    return Windows(window_ids, _spans(window_ids))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, windows: Windows,
              dropout_p: float = 0.0, training: bool = False) -> torch.Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) within each window of a row.

    query, key, value: [B, heads, S, head_dim]. windows: of `window_mask`. dropout_p: dropout of the
    probabilities, applied if `training`. Returns [B, heads, S, head_dim]; the values at padding are
    finite but have no meaning.

    Attention is computed window by window where that skips enough scores between windows to pay for
    the loop, else with a mask.
    """
    dropout_p = dropout_p if training else 0.0
    window_ids, spans = windows
    batch, heads, length, _ = query.shape
    # Scores between tokens of different windows, which the loop over windows does not compute.
    saved = heads * (batch * length * length - sum((end - begin) ** 2 for _, begin, end in spans))
    if saved > LOOP_COST * len(spans):
        return _ByWindow.apply(query, key, value, spans, dropout_p)
    same_window = (window_ids.unsqueeze(2) == window_ids.unsqueeze(1)).unsqueeze(1)
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    probabilities = torch.softmax(scores.masked_fill(~same_window, MASKED), dim=-1)
    return torch.matmul(dropout(probabilities, dropout_p), value)


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True) -> torch.Tensor:
    """torch.nn.functional.dropout with a cheaper mask (see keep_mask), for any shape."""
    return input * keep_mask(input, p) if training and p else input


def keep_mask(like: torch.Tensor, p: float) -> torch.Tensor:
    """Return a dropout mask that is 0 with probability p and 1 / (1 - p) elsewhere.

    The mask has the shape and type of `like`; p is rounded to a multiple of 1/65536.

    Each 64-bit number of NumPy's SFC64, seeded by torch's generator, gives four 16-bit numbers. The
    comparison writes to the mask directly, because PyTorch takes longer to convert bool to bfloat16
    than to compare. 2.4 million bfloat16 numbers take 2 ms; bernoulli_() takes 14 ms in torch
    2.13's build for CPUs and 1.3 ms in a build with MKL (measured, 2 threads).
    """
    seed = int(torch.empty((), dtype=torch.int64).random_())
    draws = torch.from_numpy(
        numpy.random.SFC64(seed).random_raw((like.numel() + 3) // 4).view(numpy.int16))
    mask = torch.empty(like.shape, dtype=like.dtype)
    torch.ge(draws[:like.numel()].view(like.shape), round(p * 65536) - 32768, out=mask)
    return mask.mul_(1.0 / (1.0 - p))


def _spans(window_ids: torch.Tensor) -> List[Tuple[int, int, int]]:
    """Return (row, first token, token after the last) of every window, without padding."""
    rows, length = window_ids.shape
    edges = torch.ones(rows, length + 1, dtype=torch.bool)
    edges[:, 1:-1] = window_ids[:, 1:] != window_ids[:, :-1]
    positions = edges.nonzero().tolist()
    spans = [(row, begin, end) for (row, begin), (other, end) in zip(positions, positions[1:])
             if row == other]
    real = window_ids.flatten()[[row * length + begin for row, begin, _ in spans]].tolist()
    return [span for span, window in zip(spans, real) if window]


class _ByWindow(torch.autograd.Function):
    """Attention computed window by window, with a backward pass written by hand.

    The backward pass of autograd's slices would fill a zero tensor of the full size per window.
    """

    @staticmethod
    def forward(ctx, query, key, value, spans, dropout_p):
        scale = query.shape[-1] ** -0.5
        out = torch.zeros_like(query.transpose(1, 2),
                               memory_format=torch.contiguous_format).transpose(1, 2)
        probabilities: List[torch.Tensor] = []
        masks: List[Optional[torch.Tensor]] = []
        for row, begin, end in spans:
            q, k, v = (t[row, :, begin:end].contiguous() for t in (query, key, value))
            probabilities.append(
                torch.softmax(torch.matmul(q, k.transpose(1, 2)).mul_(scale), dim=-1))
            masks.append(keep_mask(probabilities[-1], dropout_p) if dropout_p else None)
            kept = probabilities[-1] if masks[-1] is None else probabilities[-1] * masks[-1]
            out[row, :, begin:end] = torch.matmul(kept, v)
        ctx.save_for_backward(query, key, value)
        ctx.spans, ctx.probabilities, ctx.masks = spans, probabilities, masks
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grads = [torch.zeros_like(t) for t in (query, key, value)]
        for (row, begin, end), probability, mask in zip(ctx.spans, ctx.probabilities, ctx.masks):
            q, k, v, g = (t[row, :, begin:end].contiguous() for t in (query, key, value, grad))
            kept = probability if mask is None else probability * mask
            grads[2][row, :, begin:end] = torch.matmul(kept.transpose(1, 2), g)
            g_probability = torch.matmul(g, v.transpose(1, 2))
            if mask is not None:
                g_probability.mul_(mask)
            g_scores = torch._softmax_backward_data(g_probability, probability, -1,
                                                    probability.dtype).mul_(scale)
            grads[0][row, :, begin:end] = torch.matmul(g_scores, k)
            grads[1][row, :, begin:end] = torch.matmul(g_scores.transpose(1, 2), q)
        return (*grads, None, None)


HOST_KERNELS = Kernels(attention, dropout, window_mask)
