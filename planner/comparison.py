"""Sets plans, runs and profiles side by side: what differs, memory, time and throughput.

What is compared is a list of `Side`s, whose plans are dictionaries as text.plan_dict gives them, so
that a plan that was saved as JSON is as good as one that was just made. Measured figures of a host
that stands in for IPUs have rows of their own, never one with figures of IPUs.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

from planner.machine import MIB
from planner.memory import CATEGORIES
from planner.profile import ACTIVITIES, Profile
from planner.text import SHORT, duration, table, value_text

# What names a run rather than how it works.
_NAMES_ONLY = ("config", "output_dir")


@dataclass(frozen=True)
class Side:
    """One of the things that are compared.

    name: "A", "B" and so on. given: as on the command line. kind: "flags", "ipu_config.json",
    "saved plan", "run" or "profile". title: what to call it. settings: all that are known, by flag.
    plan: as text.plan_dict gives it, None if none can be made, which `note` then explains.
    measured: of a run; `device` is "IPU" or "host". profile: of an IPU.
    """

    name: str
    given: str
    kind: str
    title: str
    settings: Dict[str, Any]
    plan: Optional[Dict[str, Any]] = None
    measured: Dict[str, Any] = field(default_factory=dict)
    profile: Optional[Profile] = None
    note: Optional[str] = None

    @property
    def label(self) -> str:
        """What to call it in a heading: its name, its title and where that is from."""
        return f"{self.name}: {self.title} ({self.kind})" if self.kind != "flags" else (
            f"{self.name}: {self.title}")

    def measured_on(self, device: str) -> Optional[float]:
        """Return the windows/s that were measured on "IPU" or "host", None if they were not."""
        return self.measured.get("windows_per_second") if (
            self.measured.get("device") == device) else None

    def totals(self) -> Dict[int, int]:
        """Return {IPU: bytes in all} as planned, {} without a plan."""
        return {ipu["ipu"]: ipu["total_bytes"] for ipu in self.plan["ipus"]} if self.plan else {}


def differences(sides: Sequence[Side]) -> Dict[str, Dict[str, Any]]:
    """Return {setting: {name of a side: its value}} of the settings that differ.

    A side that does not know a setting (a saved plan does not hold the learning rate) is left out
    of the inner dictionary, and makes no difference by itself.
    """
    found = {}
    for name in dict.fromkeys(name for side in sides for name in side.settings):
        values = {side.name: side.settings[name] for side in sides if name in side.settings}
        first = next(iter(values.values()))
        if name not in _NAMES_ONLY and any(value != first for value in values.values()):
            found[name] = values
    return found


def comparison_dict(sides: Sequence[Side]) -> Dict[str, Any]:
    """Return the whole comparison as a dictionary that can be written as JSON."""
    return {"sides": [{**vars(side), "profile": side.profile and asdict(side.profile)}
                      for side in sides],
            "differences": differences(sides)}


def comparison_text(sides: Sequence[Side]) -> str:
    """Return the whole comparison as text."""
    parts = ["\n".join(line for side in sides for line in (
                 side.label, f"   {side.note}" if side.note else "") if line),
             _differences(sides), _memory(sides), _stages(sides), _where(sides), _profiled(sides),
             _throughput(sides)]
    return "\n\n".join(part for part in parts if part)


def _differences(sides: Sequence[Side]) -> str:
    found = differences(sides)
    if not found:
        return "Settings that differ: none of those that are known"
    rows = [[name, *(value_text(values[side.name]) if side.name in values else "not known"
                     for side in sides)] for name, values in found.items()]
    return "Settings that differ\n" + table(["", *_names(sides)], rows)


def _memory(sides: Sequence[Side]) -> str:
    """Return the memory of each IPU by category, the sides below each other."""
    used = [name for name in CATEGORIES if any(
        ipu[f"{name}_bytes"] for side in _planned(sides) for ipu in side.plan["ipus"])]
    rows: List[Tuple[int, List[str]]] = []
    for side in sides:
        for ipu in side.plan["ipus"] if side.plan else ():
            free = ipu["limit_bytes"] - ipu["total_bytes"]
            rows.append((ipu["ipu"], [
                f"IPU {ipu['ipu']}", side.name, *(_mib(ipu[f"{name}_bytes"]) for name in used),
                _mib(ipu["total_bytes"]), _mib(free) if free >= 0 else f"OVER BY {_mib(-free)}"]))
        for number, total in enumerate(side.profile.total_bytes if side.profile else ()):
            code = side.profile.ipu_code_bytes[number]
            rows.append((number, [
                f"IPU {number}", f"{side.name} profiled",
                *(_mib(code) if name == "code" else "" for name in used), _mib(total), ""]))
    if not rows:
        return ""
    head = ["", "", *(SHORT.get(name, name) for name in used), "total", "free"]
    rows.sort(key=lambda row: row[0])  # stable: the sides stay in order
    limits = {_mib(ipu["limit_bytes"]) for side in _planned(sides) for ipu in side.plan["ipus"]}
    return ("Memory of each IPU in MiB" + (f", of {limits.pop()}" if len(limits) == 1 else "") +
            ", as planned\n" + table(head, [row for _, row in rows], left=(0, 1)))


def _stages(sides: Sequence[Side]) -> str:
    """Return the planned time of each stage, the sides below each other."""
    kinds = ("forward", "recompute", "backward")
    rows = sorted(((stage["stage"], [
        f"stage {stage['stage']}", side.name, str(stage["ipu"]),
        *(_ms(stage[f"{kind}_seconds"]) for kind in kinds),
        _ms(sum(stage[f"{kind}_seconds"] for kind in kinds))])
                   for side in _planned(sides) for stage in side.plan["stages"]),
                  key=lambda row: row[0])
    return rows and ("Time of one micro-batch in ms, by pipeline stage, as planned\n" +
                     table(["", "", "IPU", *kinds, "sum"], [row for _, row in rows], left=(0, 1)))


def _where(sides: Sequence[Side]) -> str:
    """Return where the time of a weight update or a call goes, the sides beside each other."""
    planned = _planned(sides)
    parts = [side.plan["update_parts_seconds"] for side in planned]
    rows = [[name, *(f"{_ms(part.get(name, 0))} ({100 * part.get(name, 0) / sum(part.values()):.0f}"
                     " %)" for part in parts)]
            for name in dict.fromkeys(name for part in parts for name in part)
            if any(part.get(name) for part in parts)]
    what = "call" if planned and planned[0].plan["phase"] == "inference" else "weight update"
    return rows and (f"Where the time of a {what} goes, in ms (mean over the IPUs), as planned\n" +
                     table(["", *_names(planned)], rows))


def _profiled(sides: Sequence[Side]) -> str:
    """Return what the IPUs of the profiles do in the profiled call."""
    rows = sorted(((ipu, [f"IPU {ipu}", side.name, *(
        f"{1e3 * cycles[name] / side.profile.clock_hz:.2f}" for name in ACTIVITIES)])
                   for side in sides if side.profile
                   for ipu, cycles in enumerate(side.profile.cycles)), key=lambda row: row[0])
    return rows and ("Time in ms of the profiled call, by what an IPU does\n" +
                     table(["", "", *ACTIVITIES], [row for _, row in rows], left=(0, 1)))


def _throughput(sides: Sequence[Side]) -> str:
    """Return a table of one figure a row; those that no side has are left out."""
    plans = [side.plan or {} for side in sides]
    first = plans[0].get("windows_per_second")

    def row(name: str, values: Sequence[Any], shown: Any) -> List[str]:
        return [name, *("-" if value is None else shown(value) for value in values)]

    def of_plan(name: str, key: str, shown: Any) -> List[str]:
        return row(name, [plan.get(key) for plan in plans], shown)

    def measured(name: str, key: str, shown: Any) -> List[str]:
        return row(name, [side.measured.get(key) for side in sides], shown)

    speeds = [plan.get("windows_per_second") for plan in plans]
    rows = [
        of_plan("fits (planned)", "fits", lambda fits: "yes" if fits else "NO"),
        of_plan("windows/s, planned for IPUs", "windows_per_second", _count),
        row("  expected within", [plan or None for plan in plans], lambda plan: (
            f"{_count(plan['windows_per_second_low'])} to "
            f"{_count(plan['windows_per_second_high'])}")),
        row(f"  relative to {sides[0].name}", [speed and first and speed / first
                                               for speed in speeds], lambda value: f"{value:.2f}"),
        row("windows/s, measured on IPUs", [side.measured_on("IPU") for side in sides], _count),
        row("  relative to its plan", [speed and on_ipu and on_ipu / speed for speed, on_ipu in zip(
            speeds, [side.measured_on("IPU") for side in sides])], lambda value: f"{value:.2f}"),
        row("windows/s, measured on a host without IPUs",
            [side.measured_on("host") for side in sides], lambda value: f"{value:,.1f}"),
        of_plan("pipeline bubbles (planned)", "bubble_fraction", lambda x: f"{100 * x:.1f} %"),
        of_plan("step (planned)", "step_seconds", lambda x: f"{_ms(x)} ms"),
        of_plan("update or call (planned)", "update_seconds", lambda x: f"{1e3 * x:.1f} ms"),
        of_plan("rows in it", "rows_per_update", _count),
        of_plan("windows in a row", "windows_per_row", lambda x: f"{x:.2f}"),
        of_plan("whole run (planned)", "run_seconds", duration),
        measured("waited for data (measured)", "data_share", lambda x: f"{100 * x:.1f} %"),
        measured("steps (run)", "steps", _count),
        measured("loss, at the end", "loss", lambda x: f"{x:.4g}"),
        measured("F1, last evaluation", "f1", lambda x: f"{x:.2f} %"),
        measured("exact match, last evaluation", "exact_match", lambda x: f"{x:.2f} %")]
    return "Throughput\n" + table(
        ["", *_names(sides)], [row for row in rows if any(cell != "-" for cell in row[1:])])


def _planned(sides: Sequence[Side]) -> List[Side]:
    return [side for side in sides if side.plan]


def _names(sides: Sequence[Side]) -> List[str]:
    return [side.name for side in sides]


def _mib(size: float) -> str:
    return f"{size / MIB:.0f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"
