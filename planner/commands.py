"""python -m planner COMMAND: plan and tune how a job is mapped to IPUs.

Commands, each of which has a --help:

    plan        predict memory, time and throughput of a training run
    search      find the best split and settings for a number of IPUs
    sweep       plan or measure every combination of some flags
    compare     set plans, runs and profiles side by side
    explore     change a plan on a page, and see at once what it does
    calibrate   fit the planner to your own runs
    report      compare a PopVision profile with the plan
"""
from __future__ import annotations

import json
import math
import string
import sys
import time
from dataclasses import asdict, replace
from typing import Any, Dict, List, Optional, Tuple

from ipu_options.config import POD_IPUS, IPUConfig, pod_of
from planner.flags import (
    CalibrateSettings,
    CompareSettings,
    ExploreSettings,
    JobSettings,
    PlanSettings,
    ReportSettings,
    SearchSettings,
)
from qa.families import check_checkpoint
from qa.settings import TrainSettings, check_page, train_flags, train_settings
from runtime.errors import UsageError
from runtime.files import writing

# How much faster or slower than its plan a run may be for the planner to be fitted to it.
PLAUSIBLE = 20


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command argv[0] with the flags that follow and return the exit status.

    argv: without the program's name; by default sys.argv[1:]. Raises UsageError for an unknown
    command or a wrong flag, RunError where a command cannot do its work.
    """
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "plan": plan, "search": search, "sweep": sweep, "compare": compare, "explore": explore,
        "calibrate": calibrate, "report": report}
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if argv[0] not in commands:
        raise UsageError(f"{argv[0]}: there is no such command; choose from {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


def plan(argv: List[str]) -> int:
    """Predict memory, time and throughput of train.py's run with the same flags."""
    return show_plan(*_parse(argv, plan, PlanSettings))


def search(argv: List[str]) -> int:
    """Find the best split and settings for a number of IPUs, at the same batch size."""
    settings, ipu_config, planning, searching = _parse(argv, search, JobSettings, SearchSettings)
    _refuse_trace(settings, "search")
    ipus = POD_IPUS[settings.pod_type] if searching.ipus is None else searching.ipus
    counts = [2 ** power for power in range(max(POD_IPUS.values()).bit_length())]
    if ipus not in counts:
        near = min(counts, key=lambda n: abs(n - ipus))
        raise UsageError(
            f"--ipus {ipus}: IPUs are reserved in powers of two, at most {counts[-1]}; the nearest "
            f"is {near}")
    _refuse_early(settings, planning)
    from planner.from_settings import Request, planned
    from planner.present import check_output, present
    from planner.search import search as best_plans
    from planner.search import settings_of
    from planner.sides import Side
    from planner.text import search_text

    check_output(searching)
    begin = time.perf_counter()
    request = Request(settings, ipu_config, planning, searching.phase)
    now = planned(request)
    if searching.inference and now.job.windows is None:
        raise UsageError("how many windows there are to answer is not known: give --eval_windows, "
                         "for the number of micro-batches of a call depends on it")
    plans, tried = best_plans(now.job, ipus, ipu_config, now.efficiencies, searching.keep)
    seconds = time.perf_counter() - begin
    sides = [Side.from_search(str(place) if place else "given", plan, request, ipus)
             for place, plan in enumerate([now, *plans])]
    present(sides, searching, "Search", [side.plan for side in sides[1:]],
            search_text(sides, tried, seconds, [now, *plans], ipu_config, ipus))
    if searching.write:
        best = settings_of(plans[0], ipu_config, ipus)
        with writing(f"--write {searching.write}"):
            best.write(searching.write)
        print(f"wrote {searching.write}; " +
              _how_to_train(searching.write, plans[0], request, best, ipus), file=sys.stderr)
    return 0


def sweep(argv: List[str]) -> int:
    """Plan every combination of some flags, and measure them with --run."""
    from planner.sweep import run_sweep
    return run_sweep(argv)


