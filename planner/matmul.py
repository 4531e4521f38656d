"""What matmul_proportion does to a matrix multiplication: its temporary memory and its time.

poplibs splits it over the tiles and takes the fastest split whose temporaries fit into this share
of a tile's memory (lib/poplin/ConvPlan.cpp, runPlanner). Of V multiply-adds a tile computes r rows,
d of the depth and c columns, V = r d c. Its temporaries are its operands and partial sums, of s and
p bytes an element, and pass through its exchange (lib/poplin/ConvModel.cpp,
addConvTempMemoryEstimate and addExchangeCycleEstimates):

    s r d + s d c + p r c  >=  3 (s s p V V)^(1/3)  bytes

which is an equality where the three are alike: the fastest split. With less memory, poplibs works
in parts, one after the other (serial splits, constructModel). Each of S parts has V / S
multiply-adds: its temporaries fall by S^(2/3), and the exchange of all parts rises by S^(1/3).
tests/planner/test_matmul.py tries all splits of the shapes at hand.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from planner.job import Job

# poplibs cuts the depth or the columns of a part, which have at least 1,024 elements where memory
# is short, in grains of 16.
MOST_PARTS = 64


def temporary_bytes(job: Job, flops: Any, proportion: float) -> Any:
    """Return the bytes that a multiplication of so many FLOPs needs on all tiles."""
    fastest = np.ceil(_fastest_bytes(job, flops))
    share = np.floor(proportion * job.machine.memory_bytes)
    return np.clip(share, np.ceil(fastest / MOST_PARTS ** (2 / 3)), fastest)


def serial_bytes(job: Job, flops: Any, each: Any, proportion: float) -> Any:
    """Return how many bytes more all tiles exchange because memory is short.

    flops: of all multiplications, `each` of one.
    """
    fastest, each = _fastest_bytes(job, each), np.maximum(1.0 * each, 1)
    parts = np.sqrt(fastest / np.maximum(temporary_bytes(job, each, proportion), 1))
    return flops / each * fastest * np.maximum(parts - 1, 0)


def _fastest_bytes(job: Job, flops: Any) -> Any:
    tiles, size = job.machine.tiles, job.element_bytes
    partial = 2 if size == 2 and job.config.enable_half_partials else 4
    return 3 * tiles * (size * size * partial * (flops / 2 / tiles) ** 2) ** (1 / 3)
