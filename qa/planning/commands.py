"""python -m ipu_options COMMAND: plan and tune how a job is mapped to IPUs.

Commands, each of which has a --help:

    plan        predict memory, time and throughput of a training run
    search      find the best split and settings for a number of IPUs
    sweep       plan or measure every combination of some flags
    calibrate   fit the planner to your own runs
    report      compare a PopVision profile with the plan
"""
from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import List, Optional, Tuple

from ipu_options.config import POD_IPUS, IPUConfig
from ipu_options.errors import UsageError
from ipu_options.files import write_json, writing
from qa.planning.flags import CalibrateSettings, PlanSettings, ReportSettings, SearchSettings
from qa.settings import TrainSettings, parse_train


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command argv[0] with the flags that follow and return the exit status.

    argv: without the program's name; by default sys.argv[1:]. Raises UsageError for an unknown
    command or a wrong flag, RunError where a command cannot do its work.
    """
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "plan": plan, "search": search, "sweep": sweep, "calibrate": calibrate, "report": report}
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
    settings, ipu_config, planning, searching = _parse(argv, search, PlanSettings, SearchSettings)
    ipus = POD_IPUS[settings.pod_type] if searching.ipus is None else searching.ipus
    if ipus not in (1, 2, 4, 8, 16, 32, 64):
        near = min((1, 2, 4, 8, 16, 32, 64), key=lambda n: abs(n - ipus))
        raise UsageError(
            f"--ipus {ipus}: IPUs are reserved in powers of two, at most 64; the nearest is {near}")
    from ipu_options.plan.search import search as best_plans
    from ipu_options.plan.text import search_text
    from qa.planning.job import planned

    begin = time.perf_counter()
    given = planned(settings, ipu_config, planning)
    plans, tried = best_plans(given.job, ipus, given.efficiencies, searching.keep)
    if planning.json:
        from ipu_options.plan.text import plan_dict
        print(json.dumps([plan_dict(plan) for plan in plans], indent=2))
    else:
        print(search_text(plans, tried, time.perf_counter() - begin, given))
    if searching.write:
        job = plans[0].job
        with writing(f"--write {searching.write}"):
            write_json(searching.write, dict(sorted(job.config.to_dict().items())))
        print(
            f"wrote {searching.write}; train with it: your flags and --ipu_config "
            f"{searching.write} --micro_batch_size {job.micro_batch_size}", file=sys.stderr)
    return 0


def sweep(argv: List[str]) -> int:
    """Plan every combination of some flags, and measure them with --run."""
    from qa.planning.sweep import run_sweep
    return run_sweep(argv)


def calibrate(argv: List[str]) -> int:
    """Fit the planner to your own runs, or show its errors on published runs."""
    _, _, planning, calibrating = _parse(argv, calibrate, PlanSettings, CalibrateSettings)
    from ipu_options.plan import calibrate as calibration
    from ipu_options.plan.text import fit_text
    from qa.planning.job import published

    if calibrating.refit_published:
        print(calibration.fit_published(published()))
        return 0
    if calibrating.show:
        now = calibration.load(planning.calibration)
        print(fit_text(calibration.fit_table(published(), now), now))
        return 0
    return _calibrate_own(argv, planning, calibrating)


def report(argv: List[str]) -> int:
    """Compare a PopVision profile with the plan of the same flags."""
    settings, ipu_config, planning, given = _parse(argv, report, PlanSettings, ReportSettings)
    from ipu_options.plan.profile import open_profile, profile_text
    from qa.planning.job import planned

    print(profile_text(open_profile(given.profile), planned(settings, ipu_config, planning)))
    return 0


def show_plan(settings: TrainSettings, ipu_config: IPUConfig, planning: PlanSettings) -> int:
    """Print the plan of train.py's run with these settings and return the exit status, 0.

    Also prints, draws or writes what the planner's flags and --trace ask for. Raises UsageError or
    RunError where that is not possible.
    """
    from ipu_options.plan.calibrate import fit_table
    from ipu_options.plan.text import fit_text, plan_dict, plan_text
    from qa.planning.job import planned, planned_name, published

    made, title = planned(settings, ipu_config, planning), planned_name(settings, planning)
    print(json.dumps(plan_dict(made), indent=2) if planning.json else plan_text(made, title))
    if planning.fit and not planning.json:
        print("\n" + fit_text(fit_table(published(), made.efficiencies), made.efficiencies))
    if planning.plot:
        from ipu_options.plan.draw import draw_plan
        draw_plan(made, planning.plot, title)
    if settings.trace:
        from ipu_options.plan.draw import write_timeline
        write_timeline(made, settings.trace)
    return 0


def _parse(argv: List[str], command, *groups: type):
    """Parse the flags of a command, whose docstring is its description in --help."""
    return parse_train(argv, *groups, program=f"python -m ipu_options {command.__name__}",
                       description=command.__doc__)


def _calibrate_own(argv: List[str], planning: PlanSettings,
                   calibrating: CalibrateSettings) -> int:
    from ipu_options.plan import calibrate as calibration
    from ipu_options.plan.machine import Efficiencies
    from ipu_options.plan.planner import make_plan
    from qa.planning.job import make_job

    runs = []
    for swept, measured in _measured(calibrating.measured or ""):
        settings, ipu_config, own, _ = _parse([*argv, *swept], calibrate, PlanSettings,
                                              CalibrateSettings)
        runs.append((" ".join([*swept, "measured"]), make_job(settings, ipu_config, own), measured))
    fitted = calibration.fit_own([run[1:] for run in runs], Efficiencies())
    if calibrating.profile:
        from ipu_options.plan.profile import open_profile
        fitted = replace(fitted, code_bytes=open_profile(calibrating.profile).code_bytes)
    file = calibration.calibration_file(planning.calibration)
    calibration.save(fitted, file)
    for name, job, measured in runs:
        before, now = (make_plan(job, each).windows_per_second
                       for each in (Efficiencies(), fitted))
        print(f"{name} {measured:,.0f} windows/s; planned {before:,.0f} before and {now:,.0f} now")
    print(
        f"saved to {file}; plans use it from now on and say so; delete it to go back to the "
        "published runs")
    return 0


def _measured(given: str) -> List[Tuple[List[str], float]]:
    """Return (the flags of its own, windows/s) of each run that --measured gives."""
    if given.endswith(".csv"):
        from qa.planning.sweep import measured_runs
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
