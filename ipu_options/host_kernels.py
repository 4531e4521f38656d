"""Attention and dropout for poptorch_host.

Nothing is compiled on the host, so that, unlike on an IPU, the operations may depend on the data.
"""
from __future__ import annotations

from typing import Iterable, List, NamedTuple, Optional, Tuple

import numpy
import torch

from ipu_options.ipu_kernels import MASKED, Kernels, skew
from poptorch_host.ops import for_the_host

# One more group of windows takes about as long as this number of attention scores of each head
# (measured, 1 thread, 4 and 12 heads).
GROUP_COST = 2_000
# The most scores of each head in a group of several windows; they fit in a processor's cache.
GROUP_SCORES = 40_000


class Group(NamedTuple):
    """Windows of about the same length, whose attention is computed together.

    length: the tokens of the longest one. spans: (first token, token after the last) of each window
    in the rows joined end to end. padding: what is added to the attention scores of the shorter
    windows, [windows, 1, 1, length]; None if all are equally long.
    """

    length: int
    spans: List[Tuple[int, int]]
    padding: Optional[torch.Tensor]


@for_the_host
def take_tokens(window_ids: torch.Tensor, *rows: torch.Tensor) -> List[torch.Tensor]:
    """Return the tokens of all windows as one row, without padding, [1, tokens] of each argument.

    window_ids: int [B, S], which are numbered anew, since windows of two rows may now be
    neighbours. rows: [B, S].
    """
    numbers = window_ids + torch.arange(len(window_ids)).unsqueeze(1) * (window_ids.max() + 1)
    return [tokens[window_ids != 0].unsqueeze(0) for tokens in (numbers, *rows)]


@for_the_host
def put_tokens(values: torch.Tensor, window_ids: torch.Tensor) -> torch.Tensor:
    """Return [1, tokens, n] of take_tokens' tokens at their places in the rows, [B, S, n].

    window_ids: as given to `take_tokens`. Padding gets 0.
    """
    rows = values.new_zeros(*window_ids.shape, values.shape[-1])
    rows[window_ids != 0] = values[0]
    return rows


