"""The planner's input: one pipeline, for training or for inference, and the data it is fed."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from ipu_options.config import (
    IPUS_OF_A_HOST,
    IPUConfig,
    packed_accumulation,
    reserved_ipus,
)
from ipu_options.layout import Layout, least_accumulation
from planner.count import CountedBlock
from planner.machine import Machine

BlockCounter = Callable[..., Sequence[CountedBlock]]


@dataclass(frozen=True)
class Job:
    """A pipeline to plan.

    blocks: the counted blocks, for one micro-batch, in the order of execution. layout: their IPUs.
    config: as the user would give it, with by-pod values resolved; for inference, what
    `IPUConfig.inference` returns. micro_batch_size: in rows. max_seq_length: tokens of a row.
    precision: "float16" or "float32". training: whether the pipeline trains or only answers.
    windows_per_row: mean number of real windows in a row, more than 1 with packing.
    packed_windows_per_row: the number with packing, None if it is not known. windows: of an epoch,
    or to answer; None if not known. epochs: their number. updates: of the whole run, if that is
    given in place of epochs. count(micro_batch_size, embedding_serialization_factor, halves):
    counts the blocks for other settings.
    """

    blocks: Tuple[CountedBlock, ...]
    layout: Layout
    config: IPUConfig
    machine: Machine
    micro_batch_size: int
    max_seq_length: int
    precision: str = "float16"
    training: bool = True
    windows_per_row: float = 1.0
    packed_windows_per_row: Optional[float] = None
    windows: Optional[int] = None
    epochs: float = 1.0
    updates: Optional[int] = None
    count: Optional[BlockCounter] = field(default=None, compare=False, repr=False)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of a weight, a gradient or an activation."""
        return 2 if self.precision == "float16" else 4

    @property
    def micro_batches(self) -> int:
        """Micro-batches that follow each other through the pipeline before it runs empty."""
        return self.micro_batches_over(len(self.layout.stages()))

    def micro_batches_over(self, stages: int) -> int:
        """Return what `micro_batches` would be with the given number of pipeline stages.

        These are the micro-batches of a weight update, fewer with packing as train.py has them, or
        in inference those of a call of the device.
        """
        if not self.training:
            return self.config.device_iterations
        return packed_accumulation(self.config.gradient_accumulation_steps, self.windows_per_row,
                                   least_accumulation(stages))

    @property
    def batch_size(self) -> int:
        """Rows of one weight update as the user gives them, that is, without packing."""
        return (self.micro_batch_size * self.config.gradient_accumulation_steps *
                self.config.replication_factor)

    @property
    def rows_per_update(self) -> int:
        """Rows of one weight update, in inference of one call, over all replicas."""
        return self.micro_batch_size * self.micro_batches * self.config.replication_factor

    @property
    def ipus(self) -> int:
        """IPUs of all replicas, each of which reserves a power of two."""
        return self.config.replication_factor * reserved_ipus(self.config.num_ipus())

    @property
    def hosts(self) -> int:
        """Hosts, each with a rack of 64 IPUs and one instance (process), the fewest possible."""
        return -(-self.ipus // IPUS_OF_A_HOST)

    def stages(self) -> List[Tuple[int, Tuple[CountedBlock, ...]]]:
        """Return the forward pipeline stages in order: (IPU, counted blocks) of each."""
        by_name: Dict[str, CountedBlock] = {block.name: block for block in self.blocks}
        return [(ipu, tuple(by_name[name] for name in names))
                for ipu, names in self.layout.stages()]

    def state_bytes_per_parameter(self) -> float:
        """Return the bytes of optimizer state per parameter on each replica.

        Two moments (Adam, Kingma and Ba 2015; LAMB, You et al. 2020) in float32, the first one in
        float16 with enable_half_first_order_momentum.
        """
        both = 4 + (2 if self.config.enable_half_first_order_momentum else 4)
        return both / self.shards

    @property
    def shards(self) -> int:
        """Over how many replicas the optimizer state is sharded (ZeRO stage 1)."""
        return self.config.replication_factor if self.config.replicated_tensor_sharding else 1
