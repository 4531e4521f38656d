"""The outputs that a call returns: those of the micro-batches that the output mode selects."""
from __future__ import annotations

from typing import Any, Dict, List, Tuple

import torch

from . import enums

# Outputs of these types are converted: bfloat16 stands for float16, and PopTorch has no 64 bits.
OUTPUT_TYPES = {
    torch.bfloat16: torch.float16, torch.int64: torch.int32, torch.float64: torch.float32}
LARGEST = 65504.0  # the largest float16 number


def output_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type that PopTorch gives to an output that the host's model returns in `dtype`."""
    return OUTPUT_TYPES.get(dtype, dtype)


class Outputs:
    """Collects the output tensors of the micro-batches of one call.

    Anchored gradients are among them: PopTorch 3.4 ignores the output modes of their own
    (addOutputTensor(id) in LowerToPopart.cpp).

    options: the executor's, whose output mode is not Default. types: the type of each tensor.
    """

    def __init__(self, options: Any, types: List[torch.dtype]):
        self.mode, self.period, self.types = (
            options.output_mode, options.output_return_period, types)
        popart = options._Popart.options
        self.synthetic = bool(popart.get("syntheticDataMode"))
        self.nan_on_overflow = popart.get("engineOptions", {}).get(
            "debug.nanOverflowMode") == "true"
        self.accumulation = options.Training.gradient_accumulation
        # Tensors by (step, replica), or by (0, replica) where a replica keeps one for all steps.
        self.kept: Dict[Tuple[int, int], List[torch.Tensor]] = {}

    def add(self, step: int, replica: int, tensors: List[torch.Tensor]) -> None:
        """Take a micro-batch's tensors, and keep them if the mode says so; step: of its replica."""
        if self.mode == enums.OutputMode.Final:
            self.kept[0, replica] = tensors
        elif self.mode == enums.OutputMode.Sum:
            old = self.kept.get((0, replica))
            self.kept[0, replica] = tensors if old is None else [
                a + b for a, b in zip(old, tensors)]
        elif (self.mode == enums.OutputMode.All
              or (step // self.accumulation + 1) % self.period == 0):
            self.kept[step, replica] = tensors

    def joined(self) -> List[torch.Tensor]:
        """Return one new tensor for each output, with the micro-batches joined along dimension 0.

        A single scalar stays a scalar. With synthetic data PopTorch returns memory that was never
        written (at::empty in PoplarExecutable.cpp; PopART makes no streams to the host,
        irlowering.cpp): here NaN, or 0 in integers.
        """
        kept = [self.kept[place] for place in sorted(self.kept)]
        joined = []
        for dtype, column in zip(self.types, zip(*kept)):
            out = column[0].clone() if len(column) == 1 else torch.cat([
                t.reshape(1) if t.dim() == 0 else t for t in column])
            out = self._half(out) if dtype == torch.float16 else out.to(dtype)
            if self.synthetic:
                out.fill_(float("nan") if dtype.is_floating_point else 0)
            joined.append(out)
        return joined

    def _half(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` in float16; finite numbers beyond its range saturate, as on an IPU.

        With Poplar's engine option debug.nanOverflowMode they become NaN. PopART documents both
        (removeunnecessarylossgradcastpattern.hpp: "clipped (unless the user has enabled NaN on
        overflow)").
        """
        half = tensor.half()
        overflow = half.isinf() & tensor.isfinite()
        if not overflow.any():
            return half
        if self.nan_on_overflow:
            return half.masked_fill(overflow, float("nan"))
        return torch.where(overflow, tensor.float().clamp(-LARGEST, LARGEST).half(), half)
