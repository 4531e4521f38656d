"""Which block of the model runs on which IPU, from `layers_per_ipu` (torch-free)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

from ipu_options.errors import UsageError


@dataclass(frozen=True)
class Layout:
    """IPU of the embedding, of every encoder layer in order, and of the QA head (0-based, within
    one replica).
    """

    embedding_ipu: int
    layer_ipus: Tuple[int, ...]
    head_ipu: int

    def blocks(self) -> List[Tuple[str, int]]:
        """(block name, IPU) in the order of execution."""
        layers = [(f"Encoder {i}", ipu) for i, ipu in enumerate(self.layer_ipus)]
        return [("Embedding", self.embedding_ipu)] + layers + [("QA head", self.head_ipu)]

    @classmethod
    def from_blocks(cls, ipus: Sequence[int]) -> "Layout":
        """The layout that has the block at each place of `blocks()` on the IPU at that place of
        `ipus`.
        """
        return cls(ipus[0], tuple(ipus[1:-1]), ipus[-1])

    def layers_per_ipu(self, ipus: int) -> List[int]:
        """The number of encoder layers on each of `ipus` IPUs."""
        return [self.layer_ipus.count(ipu) for ipu in range(ipus)]

    def stages(self) -> List[Tuple[int, List[str]]]:
        """Forward pipeline stages (IPU, block names). Consecutive blocks on one IPU are one stage;
        coming back to an IPU makes another stage on it (PopTorch user guide,
        AutoStage.AutoIncrement with explicit IPU ids).
        """
        stages: List[Tuple[int, List[str]]] = []
        for name, ipu in self.blocks():
            if not stages or stages[-1][0] != ipu:
                stages.append((ipu, []))
            stages[-1][1].append(name)
        return stages

    def min_gradient_accumulation(self) -> int:
        """The least gradient accumulation that pipelined training accepts: one micro-batch for each
        of 2S - 1 stages.
        """
        return 2 * len(self.stages()) - 1

    def table(self) -> str:
        """The device-allocation table printed at the start of every run."""
        rows = [f"{name:<11} -> IPU {ipu}" for name, ipu in self.blocks()]
        head = " Device allocation ".center(max(map(len, rows)) + 16, "-")
        return "\n".join([head, *rows, "-" * len(head)])


def make_layout(layers_per_ipu: Sequence[int], num_layers: int,
                ipus_per_replica: Optional[int] = None, embedding_ipu: int = 0,
                head_ipu: Optional[int] = None, source: Callable[[str],
                                                                 str] = "--{}".format) -> Layout:
    """Lay `num_layers` encoder layers out over the IPUs of one replica.

    layers_per_ipu: a number of layers for each IPU; -1 stands for an equal share of the layers that
    are left (earlier wildcards take the remainder); a single -1 with `ipus_per_replica` shares all
    layers out over that many IPUs. head_ipu: the last IPU by default.  source(name): what to call a
    setting in a message; its flag by default. Raises UsageError where the numbers do not add up to
    `num_layers` or do not fit `ipus_per_replica`.
    """
    counts = list(layers_per_ipu)
    given = f"{source('layers_per_ipu')} {' '.join(map(str, counts))}"
    if not counts or any(count < -1 for count in counts):
        raise UsageError(
            f"{given}: give the number of encoder layers on each IPU (0 or more), or -1 for an equal share"
        )
    if len(counts) == 1 and ipus_per_replica:
        counts = counts * ipus_per_replica if counts[0] == -1 else counts
    ipus = len(counts)
    if ipus_per_replica and ipus != ipus_per_replica:
        raise UsageError(
            f"{given} names {ipus} IPUs, but {source('ipus_per_replica')} is {ipus_per_replica}: the two must agree"
        )
    wildcards = [i for i, count in enumerate(counts) if count == -1]
    left = num_layers - sum(count for count in counts if count >= 0)
    if left < 0 or (left and not wildcards):
        total = num_layers - left
        raise UsageError(
            f"{given} adds up to {total} layers, but the model has {num_layers}: the sum must be {num_layers}"
            f" (for example {' '.join(map(str, even_split(num_layers, ipus)))})")
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
            f"{given} leaves IPU {', '.join(map(str, empty))} without any block: give it a layer, or use fewer IPUs"
        )
    return layout


def even_split(total: int, parts: int) -> List[int]:
    """`total` shared out over `parts` as equally as can be, earlier parts taking the remainder."""
    share, rest = divmod(total, parts)
    return [share + (i < rest) for i in range(parts)]
