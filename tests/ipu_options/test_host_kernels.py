"""Attention and dropout, against their definitions and finite differences."""
from __future__ import annotations

import math

import pytest
import torch

from ipu_options import host_kernels
from ipu_options.host_kernels import HOST_KERNELS, dropout
from ipu_options.ipu_kernels import IPU_KERNELS

HEADS, HEAD_DIM = 3, 60


def rows_of(lengths, length):
    """window_ids [rows, length] of rows with windows of these lengths, then padding."""
    ids = torch.zeros(len(lengths), length, dtype=torch.int32)
    for row, windows in zip(ids, lengths):
        begin = 0
        for number, count in enumerate(windows, start=1):
            row[begin:begin + count] = number
            begin += count
    return ids


def mixed(kernels, qkv, window_ids, p=0.0, *by_distance):
    mask = kernels.window_mask(window_ids, qkv.dtype)
    return kernels.attention(qkv, HEADS, mask, p, True, 0, *by_distance)


@pytest.mark.parametrize("scores", [1, 1_000_000])  # window by window, and as many as can be
@pytest.mark.parametrize("kernels", [HOST_KERNELS, IPU_KERNELS], ids=["host", "ipu"])
@pytest.mark.parametrize("lengths", [
    [[3, 2, 4], [7, 1], [9]],  # of several lengths, which are computed together
    [[50, 9], [59], [2, 50]],  # of lengths too different for that
    [[12], [12], []]])  # all equal; a row of padding
def test_attention_and_its_gradient_equal_their_definition(kernels, lengths, scores, monkeypatch):
    monkeypatch.setattr(host_kernels, "GROUP_SCORES", scores)
    torch.manual_seed(0)
    window_ids = rows_of(lengths, 60)
    real = window_ids > 0
    qkv = torch.randn(3, 60, 3, HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    same = (window_ids.unsqueeze(2) == window_ids.unsqueeze(1)).unsqueeze(1)
    logits = (query @ key.transpose(-1, -2) / HEAD_DIM ** 0.5).masked_fill(~same, -math.inf)
    expected = (torch.softmax(logits, -1) @ value).transpose(1, 2).flatten(2)[real]
    ours = mixed(kernels, qkv.flatten(2), window_ids)[real]
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, qkv, upstream),
                               torch.autograd.grad(expected, qkv, upstream))


@pytest.mark.parametrize("kernels", [HOST_KERNELS, IPU_KERNELS], ids=["host", "ipu"])
@pytest.mark.parametrize("lengths", [[[3, 2, 4], [7, 1], [9]], [[20], [2, 18], []]])
def test_attention_by_distance_equals_its_definition(kernels, lengths):
    torch.manual_seed(0)
    window_ids, length = rows_of(lengths, 20), 20
    qkv = torch.randn(3, length, 3, HEADS, 8, dtype=torch.float64, requires_grad=True)
    keys, queries = by_distance = [  # of the distances -20 to 19
        torch.randn(2 * length, HEADS, 8, dtype=torch.float64, requires_grad=True)
        for _ in range(2)]
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    place = torch.arange(length)
    distance = place.unsqueeze(1) - place + length  # [query, key]
    logits = (query @ key.transpose(-1, -2)
              + torch.einsum("bhid,ijhd->bhij", query, keys[distance])
              + torch.einsum("bhjd,ijhd->bhij", key, queries[distance])) / (3 * 8) ** 0.5
    same = (window_ids.unsqueeze(2) == window_ids.unsqueeze(1)).unsqueeze(1)
    real = window_ids > 0
    expected = (torch.softmax(logits.masked_fill(~same, -math.inf), -1) @ value
                ).transpose(1, 2).flatten(2)[real]
    ours = mixed(kernels, qkv.flatten(2), window_ids, 0.0, keys.flatten(1).flip(0),
                 queries.flatten(1))[real]
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, [qkv, *by_distance], upstream),
                               torch.autograd.grad(expected, [qkv, *by_distance], upstream))


