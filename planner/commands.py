"""python -m planner COMMAND: plan and tune how a job is mapped to IPUs.

Commands, each of which has a --help:

    plan        predict memory, time and throughput of a training run
    search      find the best split and settings for a number of IPUs
    sweep       plan or measure every combination of some flags
    compare     set plans, runs and profiles side by side
    explore     change a plan on a page, and see at once what it does
    calibrate   fit the planner to your own runs
    report      compare a PopVision profile with the plan

`plan` ends with status 3 if what it plans does not fit, `sweep` with 1 if no combination could be
planned or run.
"""
from __future__ import annotations

import json
import string
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Callable, Dict, List, Optional, Tuple

from ipu_options.config import POD_IPUS, IPUConfig
from planner import flags
from planner.phase import TRAINING
from qa.families import check_checkpoint
from qa.settings import TrainSettings, check_page, train_flags, train_settings
from runtime.errors import UsageError

DOES_NOT_FIT = 3  # exit status of a plan that does not fit


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command argv[0] (by default of sys.argv[1:]); return the exit status.

    Raises UsageError for a wrong command or flag, RunError where a command cannot do its work.
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
    groups = flags.PlanSettings, flags.WriteFlags
    values = _flag_values(argv, plan, *groups)
    settings, ipu_config, planning, saving = train_settings(values, *groups)
    status = show_plan(settings, ipu_config, planning)
    if saving.write:
        from planner.from_settings import planned, write_pipeline
        request = flags.Request(settings, ipu_config, planning, planning.phase, values)
        print(write_pipeline(planned(request), request, saving.write), file=sys.stderr)
    return status


def search(argv: List[str]) -> int:
    """Find the best split and settings for a number of IPUs, at the same batch size."""
    request, searching = _parse(argv, search, flags.SearchSettings)
    ipus = searching.ipus or POD_IPUS[request.settings.pod_type]
    # The settings as they are may take a larger pod than the one that is searched for.
    request.settings.sources.pop("pod_type", None)
    from planner.from_settings import planned, write_pipeline
    from planner.present import check_output, present
    from planner.search import search as best_plans
    from planner.search import settings_in
    from planner.sides import Side
    from planner.text import search_text

    check_output(searching)
    begin = time.perf_counter()
    now = planned(request)
    if searching.inference and now.job.windows is None:
        raise UsageError("how many windows there are to answer is not known: give --eval_windows, "
                         "for the number of micro-batches of a call depends on it")
    plans, tried = best_plans(now.job, ipus, request.ipu_config, now.efficiencies, searching.keep)
    seconds = time.perf_counter() - begin
    changes = [settings_in(plan, request.ipu_config, ipus) for plan in [now, *plans]]
    names = dict.fromkeys(name for change in changes for name in change)
    rows = [{name: change.get(name, getattr(request.ipu_config, name, None)) for name in names}
            for change in changes]
    sides = [replace(Side.from_plan(str(place) if place else "now", plan, request),
                     title=flags.flags_text(change))
             for place, (plan, change) in enumerate(zip([now, *plans], changes))]
    text, ranking = search_text(sides, rows, tried, seconds, plans[0].job)
    present(sides, searching, "Search", [side.plan for side in sides[1:]], text, ranking,
            ["", *(f"{side.name}: {side.title}" for side in sides[1:])])
    if searching.write:
        print(write_pipeline(plans[0], request, searching.write, ipus), file=sys.stderr)
    return 0


def sweep(argv: List[str]) -> int:
    """Plan every combination of some flags, and measure them with --run."""
    from planner.sweep import run_sweep
    return run_sweep(argv)


def compare(argv: List[str]) -> int:
    """Set plans, runs and profiles side by side."""
    from planner.present import check_output, present
    from planner.sides import USAGE, Side, asked_for, check_phases, comparison_record, parse_around

    items, comparing, common = parse_around(argv, flags.CompareSettings, "compare",
                                            f"{compare.__doc__} {USAGE}")
    most = len(string.ascii_uppercase)
    if not 2 <= len(items) <= most:
        raise UsageError(f"compare: {len(items)} given, it takes 2 to {most}; usage: {USAGE}")
    check_output(comparing)
    sides = [Side.from_word(name, item, common, comparing.phase)
             for name, item in zip(string.ascii_uppercase, items)]
    check_phases(sides)
    shown = asked_for(sides, bool(common or comparing.plot))  # a picture is of plans
    present(shown, comparing, "Comparison", comparison_record(sides))
    return 0


def explore(argv: List[str]) -> int:
    """Change a plan on a page of this machine, and see at once what it does."""
    request, exploring = _parse(argv, explore, flags.ExploreSettings)
    check_page("explore", "127.0.0.1", exploring.port)
    from planner.explore import serve_planner
    from runtime.signals import StopSignals
    with StopSignals():
        serve_planner(request, exploring)
    return 0


