"""Load rows through a poptorch.DataLoader whose processes end with the block that uses them."""
from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import Any, Iterator

import torch

from ipu_options import poptorch
from qa.data.rows import ProcessRows
from runtime.signals import workers_ignore_signals


@contextmanager
def open_loader(options: Any, rows: torch.utils.data.Dataset, micro_batch_size: int,
                num_workers: int = 0, *, asynchronous: bool = True) -> Iterator[Iterator[dict]]:
    """Open a loader for the duration of a `with` block.

    rows: a data set of qa/data/rows.py with the rows of all processes. num_workers: processes that
    make rows, in addition to the one process of an asynchronous loader.

    Gives an iterator over this process's combined batches, {name: tensor [rows, ...]}, once the
    first one is there. An asynchronous loader reuses the shared memory of its tensors.
    """
    # A run that is resumed after its last step has no rows left to load.
    if not len(rows):
        yield iter(())
        return
    mode = poptorch.DataLoaderMode.Async if asynchronous else poptorch.DataLoaderMode.Sync
    with workers_ignore_signals():
        loader = poptorch.DataLoader(
            options, rows_of_process(options, rows, micro_batch_size), batch_size=micro_batch_size,
            collate_fn=collate, num_workers=num_workers, mode=mode,
            auto_distributed_partitioning=False)
    try:
        batches = iter(loader)
        # Not iter(batches), which would start an asynchronous loader anew.
        yield itertools.chain([next(batches)], iter(lambda: next(batches, None), None))
    finally:
        loader.terminate()


def rows_of_process(options: Any, rows: torch.utils.data.Dataset,
                    micro_batch_size: int) -> torch.utils.data.Dataset:
    """Return this process's share of `rows`."""
    here = options.Distributed
    if here.numProcesses == 1:
        return rows
    return ProcessRows(rows, here.processId, here.numProcesses,
                       options.replication_factor * micro_batch_size)


def first_batch(options: Any, rows: torch.utils.data.Dataset, micro_batch_size: int) -> dict:
    """Return this process's first combined batch, {name: tensor [rows of one step, ...]}."""
    count = (micro_batch_size * options.device_iterations * options.replication_factor
             * options.Training.gradient_accumulation)
    return rows_of_process(options, rows, micro_batch_size).__getitems__(range(count))


def collate(rows):
    """Make a batch of rows, unless they were made as one by `__getitems__`."""
    return rows if isinstance(rows, dict) else torch.utils.data.default_collate(rows)
