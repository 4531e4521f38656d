"""Plans, and measures if asked to, every combination of some flags, into a CSV that a later call
goes on from.
"""
from __future__ import annotations

import csv
import itertools
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from ipu_options.errors import RunError, UsageError
from ipu_options.files import writing, written_whole
from ipu_options.plan.text import table
from qa.planning.flags import PlanSettings
from qa.settings import parse_train

USAGE = (
    'sweep --layers_per_ipu "0 4 4 4" "3 3 3 3" --micro_batch_size 1 2 4 [--run] [--steps N] [--timeout SECONDS] '
    '[--output FILE] -- [train.py flags]')
COLUMNS = ("setting", "fits", "planned_windows_per_second", "measured_windows_per_second",
           "bubble_percent", "fullest_mib", "status")
OWN = {"--run": 0, "--steps": 1, "--output": 1, "--timeout": 1, "--help": 0}
TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def run_sweep(argv: Sequence[str]) -> int:
    """Sweep as USAGE says. A combination that cannot be, or a run that fails, is a row whose status
    says why.

    Rows are written as they come; a call with the same --output skips the combinations that it
    holds already.
    """
    swept, own, common = parse(argv)
    if "--help" in own:
        print(USAGE)
        return 0
    output = Path(own.get("--output", ["sweep.csv"])[0])
    measure, steps, timeout = "--run" in own, _number(own, "--steps", 20), _number(
        own, "--timeout", 3600)
    rows = read_rows(output)
    done = {
        row["setting"] for row in rows
        if row["measured_windows_per_second"] or not measure or row["status"] != "planned"}
    for flags in combinations(swept):
        setting = " ".join(flags)
        if setting in done:
            continue
        row = plan_row(setting, flags + list(common))
        if measure and row["status"] == "planned":
            row.update(measure_run(flags + list(common), steps, timeout))
        rows = [old for old in rows if old["setting"] != setting] + [row]
        write_rows(output, rows)
        print(f"{setting}: {row['status']}", file=sys.stderr)
    print(sweep_table(rows) + f"\n{len(rows)} rows in {output}")
    return 0


def parse(argv: Sequence[str]) -> Tuple[Dict[str, List[str]], Dict[str, List[str]], List[str]]:
    """Split the command line into swept flags with their values, sweep's own flags, and the flags
    common to all.
    """
    argv, common = list(argv), []
    if "--" in argv:
        cut = argv.index("--")
        argv, common = argv[:cut], argv[cut + 1:]
    flags: Dict[str, List[str]] = {}
    for word in argv:
        if word.startswith("--"):
            name = word
            flags[name] = []
        elif not flags:
            raise UsageError(f"{word}: a value without a flag; usage: {USAGE}")
        else:
            flags[name].append(word)
    own = {name: values for name, values in flags.items() if name in OWN}
    swept = {name: values for name, values in flags.items() if name not in OWN}
    for name, values in own.items():
        if len(values) != OWN[name]:
            raise UsageError(
                f"{name} takes {OWN[name]} value{'s' * (OWN[name] != 1)}; usage: {USAGE}")
    empty = [name for name, values in swept.items() if not values]
    if empty or not (swept or "--help" in own):
        raise UsageError(
            f"{empty[0] if empty else 'sweep'}: give the values to try; usage: {USAGE}")
    return swept, own, common


def combinations(swept: Dict[str, List[str]]) -> List[List[str]]:
    """The flags of every combination: one value of each swept flag; "0 4 4 4" is one value of four
    words.
    """
    return [[word for name, value in zip(swept, values) for word in [name, *value.split()]]
            for values in itertools.product(*swept.values())]


def plan_row(setting: str, flags: Sequence[str]) -> Dict[str, Any]:
    """The row of one combination, planned; its status is the refusal where it cannot be."""
    from qa.planning.job import planned

    row = {**dict.fromkeys(COLUMNS, ""), "setting": setting, "status": "planned"}
    try:
        plan = planned(*parse_train(list(flags), PlanSettings, program="sweep", description=USAGE))
    except (UsageError, RunError) as error:
        return {**row, "status": "refused: " + " ".join(str(error).split())}
    return {
        **row, "fits": "yes" if plan.fits else "no",
        "planned_windows_per_second": f"{plan.windows_per_second:.1f}",
        "bubble_percent": f"{100 * plan.bubble_fraction:.1f}",
        "fullest_mib": f"{max(sum(parts.values()) for parts in plan.memory.values()) / 2**20:.0f}"}


def measure_run(flags: Sequence[str], steps: int, timeout: int) -> Dict[str, str]:
    """Run train.py for so many steps on synthetic data in a process of its own; windows/s of its
    last log line.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(TRAIN), *flags, "--synthetic_data", "--max_steps",
            str(steps), "--max_eval_samples", "1", "--logging_steps",
            str(max(1, steps // 2)), "--output_dir", folder + "/run"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout, text=True)
        except subprocess.TimeoutExpired:
            return {"status": f"failed: no result after {timeout} s"}
    speeds = re.findall(r"windows/s ([\d.]+)", done.stdout + done.stderr)
    if done.returncode or not speeds:
        lines = done.stderr.strip().splitlines() or ["no output"]
        return {"status": f"failed ({done.returncode}): {lines[-1]}"}
    return {
        "measured_windows_per_second": speeds[-1],
        "status": f"measured in {time.perf_counter() - begin:.0f} s"}


def read_rows(path: Path) -> List[Dict[str, str]]:
    """The rows of an earlier sweep; none if the file is not there. UsageError for a file that is
    not a sweep's.
    """
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UsageError(
                f"--output {path} is not a CSV that sweep has written: name another file")
        return list(reader)


def write_rows(path: Path, rows: Sequence[Dict[str, Any]]) -> None:
    """Write all rows to `path`, the whole file or nothing, so that an interrupted sweep leaves a
    whole one.
    """
    with writing(f"--output {path}"), written_whole(path) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def sweep_table(rows: Sequence[Dict[str, Any]]) -> str:
    """The rows as a table, the fastest first: measured before planned, what does not fit or was
    refused last.
    """
    def key(row):
        return (
            row["fits"] != "yes",
            -float(row["measured_windows_per_second"] or row["planned_windows_per_second"] or 0))
    head = ["setting", "fits", "planned", "measured", "bubbles", "fullest", "status"]
    return table(head, [[
        row["setting"], row["fits"], row["planned_windows_per_second"],
        row["measured_windows_per_second"], row["bubble_percent"] and row["bubble_percent"] + " %",
        row["fullest_mib"] and row["fullest_mib"] + " MiB", row["status"]]
                        for row in sorted(rows, key=key)], left=(0, 6))


def _number(own: Dict[str, List[str]], name: str, default: int) -> int:
    value = own.get(name, [str(default)])[0]
    if not value.isdigit() or int(value) < 1:
        raise UsageError(f"{name} {value}: it should be a whole number of at least 1")
    return int(value)
