"""Measure each stage between the cached windows and the training loop.

    python -m benchmarks.input_pipeline            length 384, unpacked and packed

The stages are packing, collation and poptorch.DataLoader. The loader has to deliver 10 times the
published rate of this job on 16 Mk2 IPUs, which is 1,317 windows/s (Graphcore/roberta-base-squad).
The windows are made up, with SQuAD's distribution of lengths, and are stored and read as
qa.data.windows stores and reads them.
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import numpy
import pyarrow
from datasets import Dataset, disable_progress_bars, load_from_disk

from benchmarks.measure import compare, machine
from ipu_options import poptorch
from qa.data.loader import collate
from qa.data.rows import TrainingRows
from qa.data.windows import Windows

PUBLISHED = 1_317
MICRO_BATCHES, REPLICAS = 16, 4  # the published run's accumulation and replication


def write_windows(folder: str, count: int, offsets: bool = False) -> Windows:
    """Write windows with labels or offsets to a memory-mapped Arrow file, and open it.

    The columns are those that qa.data.windows.make_windows writes.
    """
    disable_progress_bars()
    random = numpy.random.default_rng(0)
    # The mean is 180 tokens, the 95th percentile 300.
    lengths = random.gamma(7.5, 24, count).clip(20, 384).astype(numpy.int32)
    begins = numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int32)
    starts = random.integers(10, lengths).astype(numpy.int16)
    columns = {
        "input_ids": pyarrow.ListArray.from_arrays(
            begins, random.integers(4, 50_000, begins[-1]).astype(numpy.uint16)),
        "example": numpy.arange(count, dtype=numpy.int32),
        "cls_position": numpy.zeros(count, numpy.int16),
        "context_start": numpy.full(count, 12, numpy.int16)}
    if offsets:
        # All but 13 tokens of a window are context.
        characters = 4 * numpy.arange(begins[-1] - 13 * count, dtype=numpy.int32)
        begins -= 13 * numpy.arange(count + 1, dtype=numpy.int32)
        characters -= 4 * numpy.repeat(begins[:-1], numpy.diff(begins))
        columns["offsets"] = pyarrow.ListArray.from_arrays(
            2 * begins, numpy.stack((characters, characters + 4), 1).ravel())
    else:
        columns.update(start_position=starts, end_position=starts)
    Dataset(pyarrow.table(columns)).save_to_disk(folder)
    return Windows(load_from_disk(folder))


def one_pass(windows: Windows, plan: dict, options) -> dict:
    """Run each stage once over all windows; returns {stage: seconds}.

    The time of a loader includes the reading and collating that it does itself.
    """
    seconds, clock = {}, time.perf_counter()

    def done(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[stage], clock = now - clock, now

    rows = TrainingRows(windows, **plan)
    done("packing, shuffling")
    for window in range(len(windows)):
        windows.input_ids(window)
    done("reading tokens")
    for first in range(0, len(rows), rows.rows_per_step):
        rows.__getitems__(range(first, first + rows.rows_per_step))
    done("reading, collating")
    for _ in poptorch.DataLoader(options, rows, batch_size=plan["micro_batch_size"],
                                 collate_fn=collate):
        pass
    done("DataLoader, sync")
    loader = poptorch.DataLoader(options, rows, batch_size=plan["micro_batch_size"],
                                 collate_fn=collate, mode=poptorch.DataLoaderMode.Async)
    batches = iter(loader)
    next(batches)
    done("starting the async worker")
    for _ in batches:
        pass
    done("DataLoader, async")
    loader.terminate()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=88_568,
                        help="as many as SQuAD v1's training set gives")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    options = poptorch.Options()
    options.Training.gradientAccumulation(MICRO_BATCHES)
    options.replicationFactor(REPLICAS)
    print(f"input pipeline, {given.windows} windows, rows of 384 tokens; {machine()}")
    with tempfile.TemporaryDirectory() as folder:
        windows = write_windows(folder, given.windows)
        plans = {
            name: dict(row_length=384, max_windows_per_row=room, pad_token_id=1, micro_batch_size=1,
                       micro_batches_per_update=MICRO_BATCHES * REPLICAS)
            for name, room in (("unpacked", 1), ("packed", 8))}
        passes = {name: [] for name in plans}
        for _ in range(given.runs):
            for name, plan in plans.items():
                passes[name].append(one_pass(windows, plan, options))
    for name, runs in passes.items():
        print(f" {name}")
        for stage in runs[0]:
            values = [run[stage] for run in runs]
            print(f"  {stage:28} {statistics.median(values):8.3f} s  "
                  f"{given.windows / statistics.median(values):12,.0f} windows/s"
                  f"   (runs {min(values):.3f} .. {max(values):.3f} s)")
        rate = given.windows / statistics.median([run["DataLoader, async"] for run in runs])
        compare(rate / PUBLISHED, 10, f"times the published {PUBLISHED:,} windows/s on 16 IPUs")


if __name__ == "__main__":
    main()
