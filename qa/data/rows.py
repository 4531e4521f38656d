"""Map-style data sets of rows for the model: windows packed into rows of one fixed length.

Packed and unpacked rows have the same format. A row of S tokens with slots for K windows is a
dictionary of
    input_ids        int32 [S]    the tokens of the windows, one window after another, then padding
    position_ids     int32 [S]    padding_idx + 1, padding_idx + 2, ... in each window, as in
                                  RoBERTa, or 0, 1, ..., as in BERT; padding_idx or 0 on padding,
                                  in RoBERTa also on a padding token within a text (transformers,
                                  create_position_ids_from_input_ids)
    window_ids       int32 [S]    the slot, 1..K, of the window a token belongs to; 0 on padding
for models that tell the two texts of a window apart by more than one token type,
    token_type_ids   int32 [S]    1 from the window's second text on; 0 before it and on padding
and, for training,
    start_positions  int32 [K]    index in the row of each window's first answer token
    end_positions    int32 [K]    index in the row of each window's last answer token
    loss_weights     float32 [K]  weight of each window's loss; 0 for an empty slot
Without packing K is 1. An empty row holds no windows and is all padding.
"""
from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple, Optional

import numpy
import torch

from ipu_options.config import IPUConfig
from qa.data.packing import pack
from qa.settings import TrainSettings
from runtime.errors import UsageError, counted

# Inference packs this many windows at a time. Larger blocks fill the rows better; smaller blocks
# give answers sooner, since a question can only be answered once all of its windows have been run.
_BLOCK = 4096


def _by_length(lengths: numpy.ndarray) -> numpy.ndarray:
    """Return the indices [N] that sort `lengths` in ascending order; the sort is stable."""
    # numpy sorts int16 by radix sort, in linear time.
    return numpy.argsort(lengths.astype(numpy.int16), kind="stable")


class _RowWriter:
    """Writes windows into the numpy arrays of a batch of rows."""

    def __init__(self, windows, rows: int, row_length: int, pad_token_id: int,
                 first_position: Optional[int], token_types: Optional[bool]):
        self.windows = windows
        first = pad_token_id + 1 if first_position is None else first_position
        self.positions = numpy.arange(first, first + row_length, dtype=numpy.int32)
        # The token that takes no position, if the positions count from it.
        self.uncounted = pad_token_id if first_position is None else -1
        self.input_ids = numpy.full((rows, row_length), pad_token_id, numpy.int32)
        self.position_ids = numpy.full((rows, row_length), max(first - 1, 0), numpy.int32)
        self.window_ids = numpy.zeros((rows, row_length), numpy.int32)
        self.token_type_ids = (numpy.zeros((rows, row_length), numpy.int32)
                               if token_types and windows.second_text is not None else None)

    def write(self, row: int, chosen: numpy.ndarray, starts: numpy.ndarray) -> None:
        """Write the windows `chosen` into row `row`, with the window ids 1, 2, ...

        chosen, starts: int [windows], the windows and the row's tokens at which they start.
        """
        input_ids, position_ids, window_ids = (
            self.input_ids[row], self.position_ids[row], self.window_ids[row])
        for number, (window, start) in enumerate(zip(chosen.tolist(), starts.tolist()), 1):
            tokens = self.windows.input_ids(window)
            end = start + len(tokens)
            input_ids[start:end] = tokens
            position_ids[start:end] = self.positions[:len(tokens)]
            counted = tokens != self.uncounted
            if not counted.all():  # the text has the padding token's name
                position_ids[start:end] = numpy.cumsum(counted) * counted + self.uncounted
            window_ids[start:end] = number
            if self.token_type_ids is not None:
                self.token_type_ids[row, start + self.windows.second_text[window]:end] = 1

    def tensors(self) -> dict:
        """Return the arrays as tensors [rows, row_length] by name, sharing their memory."""
        arrays = {name: getattr(self, name)
                  for name in ("input_ids", "position_ids", "window_ids", "token_type_ids")}
        return {name: torch.from_numpy(array) for name, array in arrays.items()
                if array is not None}


class _EpochOrder(NamedTuple):
    """The shuffled order of one epoch."""

    epoch: int
    row_at: numpy.ndarray  # int32 [row positions of the epoch]: a row of the packing; -1 if empty
    window_of_slot: numpy.ndarray  # int32 [windows]: the window in each slot of the packing
    windows_in_update: numpy.ndarray  # int64 [updates of the epoch]


