"""How many threads the host computes with.

torch takes one for each processor that it sees. This is too many where a container's quota gives
less time than it shows processors, and for small operations: a parallel region ends when the last
thread has ended, so that one busy neighbour delays each of thousands of regions.
"""
from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch

# Multiplications of a linear layer with a micro-batch below which a second thread does not pay.
SMALL = 100_000_000
_CGROUP = Path("/sys/fs/cgroup")


def choose_threads(model: torch.nn.Module, rows: int) -> None:
    """Set torch's number of threads for a model whose linear layers get `rows` rows at most.

    A change is printed to standard error. OMP_NUM_THREADS and MKL_NUM_THREADS take precedence: then
    nothing is changed.
    """
    if os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS"):
        return
    largest = max((module.weight.numel() for module in model.modules()
                   if isinstance(module, torch.nn.Linear)), default=0)
    available, before = processors(), torch.get_num_threads()
    chosen = 1 if largest * rows < SMALL else available
    torch.set_num_threads(chosen)
    if chosen != before:
        print(f"poptorch_host: {chosen} thread{'s' * (chosen > 1)} on {available} processors"
              f"{', because the layers are small' * (chosen < available)}; OMP_NUM_THREADS changes "
              "that", file=sys.stderr)


def processors() -> int:
    """Return how many processors this process may use: its affinity, within a cgroup's quota."""
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.ceil(min(visible or 1, _quota())))


def _quota() -> float:
    """Return the processors of this process's cgroup (v2 cpu.max, v1 cpu.cfs_*), or infinity.

    A container sees its own cgroup at the top of the file system.
    """
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((_CGROUP / file).read_text() for file in files).split()
            if float(quota) > 0:
                return float(quota) / float(period)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return math.inf
