"""What all benchmarks share: sides that run in turn, their medians, spread and ratios."""
from __future__ import annotations

import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

ROOT = Path(__file__).resolve().parents[1]
# Without a pipeline, which requires more accumulation and so makes micro-batches smaller.
ONE_IPU = ("--ipus_per_replica", 1, "--layers_per_ipu", -1)


def run(sides: Dict[str, Callable], least: Optional[Dict[str, float]] = None, *, runs: int = 3,
        amount: float = 1, unit: str = "runs", warm_up: bool = True) -> None:
    """Run the sides in turn and print their times, and how many times as fast the last one is.

    sides: {name: function of no arguments}. If a function returns a float, that many seconds
    count, otherwise the time of its call. least: {name: ratio that the last side has to reach over
    that one}. runs: of each side, after one more that does not count if `warm_up`. amount, unit:
    what one run works off.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in sides}
    for number in range(runs + warm_up):
        for name, side in sides.items():
            begin = time.perf_counter()
            counted = side()
            if number >= warm_up:
                seconds[name].append(
                    counted if isinstance(counted, float) else time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(f"  {name:36} {medians[name]:9.3f} s ({min(times):.3f} .. {max(times):.3f})"
              f"   {amount / medians[name]:12,.1f} {unit}/s")
    *others, last = sides
    for name in others:
        ratio, limit = medians[name] / medians[last], (least or {}).get(name)
        ratios = [other / own for other, own in zip(seconds[name], seconds[last])]
        verdict = "" if limit is None else (
            f"; at least {limit:.3g}: {'reached' if ratio >= limit else 'MISSED'}")
        print(f"  {last}: {ratio:.2f} times as fast as {name} "
              f"({min(ratios):.2f} .. {max(ratios):.2f}){verdict}", flush=True)


def python(*words: Any, environment: Optional[Dict[str, str]] = None) -> str:
    """Run Python with these arguments in the project's folder; return what it prints.

    environment: variables besides this process's own. Ends the benchmark if the command fails.
    """
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def in_new_process(function: Callable, *arguments: Any) -> Any:
    """Return the function's result from a new process, whose memory is its own alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def memory(kinds: str) -> float:
    """Return MB of this process and its children of these kinds, as "Anon|Shmem" (proc(5))."""
    kilobytes = 0
    for process in ("self", *(child.pid for child in multiprocessing.active_children())):
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
        kilobytes += sum(map(int, re.findall(rf"Rss(?:{kinds}):\s*(\d+) kB", status)))
    return kilobytes / 1024


def machine() -> str:
    """Return the processor and the versions that the figures are measured on."""
    import torch
    import transformers

    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return (f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}, "
            f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}")
