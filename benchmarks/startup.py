"""Measure start-up: `train.py --help`, and infer.py until it has answered one question.

    python -m benchmarks.startup [--runs 5] [--layers 12]

The limits: --help may take 1.5 seconds, and 1.3 times as long as importing transformers' argument
parser. The answer may take 1.15 times as long as importing torch and transformers and loading the
same model (roberta-base's size, untrained) with its tokenizer.
"""
from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import alternate, compare, describe, machine
from benchmarks.questions import ROBERTA_BASE, made_up, train_tokenizer, write_model

LOAD = """
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
AutoTokenizer.from_pretrained({folder!r})
AutoModelForQuestionAnswering.from_pretrained({folder!r})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    given = parser.parse_args()

    def command(*words):
        return lambda: subprocess.run([sys.executable, *map(str, words)], check=True,
                                      capture_output=True)

    with tempfile.TemporaryDirectory() as name:
        question = next(made_up(1))
        write_model(Path(name), train_tokenizer(each["context"] for each in made_up(2000, 1)),
                    given.layers, **ROBERTA_BASE)
        seconds = alternate({
            "import HfArgumentParser": command(
                "-c", "from transformers import HfArgumentParser"),
            "train.py --help": command("train.py", "--help"),
            "import and load the model": command("-c", LOAD.format(folder=name)),
            "infer.py, one question": command(
                "infer.py", "--checkpoint", name, "--question", question["question"],
                "--context", question["context"],
                "--ipus_per_replica", 1, "--layers_per_ipu", -1),
        }, given.runs)
    print(f"start-up; the model has {given.layers} layers of roberta-base; {machine()}")
    for side, runs in seconds.items():
        describe(side, runs, 1, "runs")
    parser_import, help_text, load, answer = map(statistics.median, seconds.values())
    compare(1.5 / help_text, 1, "1.5 s over the time of train.py --help")
    compare(1.3 * parser_import / help_text, 1,
            "1.3 times the import of HfArgumentParser over that time")
    compare(1.15 * load / answer, 1, "1.15 times importing and loading over the time to the answer")


if __name__ == "__main__":
    main()
