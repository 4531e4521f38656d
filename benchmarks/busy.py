"""Measure the demo's training on a quiet machine, with busy neighbours, and on one processor.

    python -m benchmarks.busy [--steps 60] [--runs 3]

Each run is `train.py --config demo` in a process of its own; what counts is the windows/s of its
train_results.json. Busy: one process for each processor computes all the time. One processor:
taskset, as a stand-in for a container's quota. The threads are chosen by poptorch_host, and then
as torch and OpenMP choose by default: one for each processor, which spin while they wait.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import machine

ROOT = Path(__file__).resolve().parents[1]
LEAST = 1 / 2.5  # of the quiet speed, with busy neighbours
NEIGHBOUR = [sys.executable, "-c", "while True: pass"]
THREADS = {"chosen": {}, "OpenMP's default": {"OMP_NUM_THREADS": str(os.cpu_count()),
                                              "OMP_WAIT_POLICY": "ACTIVE"}}


def windows_per_second(folder: str, steps: int, variables: dict, prefix=()) -> float:
    """Return the windows/s of one run of `steps` steps."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")}
    subprocess.run(
        [*prefix, sys.executable, "train.py", "--config", "demo", "--max_steps", str(steps),
         "--do_train", "--output_dir", folder, "--overwrite_output_dir"],
        cwd=ROOT, env={**environment, **variables}, check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    return json.loads((Path(folder) / "train_results.json").read_text())["windows_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    print(f"{machine()}\n", flush=True)
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        windows_per_second(folder, 2, {})  # the windows are in the cache from now on
        for _ in range(given.runs):
            for case, neighbours, prefix in (("quiet", 0, ()), ("busy", os.cpu_count(), ()),
                                             ("one processor", 0, ("taskset", "-c", "0"))):
                for threads, variables in THREADS.items():
                    others = [subprocess.Popen(NEIGHBOUR) for _ in range(neighbours)]
                    try:
                        speed = windows_per_second(folder, given.steps, variables, prefix)
                    finally:
                        for other in others:
                            other.kill()
                            other.wait()
                    found.setdefault((case, threads), []).append(speed)
    for (case, threads), speeds in found.items():
        quiet = statistics.median(found["quiet", threads])
        print(f"{case:14} {threads:17} {statistics.median(speeds):6.1f} windows/s "
              f"({min(speeds):.1f} to {max(speeds):.1f}), "
              f"{statistics.median(speeds) / quiet:.2f} of quiet")
    ratio = (statistics.median(found["busy", "chosen"])
             / statistics.median(found["quiet", "chosen"]))
    print(f"busy / quiet: {ratio:.2f}, at least {LEAST:.2f}: {'yes' if ratio >= LEAST else 'NO'}")


if __name__ == "__main__":
    main()