@for_the_host
def window_mask(window_ids: torch.Tensor, dtype: torch.dtype, stage: int = 0) -> List[Group]:
    """Return the windows that attention is restricted to, grouped by their length.

    window_ids: int [B, S]; the tokens of a window are consecutive and share a number, 0 is padding.
    A window joins a group if the scores of its padding take less time than one more group.
    """
    spans = sorted(_spans(window_ids), key=lambda span: span[0] - span[1])
    groups: List[Group] = []
    while spans:
        longest = spans[0][1] - spans[0][0]
        most = min(len(spans), max(1, GROUP_SCORES // longest ** 2))
        count = next((index for index, (begin, end) in enumerate(spans[:most])
                      if longest ** 2 - (end - begin) ** 2 > GROUP_COST), most)
        lengths = torch.tensor([[end - begin] for begin, end in spans[:count]])
        padding = None
        if lengths[-1] < longest:
            padding = ((torch.arange(longest) >= lengths) * MASKED).to(dtype)[:, None, None]
        groups.append(Group(longest, spans[:count], padding))
        spans = spans[count:]
    return groups


@for_the_host
def attention(qkv: torch.Tensor, heads: int, groups: List[Group], dropout_p: float = 0.0,
              training: bool = False, stage: int = 0, *by_distance: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) within each window of a row.

    qkv: [B, S, 3 * width], query, key and value. groups: of `window_mask`. dropout_p: dropout of
    the probabilities, applied if `training`. by_distance: of `ipu_kernels.attention`. Returns
    [B, S, width]; it is 0 at padding.
    """
    return _ByGroup.apply(qkv, heads, groups, dropout_p if training else 0.0, *by_distance)


@for_the_host
def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True) -> torch.Tensor:
    """torch.nn.functional.dropout with a cheaper mask (see keep_mask), for any shape."""
    return input * keep_mask(input, p).mul_(1 / (1 - p)) if training and p else input


def keep_mask(like: torch.Tensor, p: float) -> torch.Tensor:
    """Return a mask that is 1, or 0 with probability p rounded to a multiple of 1/65536.

    It has the shape and type of `like`.

    Each 64-bit number of NumPy's SFC64, seeded by torch's generator, gives four 16-bit numbers. The
    comparison writes to the mask directly, because PyTorch takes longer to convert bool to bfloat16
    than to compare. 2.4 million bfloat16 numbers take 2 ms; bernoulli_() takes 14 ms in torch
    2.13's build for CPUs and 1.3 ms in a build with MKL (measured, 2 threads).
    """
    seed = int(torch.empty((), dtype=torch.int64).random_())
    draws = torch.from_numpy(
        numpy.random.SFC64(seed).random_raw((like.numel() + 3) // 4).view(numpy.int16))
    mask = torch.empty(like.shape, dtype=like.dtype)
    return torch.ge(draws[:like.numel()].view(like.shape), round(p * 65536) - 32768, out=mask)


def _spans(window_ids: torch.Tensor) -> List[Tuple[int, int]]:
    """Return (first token, token after the last) of every window in the rows joined end to end."""
    rows, length = window_ids.shape
    edges = torch.ones(rows, length + 1, dtype=torch.bool)
    edges[:, 1:-1] = window_ids[:, 1:] != window_ids[:, :-1]
    places = [row * length + place for row, place in edges.nonzero().tolist()]
    windows = window_ids.flatten().tolist()
    # The end of a row and the begin of the next are the same place.
    return [(begin, end) for begin, end in zip(places, places[1:])
            if begin < end and windows[begin]]


class _ByGroup(torch.autograd.Function):
    """Attention computed group by group, with a backward pass written by hand.

    The backward pass of autograd's slices would fill a zero tensor of the full size per window.
    """

    @staticmethod
    def forward(ctx, qkv, heads, groups, dropout_p, *by_distance):
        rows, length, width = qkv.shape
        tokens = qkv.reshape(rows * length, width)
        out = tokens.new_zeros(rows * length, width // 3)
        ctx.heads, ctx.groups, ctx.saved = heads, groups, []
        ctx.scale = (width // 3 // heads * (1 + len(by_distance))) ** -0.5
        ctx.kept_scale = 1 / (1 - dropout_p)
        ctx.by_distance = [vectors.view(len(vectors), heads, -1).transpose(0, 1) * scale
                           for vectors, scale in zip(by_distance, (1, ctx.scale))]
        for group in groups:
            # The factors are taken into the query and the value, which are smaller than the scores.
            query, key, value = parts = _take(tokens, group, 3, heads)
            scores = torch.bmm(query.mul_(ctx.scale), key.transpose(1, 2))
            for content, vectors, zero, sums in _distance_terms(ctx.by_distance, parts, scores):
                sums.add_(skew(torch.matmul(content, vectors.transpose(1, 2)).flatten(0, 1), zero))
            if group.padding is not None:
                scores.view(-1, heads, group.length, group.length).add_(group.padding)
            probabilities, mask = torch.softmax(scores, dim=-1), None
            if dropout_p:
                mask = keep_mask(probabilities, dropout_p)
                value.mul_(ctx.kept_scale)
            _put(out, torch.bmm(_masked(probabilities, mask), value), group, 1, heads)
            ctx.saved.append((parts, probabilities, mask))
        return out.view(rows, length, width // 3)

    @staticmethod
    def backward(ctx, grad):
        rows, length, width = grad.shape
        tokens = grad.reshape(rows * length, width)
        out = tokens.new_zeros(rows * length, 3 * width)
        g_by_distance = [torch.zeros_like(vectors) for vectors in ctx.by_distance]
        for group, (parts, probabilities, mask) in zip(ctx.groups, ctx.saved):
            query, key, value = parts
            g_out, = _take(tokens, group, 1, ctx.heads)
            g_query, g_key, g_value = grads = torch.empty_like(parts)
            torch.bmm(_masked(probabilities, mask).transpose(1, 2), g_out, out=g_value)
            g_value.mul_(ctx.kept_scale)
            g_probabilities = torch.bmm(g_out, value.transpose(1, 2))
            if mask is not None:
                g_probabilities.mul_(mask)
            g_scores = torch._softmax_backward_data(g_probabilities, probabilities, -1,
                                                    probabilities.dtype)
            torch.bmm(g_scores, key, out=g_query)
            torch.bmm(g_scores.transpose(1, 2), query, out=g_key)
            for (content, vectors, zero, g_sums), g_content, (_, g_vectors, *_) in zip(
                    _distance_terms(ctx.by_distance, parts, g_scores), grads,
                    _distance_terms(g_by_distance, parts, g_scores)):
                g_products = torch.zeros_like(g_sums).repeat(1, 1, 2)
                skew(g_products, zero).copy_(g_sums)
                g_products = g_products.view(*content.shape[:3], -1)
                g_content.view_as(content).add_(torch.matmul(g_products, vectors))
                g_vectors.add_(torch.einsum("whln,whld->hnd", g_products, content))
            g_query.mul_(ctx.scale)
            _put(out, grads, group, 3, ctx.heads)
        return (out.view(rows, length, 3 * width), None, None, None,
                *(g_vectors.mul_(scale).transpose(0, 1).flatten(1)
                  for g_vectors, scale in zip(g_by_distance, (1, ctx.scale))))


def _distance_terms(by_distance: List[torch.Tensor], parts: torch.Tensor,
                    scores: torch.Tensor) -> Iterable[Tuple]:
    """Return (queries, keys of distances, `zero` of `skew`, scores) and the same of keys.

    by_distance: [heads, 2 S, head_dim] each. parts: of `_take`. scores: [windows * heads, length,
    length]. Queries are [windows, heads, length, head_dim], of which scores are the rows.
    """
    length = scores.shape[1]
    cut = [vectors[:, vectors.shape[1] // 2 - length:vectors.shape[1] // 2 + length]
           for vectors in by_distance]
    contents = parts[:len(cut)].unflatten(1, (-1, len(cut[0]))) if cut else ()
    return zip(contents, cut, (length - 1, length), (scores, scores.transpose(1, 2)))


def _masked(probabilities: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
    return probabilities if mask is None else probabilities * mask


def _take(tokens: torch.Tensor, group: Group, parts: int, heads: int) -> torch.Tensor:
    """Return a group's part of [tokens, parts * heads * head_dim], 0 at padding.

    Its shape is [parts, windows * heads, length, head_dim].
    """
    taken = tokens.new_zeros if group.padding is not None else tokens.new_empty
    out = taken((parts, len(group.spans), heads, group.length, tokens.shape[1] // parts // heads))
    for window, (begin, end) in enumerate(group.spans):
        out[:, window, :, :end - begin] = tokens[begin:end].view(
            end - begin, parts, heads, -1).permute(1, 2, 0, 3)
    return out.flatten(1, 2)


def _put(tokens: torch.Tensor, values: torch.Tensor, group: Group, parts: int, heads: int) -> None:
    """Write what has the form of `_take`'s result back to the places it was taken from."""
    values = values.view(parts, -1, heads, *values.shape[-2:])
    for window, (begin, end) in enumerate(group.spans):
        tokens[begin:end].view(end - begin, parts, heads, -1).copy_(
            values[:, window, :, :end - begin].permute(2, 0, 1, 3))


HOST_KERNELS = Kernels(attention, dropout, window_mask, take_tokens, put_tokens)
