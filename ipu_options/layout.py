"""Assigns the blocks of the model to IPUs, from `layers_per_ipu`. Does not import torch."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

from runtime.errors import UsageError, counted


@dataclass(frozen=True)
class Layout:
    """The IPU of each block: the embedding, every encoder layer in order, and the QA head.

    IPUs are numbered from 0 within one replica.
    """

    embedding_ipu: int
    layer_ipus: Tuple[int, ...]
    head_ipu: int

    def blocks(self) -> List[Tuple[str, int]]:
        """Return (block name, IPU) of every block, in the order of execution."""
        layers = [(f"Encoder {i}", ipu) for i, ipu in enumerate(self.layer_ipus)]
        return [("Embedding", self.embedding_ipu)] + layers + [("QA head", self.head_ipu)]

    @classmethod
    def from_blocks(cls, ipus: Sequence[int]) -> "Layout":
        """Return the layout with the given IPU for each block, in the order of `blocks()`."""
        return cls(ipus[0], tuple(ipus[1:-1]), ipus[-1])

    def layers_per_ipu(self, ipus: int) -> List[int]:
        """Return the number of encoder layers on each of the IPUs 0 to `ipus` - 1."""
        return [self.layer_ipus.count(ipu) for ipu in range(ipus)]

    def stages(self) -> List[Tuple[int, List[str]]]:
        """Return the forward pipeline stages in order: (IPU, block names) of each.

        Consecutive blocks on one IPU form one stage. Blocks that return to an earlier IPU form
        another stage there (PopTorch user guide, AutoStage.AutoIncrement with explicit IPU ids).
        PopTorch begins on IPU 0, where an embedding elsewhere leaves a stage without blocks
        (popart_compiler/source/Compiler.cpp, setActiveIpu).
        """
        stages: List[Tuple[int, List[str]]] = [(0, [])]
        for name, ipu in self.blocks():
            if stages[-1][0] != ipu:
                stages.append((ipu, []))
            stages[-1][1].append(name)
        return stages

    def min_gradient_accumulation(self) -> int:
        """Return the least gradient accumulation that pipelined training accepts."""
        return least_accumulation(len(self.stages()))

    def table(self) -> str:
        """Return the device-allocation table that is printed at the start of every run."""
        rows = [f"{name:<11} -> IPU {ipu}" for name, ipu in self.blocks()]
        head = " Device allocation ".center(max(map(len, rows)) + 16, "-")
        return "\n".join([head, *rows, "-" * len(head)])


def make_layout(layers_per_ipu: Sequence[int], num_layers: int,
                ipus_per_replica: Optional[int] = None, embedding_ipu: int = 0,
                head_ipu: Optional[int] = None,
                source: Callable[[str], str] = "--{}".format) -> Layout:
    """Return the Layout of `num_layers` encoder layers over the IPUs of one replica.

    layers_per_ipu: the number of layers on each IPU. -1 stands for an equal share of the remaining
    layers, of which earlier IPUs take what does not divide evenly. A single -1 together with
    `ipus_per_replica` divides all layers over that many IPUs. head_ipu: by default the last IPU.
    source(name): what to call a setting in an error message; by default its flag.

    Raises UsageError if the numbers do not add up to `num_layers` or disagree with
    `ipus_per_replica`, if embedding_ipu or head_ipu is not an IPU of the replica, or if an IPU is
    left without a block.
    """
    counts = list(layers_per_ipu)
    setting = f"{source('layers_per_ipu')} {' '.join(map(str, counts))}"
    if not counts or any(count < -1 for count in counts):
        raise UsageError(
            f"{setting}: give the number of encoder layers on each IPU (0 or more), or -1 for an "
            "equal share")
    if len(counts) == 1 and ipus_per_replica:
        counts = counts * ipus_per_replica if counts[0] == -1 else counts
    ipus = len(counts)
    if ipus_per_replica and ipus != ipus_per_replica:
        raise UsageError(
            f"{setting} names {in_ipus(ipus)}, but {source('ipus_per_replica')} is "
            f"{ipus_per_replica}: the two must agree")
    wildcards = [i for i, count in enumerate(counts) if count == -1]
    left = num_layers - sum(count for count in counts if count >= 0)
    if left < 0 or (left and not wildcards):
        total = num_layers - left
        raise UsageError(
            f"{setting} adds up to {total} layers, but the model has {num_layers}: "
            f"the sum must be {num_layers} "
            f"(for example {' '.join(map(str, even_split(num_layers, ipus)))})")
    for i, share in zip(wildcards, even_split(left, len(wildcards)) if wildcards else []):
        counts[i] = share
    head_ipu = ipus - 1 if head_ipu is None else head_ipu
    for name, ipu in (("embedding_ipu", embedding_ipu), ("head_ipu", head_ipu)):
        if not 0 <= ipu < ipus:
            raise UsageError(
                f"{source(name)} {ipu} is not one of this replica's IPUs: use 0 to {ipus - 1}")
    layout = Layout(embedding_ipu, tuple(i for i, count in enumerate(counts) for _ in range(count)),
                    head_ipu)
    empty = sorted(set(range(ipus)) - {ipu for _, ipu in layout.blocks()})
    if empty:
        raise UsageError(
            f"{setting} leaves IPU {', '.join(map(str, empty))} without any block: "
            "give it a layer, or use fewer IPUs")
    return layout


def least_accumulation(stages: int) -> int:
    """Return the least gradient accumulation with which a pipeline of S forward stages trains.

    It is 2S - 1: one micro-batch for each forward and backward stage.
    """
    return 2 * stages - 1


def even_split(total: int, parts: int) -> List[int]:
    """Return `parts` whole numbers, as equal as possible and larger first, with sum `total`."""
    share, rest = divmod(total, parts)
    return [share + (i < rest) for i in range(parts)]


def in_ipus(number: int) -> str:
    """Return a number of IPUs in words, for a message."""
    return counted(number, "IPU")
