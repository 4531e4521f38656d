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

    gloo's own sum has another order. So each process adds up one part of the elements, of which it
    receives all processes' values, and sends the others the sums (a reduce-scatter and an
    all-gather, as in a ring; Patarasuk and Yuan 2009). Small gradients travel together. Of a large
    matrix, such as an embedding's gradient, only the rows travel that are not zero everywhere.
    Raises ConnectionError if a process has gone or does not answer within the group's timeout.
    """
    if processes == 1:
        return gradients
    gradients = [None if each is None else each.contiguous() for each in gradients]
    present = [each for each in gradients if each is not None]
    small = [gradient.view(-1) for gradient in present if gradient.numel() < PIECE]
    try:
        with torch.no_grad():
            if small:
                joined = torch.cat(small)
                _sum_in_place(joined, processes)
                for gradient, part in zip(small, joined.split([len(each) for each in small])):
                    gradient.copy_(part)
            for gradient in present:
                if gradient.numel() >= PIECE:
                    _sum_rows(gradient.view(len(gradient), -1), processes)
    except RuntimeError as error:
        raise ConnectionError(f"the gradients of {processes} processes could not be exchanged: "
                              f"{error}") from error
    return gradients


def _sum_rows(matrix: torch.Tensor, processes: int) -> None:
    """Sum a matrix over the processes in place; rows of zeros in all of them stay where they are.

    A row counts as zero if all its bits are, so that -0.0 is summed as everything else.
    """
    used = matrix.view(torch.int32).any(dim=1).to(torch.uint8)
    torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX)
    rows = used.nonzero().flatten()
    if 2 * len(rows) > len(matrix):
        _sum_in_place(matrix.view(-1), processes)
        return
    values = matrix[rows]
    _sum_in_place(values.view(-1), processes)
    matrix.index_copy_(0, rows, values)


def _sum_in_place(values: torch.Tensor, processes: int) -> None:
    """Sum a vector over the processes in place."""
    if not len(values):  # gloo in torch 2.0 divides by the number of elements
        return
    for piece in values.split(PIECE):
        # Each process sums one of as many equal parts as there are processes.
        sums = torch.nn.functional.pad(piece, (0, -len(piece) % processes))
        parts, total = torch.empty_like(sums), PairwiseSum()
        torch.distributed.all_to_all_single(parts, sums)
        for part in parts.chunk(processes):
            total.add([part])
        torch.distributed.all_gather(list(sums.chunk(processes)), total.total()[0])
        piece.copy_(sums[:len(piece)])
