"""python -m ipu_options plan | search | sweep | calibrate | report: choose how a job is mapped to IPUs. --help with each."""
from __future__ import annotations

import json
import sys
import time
from typing import List, Optional

from ipu_options.config import POD_IPUS, available_pod
from ipu_options.errors import RunError, UsageError, run_script
from ipu_options.plan.flags import add_plan_flags
from qa.settings import Parser, parse_train

COMMANDS = "plan, search, sweep, calibrate, report"


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command; argv without the program's name."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"plan": plan, "search": search, "sweep": sweep, "calibrate": calibrate, "report": report}
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if argv[0] not in commands:
        raise UsageError(f"{argv[0]}: there is no such command; choose from {COMMANDS}")
    return commands[argv[0]](argv[1:])


def plan(argv: List[str]) -> int:
    """Memory, time and throughput of the run that train.py would make with the same flags."""
    parser = Parser("python -m ipu_options plan", plan.__doc__)
    add_plan_flags(parser)
    s, ipu_config, given = parse_train(argv, parser)
    from qa.plan import show_plan
    return show_plan(s, ipu_config, given)


def search(argv: List[str]) -> int:
    """The best split and settings for a number of IPUs, under the memory limit and at the same batch size."""
    parser = Parser("python -m ipu_options search", search.__doc__)
    add_plan_flags(parser)
    parser.add_argument("--ipus", type=int, metavar="N", help="IPUs to use (default: those of the pod)")
    parser.add_argument("--write", metavar="FILE", help="write the best as an ipu_config.json")
    parser.add_argument("--keep", type=int, metavar="N", help="settings to show (default: 5)")
    s, ipu_config, given = parse_train(argv, parser)
    ipus, keep = getattr(given, "ipus", POD_IPUS[available_pod(s.pod_type)]), getattr(given, "keep", 5)
    if ipus not in (1, 2, 4, 8, 16, 32, 64):
        near = min((1, 2, 4, 8, 16, 32, 64), key=lambda n: abs(n - ipus))
        raise UsageError(f"--ipus {ipus}: IPUs are reserved in powers of two, at most 64; the nearest is {near}")
    if keep < 1:
        raise UsageError(f"--keep {keep}: it should be at least 1")
    from ipu_options.plan.search import search as best_plans
    from ipu_options.plan.text import search_text
    from qa.plan import planned

    begin = time.perf_counter()
    given_plan = planned(s, ipu_config, given)
    plans, tried = best_plans(given_plan.job, ipus, given_plan.efficiencies, keep)
    if hasattr(given, "json"):
        print(json.dumps([plan.to_dict() for plan in plans], indent=2))
    else:
        print(search_text(plans, tried, time.perf_counter() - begin, given_plan))
    if hasattr(given, "write"):
        _write_config(given.write, plans[0])
    return 0


def sweep(argv: List[str]) -> int:
    """Plan, and with --run measure, every combination of some flags: sweep --layers_per_ipu "0 4 4 4" "3 3 3 3"
    --micro_batch_size 1 2 4 [--run] [--output sweep.csv] -- [train.py flags]."""
    from ipu_options.plan.sweep import run_sweep
    return run_sweep(argv)


def calibrate(argv: List[str]) -> int:
    """Fit the efficiencies to your own run, or --show how far they are from the published ones."""
    parser = Parser("python -m ipu_options calibrate", calibrate.__doc__)
    add_plan_flags(parser)
    parser.add_argument("--measured", metavar="windows_per_second=N", help="what the run with these flags measured")
    parser.add_argument("--profile", metavar="DIR", help="its PopVision profile: the code's size is taken from it")
    parser.add_argument("--show", action="store_true", help="print the published runs and how far the planner is from each")
    parser.add_argument("--refit_published", action="store_true", help="fit to the published runs and print the numbers")
    s, ipu_config, given = parse_train(argv, parser)
    from ipu_options.plan import calibrate as calibration
    from ipu_options.plan.text import fit_text
    from qa.plan import published

    if hasattr(given, "refit_published"):
        print(calibration.fit_published(published()))
        return 0
    if hasattr(given, "show"):
        now = calibration.load(getattr(given, "calibration", None))
        print(fit_text(calibration.fit_table(published(), now), now))
        return 0
    return _calibrate_own(s, ipu_config, given)


def report(argv: List[str]) -> int:
    """What a PopVision profile says, against the plan of the same flags."""
    parser = Parser("python -m ipu_options report", report.__doc__)
    parser.add_argument("profile", metavar="PROFILE", help="a profile.pop, or the folder that --profile_dir named")
    add_plan_flags(parser)
    s, ipu_config, given = parse_train(argv, parser)
    from ipu_options.plan.profile import open_profile, profile_text
    from qa.plan import planned

    print(profile_text(open_profile(given.profile), planned(s, ipu_config, given)))
    return 0


def _calibrate_own(s, ipu_config, given) -> int:
    from dataclasses import replace

    from ipu_options.plan import calibrate as calibration
    from ipu_options.plan.machine import Efficiencies
    from ipu_options.plan.planner import make_plan
    from qa.plan import make_job

    name, _, value = getattr(given, "measured", "").partition("=")
    try:
        measured = float(value)
    except ValueError:
        measured = 0.0
    if name != "windows_per_second" or not measured > 0:
        raise UsageError("--measured: give what the run reached, as --measured windows_per_second=1234")
    job = make_job(s, ipu_config, given)
    before = make_plan(job, Efficiencies()).windows_per_second
    fitted = calibration.fit_own(job, measured, Efficiencies())
    if hasattr(given, "profile"):
        from ipu_options.plan.profile import open_profile
        fitted = replace(fitted, code_bytes=open_profile(given.profile).code_bytes)
    file = calibration.calibration_file(getattr(given, "calibration", None))
    calibration.save(fitted, file)
    now = make_plan(job, fitted).windows_per_second
    print(f"measured {measured:,.0f} windows/s; planned {before:,.0f} before and {now:,.0f} now\n"
          f"saved to {file}; plans use it from now on and say so; delete it to go back to the published runs")
    return 0


def _write_config(path: str, made) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(made.job.config.to_dict(), file, indent=2, sort_keys=True)
            file.write("\n")
    except OSError as error:
        raise RunError(f"--write {path}: cannot write it ({error})")
    print(f"wrote {path}; train with it: your flags and --ipu_config {path} --micro_batch_size {made.job.micro_batch_size}",
          file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_script(main))
