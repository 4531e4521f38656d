"""Plans every combination of some flags, and measures them with --run.

The results are written to a CSV file, from which an interrupted sweep continues.
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
from qa.planning.flags import JobSettings
from qa.settings import parse_train

USAGE = (
    'sweep --layers_per_ipu "0 4 4 4" "3 3 3 3" --micro_batch_size 1 2 4 [--run] [--steps N] '
    '[--timeout SECONDS] [--output FILE] -- [train.py flags]')
COLUMNS = ("setting", "fits", "planned_windows_per_second", "measured_windows_per_second",
           "bubble_percent", "fullest_mib", "status")
# The flags of sweep itself, and the number of values that each takes.
OWN = {"--run": 0, "--steps": 1, "--output": 1, "--timeout": 1, "--help": 0}
TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def run_sweep(argv: Sequence[str]) -> int:
    """Run the sweep that `argv` asks for (see USAGE), print its table and return 0.

    Rows are written as soon as they are known. Combinations that the --output file already holds
    are skipped. If a combination is not possible or its run fails, the status in its row says why.
    Raises UsageError for a wrong command line, RunError if the file cannot be written.
    """
    swept, own, common = parse(argv)
    if "--help" in own:
        print(USAGE)
        return 0
    output = Path(own.get("--output", ["sweep.csv"])[0])
    measure, steps, timeout = ("--run" in own, _number(own, "--steps", 20),
                               _number(own, "--timeout", 3600))
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
    """Split the command line and return (swept, own, common).

    swept: {flag: values to try}. own: {flag of sweep itself: values}. common: the words after "--",
    which are flags of all combinations. Raises UsageError for a value without a flag, a wrong
    number of values, or nothing to sweep.
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
    """Return the flags of every combination, as words of a command line.

    A combination has one value of each swept flag. A value such as "0 4 4 4" becomes four words.
    """
    return [[word for name, value in zip(swept, values) for word in [name, *value.split()]]
            for values in itertools.product(*swept.values())]


def plan_row(setting: str, flags: Sequence[str]) -> Dict[str, Any]:
    """Return the row of one combination with its plan, or with the error message as its status."""
    from qa.planning.job import planned

    row = {**dict.fromkeys(COLUMNS, ""), "setting": setting, "status": "planned"}
    try:
        plan = planned(*parse_train(list(flags), JobSettings, program="sweep", description=USAGE))
    except (UsageError, RunError) as error:
        return {**row, "status": "refused: " + " ".join(str(error).split())}
    return {
        **row, "fits": "yes" if plan.fits else "no",
        "planned_windows_per_second": f"{plan.windows_per_second:.1f}",
        "bubble_percent": f"{100 * plan.schedule.bubble_fraction:.1f}",
        "fullest_mib": f"{max(sum(parts.values()) for parts in plan.memory.values()) / 2**20:.0f}"}


def measure_run(flags: Sequence[str], steps: int, timeout: int) -> Dict[str, str]:
    """Run train.py for `steps` steps on synthetic data, in a separate process.

    Returns the columns to update: the status and, if the run succeeded, the windows/s of its last
    log line. timeout: in seconds.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(TRAIN), *flags, "--synthetic_data", "--max_steps", str(steps),
            "--max_eval_samples", "1", "--logging_steps", str(max(1, steps // 2)),
            "--output_dir", folder + "/run"]
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
    """Return the rows of an earlier sweep, [] if there is no such file.

    Raises UsageError if the file was not written by a sweep.
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
    """Write all rows to `path` atomically, so that an interrupted sweep leaves a complete file.

    Raises RunError if the file cannot be written.
    """
    with writing(f"--output {path}"), written_whole(path) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def sweep_table(rows: Sequence[Dict[str, Any]]) -> str:
    """Return the rows as a text table, the fastest first.

    The order is by measured windows/s where there is one, else by planned windows/s. Settings that
    do not fit or are not possible come last.
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
    """Return the value of a flag of sweep itself. Raises UsageError unless it is at least 1."""
    value = own.get(name, [str(default)])[0]
    if not value.isdigit() or int(value) < 1:
        raise UsageError(f"{name} {value}: it should be a whole number of at least 1")
    return int(value)
