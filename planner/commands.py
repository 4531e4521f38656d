"""python -m planner COMMAND: plan and tune how a job is mapped to IPUs.

`plan` ends with status 3 if what it plans does not fit, `sweep` with 1 if no combination could be
planned or run. Each command has a --help:
"""
from __future__ import annotations

import json
import string
import sys
from dataclasses import asdict, replace
from typing import Any, Callable, Dict, List, Optional, Tuple

from ipu_options.config import POD_IPUS, IPUConfig
from planner import calibrate as calibration
from planner import flags, sides
from planner.from_settings import make_job, planned, published, request_of, write_pipeline
from planner.phase import TRAINING
from planner.pictures import write_timeline
from planner.plan import make_plan
from planner.present import present
from planner.profile import advice, open_profile
from planner.search import search as best_plans
from planner.search import settings_in
from planner.sides import Side
from planner.sweep import measured_runs, run_sweep
from planner.text import check_sides, fit_text, profile_text, search_text
from qa.settings import TrainSettings, check_page, check_writable, train_flags, train_settings
from runtime.errors import UsageError

DOES_NOT_FIT = 3  # exit status of a plan that does not fit


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command argv[0], by default of sys.argv[1:]; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "plan": plan, "search": search, "sweep": run_sweep, "compare": compare, "explore": explore,
        "calibrate": calibrate, "report": report}
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        for name, command in commands.items():
            print(f"    {name:<11} {command.__doc__.splitlines()[0]}")
        return 0
    if argv[0] not in commands:
        raise UsageError(f"{argv[0]}: there is no such command; choose from {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


def plan(argv: List[str]) -> int:
    """Predict memory, time and throughput of train.py's run with the same flags."""
    groups = flags.PlanSettings, flags.WriteFlags
    values = _flag_values(argv, plan, *groups)
    settings, ipu_config, planning, saving = train_settings(values, *groups)
    flags.check_output(saving)
    return show_plan(settings, ipu_config, planning, values, saving.write)


def show_plan(settings: TrainSettings, ipu_config: IPUConfig, planning: flags.PlanSettings,
              values: Optional[Dict[str, Any]] = None, write: Optional[str] = None) -> int:
    """Print the plan of train.py's run, and what the flags ask for; return the exit status."""
    if planning.fit and planning.json:
        raise UsageError("--fit and --json exclude each other: `python -m planner calibrate "
                         "--show --json` gives the errors as JSON")
    flags.check_output(planning)
    request = flags.Request(settings, ipu_config, planning, planning.phase, values or {})
    plan = planned(request)
    side = Side.from_plan("", plan, request)
    present([side], planning, f"Plan: {side.title}", side.plan)
    if planning.fit:
        records = calibration.compare(published(), plan.efficiencies)
        print("\n" + fit_text(records, plan.efficiencies))
    if settings.trace:
        write_timeline(side.plan, settings.trace)
    if write:
        print(write_pipeline(plan, request, write), file=sys.stderr)
    return 0 if plan.fits else DOES_NOT_FIT


def search(argv: List[str]) -> int:
    """Find the best split and settings for a number of IPUs, at the same batch size."""
    request, searching = _parse(argv, search, flags.SearchSettings)
    ipus = searching.ipus or POD_IPUS[request.settings.pod_type]
    # The settings as they are may take a larger pod than the one that is searched for.
    request.settings.sources.pop("pod_type", None)
    now = planned(request)
    plans, tried = best_plans(now, ipus, request.ipu_config, searching.keep)
    changes = [settings_in(plan, request.ipu_config, ipus) for plan in [now, *plans]]
    found = [replace(Side.from_plan(str(place) if place else "now", plan, request),
                     title=flags.flags_text(change))
             for place, (plan, change) in enumerate(zip([now, *plans], changes))]
    text, ranking = search_text(found, changes, [now, *plans], tried)
    present(found, searching, "Search", [side.plan for side in found[1:]], text, ranking,
            ["", *(f"{side.name}: {side.title}" for side in found[1:])])
    if searching.write:
        print(write_pipeline(plans[0], request, searching.write, ipus), file=sys.stderr)
    return 0


def compare(argv: List[str]) -> int:
    """Set plans, runs and profiles side by side."""
    items, comparing, common = sides.parse_around(
        argv, flags.CompareSettings, "compare", f"{compare.__doc__} {sides.USAGE}")
    most = len(string.ascii_uppercase)
    if not 2 <= len(items) <= most:
        raise UsageError(f"compare: {len(items)} given, it takes 2 to {most}; usage: "
                         f"{sides.USAGE}")
    compared = [Side.from_word(name, item, common, comparing.phase)
                for name, item in zip(string.ascii_uppercase, items)]
    check_sides(compared)
    record = sides.comparison_record(compared)
    # Runs of a host alone have no plan on IPUs unless it is asked for; a picture is of plans.
    if not common and not comparing.plot and all(
            side.kind == "run" and side.measured_on("host") for side in compared):
        compared = [replace(side, plan=None, note="for its plan on IPUs, end with -- --ipu mk2")
                    for side in compared]
    present(compared, comparing, "Comparison", record)
    return 0


def explore(argv: List[str]) -> int:
    """Change a plan on a page of this machine, and see at once what it does."""
    request, exploring = _parse(argv, explore, flags.ExploreSettings)
    check_page("explore", "127.0.0.1", exploring.port)
    from planner.explore import serve_planner  # needs dash
    from runtime.signals import StopSignals
    with StopSignals():
        serve_planner(request, exploring)
    return 0


def calibrate(argv: List[str]) -> int:
    """Fit the planner to your own runs, or show its errors on published runs."""
    request, calibrating = _parse(argv, calibrate, flags.CalibrateSettings)
    asked = [f"--{name}" for name in ("measured", "show", "refit_published")
             if getattr(calibrating, name)]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} exclude each other: give one of them")
    if calibrating.profile and not calibrating.measured:
        raise UsageError("--profile does nothing without --measured: give both, of one run")
    if calibrating.refit_published:
        fitted = calibration.fit_published(published())
        print(json.dumps(asdict(fitted), indent=2) if calibrating.json else fitted)
    elif calibrating.show:
        now = calibration.load(request.planning.calibration)
        records = calibration.compare(published(), now)
        print(json.dumps(records, indent=2) if calibrating.json else fit_text(records, now))
    else:
        _calibrate_own(request, calibrating)
    return 0