def compare(argv: List[str]) -> int:
    """Set plans, runs and profiles side by side."""
    from planner.present import check_output, present
    from planner.sides import (
        USAGE,
        Side,
        check_phases,
        comparison_record,
        parse_around,
        whole,
    )
    from planner.text import comparison_text

    items, comparing, common = parse_around(argv, CompareSettings, "compare",
                                            f"{compare.__doc__} {USAGE}")
    most = len(string.ascii_uppercase)
    if not 2 <= len(items) <= most:
        raise UsageError(f"compare: {len(items)} given, it takes 2 to {most}; usage: {USAGE}")
    check_output(comparing)
    sides = [Side.from_word(name, item, common, comparing.phase)
             for name, item in zip(string.ascii_uppercase, items)]
    check_phases(sides)
    for side in sides:
        if side.kind == "saved plan":
            with whole(f"{side.name}, {side.item}: "):
                comparison_text([side])
    present(sides, comparing, "Comparison", comparison_record(sides))
    return 0


def explore(argv: List[str]) -> int:
    """Change a plan on a page of this machine, and see at once what it does."""
    flags = _flags(argv, explore, JobSettings, ExploreSettings)
    settings, _, _, exploring = train_settings(flags, JobSettings, ExploreSettings)
    _refuse_trace(settings, "explore")
    check_page("explore", "127.0.0.1", exploring.port)
    from planner.explore import serve_planner
    from runtime.signals import StopSignals
    with StopSignals():
        serve_planner({name: value for name, value in flags.items()
                       if name not in exploring.values()}, exploring)
    return 0


def calibrate(argv: List[str]) -> int:
    """Fit the planner to your own runs, or show its errors on published runs."""
    settings, _, planning, calibrating = _parse(argv, calibrate, JobSettings, CalibrateSettings)
    _refuse_trace(settings, "calibrate")
    calibrating.check()
    from planner import calibrate as calibration
    from planner.from_settings import published
    from planner.text import fit_dict, fit_text

    if calibrating.refit_published:
        fitted = calibration.fit_published(published())
        print(json.dumps(asdict(fitted), indent=2) if calibrating.json else fitted)
        return 0
    if calibrating.show:
        now = calibration.load(planning.calibration)
        rows = calibration.compare(published(), now)
        print(json.dumps(fit_dict(rows), indent=2) if calibrating.json else fit_text(rows, now))
        return 0
    return _calibrate_own(argv, planning, calibrating)


def report(argv: List[str]) -> int:
    """Compare a PopVision profile with the plan of the same flags."""
    settings, ipu_config, planning, reporting = _parse(argv, report, JobSettings, ReportSettings)
    _refuse_trace(settings, "report")
    from planner.from_settings import Request, planned
    from planner.profile import advice, open_profile
    from planner.sides import Side
    from planner.text import profile_text

    request = Request(settings, ipu_config, planning)
    profile, plan = open_profile(reporting.profile), planned(request)
    side = replace(Side.from_plan("", plan, request), profile=profile)
    print(profile_text(side) + f"\n\nWhat to change: {advice(profile, plan)}")
    return 0


def show_plan(settings: TrainSettings, ipu_config: IPUConfig, planning: PlanSettings) -> int:
    """Print the plan of train.py's run with these settings and return the exit status, 0.

    Also prints, draws or writes what the planner's flags and --trace ask for. Raises UsageError or
    RunError where that is not possible.
    """
    if planning.fit and planning.json:
        raise UsageError("--fit and --json exclude each other: `python -m planner calibrate "
                         "--show --json` gives the errors as JSON")
    _refuse_early(settings, planning)
    from planner.from_settings import Request, planned, published
    from planner.present import check_output, present
    from planner.sides import Side

    check_output(planning)
    request = Request(settings, ipu_config, planning, planning.phase)
    plan = planned(request)
    side = Side.from_plan("", plan, request)
    present([side], planning, f"Plan: {side.title}", side.plan)
    if planning.fit:
        from planner.calibrate import compare
        from planner.text import fit_text
        print("\n" + fit_text(compare(published(), plan.efficiencies), plan.efficiencies))
    if settings.trace:
        from planner.pictures import write_timeline
        write_timeline(side.plan, settings.trace)
    return 0


def _parse(argv: List[str], command, *groups: type):
    """Return what `parse_train` does for the flags of a command."""
    return train_settings(_flags(argv, command, *groups), *groups)