@pytest.mark.parametrize("lengths", [[[3, 2], [7], [], [9]], [[]]])
def test_the_host_computes_no_padding_and_puts_every_token_back(lengths):
    window_ids = rows_of(lengths, 12)
    tokens = torch.arange(window_ids.numel()).view_as(window_ids)
    numbers, taken = HOST_KERNELS.take_tokens(window_ids, tokens)
    assert taken[0].tolist() == tokens[window_ids > 0].tolist()
    # Windows stay apart, also where the first of a row follows the first of another.
    _, counts = torch.unique_consecutive(numbers, return_counts=True)
    assert counts.tolist() == [count for row in lengths for count in row]
    rows = HOST_KERNELS.put_tokens(taken.unsqueeze(-1), window_ids)
    assert torch.equal(rows[..., 0], tokens * (window_ids > 0))


def test_attention_dropout_drops_probabilities_and_scales_the_others():
    """A value that is 1 at one token and place shows the probability of that token."""
    torch.manual_seed(0)
    p, lengths = 0.3, [[17, 19, 24], [60]]
    window_ids = rows_of(lengths, 60)
    qkv = torch.randn(2, 60, 3, HEADS, HEAD_DIM, dtype=torch.float64)
    qkv[:, :, 2] = torch.eye(60, HEAD_DIM, dtype=torch.float64).unsqueeze(1)
    qkv = qkv.flatten(2)
    plain, dropped = mixed(HOST_KERNELS, qkv, window_ids), mixed(HOST_KERNELS, qkv, window_ids, p)
    kept = dropped[plain > 0] > 0
    torch.testing.assert_close(dropped[plain > 0][kept], plain[plain > 0][kept] / (1 - p))
    # The standard deviation of the share is 0.004.
    assert len(kept) == HEADS * sum(n * n for row in lengths for n in row)
    assert abs(1 - kept.double().mean() - p) < 0.02


@pytest.mark.slow
def test_gradients_with_dropout_are_those_of_finite_differences():
    window_ids = rows_of([[3, 4], [5]], 8)

    def function(qkv):
        torch.manual_seed(3)  # the same mask in each call
        return dropout(mixed(HOST_KERNELS, qkv, window_ids, 0.4), 0.2)

    qkv = torch.randn(2, 8, 3 * HEADS * 2, dtype=torch.float64, requires_grad=True,
                      generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(function, qkv)


def test_dropout_keeps_the_right_share_and_the_mean():
    """Of a number of elements that is not a multiple of four, as many as are drawn at once."""
    torch.manual_seed(0)
    mask = dropout(torch.ones(1001, 999), 0.1)
    assert abs(float((mask == 0).float().mean()) - 0.1) < 1e-3
    assert abs(float(mask.mean()) - 1) < 1e-3 and torch.equal(mask.unique(),
                                                              torch.tensor([0.0, 1 / 0.9]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_as_many_as_it_says_and_scales_them(dtype, p):
    like = torch.ones(1000, 333, dtype=dtype)
    torch.manual_seed(0)
    first, second = dropout(like, p), dropout(like, p)
    torch.manual_seed(0)
    assert torch.equal(dropout(like, p), first) and not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p), dtype=dtype))}
    five_sigma = 5 * (p * (1 - p) / like.numel()) ** 0.5
    kept = [(mask > 0).double() for mask in (first, second)]
    assert (abs(float(kept[0].mean()) - (1 - p)) < five_sigma
            and abs(float(kept[1].mean()) - (1 - p)) < five_sigma)
    # The two masks are independent of each other, and so are the neighbouring elements of a mask.
    together = float((kept[0] * kept[1]).mean())
    neighbours = float((kept[0][:, 1:] * kept[0][:, :-1]).mean())
    assert (abs(together - (1 - p) ** 2) < 2 * five_sigma
            and abs(neighbours - (1 - p) ** 2) < 2 * five_sigma)
    assert dropout(like, p, training=False) is like
