"""Sums of the replicas' gradients, in one order however the replicas are shared over processes.

Floating-point sums depend on their order. Here they are those of a binary tree over the replicas,
((r0 + r1) + (r2 + r3)) + ...: where each process has a power of two of them, its part is a whole
branch of the tree.
"""
from __future__ import annotations

from typing import List, Optional, Tuple

import torch

Gradients = List[Optional[torch.Tensor]]  # one for each weight; None if the loss does not depend
PIECE = 1 << 22  # number of elements of a message


class PairwiseSum:
    """Adds up lists of tensors pairwise, as they come; of N lists it keeps about log2(N)."""

    def __init__(self) -> None:
        self._branches: List[Tuple[int, Gradients]] = []  # number of lists in it, their sum

    def add(self, tensors: Gradients) -> None:
        """Take the next list. Its tensors may be overwritten."""
        self._branches.append((1, tensors))
        while len(self._branches) > 1 and self._branches[-1][0] == self._branches[-2][0]:
            self._merge()

    def total(self) -> Gradients:
        """Return the sum of all lists. At least one must have been added."""
        while len(self._branches) > 1:
            self._merge()
        return self._branches[0][1]

    def _merge(self) -> None:
        (left, into), (right, more) = self._branches[-2:]
        for place, tensor in enumerate(more):
            into[place] = tensor if into[place] is None else (
                into[place] if tensor is None else into[place].add_(tensor))
        self._branches[-2:] = [(left + right, into)]


def sum_over_processes(gradients: Gradients, processes: int) -> Gradients:
    """Return the sums of all processes' gradients; they get the same bits.

    Each process receives the gradients of all, piece by piece, and adds them up itself, because
    gloo's own sum has another order. Small gradients travel together. Raises ConnectionError if a
    process has gone or does not answer within the group's timeout.
    """
    if processes == 1:
        return gradients
    gradients = [None if each is None else each.contiguous() for each in gradients]
    present = [each.view(-1) for each in gradients if each is not None]
    small = [gradient for gradient in present if len(gradient) < PIECE]
    with torch.no_grad():
        if small:
            joined = torch.cat(small)
            _sum_in_place(joined, processes)
            for gradient, part in zip(small, joined.split([len(each) for each in small])):
                gradient.copy_(part)
        for gradient in present:
            if len(gradient) >= PIECE:
                _sum_in_place(gradient, processes)
    return gradients


def _sum_in_place(tensor: torch.Tensor, processes: int) -> None:
    for piece in tensor.split(PIECE):
        parts = [torch.empty_like(piece) for _ in range(processes)]
        try:
            torch.distributed.all_gather(parts, piece)
        except RuntimeError as error:
            raise ConnectionError(
                f"the gradients of {processes} processes could not be exchanged: "
                f"{error}") from error
        total = PairwiseSum()
        for part in parts:
            total.add([part])
        piece.copy_(total.total()[0])
