"""The planner's own flags, added to train.py's."""
from __future__ import annotations

import argparse

from ipu_options.errors import UsageError

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """What `train.py --plan` and `python -m ipu_options plan` understand besides the flags of train.py, whose --trace writes the
    planned timeline when planning."""
    group = parser.add_argument_group("Planning")
    group.add_argument("--ipu", choices=("mk2", "bow"), help="generation of the IPU (default: mk2)")
    group.add_argument("--json", action="store_true", help="print the plan as one JSON object, units in the names")
    group.add_argument("--plot", metavar="FILE", help="draw the plan: timeline, memory and split, as .png, .svg or .pdf")
    group.add_argument("--config_json", metavar="FILE", help="plan the model of this config.json, without weights or tokenizer")
    for name in SHAPE:
        group.add_argument("--" + name, type=int, metavar="N", help="plan a model of this shape, without any file")
    group.add_argument("--windows_per_row", type=float, metavar="X", help="real windows in a packed row (default: estimated)")
    group.add_argument("--train_windows", type=int, metavar="N", help="windows of an epoch (default: known for squad and squad_v2)")
    group.add_argument("--calibration", metavar="FILE", help="efficiencies to plan with, as `calibrate` writes them")
    group.add_argument("--fit", action="store_true", help="also print how far the planner is from each published run")


def check_plan_flags(given: argparse.Namespace) -> None:
    """UsageError for a flag of the planner on a command line that does not plan."""
    if not hasattr(given, "plan"):
        for name in ("ipu", "json", "plot", "config_json", "windows_per_row", "train_windows", "calibration", "fit", *SHAPE):
            if hasattr(given, name):
                raise UsageError(f"--{name} does nothing without --plan: add it")
