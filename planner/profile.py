"""Reads memory and cycles from a PopVision profile, and says what to change.

profile.pop is read through pva, which comes with the Poplar SDK (docs.graphcore.ai, "PopVision
Analysis Library: Python API").
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List

from planner.advice import changes, describe, planned_changes, suggestion
from planner.phase import PHASES
from planner.plan import Plan, make_plan
from runtime.errors import RunError, UsageError

CODE = ("vertexCode", "controlCode", "internalExchangeCode", "hostExchangeCode",
        "globalExchangeCode", "vertexInstanceState", "copyDescriptor", "vertexFieldData")
# What an IPU does in a step, by the type of its program; "other" is control flow, almost no time.
ACTIVITY = {
    "OnTileExecute": "compute", "DoExchange": "exchange", "GlobalExchange": "IPU-Links",
    "StreamCopy": "host", "StreamCopyBegin": "host", "StreamCopyMid": "host",
    "StreamCopyEnd": "host", "Sync": "waiting"}
ACTIVITIES = (*dict.fromkeys(ACTIVITY.values()), "other")


@dataclass(frozen=True)
class Profile:
    """Memory in bytes and cycles by activity (ACTIVITIES); each list is over a replica's IPUs."""

    total_bytes: List[int]
    ipu_code_bytes: List[int]
    largest_tile_bytes: List[int]
    tile_limit_bytes: int
    cycles: List[Dict[str, int]]
    clock_hz: float

    @property
    def code_bytes(self) -> int:
        """Bytes of code on the IPU that has most of it."""
        return max(self.ipu_code_bytes)

    def work_cycles(self, ipu: int) -> int:
        return sum(self.cycles[ipu][name] for name in ("compute", "exchange", "IPU-Links"))


def open_profile(path: str) -> Profile:
    """Return the Profile of `profile_file`. Raises UsageError without pva, RunError if it fails."""
    file = profile_file(path)
    try:
        import pva
    except ImportError:
        raise UsageError(
            "reading a profile needs pva, which comes with the Poplar SDK and not from a package "
            "index: run this where the SDK is enabled (source its poplar enable.sh)")
    try:
        return read_profile(pva.openReport(str(file)))
    except Exception as error:  # pva has its own exceptions, and RuntimeError for a broken file
        raise RunError(f"{file}: pva cannot read it ({error})")


def profile_file(path: str) -> Path:
    """Return `path`, or the newest profile.pop of training below it. Raises UsageError."""
    folder = Path(path)
    if not folder.exists():
        raise UsageError(f"{path}: no such file or folder; name a profile.pop, or the folder that "
                         "was given to --profile_dir")
    files = [folder] if folder.is_file() else folder.rglob("profile.pop")
    newest = max(files, key=lambda file: (_phase(file) == "training", file.stat().st_mtime),
                 default=None)
    if newest is None:
        kind = "a run's folder, which has" if (folder / "run.json").is_file() else "a folder with"
        raise UsageError(f"{path}: {kind} no profile.pop in it; name the folder that was given to "
                         "--profile_dir, where a run on IPUs writes one")
    if _phase(newest) == "inference":
        raise UsageError(f"{newest}: this compares profiles of training; give the folder of one")
    return newest


def _phase(profile: Path) -> str:
    """Return the phase that a profile is of, by the folder that train.py or infer.py gave it."""
    return next((part for part in reversed(profile.parts) if part in PHASES), "")


def read_profile(report: Any) -> Profile:
    """Return the Profile in a report of pva.openReport, of the first replica's IPUs."""
    target = report.compilation.target  # its numIPUs counts the IPUs of all replicas
    ipus, per_ipu = target.ipusPerReplica, target.tilesPerIpu
    total, code, largest = [0] * ipus, [0] * ipus, [0] * ipus
    for index, tile in zip(range(ipus * per_ipu), report.compilation.tiles):
        ipu = index // per_ipu
        size = tile.memory.total.excludingGaps
        total[ipu] += size
        largest[ipu] = max(largest[ipu], size)
        code[ipu] += sum(getattr(tile.memory.category, name).total for name in CODE
                         if hasattr(tile.memory.category, name))
    cycles = [dict.fromkeys(ACTIVITIES, 0) for _ in range(ipus)]
    for step in report.execution.steps:
        activity = ACTIVITY.get(str(step.program.type).split(".")[-1], "other")
        for counted, part in zip(cycles, step.ipus):
            counted[activity] += part.cycles
    return Profile(total, code, largest, target.bytesPerTile, cycles, target.clockFrequency)


def advice(profile: Profile, plan: Plan) -> str:
    """Return the change to make next, in one line; what it names has been planned.

    In order: a tile out of memory, imbalance between the IPUs, the host, the plan's suggestion.
    """
    ipus = list(plan.memory)
    full = max(ipus, key=lambda ipu: profile.largest_tile_bytes[ipu])
    over = profile.largest_tile_bytes[full] - profile.tile_limit_bytes
    if over > 0:
        lighter = [change for change in planned_changes(plan) if change.plan.fits and
                   sum(change.plan.memory[full].values()) < sum(plan.memory[full].values())]
        best = max(lighter, key=lambda change: change.plan.windows_per_second, default=None)
        return (f"IPU {full}'s fullest tile is over by {over / 1024:.0f} KiB: " + (
            describe(plan, best) if best else f"no single change leaves IPU {full} more room"))
    layers = plan.job.layout.layers_per_ipu(len(ipus))
    work = {ipu: profile.work_cycles(ipu) for ipu in ipus}
    slowest = max(work, key=work.get)
    layer = work[slowest] / max(1, layers[slowest])
    # The step is as long as the slowest IPU's work, after a layer of it has moved to another.
    after = {ipu: max({**work, slowest: work[slowest] - layer, ipu: work[ipu] + layer}.values())
             for ipu in ipus if ipu != slowest}
    for ipu in sorted(after, key=lambda ipu: (after[ipu], work[ipu])):
        moved = list(layers)
        moved[slowest], moved[ipu] = moved[slowest] - 1, moved[ipu] + 1
        if moved[slowest] > 0 and after[ipu] < 0.98 * work[slowest] and make_plan(
                plan.job.changed(layers_per_ipu=moved), plan.efficiencies).fits:
            return (f"IPU {slowest} works {work[slowest] * len(ipus) / sum(work.values()):.2f} "
                    f"times the mean: --layers_per_ipu {' '.join(map(str, moved))}, which fits, "
                    f"shortens its work by {100 - 100 * after[ipu] / work[slowest]:.0f} %")
    busy = sum(sum(parts.values()) for parts in profile.cycles) or 1
    host = sum(parts["host"] for parts in profile.cycles) / busy
    if host > 0.1:
        return (f"{100 * host:.0f} % of the time goes to the host: --device_iterations "
                f"{2 * plan.job.config.device_iterations}, or more --dataloader_num_workers")
    return suggestion(plan, changes(plan))
