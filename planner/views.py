"""What is shown of sides, as data: views, each of them rows of bars. Three renderers draw any."""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from planner.bound import ROOFLINE, UPDATE, WORK
from planner.machine import MIB
from planner.memory import CATEGORIES
from planner.phase import PHASES, TRAINING
from planner.profile import ACTIVITIES
from planner.schedule import Schedule, StageWork
from planner.sides import Side

PROFILED = "profiled, other than code"
PLANNED = "planned for IPUs"
MIDDLE = "steps like these"  # those between the first and the last ones of a timeline
# Words and looks. Lightness of the styles falls from forward to update and each hatching is
# different: pictures can be read in black and white.
WORDS = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
STYLES, LEGEND = WORDS["styles"], WORDS["legend"]


class Segment(NamedTuple):
    """A piece of a bar: its part (a key of STYLES), where it starts and how long it is."""

    part: str
    start: float
    length: float
    hint: str = ""  # what else there is to say of it


@dataclass(frozen=True)
class Row:
    """One bar. Without a group, it is the only one of its side."""

    group: str
    label: str
    segments: List[Segment]
    cells: Dict[str, str] = field(default_factory=dict)  # further columns of a table
    remark: str = ""                                     # stands behind the bar
    expected: Optional[Tuple[float, float]] = None       # the range in which its end is expected
    measured: Optional[float] = None

    @property
    def end(self) -> float:
        """Where all that is drawn of the bar ends."""
        return max([piece.start + piece.length for piece in self.segments] +
                   [self.expected[1] if self.expected else 0.0, self.measured or 0.0])


@dataclass(frozen=True)
class View:
    """Rows of bars with one unit. limit: where a line is drawn. note: a sentence below."""

    name: str
    title: str
    unit: str
    rows: List[Row]
    digits: int = 2
    limit: Optional[float] = None
    note: str = ""
    hints: bool = False  # whether hints are written into the bars

    def parts(self) -> List[str]:
        """Return the parts that have a length, in the order of STYLES."""
        used = {piece.part for row in self.rows for piece in row.segments if piece.length}
        return [part for part in STYLES if part in used]


def views_of(sides: Sequence[Side], names: Iterable[str] = ()) -> List[View]:
    """Return the views of these names, or all, that have any rows."""
    views = [VIEWS[name](sides) for name in names or VIEWS]
    return [view for view in views if view.rows]


def memory(sides: Sequence[Side]) -> View:
    rows, limits = [], {ipu["limit_bytes"] for side in planned(sides) for ipu in side.plan["ipus"]}
    for side in sides:
        for ipu in side.plan["ipus"] if side.plan else ():
            free, total = ipu["limit_bytes"] - ipu["total_bytes"], mib(ipu["total_bytes"])
            rows.append(Row(
                f"IPU {ipu['ipu']}", side.name,
                _stacked((name, ipu[f"{name}_bytes"] / MIB) for name in CATEGORIES),
                {"total": total, "free": mib(free) if free >= 0 else f"OVER BY {mib(-free)}"},
                total if free >= 0 else f"{total}, over by {mib(-free)}"))
        for number, total in enumerate(side.profile.total_bytes if side.profile else ()):
            code = side.profile.ipu_code_bytes[number]
            fullest = side.profile.largest_tile_bytes[number] / side.profile.tile_limit_bytes
            rows.append(Row(
                f"IPU {number}", f"{side.name} profiled".strip(),
                _stacked([("code", code / MIB), (PROFILED, (total - code) / MIB)]),
                {"total": mib(total), "fullest tile": percent(fullest)}, mib(total)))
    limit = max(limits, default=0) / MIB
    of = f", of {limit:.0f}" if len(limits) == 1 else ""
    return View("memory", f"Memory of each IPU in MiB{of}, as planned" +
                (" unless it says profiled" if any(side.profile for side in sides) else ""),
                "MiB", _by_group(rows), digits=0, limit=limit or None)


def stages(sides: Sequence[Side]) -> View:
    rows, note = [], ""
    for side in planned(sides):
        load = _load(side.plan)
        for stage in side.plan["stages"]:
            seconds = [(kind, 1e3 * stage[f"{kind}_seconds"]) for kind in TRAINING.kinds]
            total = f"{sum(length for _, length in seconds):.2f}"
            terms = {term.replace("_", " "): f"{1e3 * stage[f'{term}_seconds']:.2f}"
                     for term in WORK}
            rows.append(Row(f"stage {stage['stage']}", side.name, _stacked(seconds), {
                "sum": total, **terms, "IPU": str(stage["ipu"]), "its load": load[stage["ipu"]]},
                total))
        fixed, step = side.plan["step_fixed_seconds"], side.plan["step_seconds"]
        note = (f"A step takes {1e3 * step:.2f} ms, as long as the slowest IPU and the copies; "
                f"{1e3 * fixed:.2f} ms of it do not depend on the micro-batch size. "
                f"{side.plan['pipeline_steps']} steps a {_round(sides)}, "
                f"{percent(side.plan['bubble_fraction'], 1)} of them ramp.")
    return View("stages", "Time of one micro-batch in ms, by pipeline stage, as planned for IPUs",
                "ms", _by_group(rows), note=note if len(sides) == 1 else "")


