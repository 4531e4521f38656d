"""The planner's own flags, which come in addition to those of train.py."""
from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from ipu_options.config import POD_IPUS, IPUConfig
from planner.phase import INFERENCE, TRAINING, Phase
from qa.settings import TrainSettings, check_writable, refuse_several_hosts
from runtime.errors import UsageError
from runtime.flags import Settings, flag

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "vocab_size")
# Sizes of well-known checkpoints, from their config.json on the hub. With these, planning such a
# checkpoint needs no network.
MODELS = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))


@dataclass
class JobSettings(Settings):
    """Planning."""

    ipu: str = flag("mk2", "generation of the IPU", choices=("mk2", "bow"))
    config_json: Optional[str] = flag(
        None, "plan the model of this config.json, without weights or tokenizer")
    hidden_size: Optional[int] = flag(
        None, "width of the model to plan, in place of the configuration's", type=int, min=1,
        max=65_536)
    num_hidden_layers: Optional[int] = flag(
        None, "number of encoder layers of the model to plan", type=int, min=1, max=256)
    num_attention_heads: Optional[int] = flag(
        None, "number of attention heads of the model to plan", type=int, min=1, max=1024)
    intermediate_size: Optional[int] = flag(
        None, "width of the feed-forward layers of the model to plan", type=int, min=1, max=262_144)
    vocab_size: Optional[int] = flag(
        None, "vocabulary size of the model to plan", type=int, min=1, max=10_000_000)
    windows_per_row: Optional[float] = flag(
        None, "mean number of real windows in a packed row (default: estimated)", type=float, min=1)
    train_windows: Optional[int] = flag(
        None, "windows of an epoch (default: known for squad and squad_v2)", type=int, min=1,
        max=10 ** 12)
    eval_windows: Optional[int] = flag(
        None, "windows to answer (default: about those of squad and squad_v2)", type=int, min=1,
        max=10 ** 12)
    calibration: Optional[str] = flag(
        None, "file of the efficiencies to plan with, as `calibrate` writes it")

    def shape(self) -> Dict[str, int]:
        """Return the given sizes of the model by their names in a config.json."""
        return {name: getattr(self, name) for name in SHAPE if getattr(self, name) is not None}


@dataclass
class PhaseFlags(Settings):
    """The pipeline."""

    inference: bool = flag(
        False, "the pipeline of evaluation and infer.py in place of the training's")

    @property
    def phase(self) -> Phase:
        return INFERENCE if self.inference else TRAINING


@dataclass
class WriteFlags(Settings):
    """The pipeline's file."""

    write: Optional[str] = flag(None, "write the pipeline to this ipu_config.json")


@dataclass
class OutputFlags(Settings):
    """The output."""

    json: bool = flag(False, "print JSON, with units in the names")
    plot: Optional[str] = flag(None, "draw memory and time to this .png, .svg or .pdf file")
    html: Optional[str] = flag(
        None, "write memory and time to this .html file, which needs no network")
    legend: bool = flag(False, "also explain every column and bar")


@dataclass
class PlanSettings(OutputFlags, PhaseFlags, JobSettings):
    """Planning."""

    fit: bool = flag(False, "also print the planner's error on each published run")


class Request(NamedTuple):
    """What to plan: the settings of a run, and which of its pipelines. flags: their values."""

    settings: TrainSettings
    ipu_config: IPUConfig
    planning: JobSettings
    phase: Phase = TRAINING
    flags: Dict[str, Any] = {}


@dataclass
class TrainPlanSettings(PlanSettings):
    """Planning, with --plan."""

    plan: bool = flag(False, "print the planned memory and time on IPUs, and do nothing else")

    def refuse_without_plan(self, settings: TrainSettings) -> None:
        """Raise UsageError for what can only be planned: planner's flags, a pod of many hosts."""
        for field in fields(PlanSettings):
            if field.name in self.sources:
                raise UsageError(f"--{field.name} does nothing without --plan: add it")
        refuse_several_hosts(settings)


@dataclass
class SearchSettings(WriteFlags, OutputFlags, PhaseFlags):
    """Search."""

    ipus: Optional[int] = flag(
        None, "IPUs to use (default: those of the pod)", type=int,
        choices=tuple(2 ** power for power in range(max(POD_IPUS.values()).bit_length())))
    keep: int = flag(5, "number of settings to show", min=1)


@dataclass
class CalibrateSettings(Settings):
    """Calibration."""

    measured: Optional[str] = flag(
        None, "measured throughput of the run with these flags, as windows_per_second=N, or the "
        "table of `sweep --run`: a file.csv")
    profile: Optional[str] = flag(
        None, "PopVision profile of such a run, from which the size of the code is taken")
    show: bool = flag(
        False, "print the planner's error on each published run, with cross-validation")
    refit_published: bool = flag(
        False, "fit to the published runs and print the efficiencies")
    json: bool = flag(False, "print what it finds as JSON, with units in the names")


@dataclass
class ReportSettings(Settings):
    """The profile."""

    profile: str = flag("", "a profile.pop, or the folder that was given to --profile_dir",
                        positional=True)


@dataclass
class SweepSettings(Settings):
    """The sweep's own flags."""

    run: bool = flag(False, "measure each combination by a short run of train.py on synthetic data")
    steps: int = flag(20, "steps of such a run", min=1)
    timeout: int = flag(3600, "seconds after which such a run has failed", min=1)
    output: str = flag("sweep.csv", "table of the results, from which a later call goes on")
    html: Optional[str] = flag(
        None, "write the table and all plans side by side to this .html file, which needs no "
        "network")


@dataclass
class ExploreSettings(PhaseFlags):
    """The page."""

    port: int = flag(8050, "port of the page on this machine; 0: any that is free", min=0,
                     max=65_535)
    write: str = flag("ipu_config.json", "file that the page's button Save writes")


@dataclass
class CompareSettings(OutputFlags, PhaseFlags):
    """The comparison."""


def check_output(output: Settings) -> None:
    """Raise UsageError unless each file that a command's flags name can be written: before work."""
    for name, endings in {"plot": (".png", ".svg", ".pdf"), "html": (".html", ".htm"),
                          "write": "", "output": ""}.items():
        path = getattr(output, name, None)
        if path is not None:
            if not path.lower().endswith(endings):
                raise UsageError(f"--{name} {path}: name a {' or '.join(endings)} file")
            check_writable(Path(path), f"--{name} {path}")
    if getattr(output, "html", None) and find_spec("plotly") is None:
        raise UsageError("--html needs plotly, which is not installed: "
                         "pip install -r requirements-pages.txt")


def value_words(value: Any) -> List[str]:
    words = value if isinstance(value, (list, tuple)) else [value]
    return [str(word).lower() if isinstance(word, bool) else
            "not set" if word is None else str(word) for word in words]


def flag_words(settings: Dict[str, Any]) -> List[str]:
    """Return settings by flag as the words of a command line."""
    return [word for name, value in settings.items()
            for word in (f"--{name}", *(value_words(value) if value is not True else ()))]


def value_text(value: Any) -> str:
    """Return a setting's value as it is written on a command line; None as "not set"."""
    return " ".join(value_words(value))


def flags_text(settings: Dict[str, Any]) -> str:
    """Return settings by flag as text of a command line."""
    return " ".join(map(shlex.quote, flag_words(settings)))