def calibrate(argv: List[str]) -> int:
    """Fit the planner to your own runs, or show its errors on published runs."""
    request, calibrating = _parse(argv, calibrate, flags.CalibrateSettings)
    calibrating.check()
    from planner import calibrate as calibration
    from planner.from_settings import published
    from planner.text import fit_record, fit_text

    if calibrating.refit_published:
        fitted = calibration.fit_published(published())
        print(json.dumps(asdict(fitted), indent=2) if calibrating.json else fitted)
    elif calibrating.show:
        now = calibration.load(request.planning.calibration)
        rows = calibration.compare(published(), now)
        print(json.dumps(fit_record(rows), indent=2) if calibrating.json else fit_text(rows, now))
    else:
        _calibrate_own(request, calibrating)
    return 0


def report(argv: List[str]) -> int:
    """Compare a PopVision profile with the plan of the same flags."""
    request, reporting = _parse(argv, report, flags.ReportSettings)
    from planner.from_settings import planned
    from planner.profile import advice, open_profile
    from planner.sides import Side
    from planner.text import profile_text

    profile, plan = open_profile(reporting.profile), planned(request)
    side = replace(Side.from_plan("", plan, request), profile=profile)
    print(profile_text(side) + f"\n\nWhat to change: {advice(profile, plan)}")
    return 0


def show_plan(settings: TrainSettings, ipu_config: IPUConfig, planning: flags.PlanSettings) -> int:
    """Print the plan of train.py's run, and what the flags ask for; return the exit status.

    Raises UsageError or RunError where that is not possible.
    """
    if planning.fit and planning.json:
        raise UsageError("--fit and --json exclude each other: `python -m planner calibrate "
                         "--show --json` gives the errors as JSON")
    _refuse_early(settings, planning)
    from planner.from_settings import planned, published
    from planner.present import check_output, present
    from planner.sides import Side

    check_output(planning)
    request = flags.Request(settings, ipu_config, planning, planning.phase)
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
    return 0 if plan.fits else DOES_NOT_FIT


def _parse(argv: List[str], command: Callable, group: type) -> Tuple[flags.Request, Any]:
    """Return what a command is to plan, and its own settings, of the class `group`."""
    values = _flag_values(argv, command, flags.JobSettings, group)
    settings, ipu_config, planning, own = train_settings(values, flags.JobSettings, group)
    if settings.trace is not None:
        raise UsageError(f"{settings.source('trace')} does nothing with {command.__name__}: leave "
                         "it out; `plan` writes the timeline of a plan")
    _refuse_early(settings, planning)
    values = {name: value for name, value in values.items() if name not in own.values()}
    phase = getattr(own, "phase", TRAINING)
    return flags.Request(settings, ipu_config, planning, phase, values), own


def _flag_values(argv: List[str], command: Callable, *groups: type) -> Dict[str, Any]:
    """Return the values of a command's flags; its docstring is the description in --help."""
    return train_flags(argv, *groups, program=f"python -m planner {command.__name__}",
                       description=command.__doc__)


def _refuse_early(settings: TrainSettings, planning: flags.JobSettings) -> None:
    """Refuse a checkpoint that cannot be planned before torch is imported, which takes seconds."""
    if planning.needs_checkpoint(settings):
        check_checkpoint(settings, weights=False)


def _calibrate_own(request: flags.Request, calibrating: flags.CalibrateSettings) -> None:
    """Fit the planner to the runs of --measured, and save the fit."""
    from planner import calibrate as calibration
    from planner.from_settings import make_job, request_of
    from planner.plan import make_plan

    runs = _measured(calibrating.measured)
    jobs = [make_job(request_of({**request.flags, **swept})) for swept, _ in runs]
    fitted = calibration.fit_own([(job, speed) for job, (_, speed) in zip(jobs, runs)])
    if calibrating.profile:
        from planner.profile import open_profile
        fitted = replace(fitted, code_bytes=open_profile(calibrating.profile).code_bytes)
    file = calibration.calibration_file(request.planning.calibration)
    calibration.save(fitted, file)
    rows = [{"flags": flags.flag_words(swept), "measured_windows_per_second": speed,
             "planned_windows_per_second_before": make_plan(job).windows_per_second,
             "planned_windows_per_second": make_plan(job, fitted).windows_per_second}
            for job, (swept, speed) in zip(jobs, runs)]
    if calibrating.json:
        print(json.dumps({"runs": rows, "file": str(file), **asdict(fitted)}, indent=2))
        return
    for row in rows:
        print(" ".join([*row["flags"], f"measured {row['measured_windows_per_second']:,.0f} "
                        f"windows/s; planned {row['planned_windows_per_second_before']:,.0f} "
                        f"before and {row['planned_windows_per_second']:,.0f} now"]))
    print(f"saved to {file}; plans use it from now on and say so; delete it to go back to the "
          "published runs")


def _measured(text: Optional[str]) -> List[Tuple[Dict[str, Any], float]]:
    """Return (flags beside the command's, windows/s) of each run that --measured gives."""
    if text and text.endswith(".csv"):
        from planner.sweep import measured_runs
        return [(train_flags(words, flags.JobSettings, program="calibrate", description=""), speed)
                for words, speed in measured_runs(text)]
    name, _, value = (text or "").partition("=")
    with suppress(ValueError):
        if name == "windows_per_second" and 0 < float(value) < float("inf"):
            return [({}, float(value))]
    raise UsageError(
        f"--measured{text and ' ' + text or ''}: give what the run reached, as --measured "
        "windows_per_second=1234, or a table of `sweep --run`")
