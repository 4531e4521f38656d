"""python -m planner compare: reads what is to be compared, and prints it side by side."""
from __future__ import annotations

import json
import shlex
import string
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ipu_options.config import IPU_CONFIG_NAME, IPUConfig
from planner.comparison import Side, comparison_dict, comparison_text
from planner.flags import CompareSettings, JobSettings, flags_text
from planner.from_settings import Request, described, planned
from planner.phase import INFERENCE, TRAINING, Phase
from planner.plan import Plan
from planner.profile import open_profile, profile_file
from planner.search import settings_in
from qa.settings import TrainSettings, parse_train
from runtime.errors import RunError, UsageError
from runtime.files import read_json_object
from runtime.flags import Parser, Source, add_flags, make_settings

USAGE = (
    'compare A B [C ...] [--json] [--plot FILE] [--html FILE] [--inference] -- [train.py flags of '
    'all]; each of them is flags of train.py in quotes, an ipu_config.json, a plan saved by `plan '
    '--json`, or the folder of a run or of a profile')
RUN_RECORD, PROFILE_NOTE = "run.json", "framework.json"


def run_compare(argv: Sequence[str]) -> int:
    """Print the comparison that `argv` asks for (see USAGE) and return 0.

    Raises UsageError for what cannot be compared, RunError for what cannot be read or written.
    """
    items, own, common = parse(argv)
    sides = [read_side(name, item, common, own.phase)
             for name, item in zip(string.ascii_uppercase, items)]
    _check_phases(sides)
    if own.json:
        print(json.dumps(comparison_dict(sides), indent=2))
    else:
        print(comparison_text(sides))
    if own.plot:
        from planner.pictures import draw_comparison
        draw_comparison(sides, own.plot)
    if own.html:
        from planner.page import write_page
        write_page(own.html, "Comparison", sides, comparison_text(sides))
    return 0


def parse(argv: Sequence[str]) -> Tuple[List[str], CompareSettings, List[str]]:
    """Split the command line and return (what to compare, compare's own flags, flags of all).

    The words after "--" are flags of train.py and of the planner that hold for everything that is
    planned. Raises UsageError unless there are two things to compare, or more.
    """
    argv, common = list(argv), []
    if "--" in argv:
        cut = argv.index("--")
        argv, common = argv[:cut], argv[cut + 1:]
    parser = Parser("python -m planner compare", "Set plans, runs and profiles side by side. " +
                    USAGE)
    add_flags(parser, CompareSettings)
    # Otherwise `--json A B` would take A for the value of --json.
    given, items = parser.parse_known_args(
        [f"{word}=true" if word in ("--json", "--inference") else word for word in argv])
    most = len(string.ascii_uppercase)
    if not 2 <= len(items) <= most:
        raise UsageError(f"compare: {len(items)} given, it takes 2 to {most}; usage: {USAGE}")
    return items, make_settings(CompareSettings, [Source(vars(given))]), common


def read_side(name: str, item: str, common: List[str], phase: Phase = TRAINING) -> Side:
    """Return what the word `item` of the command line stands for, as the Side `name`.

    common: flags of everything that is planned. phase: the pipeline to plan. Raises
    UsageError, which names the side, if it is nothing that can be compared, RunError if it cannot
    be read.
    """
    path = Path(item)
    try:
        if item.strip() and path.is_dir():
            if (path / RUN_RECORD).is_file():
                return _run(name, item, common, phase)
            if (path / IPU_CONFIG_NAME).is_file():
                return flags_side(name, item, "ipu_config.json", [*common, "--ipu_config", item],
                              phase)
            return _profile(name, item, common, phase)
        if item.strip() and path.is_file():
            if path.suffix == ".pop":
                return _profile(name, item, common, phase)
            values = read_json_object(path, item)
            if "update_parts_seconds" in values:
                return _saved_plan(name, item, values)
            return flags_side(name, item, "ipu_config.json", [*common, "--ipu_config", item],
                              phase)
        words = shlex.split(item)
    except (UsageError, RunError) as error:
        raise type(error)(f"{name}, {error}") from error
    except ValueError as error:
        raise UsageError(f"{name}, {item}: {error}") from error
    if words and not words[0].startswith("-"):
        raise UsageError(f"{name}, {item}: there is no such file or folder, and flags begin with "
                         f"--; usage: {USAGE}")
    try:
        return flags_side(name, item, "flags", [*common, *words], phase)
    except (UsageError, RunError) as error:
        raise type(error)(f"{name}, \"{item}\": {error}") from error


