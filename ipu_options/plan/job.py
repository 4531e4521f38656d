"""The planner's input: one training pipeline and the data that it is fed."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from ipu_options.config import IPUConfig
from ipu_options.layout import Layout
from ipu_options.plan.count import CountedBlock
from ipu_options.plan.machine import Machine

BlockCounter = Callable[[int, int], Sequence[CountedBlock]]


@dataclass(frozen=True)
class Job:
    """A training pipeline to plan.

    blocks: the counted blocks, for one micro-batch, in the order of execution. layout: their IPUs.
    config: with by-pod values resolved. micro_batch_size: in rows. max_seq_length: tokens of a row.
    precision: "float16" or "float32". windows_per_row: mean number of real windows in a row, more
    than 1 with packing. packed_windows_per_row: the number with packing, None if it is not known.
    train_windows, epochs: windows of one epoch (None if not known) and number of epochs, for the
    time of the whole run. count(micro_batch_size, embedding_serialization_factor): counts the
    blocks for other settings.
    """

    blocks: Tuple[CountedBlock, ...]
    layout: Layout
    config: IPUConfig
    machine: Machine
    micro_batch_size: int
    max_seq_length: int
    precision: str = "float16"
    windows_per_row: float = 1.0
    packed_windows_per_row: Optional[float] = None
    train_windows: Optional[int] = None
    epochs: float = 1.0
    count: Optional[BlockCounter] = field(default=None, compare=False, repr=False)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of a weight, a gradient or an activation."""
        return 2 if self.precision == "float16" else 4

    @property
    def rows_per_update(self) -> int:
        """Rows of one weight update over all replicas."""
        return (self.micro_batch_size * self.config.gradient_accumulation_steps *
                self.config.replication_factor)

    def stages(self) -> List[Tuple[int, List[CountedBlock]]]:
        """Return the forward pipeline stages in order: (IPU, counted blocks) of each."""
        by_name: Dict[str, CountedBlock] = {block.name: block for block in self.blocks}
        return [(ipu, [by_name[name] for name in names]) for ipu, names in self.layout.stages()]

    def state_bytes_per_parameter(self) -> float:
        """Return the bytes of optimizer state per parameter on each replica.

        Two moments (Adam, Kingma and Ba 2015; LAMB, You et al. 2020) in float32, the first one in
        float16 with enable_half_first_order_momentum. Replicated tensor sharding (ZeRO stage 1)
        divides them over the replicas.
        """
        both = 4 + (2 if self.config.enable_half_first_order_momentum else 4)
        return both / (self.config.replication_factor
                       if self.config.replicated_tensor_sharding else 1)