def report(argv: List[str]) -> int:
    """Compare a PopVision profile with the plan of the same flags."""
    request, reporting = _parse(argv, report, flags.ReportSettings)
    profile, plan = open_profile(reporting.profile), planned(request)
    side = replace(Side.from_plan("", plan, request, reporting.profile), profile=profile)
    print(profile_text(side) + f"\n\nWhat to change: {advice(profile, plan)}")
    return 0


def _parse(argv: List[str], command: Callable, group: type) -> Tuple[flags.Request, Any]:
    """Return what a command is to plan, and its own settings, of the class `group`."""
    values = _flag_values(argv, command, flags.JobSettings, group)
    settings, ipu_config, planning, own = train_settings(values, flags.JobSettings, group)
    if settings.trace is not None:
        raise UsageError(f"{settings.source('trace')} does nothing with {command.__name__}: leave "
                         "it out; `plan` writes the timeline of a plan")
    flags.check_output(own)
    values = {name: value for name, value in values.items() if name not in own.values()}
    phase = getattr(own, "phase", TRAINING)
    return flags.Request(settings, ipu_config, planning, phase, values), own


def _flag_values(argv: List[str], command: Callable, *groups: type) -> Dict[str, Any]:
    """Return the values of a command's flags; its docstring is the description in --help."""
    return train_flags(argv, *groups, program=f"python -m planner {command.__name__}",
                       description=command.__doc__)


def _calibrate_own(request: flags.Request, calibrating: flags.CalibrateSettings) -> None:
    """Fit the planner to the runs of --measured, and save the fit."""
    file = calibration.calibration_file(request.planning.calibration)
    if request.planning.calibration:
        check_writable(file, f"--calibration {file}")
    profile = calibrating.profile and open_profile(calibrating.profile)
    runs = [(swept, make_job(request_of({**request.flags, **swept})), speed)
            for swept, speed in measured_runs(calibrating.measured or "")]
    fitted = calibration.fit_own([(job, speed) for _, job, speed in runs])
    if profile:
        fitted = replace(fitted, code_bytes=profile.code_bytes)
    calibration.save(fitted, file)
    rows = [{"flags": flags.flag_words(swept), "measured_windows_per_second": speed,
             "planned_windows_per_second_before": make_plan(job).windows_per_second,
             "planned_windows_per_second": make_plan(job, fitted).windows_per_second}
            for swept, job, speed in runs]
    if calibrating.json:
        print(json.dumps({"runs": rows, "file": str(file), **asdict(fitted)}, indent=2))
        return
    for row in rows:
        print(" ".join([*row["flags"], f"measured {row['measured_windows_per_second']:,.0f} "
                        f"windows/s; planned {row['planned_windows_per_second_before']:,.0f} "
                        f"before and {row['planned_windows_per_second']:,.0f} now"]))
    print(f"saved to {file}; plans use it from now on and say so; delete it to go back to the "
          "published runs")
