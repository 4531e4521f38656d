"""The outputs that a call returns: those of the micro-batches that the output mode selects."""
from __future__ import annotations

from typing import Any, List

import torch

from . import enums

# Outputs of these types are converted: bfloat16 stands for float16, and PopTorch has no 64 bits.
OUTPUT_TYPES = {
    torch.bfloat16: torch.float16, torch.int64: torch.int32, torch.float64: torch.float32}


class Outputs:
    """Collects the output tensors of the micro-batches of one call.

    mode: an OutputMode other than Default.
    period: for EveryN, the number of device iterations of which the last one is kept.
    """

    def __init__(self, mode: int, period: int):
        self.mode, self.period = mode, period
        self.kept: Any = {} if mode in (enums.OutputMode.Final, enums.OutputMode.Sum) else []

    def add(self, iteration: int, replica: int, tensors: List[torch.Tensor]) -> None:
        """Take the output tensors of the next micro-batch, and keep them if the mode says so."""
        if self.mode == enums.OutputMode.Final:
            self.kept[replica] = tensors
        elif self.mode == enums.OutputMode.Sum:
            old = self.kept.get(replica)
            self.kept[replica] = tensors if old is None else [a + b for a, b in zip(old, tensors)]
        elif self.mode == enums.OutputMode.All or (iteration + 1) % self.period == 0:
            self.kept.append(tensors)

    def joined(self) -> List[torch.Tensor]:
        """Return one new tensor for each output, with the micro-batches joined along dimension 0.

        Scalars are joined to a vector, except that a single scalar stays a scalar.
        """
        kept = list(self.kept.values()) if isinstance(self.kept, dict) else self.kept
        joined = []
        for column in zip(*kept):
            out = column[0].clone() if len(column) == 1 else torch.cat([
                t.reshape(1) if t.dim() == 0 else t for t in column])
            joined.append(out.to(OUTPUT_TYPES.get(out.dtype, out.dtype)))
        return joined