def _flags(argv: List[str], command, *groups: type) -> Dict[str, Any]:
    """Return the values of a command's flags; its docstring is the description in --help."""
    return train_flags(argv, *groups, program=f"python -m planner {command.__name__}",
                       description=command.__doc__)


def _refuse_early(settings: TrainSettings, planning: JobSettings) -> None:
    """Refuse a checkpoint that cannot be planned before torch is imported, which takes seconds."""
    if planning.needs_checkpoint(settings):
        check_checkpoint(settings, weights=False)


def _refuse_trace(settings: TrainSettings, command: str) -> None:
    """Raise UsageError if --trace was given to a command that writes none."""
    if settings.trace is not None:
        raise UsageError(f"{settings.source('trace')} does nothing with {command}: leave it out; "
                         "`plan` writes the timeline of a plan")


def _how_to_train(path: str, plan, request, best: IPUConfig, ipus: int) -> str:
    """Return how to use the file that --write wrote: what to add to one's flags, what to leave."""
    text = (f"train with it: your flags and --ipu_config {path} "
            f"--{plan.job.phase.micro_batch_flag} {plan.job.micro_batch_size}")
    if ipus > POD_IPUS[request.settings.pod_type]:
        text += f" --pod_type {pod_of(ipus)}"
    ipu_config = request.ipu_config
    # Flags win over a file.
    replaced = [f"--{name}" for name, value in best.values().items()
                if ipu_config.source(name) == f"--{name}" and name in ipu_config.sources
                and value != getattr(ipu_config, name)]
    return text + (f", but without {' '.join(replaced)}" if replaced else "")


def _calibrate_own(argv: List[str], planning: JobSettings,
                   calibrating: CalibrateSettings) -> int:
    from planner import calibrate as calibration
    from planner.from_settings import Request, make_job
    from planner.machine import Efficiencies
    from planner.plan import make_plan

    runs = []
    for swept, measured in _measured(calibrating.measured or ""):
        job = make_job(Request(*_parse([*argv, *swept], calibrate, JobSettings,
                                       CalibrateSettings)[:3]))
        before = make_plan(job, Efficiencies()).windows_per_second
        if not 1 / PLAUSIBLE < measured / before < PLAUSIBLE or not math.isfinite(measured):
            raise UsageError(
                f"--measured windows_per_second={measured:g}: the plan of these flags says "
                f"{before:,.0f}; give the flags that the run was started with")
        runs.append((swept, job, measured, before))
    fitted = calibration.fit_own([run[1:3] for run in runs], Efficiencies())
    if calibrating.profile:
        from planner.profile import open_profile
        fitted = replace(fitted, code_bytes=open_profile(calibrating.profile).code_bytes)
    file = calibration.calibration_file(planning.calibration)
    calibration.save(fitted, file)
    found: List[Dict[str, Any]] = [
        {"flags": swept, "measured_windows_per_second": measured,
         "planned_windows_per_second_before": before,
         "planned_windows_per_second": make_plan(job, fitted).windows_per_second}
        for swept, job, measured, before in runs]
    if calibrating.json:
        print(json.dumps({"runs": found, "file": str(file), **asdict(fitted)}, indent=2))
        return 0
    for (swept, *_), run in zip(runs, found):
        print(" ".join([*swept, f"measured {run['measured_windows_per_second']:,.0f} windows/s; "
                        f"planned {run['planned_windows_per_second_before']:,.0f} before and "
                        f"{run['planned_windows_per_second']:,.0f} now"]))
    print(
        f"saved to {file}; plans use it from now on and say so; delete it to go back to the "
        "published runs")
    return 0


def _measured(given: str) -> List[Tuple[List[str], float]]:
    """Return (the flags of its own, windows/s) of each run that --measured gives."""
    if given.endswith(".csv"):
        from planner.sweep import measured_runs
        return measured_runs(given)
    name, _, value = given.partition("=")
    try:
        measured = float(value)
    except ValueError:
        measured = 0.0
    if name != "windows_per_second" or not measured > 0:
        raise UsageError(
            "--measured: give what the run reached, as --measured windows_per_second=1234, or a "
            "table of `sweep --run`")
    return [([], measured)]
