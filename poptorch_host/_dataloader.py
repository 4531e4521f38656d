"""poptorch.DataLoader: combined batches, read in this process or in a worker process.

The worker process writes batches into a ring of tensors in shared memory, because torch's own
workers take several times as long to hand a batch over, most of all where the processors are busy.
As with PopTorch, the tensors of a batch are overwritten once the next batch has been requested:
clone whatever must outlive an iteration.
"""
from __future__ import annotations

import os
import sys
import weakref
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence, Union

import torch
import torch.multiprocessing

from . import _structure, profiling
from ._device import micro_batches_per_call
from ._errors import NotOffered, refuse
from ._logging import logger
from .enums import DataLoaderMode
from .options import Options

SLOTS = 3  # batches in the ring


class DataLoader(torch.utils.data.DataLoader):
    """torch's DataLoader for combined batches.

    A combined batch has batch_size x device iterations x gradient accumulation x replicas rows.
    With mode Async, an additional process reads the data set ahead of time.
    """

    def __init__(
            self, options: Options, dataset: torch.utils.data.Dataset, batch_size: int = 1,
            shuffle: bool = None, num_workers: int = 0, drop_last: bool = True,
            persistent_workers: Optional[bool] = None, auto_distributed_partitioning: bool = True,
            mode: DataLoaderMode = DataLoaderMode.Sync,
            async_options: Optional[Dict[str, Any]] = None,
            rebatched_worker_size: Optional[int] = None,
            batch_sampler: Optional[Union[torch.utils.data.Sampler, Iterable[Sequence]]] = None,
            **kwargs):
        assert isinstance(options, Options)
        options._freeze()
        self._options = options
        if mode == DataLoaderMode.AsyncRebatched or rebatched_worker_size is not None:
            refuse("DataLoaderMode.AsyncRebatched")
        if async_options is not None:
            refuse("AsynchronousDataAccessor")
        if batch_sampler is not None:
            raise NotOffered("DataLoader(batch_sampler=...)", "the data set gives rows in order")
        if options.Distributed.numProcesses > 1 and auto_distributed_partitioning:
            raise NotOffered(
                "DataLoader(auto_distributed_partitioning=True)",
                "give the loader this process's part of the data set, and pass False")
        iterable = isinstance(dataset, torch.utils.data.IterableDataset)
        if not iterable:
            dataset = profiling.Channel("dataset").instrument(dataset, "__getitem__")
        self._combined = None if batch_size is None else (
            batch_size * micro_batches_per_call(options))
        super().__init__(
            dataset, batch_size=self._combined, shuffle=None if iterable else bool(shuffle),
            drop_last=drop_last and batch_size is not None, num_workers=num_workers,
            persistent_workers=num_workers > 0 if persistent_workers is None else
            persistent_workers, **kwargs)
        self._reader = _Reader(self) if mode == DataLoaderMode.Async else None

    # the number of rows that one call of the model takes, or None if batch_size is None
    combinedBatchSize = property(lambda self: self._combined)
    options = property(lambda self: self._options)  # which are frozen

    def terminate(self) -> None:
        """End the worker process, if this loader has one."""
        if self._reader is not None:
            self._reader.end()

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self._reader is None else self._reader.epoch()

    def __getstate__(self):
        return {**self.__dict__, "_reader": None}


class _Reader:
    """The worker process of a loader, as the process that it works for sees it."""

    def __init__(self, loader: DataLoader):
        context = torch.multiprocessing.get_context("forkserver")
        # The fork server imports torch once, which every process it forks would do otherwise.
        context.set_forkserver_preload(["__main__", __name__])
        self._pipe, other = context.Pipe()
        process = context.Process(target=_Worker().main, args=(loader, other), daemon=False)
        process.start()
        other.close()
        # The process ends with this object, or at the latest when Python exits.
        self.end = weakref.finalize(self, _end_process, process, self._pipe)
        self._epoch, self._held, self._ring = 0, None, None

    def epoch(self) -> Iterator[Any]:
        """Have the worker begin an epoch, and return the iterator over its batches."""
        assert self.end.alive, "The worker process has been terminated"
        self._epoch += 1
        self._pipe.send(("epoch", self._epoch))
        return self._batches(self._epoch)

    def _batches(self, wanted: int) -> Iterator[Any]:
        while wanted == self._epoch:  # until another iterator is begun
            self._give_back(self._held)
            self._held = None
            try:
                if self._ring is None:
                    self._structure, self._ring = self._pipe.recv()
                epoch, slot, rows = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                raise AssertionError("An error occurred in the data fetcher") from None
            if epoch != wanted:  # read for an iterator before this one
                self._give_back(slot)
            elif slot is None:
                return
            else:
                self._held = slot
                tensors = self._ring[slot] if rows is None else [t[:rows] for t in self._ring[slot]]
                yield _structure.rebuild(self._structure, iter(tensors))

    def _give_back(self, slot: Optional[int]) -> None:
        if slot is not None:
            self._pipe.send(("free", slot))


def _end_process(process, pipe) -> None:
    try:
        pipe.send(("end", None))
    except OSError:
        pass
    process.join(timeout=5)
    if process.is_alive():  # it is still busy inside the data set
        process.kill()
        process.join()
    pipe.close()


class _Worker:
    """What the worker process runs: it reads the data set and fills the free slots of the ring.

    It sends (structure, ring) once, then (epoch, slot, rows) for each batch, where rows is None
    if the batch fills the slot, and (epoch, None, None) at the end of an epoch. It receives
    ("epoch", number) when an iterator is begun, ("free", slot) when a slot may be overwritten, and
    ("end", None).
    """

    def __init__(self):
        self.free, self.wanted, self.ring = list(range(SLOTS)), 0, None

    def main(self, loader, pipe) -> None:
        """Run until "end" is received or the other end of the pipe is closed."""
        logger.debug("AsynchronousDataAccessor worker process: %d", os.getpid())
        # torch's own workers are forked. They would otherwise inherit this process's start method.
        if sys.platform == "linux":
            torch.multiprocessing.set_start_method("fork", force=True)
        self.pipe, done = pipe, 0
        try:
            while True:
                while self.wanted == done:
                    self._receive()
                done = self.wanted
                self._read(loader, done)
        except (KeyboardInterrupt, EOFError, ConnectionError):
            pass

    def _read(self, loader, epoch: int) -> None:
        """Send the batches of an epoch, until another one is wanted."""
        for batch in loader:
            tensors = _structure.flatten(batch)
            if self.ring is None:
                self.ring = [
                    [torch.empty_like(t).share_memory_() for t in tensors] for _ in range(SLOTS)]
                self.pipe.send((batch, self.ring))
            while not self.free or self.pipe.poll():
                self._receive()
                if self.wanted > epoch:
                    return
            slot, rows = self.free.pop(0), None
            for shared, tensor in zip(self.ring[slot], tensors):
                if shared.shape != tensor.shape:
                    rows = len(tensor)
                (shared if rows is None else shared[:rows]).copy_(tensor)
            self.pipe.send((epoch, slot, rows))
        self.pipe.send((epoch, None, None))

    def _receive(self) -> None:
        what, number = self.pipe.recv()
        if what == "end":
            raise EOFError
        if what == "free":
            self.free.append(number)
        else:
            self.wanted = number
