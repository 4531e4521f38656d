"""How many threads the host computes with.

torch takes one for each processor that it sees: too many where a container's quota gives less time,
and for small operations, because a busy neighbour delays each of thousands of parallel regions.
"""
from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

# Multiplications of a linear layer with a micro-batch below which a second thread does not pay.
SMALL = 100_000_000
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def choose_threads(model: torch.nn.Module, rows: int) -> None:
    """Set torch's number of threads for a model whose linear layers get `rows` rows at most.

    A change is printed. OMP_NUM_THREADS and MKL_NUM_THREADS take precedence.
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
    """Return how many processors this process may use: its affinity, within its cgroups' quota."""
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.ceil(min(visible or 1, _quota())))


def _quota() -> float:
    """Return the processors that this process's cgroup and all above it leave it, or infinity.

    That is cpu.max (v2) or cpu.cfs_quota_us / cpu.cfs_period_us (v1; cgroups(7)). A container often
    sees its own cgroup at the top of the file system.
    """
    folders = {_CGROUPS, _CGROUPS / "cpu"}
    with suppress(OSError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                own = (_CGROUPS / "cpu" if controllers else _CGROUPS) / path.strip("/")
                folders.update((own, *own.parents))
    return min(map(_quota_of, folders))


def _quota_of(folder: Path) -> float:
    """Return the processors that the files of one cgroup name, or infinity."""
    for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = " ".join((folder / file).read_text() for file in files).split()
            if float(quota) > 0:
                return float(quota) / float(period)
    return math.inf
