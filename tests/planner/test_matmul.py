"""matmul_proportion: planner/matmul.py beside a search over all splits of a multiplication."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ipu_options.config import IPUConfig
from planner.commands import main
from planner.machine import MACHINES
from planner.matmul import serial_bytes, temporary_bytes
from tests.planner.test_planner import no_calibration  # noqa: F401

MK2 = MACHINES["mk2"]
JOB = SimpleNamespace(machine=MK2, element_bytes=2, config=IPUConfig())
MACS = 64        # of a tile in a cycle, at the peak rate of float16
SHARES = (1.0, 0.25, 0.15, 0.1)
SHAPES = [pytest.param(*shape, id=f"{width} x {rows} rows, {name}")
          for width, micro_batches in ((768, (1, 4)), (1024, (2, 4, 16))) for rows in micro_batches
          for name, shape in (("projection", (384 * rows, width, width)),
                              ("feed-forward", (384 * rows, width, 4 * width)),
                              ("back", (384 * rows, 4 * width, width)),
                              ("gradient", (width, 384 * rows, 4 * width)))]


def grains(count):
    """What splitting `count` grains over any number of tiles leaves to one of them."""
    return sorted({-(-count // parts) for parts in range(1, count + 1)})


def fastest(rows, depth, columns):
    """Return (cycles, bytes of a tile) of the fastest split for each of SHARES, by trying all.

    Rows, depth and columns are split over the tiles, depth or columns further into parts that
    follow each other, both in grains of 16. A tile receives its operands but for what it holds of
    them, and sums of another's depth: poplibs' formulas.
    """
    best = [(np.inf, 0)] * len(SHARES)
    for d in grains(depth // 16):
        for c in grains(columns // 16):
            deep, wide = -(-depth // 16 // d), -(-columns // 16 // c)
            kinds = np.array([(1, s) for s in range(1, wide + 1)] +
                             [(s, 1) for s in range(2, deep + 1)]).T
            tiles = -(-deep // kinds[0]) * -(-wide // kinds[1])
            kinds, tiles = kinds[:, tiles <= MK2.tiles], tiles[tiles <= MK2.tiles]
            row_tiles = np.minimum(rows, MK2.tiles // tiles)
            r, deep, wide = -(-rows // row_tiles), -(-deep // kinds[0]), -(-wide // kinds[1])
            left, right, sums = 2 * r * 16 * d, 2 * 16 * d * 16 * c, 2 * r * 16 * c
            received = left * (1 - 1 / wide) + right * (1 - 1 / row_tiles) + sums * (deep > 1)
            cycles = kinds.prod(0) * (r * 16 * d * 16 * c / MACS + received / 4)
            size = left + right + sums + sums * (kinds[0] > 1) / deep
            for place, share in enumerate(SHARES):
                allowed = np.where(size <= share * MK2.tile_bytes, cycles, np.inf)
                at = allowed.argmin() if allowed.size else None
                if at is not None and allowed[at] < best[place][0]:
                    best[place] = (allowed[at], size[at])
    return best


@pytest.mark.slow
@pytest.mark.parametrize("rows, depth, columns", SHAPES)
def test_a_multiplication_takes_the_memory_and_time_of_its_fastest_split(rows, depth, columns):
    flops = 2 * rows * depth * columns
    for share, (cycles, size) in zip(SHARES, fastest(rows, depth, columns)):
        planned = temporary_bytes(JOB, flops, share) / MK2.tiles
        least = temporary_bytes(JOB, flops, 1.0) + serial_bytes(JOB, flops, flops, share)
        seconds = flops / 2 / MACS / MK2.tiles + least / 4 / MK2.tiles
        assert planned <= share * MK2.tile_bytes
        if share == 1.0:
            assert planned == pytest.approx(size, rel=0.06)
        assert seconds == pytest.approx(cycles, rel={1.0: 0.03, 0.1: 0.3}.get(share, 0.2))


def test_stages_are_planned_as_their_multiplications_one_by_one():
    flops = np.array([[0.0, 7e9], [5e10, 9e9]])
    for share in (0.0, 0.05, 0.25, 1.0):
        for each, size in zip(flops.ravel(), temporary_bytes(JOB, flops, share).ravel()):
            assert size == temporary_bytes(JOB, each, share)
    assert serial_bytes(JOB, flops, flops, 1.0).max() == 0
    assert np.isfinite(serial_bytes(JOB, flops, flops, 0.0)).all()
    assert serial_bytes(JOB, 0, 0, 0.25) == 0


def test_matmul_proportion_trades_memory_for_time_up_to_the_fastest_split(capsys):
    plans = []
    for share in ("0.05", "0.1", "0.15", "0.3", "0.6"):
        main(["plan", "--config", "squad_base_384", "--micro_batch_size", "4", "--json",
              "--matmul_proportion", share])
        plans.append(json.loads(capsys.readouterr().out))
    speeds = [plan["windows_per_second"] for plan in plans]
    sizes = [plan["ipus"][1]["matmul_temporaries_bytes"] / MK2.memory_bytes for plan in plans]
    assert sizes[:3] == pytest.approx([0.05, 0.1, 0.15]) and 0.15 < sizes[3] == sizes[4] < 0.2
    assert speeds == sorted(speeds) and speeds[0] < speeds[1] < speeds[2] < speeds[3] == speeds[4]
