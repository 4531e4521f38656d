"""Run all benchmarks, one after the other, each in a process of its own.

Each benchmark prints its ratios, their spread and the limits that the ratios have to reach.

    python -m benchmarks                       about an hour on 2 cores; needs `accelerate`
    python -m benchmarks startup features      only these two
"""
from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.measure import machine

COMMANDS = {  # the quickest first
    "startup": ["--runs", "5"],
    "features": ["--runs", "5"],
    "input_pipeline": [],
    "answers": [],
    "host_overhead": [],
    "processes": [],
    "busy": [],
    "packing": [],
    "inference": ["--runs", "3"],
    "million_windows": [],
    "growth": [],
    "training": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(COMMANDS)}")
    names = parser.parse_args().names or list(COMMANDS)
    unknown = set(names) - set(COMMANDS)
    if unknown:
        parser.error(
            f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(COMMANDS)}")
    print(f"{machine()}\n", flush=True)
    failed = []
    for name in names:
        print(f"== python -m benchmarks.{name} {' '.join(COMMANDS[name])}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *COMMANDS[name]]).returncode:
            failed.append(name)
        print(flush=True)
    if failed:
        sys.exit(f"ended with an error: {', '.join(failed)}")


if __name__ == "__main__":
    main()
