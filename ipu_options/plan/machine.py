"""What an IPU can do, as documented, and how much of it a BERT-like model reaches, as fitted.

Documented: the Mk2 (GC200) and Bow product pages and IPU-M2000 / Bow-2000 data sheets,
docs.graphcore.ai. Fitted: `Efficiencies`; published_runs.json has the runs, `python -m ipu_options
calibrate --show` the error of each.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One IPU and its links. FLOP/s and bytes/s, decimal."""

    name: str
    clock_hz: float
    float16_flops: float
    float32_flops: float
    tiles: int = 1472
    tile_bytes: int = 624 * 1024
    exchange_bytes_per_second: float = 8e12        # all-to-all on chip
    link_bytes_per_second: float = 320e9           # IPU-Link, all links of an IPU, both directions
    streaming_bytes_per_second: float = 20e9  # DRAM of the IPU-Machine, shared out over its IPUs

    @property
    def memory_bytes(self) -> int:
        """In-Processor-Memory of one IPU: 1,472 tiles x 624 KiB = 897 MiB."""
        return self.tiles * self.tile_bytes

    def flops(self, precision: str) -> float:
        """Peak rate of matrix multiplications in "float16" or "float32"."""
        return self.float16_flops if precision == "float16" else self.float32_flops


MACHINES = {
    "mk2": Machine("Mk2", clock_hz=1.33e9, float16_flops=250e12, float32_flops=62.5e12),
    "bow": Machine("Bow", clock_hz=1.85e9, float16_flops=350e12, float32_flops=87.5e12),
}


@dataclass(frozen=True)
class Efficiencies:
    """Three fitted numbers and an allowance.

    A matrix multiplication of F FLOPs takes F / (peak x peak_utilisation) + matmul_cycles / clock.
    So utilisation grows with the work of one layer on one micro-batch and saturates: half of
    `peak_utilisation` is reached where both terms are equal. `matmul_cycles` stands for all that
    does not grow with the work: exchange, synchronisation, and the element-wise operations around a
    multiplication.  `call_seconds` is what the host adds to each call of the device: scheduling,
    streams, the loop in Python.

    code_bytes is not fitted to speed: an allowance for code, control code and exchange code of an
    IPU that runs BERT layers, small enough that every configuration in published_runs.json that is
    known to fit does fit; a profile replaces it.
    """

    peak_utilisation: float = 0.378
    matmul_cycles: float = 21.1e3
    call_seconds: float = 0.0622
    code_bytes: int = 110 << 20
    source: str = "published runs"


# Link efficiency of collectives and of copies between IPUs: each direction has half of the
# bidirectional figure.
LINK_SHARE = 0.5


# Error of the default efficiencies on each published run that has a throughput, in percent, as
# `calibrate --show` prints it.
PUBLISHED_ERRORS_PERCENT = {
    "roberta-base SQuAD v1, 16 Mk2": 4.6,
    "bert-base pretraining phase 2, 16 Mk2": 3.5,
    "bert-large SQuAD v1, tutorial, 16 Mk2": -6.9,
    "roberta-base SQuAD v2, 16 Mk2 (held out)": -1.0,
}
