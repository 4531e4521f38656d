"""Measure time and memory of one epoch of a million windows through poptorch.DataLoader.

    python -m benchmarks.million_windows           packed and unpacked; one minute, 0.4 GB of disk

Memory should not grow during the epoch. It is read after every tenth of the epoch, and is what the
training process and its loader's worker hold themselves (proc(5), RssAnon + RssShmem; what they
share counts twice). The windows are in a memory-mapped file, whose pages belong to the system's
cache. The peak is the largest resident size of the training process, which includes the pages of
that file that it has read.
"""
from __future__ import annotations

import argparse
import multiprocessing
import re
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Dict

import datasets
import torch

from benchmarks.input_pipeline import MICRO_BATCHES, REPLICAS, write_windows
from benchmarks.measure import machine
from ipu_options import poptorch
from qa.data.loader import collate
from qa.data.rows import TrainingRows
from qa.data.windows import Windows


def held_memory() -> float:
    """MB that this process and its children hold themselves, without pages of mapped files."""
    kilobytes = 0
    for process in ("self", *(child.pid for child in multiprocessing.active_children())):
        with open(f"/proc/{process}/status", encoding="ascii") as status:
            kilobytes += sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s*(\d+) kB", status.read())))
    return kilobytes / 1024


def epoch(folder: str, room: int) -> Dict[str, float]:
    """Load one epoch of the windows in `folder` as train.py does, up to `room` windows in a row.

    Returns the number of windows in the batches, the seconds, the peak MB, and the MB held after
    the first and after the last tenth of the epoch.
    """
    torch.set_num_threads(1)
    options = poptorch.Options()
    options.Training.gradientAccumulation(MICRO_BATCHES)
    options.replicationFactor(REPLICAS)
    begin = time.perf_counter()
    rows = TrainingRows(
        Windows(datasets.load_from_disk(folder)), row_length=384, max_windows_per_row=room,
        pad_token_id=1, micro_batch_size=1, micro_batches_per_update=MICRO_BATCHES * REPLICAS)
    loader = poptorch.DataLoader(options, rows, batch_size=1, collate_fn=collate,
                                 mode=poptorch.DataLoaderMode.Async)
    windows, held = 0, []
    for step, batch in enumerate(loader, start=1):
        windows += int(torch.count_nonzero(batch["loss_weights"]))
        if step * 10 // rows.total_steps > len(held):
            held.append(held_memory())
    seconds = time.perf_counter() - begin
    loader.terminate()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "windows": windows, "seconds": seconds, "peak": peak, "first": held[0], "last": held[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=1_000_000)
    given = parser.parse_args()
    print(f"an epoch through the asynchronous loader, rows of 384 tokens; {machine()}")
    with tempfile.TemporaryDirectory() as folder:
        in_a_process_of_its_own(write_windows, folder, given.windows)
        for name, room in (("packed", 8), ("unpacked", 1)):
            seen = in_a_process_of_its_own(epoch, folder, room)
            print(
                f"{name:>9}: {seen['windows']:,} windows in {seen['seconds']:.1f} s, "
                f"{seen['windows'] / seen['seconds']:,.0f} windows/s; "
                f"peak {seen['peak']:.0f} MB; held after the first tenth {seen['first']:.0f} MB, "
                f"after the last {seen['last']:.0f} MB: "
                f"growth {seen['last'] - seen['first']:+.1f} MB", flush=True)


def in_a_process_of_its_own(function, *arguments):
    """Call the function in a new process, which takes all it has allocated along when it ends."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


if __name__ == "__main__":
    main()
