"""What a call returns of all its micro-batches, by output mode."""
from __future__ import annotations

from typing import Any, List

import torch

from . import enums

OUTPUT_TYPES = {
    torch.bfloat16: torch.float16, torch.int64: torch.int32,
    torch.float64: torch.float32}  # PopTorch has no 64 bits


class Outputs:
    """Collects the tensors of micro-batches. `mode` is not Default; `period` counts device
    iterations, for EveryN.
    """

    def __init__(self, mode: int, period: int):
        self.mode, self.period = mode, period
        self.kept: Any = {} if mode in (enums.OutputMode.Final, enums.OutputMode.Sum) else []

    def add(self, iteration: int, replica: int, tensors: List[torch.Tensor]) -> None:
        """The tensors of the next micro-batch."""
        if self.mode == enums.OutputMode.Final:
            self.kept[replica] = tensors
        elif self.mode == enums.OutputMode.Sum:
            old = self.kept.get(replica)
            self.kept[replica] = tensors if old is None else [a + b for a, b in zip(old, tensors)]
        elif self.mode == enums.OutputMode.All or (iteration + 1) % self.period == 0:
            self.kept.append(tensors)

    def joined(self) -> List[torch.Tensor]:
        """One new tensor for each output: micro-batches one after the other along dimension 0; a
        lone scalar stays one.
        """
        kept = list(self.kept.values()) if isinstance(self.kept, dict) else self.kept
        joined = []
        for column in zip(*kept):
            out = column[0].clone() if len(column) == 1 else torch.cat([
                t.reshape(1) if t.dim() == 0 else t for t in column])
            joined.append(out.to(OUTPUT_TYPES.get(out.dtype, out.dtype)))
        return joined
