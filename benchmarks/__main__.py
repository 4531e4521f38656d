"""Run benchmarks: each runs its sides in turn on this machine, and prints the ratio of their times.

    python -m benchmarks                             all that need no flag: an hour on 2 cores
    python -m benchmarks startup features            these two
    python -m benchmarks features --runs 5 --help    one, with its flags
"""
from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from importlib import import_module

from benchmarks.measure import machine

MODULE_OF = {  # the quickest first
    "startup": "answering", "features": "data", "input_pipeline": "data", "packing": "data",
    "answers": "answering", "deberta_attention": "host", "host_overhead": "host",
    "processes": "host", "busy": "host", "inference": "answering", "growth": "data",
    "training": "training"}
HIDDEN = {"quality": "quality",  # needs flags
          "trainer": "training", "process": "host"}  # what others run as a side


def main() -> None:
    argv = sys.argv[1:]
    names = [word for word in argv if not word.startswith("-")]
    if len(argv) == len(names) != 1:
        several(names or list(MODULE_OF))
        return
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module in {**MODULE_OF, **HIDDEN}.items():
        command = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in argv[:1]:
            function = getattr(import_module(f"benchmarks.{module}"), name)
            command.description = inspect.cleandoc(function.__doc__)
            add_flags(command, function)
    flags = vars(parser.parse_args(argv))
    del flags["name"]
    print(machine(), flush=True)
    function(**flags)


def add_flags(parser: argparse.ArgumentParser, function) -> None:
    """Add a flag for each argument of `function`, of its default's type; text if that is None."""
    for name, argument in inspect.signature(function).parameters.items():
        default = argument.default
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        elif default is inspect.Parameter.empty:
            parser.add_argument(f"--{name}", required=True)
        else:
            several = isinstance(default, tuple)
            kind = type(default[0] if several else default)
            parser.add_argument(f"--{name}", default=default, nargs="+" if several else None,
                                type=str if default is None else kind, help=f"default: {default}")


def several(names) -> None:
    """Run several benchmarks one after the other, each in a process of its own."""
    unknown = set(names) - set(MODULE_OF)
    if unknown:
        sys.exit(f"no benchmark without flags is called {', '.join(sorted(unknown))}; there are "
                 f"{', '.join(MODULE_OF)}")
    failed = []
    for name in names:
        print(f"== python -m benchmarks {name}", flush=True)
        if subprocess.run([sys.executable, "-m", "benchmarks", name]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"ended with an error: {', '.join(failed)}")


if __name__ == "__main__":
    main()
