"""Rows through a poptorch.DataLoader, whose processes end with the block that uses them."""
from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import Any, Iterator

import torch

from ipu_options import poptorch


@contextmanager
def open_loader(options: Any, rows: torch.utils.data.Dataset, micro_batch_size: int,
                num_workers: int = 0, *, asynchronous: bool = True) -> Iterator[Iterator[dict]]:
    """An iterator over the combined batches of `rows` (qa/data/rows.py): {name: tensor [rows of a
    step, ...]}.

    options: of the model that runs them.  num_workers: processes that make rows, besides the one of
    an asynchronous loader. The tensors of an asynchronous loader are shared memory that is
    overwritten: what outlives an iteration must be cloned.
    """
    if not len(rows):  # a run that was killed after its last step has nothing left to load
        yield iter(())
        return
    mode = poptorch.DataLoaderMode.Async if asynchronous else poptorch.DataLoaderMode.Sync
    with workers_ignore_interrupt():
        loader = poptorch.DataLoader(options, rows, batch_size=micro_batch_size, collate_fn=collate,
                                     num_workers=num_workers, mode=mode)
    try:
        yield iter(loader)
    finally:
        loader.terminate()


def collate(rows):
    """Batch rows for a DataLoader, as its `collate_fn`: rows that were made as one batch pass
    through as they are.
    """
    return rows if isinstance(rows, dict) else torch.utils.data.default_collate(rows)


@contextmanager
def workers_ignore_interrupt() -> Iterator[None]:
    """Processes started in here ignore SIGINT, which a terminal's Ctrl-C sends to the whole group:
    the loader's worker must live on for the step to be finished. (A signal that is ignored stays so
    over exec, and Python leaves it as it finds it.)
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