def found_sides(given: Plan, plans: Sequence[Plan], request: Request, ipus: int) -> List[Side]:
    """Return the plan as given and those that a search for `ipus` IPUs has found, as sides."""
    sides = []
    for place, plan in enumerate([given, *plans]):
        made = described(plan, request)
        sides.append(Side(
            str(place) if place else "given", "", "flags",
            flags_text(settings_in(plan, request.ipu_config, ipus)),
            {**_settings(request.settings, made),
             plan.job.phase.micro_batch_flag: plan.job.micro_batch_size}, made))
    return sides


def flags_side(name: str, item: str, kind: str, words: List[str], phase: Phase = TRAINING) -> Side:
    """Return the plan of the flags of train.py in `words`. Raises what parsing and planning do."""
    request = Request(*parse_train(words, JobSettings, program="compare", description=USAGE), phase)
    return planned_side(name, item, kind, planned(request), request)


def planned_side(name: str, item: str, kind: str, plan: Plan, request: Request) -> Side:
    """Return a plan that was made of flags."""
    made = described(plan, request)
    return Side(name, item, kind, item if item.strip() else made["title"],
                _settings(request.settings, made), made)


def _saved_plan(name: str, item: str, plan: Dict[str, Any]) -> Side:
    """Return a plan that `plan --json` printed. Raises UsageError if parts of it are missing."""
    side = Side(name, item, "saved plan", str(plan.get("title", item)), {}, plan)
    try:
        comparison_text([side])
        size = ("eval_" if plan["phase"] == "inference" else "") + "micro_batch_size"
        known = {size: plan["micro_batch_size"], **{
            key: plan[key] for key in ("max_seq_length", "precision")}}
        return replace(side, title=f"{plan['title']}, {item}",
                       settings={**known, **_of_plan(plan)})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{item}: not whole ({type(error).__name__}: {error}): give what `python -m "
            "planner plan --json` printed") from error


def _run(name: str, item: str, common: List[str], phase: Phase) -> Side:
    """Return a run: its settings, what it measured, and the plan of the same settings."""
    if phase is INFERENCE:
        raise UsageError(f"{item}: a run's figures are those of training: leave out --inference, "
                         "or give its ipu_config.json")
    record = read_json_object(Path(item, RUN_RECORD), f"{item}/{RUN_RECORD}")
    values = {}
    for key in ("settings", "ipu_config"):
        if not isinstance(record.get(key), dict):
            raise UsageError(f"{item}/{RUN_RECORD}: has no {key}: it is not what train.py wrote")
        values.update(record[key])
    measured = _measured(Path(item))
    per_row = measured.get("windows_per_row") if values.get("pack") else None
    settings, plan, note = _replanned(values, f"{item}/{RUN_RECORD}", common, per_row)
    return Side(name, item, "run", item, settings, plan, measured,
                note=f"the figures of its plan are for IPUs; it ran on {_ran_on(measured)}"
                if plan else note)


def _ran_on(measured: Dict[str, Any]) -> str:
    return {"IPU": "IPUs", "host": "a host without IPUs"}.get(
        measured.get("device", ""), "what its log does not tell")


def _profile(name: str, item: str, common: List[str], phase: Phase) -> Side:
    """Return a PopVision profile, with the plan of the settings that were written beside it."""
    file = profile_file(item)
    profile = open_profile(str(file))
    note = file.with_name(PROFILE_NOTE)
    if phase is INFERENCE or "inference" in file.parts:
        raise UsageError(f"{item}: this compares profiles of training; give the folder of one")
    if not note.is_file():
        return Side(name, item, "profile", item, {}, profile=profile, note=(
            f"no plan: there is no {PROFILE_NOTE} beside {file}"))
    settings, plan, why = _replanned(read_json_object(note, str(note)), str(note), common)
    return Side(name, item, "profile", item, settings, plan, profile=profile, note=why)


