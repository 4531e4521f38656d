"""The planner's input: one pipeline, for training or for inference, and the data it is fed."""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Callable, List, Optional, Tuple

from ipu_options.config import IPUS_OF_A_HOST, IPUConfig, packed_accumulation, reserved_ipus
from ipu_options.layout import Layout, least_accumulation
from planner.machine import Machine
from planner.phase import TRAINING, Phase


@dataclass(frozen=True)
class CountedBlock:
    """The counts of one block for one micro-batch.

    Bytes are those of the model's own types. A multiply-add counts as two FLOPs.
    """

    name: str
    kind: str                # "embedding", "layer" or "head"
    parameters: int = 0
    largest_parameter: int = 0   # elements of the largest parameter tensor
    forward_flops: int = 0
    backward_flops: int = 0
    forward_matmuls: int = 0     # number of matrix multiplications
    backward_matmuls: int = 0
    # What all other operations compute: the elements of their results, once for each pass over them
    # (_PASSES).
    forward_elements: int = 0
    backward_elements: int = 0
    # What is kept for the backward pass: each storage once, without parameters and dropout masks.
    saved_bytes: int = 0
    saved_results: int = 0   # those of them that are as large as result_bytes, in bytes
    input_bytes: int = 0
    output_bytes: int = 0
    result_bytes: int = 0    # the largest result of an operation in the forward pass
    linear_bytes: int = 0    # the largest result of a linear layer
    handed_bytes: int = 0    # input that is handed on as it is: DeBERTa's embeddings of distances
    matmul_flops: int = 0    # of the largest matrix multiplication
    large_flops: int = 0     # of all that are as large, forward and backward


BlockCounter = Callable[..., Tuple[CountedBlock, ...]]


@dataclass(frozen=True)
class Job:
    """A pipeline to plan."""

    blocks: Tuple[CountedBlock, ...]     # of one micro-batch, in the order of execution
    layout: Layout
    # With by-pod values and equal shares of layers resolved; of inference, IPUConfig.inference().
    config: IPUConfig
    machine: Machine
    micro_batch_size: int                # in rows
    max_seq_length: int                  # in tokens of a row
    precision: str = "float16"           # or "float32"
    phase: Phase = TRAINING
    clips: bool = False                  # the gradient's norm, of all parameters (max_grad_norm)
    pack: bool = False                   # several windows in a row
    packed_windows_per_row: Optional[float] = None   # mean of the real ones, None if not known
    windows: Optional[int] = None        # of an epoch, or to answer; None if not known
    epochs: float = 1.0
    updates: Optional[int] = None        # of the run, if given in place of epochs
    # count(micro_batch_size, embedding_serialization_factor, pack): the blocks for other settings
    count: Optional[BlockCounter] = field(default=None, compare=False, repr=False)

    @property
    def training(self) -> bool:
        return self.phase is TRAINING

    @property
    def windows_per_row(self) -> float:
        """Mean number of real windows in a row."""
        return self.packed_windows_per_row if self.pack else 1.0

    @property
    def gains_by_packing(self) -> bool:
        return not self.pack and (self.packed_windows_per_row or 1.0) > 1.05

    @property
    def element_bytes(self) -> int:
        """Of a weight, a gradient or an activation."""
        return 2 if self.precision == "float16" else 4

    @property
    def micro_batches(self) -> int:
        """Micro-batches that follow each other through the pipeline before it runs empty."""
        return self.micro_batches_over(len(self.layout.stages()))

    def micro_batches_over(self, stages: int) -> int:
        """Return `micro_batches` of a weight update (or call) with so many pipeline stages."""
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
    def windows_per_update(self) -> float:
        """Real windows of one weight update, or call, over all replicas, on average."""
        return self.rows_per_update * self.windows_per_row

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
        by_name = {block.name: block for block in self.blocks}
        return [(ipu, tuple(by_name[name] for name in names))
                for ipu, names in self.layout.stages()]

    def changed(self, micro_batch_size: Optional[int] = None, pack: bool = False,
                **changes: Any) -> "Job":
        """Return the job with other rows or config. Raises UsageError if that is not possible."""
        size = micro_batch_size or self.micro_batch_size
        job = replace(self, config=replace(self.config, **changes), micro_batch_size=size,
                      pack=pack or self.pack)
        new, old = ((one.micro_batch_size, one.config.embedding_serialization_factor, one.pack)
                    for one in (job, self))
        if new != old:
            job = replace(job, blocks=self.count(*new))
        if "layers_per_ipu" in changes:
            job = replace(job, layout=job.config.layout(len(self.layout.layer_ipus)))
        return job

    def state_bytes_per_parameter(self) -> float:
        """Return the bytes of optimizer state per parameter on each replica: of two moments."""
        both = 4 + (2 if self.config.enable_half_first_order_momentum else 4)
        return both / self.shards

    @property
    def shards(self) -> int:
        """Over how many replicas the optimizer state is sharded (ZeRO stage 1)."""
        return self.config.replication_factor if self.config.replicated_tensor_sharding else 1