class _Rows(torch.utils.data.Dataset):
    """A data set that makes batches of rows at once in `__getitems__`; a row is a batch of one."""

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}


class TrainingRows(_Rows):
    """All training rows of a run, epoch after epoch, from any step on.

    An epoch is a whole number of weight updates of `micro_batches_per_update` (gradient
    accumulation x replication factor) micro-batches of `micro_batch_size` rows. Its last update
    begins with the empty rows that fill it up: each update has a window, and so has its final
    micro-batch, the only one whose loss some output modes return. A step is one combined batch, the
    next `updates_per_step` (PopTorch's deviceIterations) updates, whatever their epochs: how many
    they are changes nothing in the updates. PopTorch splits a combined batch in this order, device
    iterations outermost, so an update uses consecutive rows. The run ends with a whole step.

    The loss weight of each window is micro_batches_per_update / (windows in the update). With a
    micro-batch loss of sum_k weight_k * loss_k, PopTorch's Mean reduction over accumulation and
    replicas gives the mean loss over all windows of the update, regardless of how they are spread
    over rows, micro-batches and replicas.

    The shuffle of an epoch depends only on (seed, epoch). Windows of equal length exchange their
    slots, so that different windows share a row while the number of rows stays the same, and the
    rows are put in random order.

    windows: qa.data.windows.Windows with labels. row_length: tokens of a row. max_windows_per_row:
    its slots, 1 for unpacked rows. epochs: may be fractional. max_steps: overrides `epochs` if
    positive. first_step: how many steps of the run have been done already. first_position: that of
    a window's first token (default: pad_token_id + 1). token_types: whether the model has several
    token types; the rows have them if the windows have them, too.

    Pickling keeps only the arguments: each worker of a loader repeats the packing and the shuffle.
    """

    def __init__(self, windows, *, row_length: int, max_windows_per_row: int, pad_token_id: int,
                 micro_batch_size: int, micro_batches_per_update: int, updates_per_step: int = 1,
                 epochs: float = 1.0, max_steps: int = -1, seed: int = 0, first_step: int = 0,
                 first_position: Optional[int] = None, token_types: Optional[bool] = None):
        self.arguments = {
            name: value for name, value in locals().items()
            if name not in ("self", "windows", "first_step")}
        self.windows = windows
        self._row_length, self._room = row_length, max_windows_per_row
        self._tokens, self._seed = (pad_token_id, first_position, token_types), seed
        self._micro_batches, self._updates_per_step = micro_batches_per_update, updates_per_step
        self._rows_per_update = micro_batches_per_update * micro_batch_size
        self.rows_per_step = updates_per_step * self._rows_per_update
        self._packing = pack(windows.lengths, row_length, max_windows_per_row)
        rows = len(self._packing.row_slots) - 1
        self.windows_per_row = len(windows) / rows
        # The fraction of all tokens that are not padding.
        self.fill = float(windows.lengths.sum()) / (rows * row_length)
        self.updates_per_epoch = math.ceil(rows / self._rows_per_update)
        self.updates = math.ceil(epochs * self.updates_per_epoch)  # that `epochs` consist of
        self.total_steps = max_steps if max_steps > 0 else math.ceil(
            self.updates / updates_per_step)
        self._first_step = first_step
        self._order = self._shuffle(first_step * updates_per_step // self.updates_per_epoch)

    @classmethod
    def of_run(cls, settings: TrainSettings, ipu_config: IPUConfig, row_kind: dict,
               windows) -> "TrainingRows":
        """Return the rows of a run with these settings.

        ipu_config: the training pipeline's, with the values for the whole pod. row_kind: the
        arguments pad_token_id, first_position and token_types, as the model needs them. windows:
        qa.data.windows.Windows with labels. Raises UsageError if a step has more updates than the
        run.
        """
        rows = cls(
            windows, row_length=settings.max_seq_length,
            max_windows_per_row=settings.row_capacity(), **row_kind,
            micro_batch_size=settings.micro_batch_size,
            micro_batches_per_update=ipu_config.gradient_accumulation_steps *
            ipu_config.replication_factor, updates_per_step=ipu_config.device_iterations,
            epochs=settings.num_train_epochs, max_steps=settings.max_steps or -1,
            seed=settings.seed)
        if ipu_config.device_iterations > rows.updates and not settings.max_steps:
            raise UsageError(
                f"{ipu_config.source('device_iterations')} {ipu_config.device_iterations}: "
                f"an epoch of {counted(len(windows), 'window')} has "
                f"{counted(rows.updates_per_epoch, 'weight update')}, the run {rows.updates}, "
                f"fewer than one call of the device has: use at most {rows.updates}")
        return rows

    def starting_at(self, step: int) -> "TrainingRows":
        """Return the rows of the rest of this run after `step` steps."""
        return TrainingRows(self.windows, first_step=step, **self.arguments)

    def epoch_after(self, step: int) -> float:
        """Return how many epochs have been seen after `step` steps of the run."""
        return step * self._updates_per_step / self.updates_per_epoch

    def first_batch(self) -> dict:
        """Return the first combined batch, {name: tensor [rows of one step, ...]}."""
        return self.__getitems__(range(self.rows_per_step))

    def __reduce__(self):
        return partial(TrainingRows, first_step=self._first_step, **self.arguments), (self.windows,)

    def __len__(self) -> int:
        return (self.total_steps - self._first_step) * self.rows_per_step

    def __getitems__(self, indices) -> dict:
        """Return the rows `indices` as one batch, {name: tensor [rows, ...]}.

        torch's DataLoader (torch >= 2.0) calls this method and gives the batch to `collate`.
        """
        writer = _RowWriter(self.windows, len(indices), self._row_length, *self._tokens)
        start_positions = numpy.zeros((len(indices), self._room), numpy.int32)
        end_positions = numpy.zeros((len(indices), self._room), numpy.int32)
        loss_weights = numpy.zeros((len(indices), self._room), numpy.float32)
        rows_per_epoch, row_slots = (self.updates_per_epoch * self._rows_per_update,
                                     self._packing.row_slots)
        for place, index in enumerate(indices):
            epoch, position = divmod(self._first_step * self.rows_per_step + index, rows_per_epoch)
            order = self._epoch_order(epoch)
            row = order.row_at[position]
            if row < 0:
                continue
            slots = slice(row_slots[row], row_slots[row + 1])
            chosen, starts = order.window_of_slot[slots], self._packing.slot_start[slots]
            writer.write(place, chosen, starts)
            start_positions[place, :len(chosen)] = self.windows.start_position[chosen] + starts
            end_positions[place, :len(chosen)] = self.windows.end_position[chosen] + starts
            loss_weights[place, :len(chosen)] = (
                self._micro_batches / order.windows_in_update[position // self._rows_per_update])
        return {
            **writer.tensors(), "start_positions": torch.from_numpy(start_positions),
            "end_positions": torch.from_numpy(end_positions),
            "loss_weights": torch.from_numpy(loss_weights)}

    def windows_in_step(self, step: int) -> int:
        """Return the number of windows in step `step`, counted from 0 at the start of the run."""
        first = step * self._updates_per_step
        updates = (divmod(update, self.updates_per_epoch)
                   for update in range(first, first + self._updates_per_step))
        return sum(int(self._epoch_order(epoch).windows_in_update[update])
                   for epoch, update in updates)

    def _epoch_order(self, epoch: int) -> _EpochOrder:
        if epoch != self._order.epoch:
            self._order = self._shuffle(epoch)
        return self._order

    def _shuffle(self, epoch: int) -> _EpochOrder:
        """Return the shuffled order of an epoch, as the class describes it."""
        generator = numpy.random.Generator(numpy.random.PCG64([self._seed, epoch]))
        shuffled = generator.permutation(len(self.windows)).astype(numpy.int32)
        window_of_slot = numpy.empty_like(shuffled)
        window_of_slot[_by_length(self._packing.slot_length)] = shuffled[_by_length(
            self.windows.lengths[shuffled])]
        rows = generator.permutation(len(self._packing.row_slots) - 1)
        row_at = numpy.full((self.updates_per_epoch, self._rows_per_update), -1, numpy.int32)
        full = (self.updates_per_epoch - 1) * self._rows_per_update
        row_at[:-1] = rows[:full].reshape(row_at[:-1].shape)
        row_at[-1, -len(rows[full:]):] = rows[full:]
        # The appended 0 is for empty rows, whose index in row_at is -1.
        windows_in_row = numpy.append(numpy.diff(self._packing.row_slots), 0)
        return _EpochOrder(epoch, row_at.reshape(-1), window_of_slot,
                           windows_in_row[row_at].sum(axis=-1))


class ProcessRows(_Rows):
    """The rows of one process's replicas, out of the rows of all.

    A combined batch is ordered by pipeline step, then replica, then row of the micro-batch, and a
    process has consecutive replicas. rows: the rows of all. process: this one's number. processes:
    how many there are. width: rows of this process in one pipeline step. (The partitioning of
    poptorch.DataLoader would give each process one contiguous part of the data set: other rows in
    an update than the loss weights are made for.)
    """

    def __init__(self, rows: _Rows, process: int, processes: int, width: int):
        self._rows, self._process, self._processes, self._width = rows, process, processes, width

    def __len__(self) -> int:
        return len(self._rows) // self._processes

    def __getitems__(self, indices) -> dict:
        """Return the rows `indices` of this process as one batch, {name: tensor [rows, ...]}."""
        places = (divmod(index, self._width) for index in indices)
        return self._rows.__getitems__([
            (step * self._processes + self._process) * self._width + row for step, row in places])


class InferenceRows(_Rows):
    """The rows for inference: every window once.

    Windows are packed within blocks of consecutive windows, so that answers can be given while
    later rows are still to come. The last combined batch is filled up with empty rows.

    windows: qa.data.windows.Windows. row_length: tokens of a row. max_windows_per_row: its slots, 1
    for unpacked rows. rows_per_step: rows of a combined batch. first_position, token_types: see
    TrainingRows. Pickling keeps only the arguments.
    """

    def __init__(self, windows, *, row_length: int, max_windows_per_row: int, pad_token_id: int,
                 rows_per_step: int, first_position: Optional[int] = None,
                 token_types: Optional[bool] = None):
        self._arguments = {
            name: value for name, value in locals().items() if name not in ("self", "windows")}
        self.windows = windows
        self._row_length, self._tokens = row_length, (pad_token_id, first_position, token_types)
        row_slots, slot_start, window_of_slot = [numpy.zeros(1, numpy.int32)], [], []
        for first in range(0, len(windows), _BLOCK):
            lengths = windows.lengths[first:first + _BLOCK]
            packing = pack(lengths, row_length, max_windows_per_row)
            row_slots.append(first + packing.row_slots[1:])
            slot_start.append(packing.slot_start)
            window_of_slot.append(numpy.empty(len(lengths), numpy.int32))
            window_of_slot[-1][_by_length(packing.slot_length)] = first + _by_length(lengths)
        self._row_slots, self._slot_start, self._window_of_slot = map(
            numpy.concatenate, (row_slots, slot_start, window_of_slot))
        self._rows = len(self._row_slots) - 1
        self._length = math.ceil(self._rows / rows_per_step) * rows_per_step

    def __reduce__(self):
        return partial(InferenceRows, **self._arguments), (self.windows,)

    def __len__(self) -> int:
        return self._length

    def __getitems__(self, indices) -> dict:
        """Return the rows `indices` as one batch, {name: tensor [rows, row_length]}.

        torch's DataLoader (torch >= 2.0) calls this method and gives the batch to `collate`.
        """
        writer = _RowWriter(self.windows, len(indices), self._row_length, *self._tokens)
        for place, index in enumerate(indices):
            writer.write(place, *self._windows_of(index))
        return writer.tensors()

    def slices(self, index: int) -> list:
        """Return where the windows of row `index` are, an empty list for an empty row.

        The list has one entry per window: (window, its first token in the row, number of tokens).
        """
        chosen, starts = self._windows_of(index)
        return list(zip(chosen.tolist(), starts.tolist(), self.windows.lengths[chosen].tolist()))

    def _windows_of(self, index: int) -> tuple:
        """Return (windows, their first tokens in the row), int32 [windows in the row] both."""
        first, last = (self._row_slots[min(index, self._rows)],
                       self._row_slots[min(index + 1, self._rows)])
        return self._window_of_slot[first:last], self._slot_start[first:last]
