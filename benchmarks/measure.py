"""What all benchmarks share: running the sides in turn, and printing times and ratios."""
from __future__ import annotations

import os
import platform
import statistics
import time
from typing import Callable, Dict, List


def alternate(sides: Dict[str, Callable], runs: int) -> Dict[str, List[float]]:
    """Run the sides in turn, `runs` times each after a warm-up round; returns {side: [seconds]}."""
    seconds = {name: [] for name in sides}
    for run in range(runs + 1):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            if run:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def describe(name: str, seconds: List[float], amount: int, unit: str) -> None:
    """Print one side's median time, its rate and the spread (fastest and slowest run)."""
    median = statistics.median(seconds)
    print(f"  {name:40} {median * 1e3:10.1f} ms   {amount / median:12,.0f} {unit}/s   "
          f"(runs {min(seconds) * 1e3:.1f} .. {max(seconds) * 1e3:.1f} ms)")


def compare(ratio: float, least: float, what: str) -> None:
    """Print a ratio and whether it reaches its limit `least`."""
    print(
        f"  {what}: {ratio:.2f} (at least {least:g}: {'reached' if ratio >= least else 'MISSED'})")


def machine() -> str:
    """The processor and the versions of Python and torch that the figures were measured on."""
    import torch

    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        model = next(
            (line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")),
            model)
    return (f"{len(os.sched_getaffinity(0))} cores of {model}, "
            f"Python {platform.python_version()}, torch {torch.__version__}")


def matmul_rate(dtype) -> float:
    """FLOP/s of a matrix multiplication of roberta-base's size, the fastest of ten.

    It multiplies 1,536 tokens of width 768 by a weight that maps 768 to 3,072.
    """
    import torch

    tokens, weight = torch.randn(1536, 768).to(dtype), torch.randn(3072, 768).to(dtype)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        torch.nn.functional.linear(tokens, weight)
        seconds.append(time.perf_counter() - begin)
    return 2 * tokens.numel() * weight.shape[0] / min(seconds)
