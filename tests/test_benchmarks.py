"""The benchmarks' runner: whose time counts, ratios and limits, and a flag for each argument."""
from argparse import ArgumentParser
from importlib import import_module

import pytest

from benchmarks.__main__ import HIDDEN, MODULE_OF, add_flags
from benchmarks.measure import run


def test_sides_run_in_turn_and_the_last_is_compared_with_each_other(capsys):
    calls, times = [], {"plain": iter([9.0, 4.0, 6.0]), "ours": iter([9.0, 2.0, 3.0])}

    def side(name):
        calls.append(name)
        return next(times[name])

    run({name: lambda name=name: side(name) for name in times}, {"plain": 2.5}, runs=2, amount=10,
        unit="windows")
    printed = capsys.readouterr().out
    assert calls == ["plain", "ours"] * 3
    assert "5.000 s (4.000 .. 6.000)" in printed and "2.0 windows/s" in printed  # 10 in 5 s
    assert "ours: 2.00 times as fast as plain (2.00 .. 2.00); at least 2.5: MISSED" in printed


@pytest.mark.parametrize("name, module", {**MODULE_OF, **HIDDEN}.items())
def test_every_benchmark_is_there_and_has_flags(name, module):
    parser = ArgumentParser()
    add_flags(parser, getattr(import_module(f"benchmarks.{module}"), name))
    flags = ["--model", "m", "--train_file", "f", "--output_dir", "o"]
    required = {"trainer": flags, "quality": [*flags, "--validation_file", "v"]}
    parser.parse_args(required.get(name, []))