def parts(sides: Sequence[Side]) -> View:
    rows = []
    for side in planned(sides):
        seconds = side.plan["update_parts_seconds"]
        rows.append(Row(
            "", side.name, _stacked((name, 1e3 * time) for name, time in seconds.items()),
            {name: f"{1e3 * time:.1f} ({percent(time / side.plan['update_seconds'])})"
             for name, time in sorted(seconds.items(), key=lambda part: -part[1]) if time},
            f"{1e3 * side.plan['update_seconds']:.1f}"))
    note = ""
    if len(rows) == 1:
        host = {name: f"{1e3 * time:.0f}" for name, time in side.plan["host_seconds"].items()}
        note = (f"Host: {host['call']} for its call (streams, Python), {host['tokens']} for its "
                f"rows, one after the other; {percent(side.plan['confidence'])} sure: "
                f"{host['low']} to {host['high']}.")
    return View("parts", f"Where the time of a {_round(sides)} goes, in ms (mean over the IPUs), "
                "as planned for IPUs", "ms", rows, note=note)


def profiled(sides: Sequence[Side]) -> View:
    rows = []
    for side in sides:
        profile, load = side.profile, _load(side.plan) if side.plan else {}
        for ipu, cycles in enumerate(profile.cycles if profile else ()):
            most = max(map(profile.work_cycles, range(len(profile.cycles)))) or 1
            cells = {"load": percent(profile.work_cycles(ipu) / most)}
            if ipu in load:
                cells["load planned"] = load[ipu]
            rows.append(Row(f"IPU {ipu}", side.name, _stacked(
                (name, 1e3 * cycles[name] / profile.clock_hz) for name in ACTIVITIES), cells))
    return View("profiled", "Time in ms of the profiled call, by what an IPU does", "ms",
                _by_group(rows))


def throughput(sides: Sequence[Side]) -> View:
    """What a host measured is text: it is no bar beside those of IPUs."""
    rows = []
    for side in sides:
        plan, on_ipus, on_host = side.plan, side.measured_on("IPU"), side.measured_on("host")
        remarks = [] if not plan else [
            f"{count(plan['windows_per_second'])} planned" + ", DOES NOT FIT" * (not plan["fits"])]
        remarks += [f"{count(on_ipus)} measured on IPUs (diamond)"] if on_ipus else []
        remarks += [f"{on_host:,.1f} measured on a host without IPUs"] if on_host else []
        rows.append(Row(
            "", side.name, _stacked([(PLANNED, plan["windows_per_second"])] if plan else []),
            _figures(side, sides[0]), "; ".join(remarks), plan and (
                plan["windows_per_second_low"], plan["windows_per_second_high"]), on_ipus))
    return View("throughput", "Throughput", "windows/s (line: the range that the plan expects)",
                rows, digits=0)


def _figures(side: Side, first: Side) -> Dict[str, str]:
    """Return {figure: text} of a side; `first` is the one that it is compared with."""
    plan, run = side.plan or {}, side.measured
    base = first.plan and first.plan["windows_per_second"]
    speed, on_ipus = plan.get("windows_per_second"), side.measured_on("IPU")
    table = [
        ("fits (planned)", plan.get("fits"), lambda fits: "yes" if fits else "NO"),
        ("windows/s, planned for IPUs", speed, count),
        ("  expected within", plan or None, lambda plan: (
            f"{count(plan['windows_per_second_low'])} to "
            f"{count(plan['windows_per_second_high'])}")),
        (f"  relative to {first.name}", speed and base and speed / base, "{:.2f}".format),
        ("windows/s, measured on IPUs", on_ipus, count),
        ("  relative to its plan", speed and on_ipus and on_ipus / speed, "{:.2f}".format),
        ("windows/s, measured on a host without IPUs", side.measured_on("host"), "{:,.1f}".format),
        ("pipeline bubbles (planned)", plan.get("bubble_fraction"), lambda x: percent(x, 1)),
        ("step (planned)", plan.get("step_seconds"), lambda x: f"{1e3 * x:.2f} ms"),
        ("update or call (planned)", plan.get("update_seconds"), lambda x: f"{1e3 * x:.1f} ms"),
        ("rows in it", plan.get("rows_per_update"), count),
        ("windows in a row", plan.get("windows_per_row"), "{:.2f}".format),
        ("whole run (planned)", plan.get("run_seconds"), duration),
        ("waited for data (measured)", run.get("data_share"), lambda x: percent(x, 1)),
        ("steps (run)", run.get("steps"), count),
        ("loss, at the end", run.get("loss"), "{:.4g}".format),
        ("F1, last evaluation", run.get("f1"), "{:.2f} %".format),
        ("exact match, last evaluation", run.get("exact_match"), "{:.2f} %".format)]
    return {figure: shown(value) for figure, value, shown in table if value is not None}


