"""What is compared: the plan of some flags, a saved plan, a run of train.py, a PopVision profile.

The plan of a side is a dictionary (`plan_record`): a saved one is as good as a new one.
"""
from __future__ import annotations

import os
import shlex
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from ipu_options.config import IPU_CONFIG_NAME, IPUConfig, pod_of
from planner.advice import changes, describe, suggestion
from planner.bound import bound_record, stage_composition
from planner.confidence import CONFIDENCE, expected_error, host_range
from planner.flags import SHAPE, JobSettings, Request, check_output
from planner.from_settings import packing_note, planned, planned_model, planned_name, pod_note
from planner.memory import reasons
from planner.phase import INFERENCE, PHASES, TRAINING, Phase
from planner.plan import Plan, latency_seconds
from planner.profile import Profile, open_profile, profile_file
from planner.throughput import host_parts
from qa.families import family_of
from qa.settings import TrainSettings, parse_train
from runtime.errors import RunError, UsageError, one_line
from runtime.files import read_json_object
from runtime.flags import Parser, Source, add_flags, make_settings

USAGE = (
    'compare A B [C ...] [--json] [--plot FILE] [--html FILE] [--inference] -- [train.py flags of '
    'all]; each of them is flags of train.py in quotes, an ipu_config.json, a plan saved by `plan '
    '--json`, or the folder of a run or of a profile')
RUN_RECORD, PROFILE_NOTE = "run.json", "framework.json"
_NAMES_ONLY = ("config", "output_dir")  # settings that name a run rather than how it works
THIS_HOST = "this host"  # where a sweep measured, if not on IPUs
_RECORDED = ("config", "model_name_or_path", "pod_type", "max_seq_length", "layers_per_ipu")
DEVICES = {"IPU": "IPUs", "host": "a host without IPUs"}


