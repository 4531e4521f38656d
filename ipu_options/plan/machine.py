"""The documented figures of an IPU, and the fitted efficiencies that a BERT-like model reaches.

Sources of the figures: the product pages of Mk2 (GC200) and Bow, and the data sheets of IPU-M2000
and Bow-2000, docs.graphcore.ai. `Efficiencies` is fitted to the runs in published_runs.json;
`python -m ipu_options calibrate --show` prints the error of each.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One IPU and its links. Rates are in FLOP/s and bytes/s, with decimal prefixes."""

    name: str
    clock_hz: float
    float16_flops: float
    float32_flops: float
    tiles: int = 1472
    tile_bytes: int = 624 * 1024
    exchange_bytes_per_second: float = 8e12        # all-to-all on chip
    link_bytes_per_second: float = 320e9           # IPU-Link, all links of an IPU, both directions
    streaming_bytes_per_second: float = 20e9       # one IPU's share of the IPU-Machine's DRAM

    @property
    def memory_bytes(self) -> int:
        """In-Processor-Memory of one IPU: 1,472 tiles x 624 KiB = 897 MiB."""
        return self.tiles * self.tile_bytes

    def flops(self, precision: str) -> float:
        """Return the peak rate of matrix multiplications in "float16" or "float32", in FLOP/s."""
        return self.float16_flops if precision == "float16" else self.float32_flops


MACHINES = {
    "mk2": Machine("Mk2", clock_hz=1.33e9, float16_flops=250e12, float32_flops=62.5e12),
    "bow": Machine("Bow", clock_hz=1.85e9, float16_flops=350e12, float32_flops=87.5e12),
}


@dataclass(frozen=True)
class Efficiencies:
    """Three fitted numbers about time, and an allowance for the size of the code.

    A matrix multiplication of F FLOPs takes F / (peak x peak_utilisation) + matmul_cycles / clock
    seconds. Utilisation therefore grows with the work of a layer on a micro-batch and saturates; it
    is half of `peak_utilisation` where the two terms are equal. `matmul_cycles` stands for all that
    does not grow with the work: exchange, synchronisation, and the element-wise operations around a
    multiplication. `call_seconds` is the time that the host adds to each call of the device:
    scheduling, streams, the loop in Python.

    `code_bytes` is an allowance for code, control code and exchange code of one IPU that runs BERT
    layers. It is not fitted to speed, but chosen small enough that every configuration in
    published_runs.json that is known to fit does fit in the plan. The size in a profile replaces
    it. `source` names the runs that the numbers were fitted to.
    """

    peak_utilisation: float = 0.378
    matmul_cycles: float = 21.1e3
    call_seconds: float = 0.0622
    code_bytes: int = 110 << 20
    source: str = "published runs"


# Share of link_bytes_per_second that collectives and copies between IPUs can use: that figure is
# for both directions, and each direction has half of it.
LINK_SHARE = 0.5


# Error of the throughput that the default efficiencies predict for a published run, in percent, as
# `calibrate --show` prints it. Runs whose published throughput is only a lower bound are left out.
PUBLISHED_ERRORS_PERCENT = {
    "roberta-base SQuAD v1, 16 Mk2": 4.6,
    "bert-base pretraining phase 2, 16 Mk2": 3.5,
    "bert-large SQuAD v1, tutorial, 16 Mk2": -6.9,
    "roberta-base SQuAD v2, 16 Mk2 (held out)": -1.0,
}
