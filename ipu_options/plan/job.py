"""What is planned: one training pipeline and how it is fed."""
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
    """A training pipeline: its blocks, counted for one micro-batch, on the IPUs that `layout`
    names.

    config: with the by-pod values resolved.  windows_per_row: real windows in a row, more than 1
    with packing. packed_windows_per_row: what packing would make of that, as far as is known.
    train_windows, epochs: windows of one epoch and number of epochs, for the time of the whole run;
    None: not known. count(micro_batch_size, embedding_serialization_factor) counts the blocks anew,
    for plans of other settings.
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
        """Bytes of a weight, a gradient and an activation."""
        return 2 if self.precision == "float16" else 4

    @property
    def rows_per_update(self) -> int:
        """Rows of one weight update over all replicas."""
        return self.micro_batch_size * self.config.gradient_accumulation_steps * self.config.replication_factor

    def stages(self) -> List[Tuple[int, List[CountedBlock]]]:
        """Forward pipeline stages: (IPU, its blocks)."""
        by_name: Dict[str, CountedBlock] = {block.name: block for block in self.blocks}
        return [(ipu, [by_name[name] for name in names]) for ipu, names in self.layout.stages()]

    def state_bytes_per_parameter(self) -> float:
        """Bytes of optimizer state on each replica: two moments (Adam, Kingma and Ba 2015; LAMB,
        You et al. 2020), float32 but for a half first moment, shared out over the replicas under
        replicated tensor sharding (ZeRO stage 1).
        """
        both = 4 + (2 if self.config.enable_half_first_order_momentum else 4)
        return both / (self.config.replication_factor
                       if self.config.replicated_tensor_sharding else 1)