def schedule_of(plan: Dict[str, Any]) -> Schedule:
    work = [StageWork(stage["ipu"], *(stage[f"{kind}_seconds"] for kind in TRAINING.kinds))
            for stage in plan["stages"]]
    copies = plan["update_parts_seconds"]["copies between IPUs"] / plan["pipeline_steps"]
    return Schedule(work, plan["micro_batches"], copies, PHASES[plan["phase"]])


def timeline(sides: Sequence[Side]) -> View:
    """A weight update or call of each side on one axis; the middle of many steps is one block."""
    rows = []
    for side in planned(sides):
        schedule = schedule_of(side.plan)
        step, total = 1e3 * schedule.step_seconds, schedule.steps
        ends = min(2 * len(schedule.stages) + 2, total // 2)  # steps drawn at either end
        pieces: Dict[int, List[Segment]] = {ipu["ipu"]: [] for ipu in side.plan["ipus"]}
        for event in schedule.events():
            for batch, start in enumerate(1e3 * event.start):
                if not ends <= int(start / step + 1e-9) < total - ends:
                    pieces[event.ipu].append(Segment(
                        event.kind, start, 1e3 * event.seconds,
                        f"stage {event.stage}, micro-batch {batch}"))
        tail = _stacked([(name, 1e3 * side.plan["update_parts_seconds"][name])
                         for name in (*UPDATE, "host")], total * step)
        between = total - 2 * ends
        middle = [Segment(MIDDLE, ends * step, between * step, f"{between} steps")] * bool(between)
        rows += [Row(side.name, f"IPU {ipu}", [*drawn, *middle, *tail])
                 for ipu, drawn in pieces.items()]
    return View("timeline", f"Timeline of a {_round(sides)} (white: idle)", "ms", rows)


def roofline(sides: Sequence[Side]) -> View:
    """How far each plan is from the best: windows/s, and their share of the peak rate."""
    rows = []
    for name in ROOFLINE:
        for side in planned(sides):
            best = side.plan["roofline_windows_per_second"][name]
            share = best / side.plan["windows_per_second"]
            rows.append(Row(name, side.name, [Segment(PLANNED, 0.0, best)], {
                "TFLOP/s an IPU": f"{1e-12 * share * side.plan['flops_per_second_per_ipu']:.1f}",
                "of the peak": percent(share * side.plan["peak_share"])}, count(best)))
    return View("roofline", "How far from the best", "windows/s", rows, digits=0)


def split(sides: Sequence[Side]) -> View:
    rows = []
    for side in planned(sides):
        load = _load(side.plan)
        for ipu in side.plan["ipus"]:
            names = [name.replace("Encoder ", "") for name in ipu["blocks"]]
            rows.append(Row(
                side.name, f"IPU {ipu['ipu']}",
                [Segment("encoder layer" if name.isdigit() else "block", place, 0.96, name)
                 for place, name in enumerate(names)],
                remark=f"{load[ipu['ipu']]} of the slowest"))
    return View("split", "Split (numbers: encoder layers) and the work of a micro-batch", "", rows,
                hints=True)


def planned(sides: Sequence[Side]) -> List[Side]:
    return [side for side in sides if side.plan]


def _load(plan: Dict[str, Any]) -> Dict[int, str]:
    """Return {IPU: its work relative to the slowest one's}."""
    busy = {ipu["ipu"]: ipu["busy_seconds"] for ipu in plan["ipus"]}
    return {ipu: percent(seconds / max(busy.values())) for ipu, seconds in busy.items()}


def _round(sides: Sequence[Side]) -> str:
    return (PHASES[planned(sides)[0].plan["phase"]] if planned(sides) else TRAINING).round


def _stacked(lengths: Iterable[Tuple[str, float]], at: float = 0.0) -> List[Segment]:
    pieces = []
    for part, length in lengths:
        pieces.append(Segment(part, at, length))
        at += length
    return pieces


def _by_group(rows: Sequence[Row]) -> List[Row]:
    return sorted(rows, key=lambda row: int(row.group.split()[-1]))


def mib(size: float) -> str:
    return f"{size / MIB:.0f}"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def count(value: float) -> str:
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


VIEWS = {view.__name__: view for view in (
    throughput, timeline, memory, stages, parts, split, roofline, profiled)}
