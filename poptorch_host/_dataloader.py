"""poptorch.DataLoader: combined batches, read in this process or in a worker process.

The worker process writes batches into a ring of tensors in shared memory. As with PopTorch, the
tensors of a batch are overwritten once the next batch has been requested: clone whatever must
outlive an iteration.
"""
from __future__ import annotations

import itertools
import os
import sys
import weakref
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Union

import torch
import torch.multiprocessing

from . import _structure, profiling
from ._device import input_groups
from ._errors import Error
from ._logging import logger
from .enums import DataLoaderMode, SharingStrategy
from .options import Options

# The other strategies, SharedMemory and FileSystem, both spawn the process. Python sends the data
# set to it through a pipe, which sets no limit on its size.
START_METHODS = {SharingStrategy.Fork: "fork", SharingStrategy.ForkServer: "forkserver"}


class _SubDataset(torch.utils.data.Dataset):
    """The part of a data set that one of several processes reads.

    A part is a run of consecutive samples, in an order that all processes agree on. If the loader
    shuffles, each epoch draws a new order of the whole data set from the seed that all processes
    share. With `drop_last`, some samples do not fill a step of all processes; they are left over
    alternately at the beginning and at the end of the order. (PopTorch takes the number of all
    samples modulo those of one process, which counts too few, and fails if a process has none.)

    `step` is the number of samples that one process reads in one step.
    """

    def __init__(self, dataset, options, step: int, drop_last: bool):
        processes, process = options.Distributed.numProcesses, options.Distributed.processId
        total = len(dataset)
        if drop_last:
            share = step * (total // (step * processes))
            self.first, self.length, self.left_over = (
                process * share, share, total - processes * share)
        else:
            shares = [total // processes + (p < total % processes) for p in range(processes)]
            self.first, self.length, self.left_over = sum(shares[:process]), shares[process], 0
        self.dataset, self.moved = dataset, torch.zeros((), dtype=torch.bool).share_memory_()
        self.order: Optional[torch.Tensor] = None
        self.generator = torch.Generator()
        if options.exists("random_seed"):
            self.generator.manual_seed(options.random_seed)

    def __getstate__(self):
        return {**self.__dict__, "generator": None}  # only the parent process shuffles

    def next_epoch(self) -> None:
        """Draw a new order, and leave out samples at the other end of it than in the last epoch."""
        order = torch.randperm(len(self.dataset), generator=self.generator)
        if self.order is None:
            self.order = order.share_memory_()  # worker processes then see later orders too
        else:
            self.order.copy_(order)
        self.moved.logical_not_()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        index += self.first + (self.left_over if self.moved else 0)
        return self.dataset[index if self.order is None else int(self.order[index])]


class DataLoader(torch.utils.data.DataLoader):
    """torch's DataLoader for combined batches.

    A combined batch has batch_size x device iterations x gradient accumulation x replicas rows;
    replicas that share their input (Options.inputReplicaGrouping) count once.

    With mode Sync, this process (or torch's workers) reads the data set. With Async, an additional
    process reads it ahead of time; with AsyncRebatched, that process also assembles the combined
    batches. If there are several processes (Options.Distributed), each of them reads its own part
    of the data set.
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
        self._accessor = None
        assert isinstance(options, Options)
        options._freeze()
        self._options = options
        iterable = isinstance(dataset, torch.utils.data.IterableDataset)
        self._sampled = batch_sampler is not None
        if self._sampled:
            _check_sampler(options, batch_size, shuffle, auto_distributed_partitioning)
            batch_size = getattr(batch_sampler, "batch_size", batch_size)
        self._combine = (options.device_iterations * options.Training.gradient_accumulation *
                         input_groups(options)[0])
        self._combined = None if batch_size is None else batch_size * self._combine
        self._drop_last = drop_last
        self._shuffle_here = False
        if options.Distributed.numProcesses > 1 and auto_distributed_partitioning:
            assert not iterable, "auto_distributed_partitioning not supported for IterableDataset"
            assert self._combined is not None, (
                "batch_size=None not allowed when using auto_distributed_partitioning.")
            assert not shuffle or options.exists("random_seed"), (
                "When using auto_distributed_partitioning you must set "
                "poptorch.Options.randomSeed() to ensure that tensors are in "
                "the same order in all processes.")
            dataset, self._shuffle_here, shuffle = _SubDataset(
                dataset, options, self._combined, drop_last), bool(shuffle), False
        if not iterable:
            dataset = profiling.Channel("dataset").instrument(dataset, "__getitem__")
        self._warn(dataset, iterable, num_workers, kwargs)
        rebatch = (self._combined is not None and self._combined > 1 and not drop_last and
                   mode == DataLoaderMode.Async)
        rebatch = rebatch or mode == DataLoaderMode.AsyncRebatched
        worker_size = self._combined
        if rebatch and rebatched_worker_size is not None:
            assert rebatched_worker_size <= self._combined, (
                f"The rebatched_worker_size ({rebatched_worker_size}) must be <= to the combined "
                f"batch size ({self._combined})")
            worker_size = rebatched_worker_size
        if persistent_workers is None:
            persistent_workers = num_workers > 0
        batching = dict(batch_sampler=batch_sampler) if self._sampled else dict(
            batch_size=worker_size, shuffle=None if iterable else bool(shuffle),
            drop_last=drop_last and not rebatch and worker_size is not None)
        super().__init__(dataset, num_workers=num_workers, persistent_workers=persistent_workers,
                         **batching, **kwargs)
        if mode != DataLoaderMode.Sync:
            async_options = async_options or {}
            assert "rebatched_size" not in async_options, (
                "You cannot use DataLoaderMode.AsyncRebatched and manually specify the "
                "rebatched_size in async_options")
            self._accessor = AsynchronousDataAccessor(
                self, **async_options, rebatched_size=self._combined if rebatch else None)

    def _warn(self, dataset, iterable, num_workers, kwargs):
        if iterable and num_workers > 1 and "worker_init_fn" not in kwargs:
            logger.warning(
                "IterableDataset used with num_workers=%d but no worker_init_fn specified: as a "
                "result the DataLoader will return %d times each element in the dataset",
                num_workers, num_workers)
        if (not iterable and not self._drop_last and not self._sampled and
                self._combined is not None and len(dataset) % self._combined):
            logger.warning(
                "The number of elements in the dataset (%d) is not divisible by the number of "
                "elements processed per step (%d) and drop_last=False. The last tensor will have a "
                "batch size of %d. To avoid having to handle this special case switch to "
                "drop_last=True", len(dataset), self._combined,
                len(dataset) % self._combined)

    @property
    def combinedBatchSize(self) -> Optional[int]:
        """The number of rows that one call of the model takes, or None if batch_size is None."""
        return self._combined

    @property
    def options(self) -> Options:
        """The options of this loader, which are frozen."""
        return self._options

    def terminate(self) -> None:
        """End the worker process, if this loader has one (modes Async and AsyncRebatched)."""
        if self._accessor is not None:
            self._accessor.terminate()

    def __len__(self) -> int:
        if self._accessor is not None and self._accessor.rebatched_size:
            return (len(self.dataset) +
                    (0 if self._drop_last else self._combined - 1)) // self._combined
        return super().__len__()

    def __iter__(self) -> Iterator[Any]:
        if self._shuffle_here:
            self.dataset.next_epoch()
        return iter(self._accessor) if self._accessor is not None else self._batches()

    def _batches(self) -> Iterator[Any]:
        """Iterate over the batches that the calling process reads itself.

        In the asynchronous modes the worker process calls this for the batches that it puts into
        the ring.
        """
        batches = super().__iter__()
        return _combined(batches, self._combine,
                         self._drop_last) if self._sampled and self._combine > 1 else batches

    def __getstate__(self):
        return {**self.__dict__, "_accessor": None}


def _check_sampler(options, batch_size, shuffle, partitioning):
    if batch_size != 1 or shuffle:
        raise Error("`batch_sampler` option is mutually exclusive with batch_size, shuffle.")
    if options.Distributed.numProcesses > 1 and partitioning:
        raise Error(
            "`batch_sampler` option is mutually exclusive with auto_distributed_partitioning=True.")


def _combined(batches, count: int, drop_last: bool) -> Iterator[Any]:
    """Yield every `count` batches joined into one, then the remaining ones unless `drop_last`."""
    waiting: List[Any] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == count:
            yield _joined(waiting)
            waiting = []
    if waiting and not drop_last:
        yield _joined(waiting)


def _joined(batches):
    return _structure.rebuild(batches[0], map(torch.cat, zip(*map(_structure.flatten, batches))))


class AsynchronousDataAccessor:
    """An iterator over a data set or data loader that a worker process reads ahead of time.

    buffer_size: number of batches in the ring of shared memory.
    miss_sleep_time_in_ms: without effect, because waiting for a batch does not poll.
    load_indefinitely: start reading the next epoch as soon as one ends.
    early_preload: start reading before an iterator is requested.
    sharing_strategy: how the worker process is started and receives the data set.
    rebatched_size: number of rows of the batches to assemble; None keeps the batches as they are.
    """

    def __init__(self, dataset: Union[torch.utils.data.Dataset, DataLoader], buffer_size: int = 3,
                 miss_sleep_time_in_ms: float = 0.1, load_indefinitely: bool = True,
                 early_preload: bool = False,
                 sharing_strategy: SharingStrategy = SharingStrategy.ForkServer,
                 rebatched_size: Optional[int] = None):
        is_loader = isinstance(dataset, DataLoader)
        if is_loader and dataset._accessor is not None:
            raise Error(
                "The DataLoader already uses an AsynchronousDataAccessor internally. Either use "
                "the existing one or set mode='poptorch.DataLoaderMode.Sync' in the DataLoader.")
        if is_loader and not dataset._sampled and not dataset._drop_last and rebatched_size is None:
            assert dataset.combinedBatchSize in (None, 1), (
                "The 'drop_last=False' option from the DataLoader only works if 'rebatched_size' "
                "is specified too.")
        assert rebatched_size is None or rebatched_size > 1, (
            "rebatched_size must be None or greater than 1")
        self._dataset, self.rebatched_size = dataset, rebatched_size
        self._slots = buffer_size
        self._start(load_indefinitely, early_preload, sharing_strategy)

    def _start(self, load_indefinitely, early_preload, sharing_strategy):
        context = torch.multiprocessing.get_context(START_METHODS.get(sharing_strategy, "spawn"))
        # The fork server imports torch once, which every process it forks would do otherwise.
        context.set_forkserver_preload(["__main__", __name__])
        self._pipe, other = context.Pipe()
        worker = _Worker(self._slots, self.rebatched_size, load_indefinitely, early_preload)
        process = context.Process(target=worker.main, args=(self._dataset, other), daemon=False)
        process.start()
        other.close()
        try:
            self._structure, self._ring = self._pipe.recv()
        except EOFError:
            process.join()
            raise Error(
                "AsynchronousDataAccessor worker thread failed to start (Check above for details)"
            ) from None
        # The process ends with this object, or at the latest when Python exits.
        self._end = weakref.finalize(self, _end_process, process, self._pipe)
        self._epoch, self._held, self._used, self._over = 0, None, False, False

    def terminate(self) -> None:
        """End the worker process."""
        self._end()

    def __len__(self) -> int:
        length = len(self._dataset)
        if self.rebatched_size and getattr(self._dataset, "_accessor", None) is not self:
            length = length * self._dataset.batch_size // self.rebatched_size
        return length

    def __iter__(self) -> "AsynchronousDataAccessor":
        assert self._end.alive, "The worker process has been terminated"
        if self._used or self._epoch == 0:
            self._epoch += 1
            self._release()
            self._pipe.send(("epoch", self._epoch))
        self._used = self._over = False
        return self

    def __next__(self) -> Any:
        self._release()
        if self._over:
            raise StopIteration
        self._used = True
        while True:
            try:
                epoch, slot, rows = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                raise AssertionError("An error occurred in the data fetcher") from None
            if epoch != self._epoch:  # read for an iterator that has been restarted since
                self._give_back(slot)
            elif slot is None:
                self._over = True
                raise StopIteration
            else:
                self._held = slot
                tensors = self._ring[slot] if rows is None else [t[:rows] for t in self._ring[slot]]
                return _structure.rebuild(self._structure, iter(tensors))

    def _release(self):
        held, self._held = self._held, None
        self._give_back(held)

    def _give_back(self, slot):
        if slot is not None:
            self._pipe.send(("free", slot))


def _end_process(process, pipe) -> None:
    try:
        pipe.send(("stop", 0))
    except (BrokenPipeError, OSError):
        pass
    process.join(timeout=5)
    if process.is_alive():  # it is still busy inside the data set
        process.terminate()
        process.join()
    pipe.close()


class _Worker:
    """What the worker process runs: it reads the data set and fills the free slots of the ring.

    It sends (structure, ring) once, then (epoch, slot, rows) for each batch, where rows is None
    if the batch fills the slot, and (epoch, None, None) at the end of an epoch. It receives
    ("free", slot) when a slot may be overwritten, ("epoch", number) when an iterator is started,
    and ("stop", 0).
    """

    def __init__(self, slots: int, rebatched_size: Optional[int], load_indefinitely: bool,
                 early_preload: bool):
        self.slots, self.rebatched_size = slots, rebatched_size
        self.load_indefinitely, self.early_preload = load_indefinitely, early_preload

    def main(self, dataset, pipe) -> None:
        """Run until "stop" is received or the other end of the pipe is closed."""
        logger.debug("AsynchronousDataAccessor worker process: %d", os.getpid())
        # torch's own workers are forked, as they are by default. They would otherwise inherit the
        # start method of this process, which may be a slower one.
        if sys.platform == "linux":
            torch.multiprocessing.set_start_method("fork", force=True)
        try:
            self.pipe, self.dataset = pipe, dataset
            self._run()
        except (KeyboardInterrupt, EOFError, ConnectionError):
            pass

    def _run(self):
        batches = iter(self._batches())
        first = next(batches, None)
        if first is None:
            raise Error("The Dataset is empty")
        self.ring = [
            [torch.empty_like(t).share_memory_() for t in _flat(first)] for _ in range(self.slots)]
        self.pipe.send((first, self.ring))
        batches = itertools.chain([first], batches)
        self.free, self.epoch, self.wanted, ahead = (
            list(range(self.slots)), 1, 0, self.early_preload)
        while True:
            while self.wanted < self.epoch and not ahead:
                self._receive()
            finished = self._one_epoch(batches)
            ahead = finished and self.load_indefinitely
            self.epoch = self.epoch + 1 if finished else self.wanted
            batches = self._batches()

    def _one_epoch(self, batches) -> bool:
        """Send the batches of epoch `self.epoch`; return False if a new iterator cut it short."""
        for batch in batches:
            while not self.free or self.pipe.poll():
                self._receive()
                if self.wanted > self.epoch:
                    return False
            slot, rows = self.free.pop(0), None
            for shared, tensor in zip(self.ring[slot], _flat(batch)):
                if shared.shape != tensor.shape:
                    rows = len(tensor)
                (shared if rows is None else shared[:rows]).copy_(tensor)
            self.pipe.send((self.epoch, slot, rows))
        self.pipe.send((self.epoch, None, None))
        return True

    def _batches(self) -> Iterator[Any]:
        batches = self.dataset._batches() if isinstance(self.dataset, DataLoader) else iter(
            self.dataset)
        if self.rebatched_size is None:
            return batches
        return _rebatched(batches, self.rebatched_size, getattr(self.dataset, "_drop_last", True))

    def _receive(self):
        what, number = self.pipe.recv()
        if what == "stop":
            raise EOFError
        if what == "free":
            self.free.append(number)
        else:
            self.wanted = number


def _rebatched(batches, size: int, drop_last: bool) -> Iterator[Any]:
    """Yield batches of `size` rows from batches of any size, then the rest unless `drop_last`."""
    waiting, rows = [], 0
    for batch in batches:
        waiting.append(batch)
        rows += len(_flat(batch)[0])
        while rows >= size:
            joined = _joined(waiting)
            yield _structure.map_tensors(lambda t: t[:size], joined)
            rows -= size
            waiting = [_structure.map_tensors(lambda t: t[size:], joined)] if rows else []
    if rows and not drop_last:
        yield _joined(waiting)


def _flat(batch) -> List[torch.Tensor]:
    """Return the tensors of a batch; raise AssertionError if it holds anything else."""
    if _structure.parser_of(batch) is None and not isinstance(batch, torch.Tensor):
        for i, item in enumerate(batch.values() if isinstance(batch, dict) else batch):
            assert isinstance(item, torch.Tensor), (
                f"Tensor at index {i} is not a torch tensor ({type(item)}). "
                "AsynchronousDataAccessor expects data to be organised as a flat 1D container of "
                "tensors.")
    return _structure.flatten(batch)
