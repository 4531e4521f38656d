"""The planner's own flags, beside those of train.py."""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Dict, Optional

from ipu_options.errors import UsageError
from ipu_options.flags import Settings, flag

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "vocab_size")


@dataclass
class PlanSettings(Settings):
    """Planning."""

    ipu: str = flag("mk2", "generation of the IPU", choices=("mk2", "bow"))
    json: bool = flag(False, "print the plan as one JSON object, units in the names")
    plot: Optional[str] = flag(None,
                               "draw the plan: timeline, memory and split, as .png, .svg or .pdf")
    config_json: Optional[str] = flag(
        None, "plan the model of this config.json, without weights or tokenizer")
    hidden_size: Optional[int] = flag(None, "plan a model of this width, without any file",
                                      type=int, min=1)
    num_hidden_layers: Optional[int] = flag(None, "the number of its encoder layers", type=int,
                                            min=1)
    num_attention_heads: Optional[int] = flag(None, "the number of its attention heads", type=int,
                                              min=1)
    intermediate_size: Optional[int] = flag(None, "the width of its feed-forward layers", type=int,
                                            min=1)
    vocab_size: Optional[int] = flag(None, "the number of its tokens", type=int, min=1)
    windows_per_row: Optional[float] = flag(
        None, "real windows in a packed row (default: estimated)", type=float, min=1)
    train_windows: Optional[int] = flag(
        None, "windows of an epoch (default: known for squad and squad_v2)", type=int, min=1)
    calibration: Optional[str] = flag(None, "efficiencies to plan with, as `calibrate` writes them")
    fit: bool = flag(False, "also print how far the planner is from each published run")

    def shape(self) -> Dict[str, int]:
        """The sizes of the model that were given, by their names in a config.json."""
        return {name: getattr(self, name) for name in SHAPE if getattr(self, name) is not None}


@dataclass
class TrainPlanSettings(PlanSettings):
    """Planning, with --plan."""

    plan: bool = flag(False, "print what the run would take on IPUs, and do nothing else")

    def refuse_without_plan(self) -> None:
        """Raise UsageError for a flag of the planner on a command line that does not plan."""
        for field in fields(PlanSettings):
            if field.name in self.sources:
                raise UsageError(f"--{field.name} does nothing without --plan: add it")


@dataclass
class SearchSettings(Settings):
    """Search."""

    ipus: Optional[int] = flag(None, "IPUs to use (default: those of the pod)", type=int)
    write: Optional[str] = flag(None, "write the best as an ipu_config.json")
    keep: int = flag(5, "settings to show", min=1)


@dataclass
class CalibrateSettings(Settings):
    """Calibration."""

    measured: Optional[str] = flag(
        None, "what the run with these flags reached, as windows_per_second=N")
    profile: Optional[str] = flag(None, "its PopVision profile: the code's size is taken from it")
    show: bool = flag(False, "print the published runs and how far the planner is from each")
    refit_published: bool = flag(False, "fit to the published runs and print the numbers")


@dataclass
class ReportSettings(Settings):
    """The profile."""

    profile: str = flag("", "a profile.pop, or the folder that --profile_dir named",
                        positional=True)