def _replanned(values: Dict[str, Any], source: str, common: List[str],
               windows_per_row: Optional[float] = None
               ) -> Tuple[Dict[str, Any], Optional[Dict[str, Any]], Optional[str]]:
    """Return (all settings, the plan or None, why there is none) of a run's recorded settings.

    values: by name. Of the flags in `common`, the planner's own apply. A run whose model is no
    longer where it was, or whose settings this version refuses, still has its measured figures.
    """
    _, _, planning = parse_train(common, JobSettings, program="compare", description=USAGE)
    if windows_per_row is not None and planning.windows_per_row is None:
        planning.windows_per_row = max(1.0, windows_per_row)
    try:
        record = Source({key: value for key, value in values.items() if value is not None}, source)
        settings, ipu_config = make_settings(TrainSettings, [record]), make_settings(
            IPUConfig, [record])
        # A run switches settings off that no flag can: dataset_name, if it has files of its own.
        for key in set(settings.values()) & set(values):
            setattr(settings, key, getattr(settings, key) if values[key] is not None else None)
        settings.config = str(values.get("config"))
        request = Request(settings, ipu_config, planning)
        plan = described(planned(request), request)
    except (UsageError, RunError) as error:
        return values, None, f"no plan: {error}"
    return _settings(settings, plan), plan, None


def _measured(folder: Path) -> Dict[str, Any]:
    """Return what a run measured, from its log and its train_results.json.

    windows_per_second: of the whole training, or without train_results.json (a run that is not
    at its end) of the last log point. Shares and windows_per_row: means over the log points.
    """
    from qa.run.log import LOG, read_log

    lines = read_log(folder / LOG)
    found: Dict[str, Any] = {}
    for line in lines:
        found.update({key: line[key] for key in ("device", "f1", "exact_match", "loss",
                                                 "windows_per_second") if key in line
                      and line.get("questions") != "test"})
        found["steps"] = line["step"]
    points = [line for line in lines if line["event"] == "log"]
    for share in ("data_share", "step_share", "rest_share"):
        if points and all(share in point for point in points):
            found[share] = sum(point[share] for point in points) / len(points)
    if points and points[-1].get("rows_per_second"):
        found["windows_per_row"] = (points[-1]["windows_per_second"] /
                                    points[-1]["rows_per_second"])
    if (folder / "train_results.json").is_file():
        results = read_json_object(folder / "train_results.json", f"{folder}/train_results.json")
        found.update({key: results[key] for key in ("windows_per_second", "steps", "train_seconds",
                                                    "compile_seconds") if key in results})
    return found


def _settings(settings: TrainSettings, plan: Dict[str, Any]) -> Dict[str, Any]:
    """Return all settings of a plan of train.py's run."""
    return {**settings.values(), **_of_plan(plan)}


def _of_plan(plan: Dict[str, Any]) -> Dict[str, Any]:
    """Return the settings that a plan's dictionary holds, with the split as it results."""
    return {**plan["ipu_config"], **plan["model"], "pod_type": plan["pod_type"],
            "model_name_or_path": plan["model_name_or_path"],
            "layers_per_ipu": plan["layers_per_ipu"],
            "ipus_per_replica": plan["ipus_per_replica"], "ipu": plan["machine"].lower()}


def _check_phases(sides: Sequence[Side]) -> None:
    """Raise UsageError if plans of training and of inference are among the sides."""
    phases = {side.plan["phase"]: side for side in sides if side.plan}
    if len(phases) > 1:
        raise UsageError(" and ".join(f"{side.name} is of {phase}" for phase, side in
                                      sorted(phases.items(), reverse=True)) +
                         ": compare plans of one kind (--inference plans all for inference)")
