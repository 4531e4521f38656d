"""Measure the demo's training on a quiet machine, with busy neighbours, and with a quota.

    python -m benchmarks.busy [--steps 60] [--runs 3]

Each run is a process of its own, and what counts is the windows/s of its training alone: of
train.py --config demo, whose threads are chosen by poptorch_host; of the same as torch and OpenMP
choose by default, which is a thread for each processor, that spin while they wait; and of Trainer
on the demo's questions and model (needs `accelerate`). Busy: one process for each processor
computes all the time. Quota: a cgroup with the time of one processor, or where none can be made
(it takes root), taskset.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List

from benchmarks.measure import compare, machine
from benchmarks.training import trainer_on_demo
from qa.data.demo import write_demo

ROOT = Path(__file__).resolve().parents[1]
LEAST = 1 / 2.5  # of the quiet speed, with busy neighbours
NEIGHBOUR = [sys.executable, "-c", "while True: pass"]
CHOSEN, DEFAULT, TRAINER = "train.py", "train.py, OpenMP's default", "Trainer"
# The default of libgomp where OMP_WAIT_POLICY is not set (its manual); ipu_options sets less.
SPINNING = {"OMP_NUM_THREADS": str(os.cpu_count()), "GOMP_SPINCOUNT": "300000"}


def windows_per_second(side: str, folder: Path, steps: int, prefix: List[str]) -> float:
    """Return the windows/s of one run of `steps` weight updates of about 32 windows."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS",
                                   "GOMP_SPINCOUNT")}
    command = trainer_on_demo(folder) if side == TRAINER else [
        "train.py", "--config", "demo", "--do_train", "--overwrite_output_dir"]
    said = subprocess.run(
        [*prefix, sys.executable, *map(str, command), "--max_steps", str(steps), "--output_dir",
         str(folder / "out")], cwd=ROOT, check=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, universal_newlines=True,
        env={**environment, **(SPINNING if side == DEFAULT else {})}).stdout
    if side == TRAINER:
        return float(re.search(r"(\S+) windows/s", said).group(1))
    return json.loads((folder / "out" / "train_results.json").read_text())["windows_per_second"]


@contextmanager
def one_processor() -> Iterator[List[str]]:
    """Give a command's prefix that lets it have the time of one processor."""
    for top, files in (("/sys/fs/cgroup/cpu", {"cpu.cfs_quota_us": "100000"}),
                       ("/sys/fs/cgroup", {"cpu.max": "100000 100000"})):
        group = Path(top) / "benchmark"
        try:
            group.mkdir(exist_ok=True)
            for name, text in files.items():
                (group / name).write_text(text)
        except OSError:
            continue
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
        group.rmdir()
        return
    print("no cgroup can be made here: taskset stands in for a quota")
    yield ["taskset", "-c", "0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    print(f"{machine()}\n", flush=True)
    found: dict = {}
    with tempfile.TemporaryDirectory() as name, one_processor() as quota:
        folder = Path(name)
        write_demo(folder, seed=0)
        windows_per_second(CHOSEN, folder, 2, [])  # the windows are in the cache from now on
        for _ in range(given.runs):
            for case, neighbours, prefix in (("quiet", 0, []), ("busy", os.cpu_count(), []),
                                             ("quota of one processor", 0, quota)):
                for side in (CHOSEN, DEFAULT, TRAINER):
                    others = [subprocess.Popen(NEIGHBOUR) for _ in range(neighbours)]
                    # With neighbours the default can take a hundred times as long.
                    steps = given.steps // 10 if side == DEFAULT else given.steps
                    try:
                        speed = windows_per_second(side, folder, steps, prefix)
                    finally:
                        for other in others:
                            other.kill()
                            other.wait()
                    found.setdefault((case, side), []).append(speed)
    for (case, side), speeds in found.items():
        quiet = statistics.median(found["quiet", side])
        print(f"{case:23} {side:27} {statistics.median(speeds):6.1f} windows/s "
              f"({min(speeds):.1f} to {max(speeds):.1f}), "
              f"{statistics.median(speeds) / quiet:.2f} of quiet")
    quiet, busy = (statistics.median(found[case, CHOSEN]) for case in ("quiet", "busy"))
    compare(busy / quiet, LEAST, "train.py's speed with busy neighbours, of its quiet speed")


if __name__ == "__main__":
    main()
