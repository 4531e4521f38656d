"""Decide which windows share a row: packing by the histogram of their lengths."""
from __future__ import annotations

import bisect
from dataclasses import replace
from typing import NamedTuple

import numpy

from ipu_options.config import Pipeline, packed_accumulation
from qa.settings import TrainSettings


class Packing(NamedTuple):
    """An assignment of window lengths to rows.

    Each window takes one slot of a row. The slots are numbered row after row: row r has the slots
    row_slots[r] to row_slots[r + 1] - 1.
    """

    row_slots: numpy.ndarray  # int32 [rows + 1]
    slot_length: numpy.ndarray  # int32 [windows]: tokens of the window in this slot
    slot_start: numpy.ndarray  # int32 [windows]: the row's token at which that window starts


def pack(lengths: numpy.ndarray, row_length: int, max_windows_per_row: int) -> Packing:
    """Pack windows into rows by best-fit decreasing on the histogram of their lengths.

    Windows are placed from the longest to the shortest, each in the fullest row that still has room
    for it (Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination",
    arXiv:2107.02027). Rows with the same lengths are kept as one entry with a count, so that the
    running time depends on `row_length` and hardly on the number of windows.

    lengths: int [N], tokens of each window. row_length: tokens of a row. max_windows_per_row: how
    many windows a row may hold at most. Raises ValueError if there are no windows, or if a window
    is empty or longer than a row.
    """
    if not len(lengths) or lengths.min() < 1 or lengths.max() > row_length:
        raise ValueError(f"window lengths must lie in 1..{row_length}, got {len(lengths)} windows"
                         + (f" of {lengths.min()}..{lengths.max()} tokens" if len(lengths) else ""))
    histogram = numpy.bincount(lengths, minlength=row_length + 1)
    # Rows that can take more windows:
    # (tokens left, windows in the row) -> [(lengths in the row, number of such rows), ...].
    open_rows = {}
    # The keys of open_rows in ascending order. Of two rows with the same number of tokens left, the
    # one with fewer windows is therefore filled first.
    places = []
    done = []
    for length in range(row_length, 0, -1):
        left = int(histogram[length])
        while left:
            best = bisect.bisect_left(places, (length, 0))
            if best < len(places):
                room, row, count = _take_open(open_rows, places, best)
            else:
                room, row, count = row_length, (), left
            # A row that has just taken a window has less room than any other row that fits, so it
            # remains the best fit until it can take no more windows of this length.
            take = min(room // length, max_windows_per_row - len(row), left)
            used = min(count, left // take)
            if row and used < count:
                _put_open(open_rows, places, room, row, count - used)
            left -= used * take
            row, room = row + (length,) * take, room - take * length
            if room and len(row) < max_windows_per_row:
                _put_open(open_rows, places, room, row, used)
            else:
                done.append((row, used))
    done += [entry for place in places for entry in open_rows[place]]
    return _flatten(done)


def _flatten(rows: list) -> Packing:
    """Return the Packing of `rows`, [(lengths in the row, number of such rows), ...]."""
    windows_in_row = numpy.repeat([len(row) for row, _ in rows], [count for _, count in rows])
    row_slots = numpy.concatenate([[0], numpy.cumsum(windows_in_row)]).astype(numpy.int32)
    slot_length = numpy.concatenate([
        numpy.tile(numpy.array(row, numpy.int32), count) for row, count in rows])
    tokens_before = numpy.cumsum(slot_length) - slot_length
    slot_start = tokens_before - numpy.repeat(tokens_before[row_slots[:-1]], windows_in_row)
    return Packing(row_slots, slot_length, slot_start.astype(numpy.int32))


def _put_open(open_rows: dict, places: list, room: int, row: tuple, count: int) -> None:
    """Add `count` rows with the window lengths `row` and `room` tokens left to the open rows."""
    place = room, len(row)
    if place not in open_rows:
        bisect.insort(places, place)
        open_rows[place] = []
    open_rows[place].append((row, count))


def _take_open(open_rows: dict, places: list, index: int) -> tuple:
    """Remove an entry with the key places[index]; return (tokens left, lengths, number of rows)."""
    place = places[index]
    row, count = open_rows[place].pop()
    if not open_rows[place]:
        del open_rows[place], places[index]
    return place[0], row, count


def windows_per_row(lengths: numpy.ndarray, row_length: int, max_windows_per_row: int) -> float:
    """Return the packing factor: the mean number of windows in a row, 1.0 without packing.

    Arguments and exceptions are those of `pack`.
    """
    return len(lengths) / (len(pack(lengths, row_length, max_windows_per_row).row_slots) - 1)


def with_packed_accumulation(pipeline: Pipeline, lengths: numpy.ndarray,
                             settings: TrainSettings) -> Pipeline:
    """Return the training pipeline with its gradient accumulation adapted to packed rows.

    lengths: int [N], tokens of each training window. See `packed_accumulation`.
    """
    factor = windows_per_row(lengths, settings.max_seq_length, settings.row_capacity())
    least = pipeline.layout.min_gradient_accumulation()
    accumulation = packed_accumulation(pipeline.config.gradient_accumulation_steps, factor, least)
    return replace(pipeline, config=replace(pipeline.config,
                                            gradient_accumulation_steps=accumulation))