@dataclass(frozen=True)
class Side:
    """One of the things that are compared."""

    name: str                                # "A", "B" and so on
    item: str                                # as on the command line
    kind: str                                # flags, ipu_config.json, saved plan, run or profile
    title: str
    settings: Dict[str, Any]                 # all that are known, by flag
    plan: Optional[Dict[str, Any]] = None    # `plan_record`; without one, `note` says why
    measured: Dict[str, Any] = field(default_factory=dict)  # of a run; on `device` IPU or host
    profile: Optional[Profile] = None
    note: Optional[str] = None

    @classmethod
    def from_word(cls, name: str, item: str, common: List[str], phase: Phase = TRAINING
                  ) -> "Side":
        """Return what the word `item` stands for. Raises errors that name the side."""
        # Path.exists() raises an error for flags that are longer than the name of a file can be.
        is_path = bool(item.strip()) and os.path.exists(item)
        where = f"{name}, {item}" if is_path else f'{name}, "{item}"'
        try:
            if not is_path:
                words = shlex.split(item)
                if words and not words[0].startswith("-"):
                    raise UsageError("there is no such file or folder, and flags begin with --; "
                                     f"usage: {USAGE}")
                return cls.from_flags(name, [*common, *words], phase, item)
            if Path(item, RUN_RECORD).is_file():
                return cls.from_run(name, item, common, phase)
            saved = item.endswith(".json") and read_json_object(Path(item), item)
            if saved and "update_parts_seconds" in saved:
                return cls.from_saved_plan(name, item, saved)
            if saved or Path(item, IPU_CONFIG_NAME).is_file():
                return cls.from_flags(name, [*common, "--ipu_config", item], phase, item,
                                      "ipu_config.json")
            return cls.from_profile(name, item, common, phase)
        except (UsageError, RunError, ValueError) as error:
            kind = RunError if isinstance(error, RunError) else UsageError
            raise kind(f"{where}: {error}") from error

    @classmethod
    def from_flags(cls, name: str, words: List[str], phase: Phase = TRAINING, item: str = "",
                   kind: str = "flags") -> "Side":
        """Return the plan of the flags of train.py in `words`."""
        request = Request(
            *parse_train(words, JobSettings, program="compare", description=USAGE), phase)
        return cls.from_plan(name, planned(request), request, item, kind)

    @classmethod
    def from_plan(cls, name: str, plan: Plan, request: Request, item: str = "",
                  kind: str = "flags") -> "Side":
        record = plan_record(plan, request)
        return cls(name, item, kind, item if item.strip() else record["title"],
                   {**request.settings.values(), **_recorded_settings(record)}, record)

    @classmethod
    def from_saved_plan(cls, name: str, item: str, plan: Dict[str, Any]) -> "Side":
        """Return a plan that `plan --json` printed. Raises UsageError if parts are missing."""
        with whole_plan():
            known = {PHASES[plan["phase"]].micro_batch_flag: plan["micro_batch_size"],
                     "max_seq_length": plan["max_seq_length"], "precision": plan["precision"]}
            return cls(name, item, "saved plan", f"{plan['title']}, {item}",
                       {**known, **_recorded_settings(plan)}, plan)

    @classmethod
    def from_run(cls, name: str, item: str, common: List[str], phase: Phase) -> "Side":
        if phase is INFERENCE:
            raise UsageError("a run's figures are those of training: leave out --inference, or "
                             "give its ipu_config.json")
        record = read_json_object(Path(item, RUN_RECORD), f"{item}/{RUN_RECORD}")
        values = {name: value for key in ("settings", "ipu_config") for name, value in (
            record[key].items() if isinstance(record.get(key), dict) else ())}
        missing = [key for key in _RECORDED if values.get(key) is None]
        if missing:
            raise UsageError(f"{RUN_RECORD} has no {', '.join(missing)}: give the folder of a run "
                             "as train.py wrote it")
        measured = _measured(Path(item))
        per_row = measured.get("windows_per_row") if values.get("pack") else None
        side = cls.from_record(name, item, "run", values, f"{item}/{RUN_RECORD}", common, per_row)
        device = DEVICES.get(measured.get("device", ""), "what its log does not tell")
        return replace(side, measured=measured, note=side.note or (
            f"the figures of its plan are for IPUs; it ran on {device}"))

    @classmethod
    def from_profile(cls, name: str, item: str, common: List[str], phase: Phase) -> "Side":
        file = profile_file(item)
        profile = open_profile(str(file))
        note = file.with_name(PROFILE_NOTE)
        if phase is INFERENCE:
            raise UsageError("this compares profiles of training; give the folder of one")
        if not note.is_file():
            return cls(name, item, "profile", item, {}, profile=profile, note=(
                f"no plan: there is no {PROFILE_NOTE} beside {file}"))
        side = cls.from_record(name, item, "profile", read_json_object(note, str(note)), str(note),
                               common)
        return replace(side, profile=profile)

    @classmethod
    def from_record(cls, name: str, item: str, kind: str, values: Dict[str, Any], source: str,
                    common: List[str], windows_per_row: Optional[float] = None) -> "Side":
        """Return the plan of settings that a run recorded; without one, the note says why."""
        _, _, planning = parse_train(common, JobSettings, program="compare", description=USAGE)
        if windows_per_row is not None and planning.windows_per_row is None:
            planning.windows_per_row = max(1.0, windows_per_row)
        # With files of its own, a run has no data set, which no flag can say.
        record = [Source({key: value for key, value in values.items()
                          if (key, value) != ("dataset_name", None)}, source)]
        try:
            settings = make_settings(TrainSettings, record)
            settings.dataset_name = values.get("dataset_name")
            settings.config = str(values.get("config"))
            request = Request(settings, make_settings(IPUConfig, record), planning)
            return cls.from_plan(name, planned(request), request, item, kind)
        except (UsageError, RunError) as error:  # its model has moved, or this version refuses it
            return cls(name, item, kind, item, values, note=f"no plan: {error}")

    def with_row(self, name: str, row: Dict[str, str]) -> "Side":
        """Return the side under another name, with what a row of a sweep measured."""
        device, speed = row["measured_on"], row["measured_windows_per_second"]
        measured = {"windows_per_second": float(speed),
                    "device": "host" if device == THIS_HOST else device} if speed else {}
        return replace(self, name=name, measured=measured, note=row["status"])

    @property
    def label(self) -> str:
        return f"{self.name}: {self.title}" + (f" ({self.kind})" if self.kind != "flags" else "")

    def measured_on(self, device: str) -> Optional[float]:
        """Return the windows/s that were measured on "IPU" or "host"."""
        return self.measured.get("windows_per_second") if (
            self.measured.get("device") == device) else None


@contextmanager
def whole_plan(where: str = "") -> Iterator[None]:
    """Turn the error of a block that misses something in a saved plan into a UsageError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{where}not a whole plan ({one_line(error)}): give what `python -m "
                         "planner plan --json` printed") from error


def parse_around(argv: Sequence[str], group: type, command: str, description: str
                 ) -> Tuple[List[str], Any, List[str]]:
    """Return (further words, the flags `group` of a command, the words after "--") of `argv`."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = Parser(f"python -m planner {command}", description)
    add_flags(parser, group)
    switches = [f"--{f.name}" for f in fields(group) if f.default is False]
    # Otherwise `--json A B` would take A for the value of --json.
    flags, further = parser.parse_known_args(
        [f"{word}=true" if word in switches else word for word in words[:cut]])
    own = make_settings(group, [Source(vars(flags))])
    check_output(own)
    return further, own, words[cut + 1:]


def comparison_record(sides: Sequence[Side]) -> Dict[str, Any]:
    """Return the whole comparison as a dictionary for JSON."""
    return {"sides": [{**vars(side), "given": side.item, "profile": side.profile and asdict(
        side.profile)} for side in sides], "differences": differences(sides)}


def differences(sides: Sequence[Side]) -> Dict[str, Dict[str, Any]]:
    """Return {setting: {name of a side that knows it: its value}} of the settings that differ."""
    different = {}
    for name in dict.fromkeys(name for side in sides for name in side.settings):
        values = {side.name: side.settings[name] for side in sides if name in side.settings}
        first, *others = values.values()
        if name not in _NAMES_ONLY and any(value != first for value in others):
            different[name] = values
    return different


