"""The documented figures of an IPU, and the fitted efficiencies that a BERT-like model reaches.

Sources of the figures: the product pages of Mk2 (GC200) and Bow, and the data sheets of IPU-M2000
and Bow-2000, docs.graphcore.ai. `Efficiencies` is fitted to the runs in published_runs.json;
`python -m planner calibrate --show` prints the error of each.

Bow is a Mk2 with a faster clock: all that happens on the chip, its exchange included, takes the
same number of cycles on both. Links, streaming memory and host do not follow the clock.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

MIB = 2 ** 20


@dataclass(frozen=True)
class Machine:
    """One IPU and its links. Rates are in FLOP/s and bytes/s, with decimal prefixes."""

    name: str
    clock_hz: float
    float16_flops: float
    float32_flops: float
    tiles: int = 1472
    tile_bytes: int = 624 * 1024
    link_bytes_per_second: float = 320e9           # IPU-Link, all links of an IPU, both directions
    # Two GW-Links of 100 Gbit/s join an IPU-Machine, with its four IPUs, to those of other racks
    # (docs.graphcore.ai, "Switched GW-Links"). In each direction.
    gateway_bytes_per_second: float = 2 * 100e9 / 8 / 4
    # The DRAM of an IPU-Machine gives 20e9 bytes/s to its four IPUs together.
    streaming_bytes_per_second: float = 20e9 / 4

    @property
    def memory_bytes(self) -> int:
        """In-Processor-Memory of one IPU: 1,472 tiles x 624 KiB = 897 MiB."""
        return self.tiles * self.tile_bytes

    @property
    def exchange_bytes_per_second(self) -> float:
        """All-to-all exchange on chip: 4 bytes a tile and cycle, 8e12 bytes/s on Mk2."""
        return 4 * self.tiles * self.clock_hz

    def flops(self, precision: str) -> float:
        """Return the peak rate of matrix multiplications in "float16" or "float32", in FLOP/s."""
        return self.float16_flops if precision == "float16" else self.float32_flops


MACHINES = {
    "mk2": Machine("Mk2", clock_hz=1.33e9, float16_flops=250e12, float32_flops=62.5e12),
    "bow": Machine("Bow", clock_hz=1.85e9, float16_flops=350e12, float32_flops=87.5e12),
}


@dataclass(frozen=True)
class Efficiencies:
    """Five fitted numbers about time, how well they are known, and an allowance for code.

    A block with F FLOPs in M matrix multiplications, whose other operations compute E elements,
    takes F / (peak x peak_utilisation) + M x matmul_cycles / clock +
    E x element_cycles / (tiles x clock) seconds, and exchange_cycles / (tiles x clock) for each
    byte that matmul_proportion makes it exchange more (matmul.py).

    `code_bytes` is not fitted, but chosen: every published configuration that is known to fit does
    fit in the plan, and the one that is known not to, does not. The size in a profile replaces it.
    """

    peak_utilisation: float = 0.7887   # share of the peak rate that large multiplications reach
    # What each multiplication takes besides: exchange, synchronisation, vertices that start.
    matmul_cycles: float = 31.05e3
    # Of a tile, for each float16 element of another operation, with its exchange.
    element_cycles: float = 2.373
    call_seconds: float = 0.05745      # of the host a training call: streams, scheduling, Python
    # Of the host for each token of a call's rows, which it collects, converts and copies
    # (poptorch/source/PoplarExecutable.cpp, run).
    token_seconds: float = 96.26e-9
    code_bytes: int = 130 * MIB        # code, control code and exchange code of an IPU
    exchange_cycles: float = 0.25      # of a tile for each byte; documented, not fitted
    source: str = "published runs"     # that the numbers were fitted to
    # Of the logarithms of the five numbers (FITTED): the expected range follows from it.
    covariance: Tuple[Tuple[float, ...], ...] = (
        (0.01787, 0.00847, 0.01755, -0.00292, 0.01145),
        (0.00847, 0.01771, -0.01406, -0.00686, 0.00407),
        (0.01755, -0.01406, 0.07831, -0.00886, -0.01697),
        (-0.00292, -0.00686, -0.00886, 0.05444, 0.00606),
        (0.01145, 0.00407, -0.01697, 0.00606, 0.0744))


FITTED = ("peak_utilisation", "matmul_cycles", "element_cycles", "call_seconds", "token_seconds")

# Share of link_bytes_per_second that collectives and copies between IPUs can use: that figure is
# for both directions, and each direction has half of it.
LINK_SHARE = 0.5
# What the host adds to a call of an inference pipeline, which has no optimizer to set. It is not
# fitted: a recorded validation of BERT-large on 16 IPUs (optimum-graphcore,
# introduction_to_optimum_graphcore.ipynb) takes 30 ms a call of 96 rows, most of it on the device.
INFERENCE_CALL_SECONDS = 0.005