def plan_record(plan: Plan, request: Request) -> Dict[str, Any]:
    """Return a plan as a dictionary for JSON, with units in the keys."""
    job, config, settings, planning = plan.job, plan.job.config, request.settings, request.planning
    model, limit = planned_model(request), job.machine.memory_bytes
    family_names = family_of(model).own_names
    low, high = (plan.windows_per_second * (1 + error) for error in expected_error(plan))
    better = changes(plan)
    return {
        "title": planned_name(request), "config": settings.config,
        "model_name_or_path": None if planning.shape() or planning.config_json
        else settings.model_name_or_path,
        "model": {name: getattr(model, family_names.get(name, name)) for name in SHAPE},
        "pod_type": pod_of(job.ipus), "pod_note": pod_note(request, job),
        "packing_note": packing_note(request, job),
        "phase": job.phase.name,
        **_picked(plan, "fits", "free_bytes", "fullest_ipu", "windows_per_second",
                  "rows_per_second", "run_seconds", "update_seconds"),
        **_picked(job, "pack", "windows_per_row", "windows", "epochs", "updates"),
        "windows_per_second_low": low, "windows_per_second_high": high, "confidence": CONFIDENCE,
        "bubble_fraction": plan.schedule.bubble_fraction, "pipeline_steps": plan.schedule.steps,
        "step_seconds": plan.schedule.step_seconds, "update_parts_seconds": plan.parts(),
        "host_seconds": dict(zip(("call", "tokens", "low", "high"), (
            *host_parts(job, plan.efficiencies), *host_range(plan)))),
        "one_question_seconds": None if job.training else latency_seconds(plan),
        "suggestion": suggestion(plan, better),
        "suggestions": [{
            "flags": change.text, "settings": change.flags,
            **_picked(change.plan, "fits", "windows_per_second"),
            "text": describe(plan, change)} for change in better],
        "why_not": reasons(job, plan.memory), **bound_record(plan, better),
        "ipus": [{
            "ipu": ipu, "blocks": [name for name, at in job.layout.blocks() if at == ipu],
            "total_bytes": sum(parts.values()),
            "limit_bytes": limit, "fits": sum(parts.values()) <= limit,
            **{f"{name}_bytes": parts[name] for name in parts},
            "busy_seconds": plan.schedule.load[ipu] * job.micro_batches}
            for ipu, parts in plan.memory.items()],
        "stages": [{
            "stage": i, "ipu": work.ipu, "blocks": [block.name for block in blocks],
            **{f"{name}_seconds": seconds
               for name, seconds in {**work._asdict(), **terms}.items() if name != "ipu"}}
            for i, (work, (_, blocks), terms) in enumerate(zip(
                plan.schedule.stages, job.stages(), stage_composition(plan)))],
        "blocks": [{"name": name, "ipu": ipu, **_picked(
            block, "parameters", "forward_flops", "backward_flops", "saved_bytes", "output_bytes")}
            for block, (name, ipu) in zip(job.blocks, job.layout.blocks())],
        "machine": job.machine.name, "ipus_in_all": job.ipus, "instances": job.hosts,
        "ipus_per_replica": config.num_ipus(),
        **_picked(job, "hosts", "precision", "max_seq_length", "micro_batch_size", "micro_batches",
                  "rows_per_update"),
        **_picked(config, "layers_per_ipu", "gradient_accumulation_steps", "replication_factor",
                  "embedding_serialization_factor", "optimizer_state_offchip"),
        "ipu_config": config.values(), "efficiencies": dict(vars(plan.efficiencies))}


def _picked(thing: Any, *names: str) -> Dict[str, Any]:
    return {name: getattr(thing, name) for name in names}


def _recorded_settings(plan: Dict[str, Any]) -> Dict[str, Any]:
    return {**plan["ipu_config"], **plan["model"], **{name: plan[name] for name in (
        "pod_type", "model_name_or_path", "layers_per_ipu", "ipus_per_replica")},
        "ipu": plan["machine"].lower()}


def _measured(folder: Path) -> Dict[str, Any]:
    """Return what a run measured: in its log, as means over its points, and at its end."""
    from qa.run.log import LOG, read_log

    measured: Dict[str, Any] = {}
    lines = read_log(folder / LOG)
    for line in lines:
        measured.update({key: line[key] for key in (
            "device", "f1", "exact_match", "loss", "windows_per_second")
            if key in line and line.get("questions") != "test"})
        measured["steps"] = line["step"]
    points = [line for line in lines if line["event"] == "log"]
    for point in points:  # each of as many rows
        if point.get("rows_per_second"):
            point["windows_per_row"] = point["windows_per_second"] / point["rows_per_second"]
    for name in ("data_share", "step_share", "rest_share", "windows_per_row"):
        if points and all(name in point for point in points):
            measured[name] = sum(point[name] for point in points) / len(points)
    file = folder / "train_results.json"
    if file.is_file():
        results = read_json_object(file, str(file))
        measured.update({key: results[key] for key in (
            "windows_per_second", "steps", "train_seconds", "compile_seconds") if key in results})
    return measured
