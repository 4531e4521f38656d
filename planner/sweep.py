"""Plans every combination of some flags, and measures them with --run."""
from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence, Tuple

from planner.flags import SHAPE, JobSettings, SweepSettings, flag_words
from planner.present import present
from planner.sides import THIS_HOST, Side, parse_around
from planner.text import ranking
from planner.views import count, mib
from qa.settings import parse_train, train_flags
from runtime.errors import RunError, UsageError, counted
from runtime.files import writing, written_whole

USAGE = (
    'sweep --layers_per_ipu "0 4 4 4" "3 3 3 3" --micro_batch_size 1 2 4 [--run] [--steps N] '
    '[--timeout SECONDS] [--output FILE] [--html FILE] -- [train.py flags]')
COLUMNS = ("setting", "job", "fits", "planned_windows_per_second", "measured_windows_per_second",
           "measured_on", "bubble_percent", "fullest_mib", "status")
# Flags of plans that train.py refuses without --plan. The others would ask it for another model.
OF_PLANS = set(JobSettings().values()) - {"config_json", *SHAPE}
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def run_sweep(argv: Sequence[str]) -> int:
    """Plan every combination of some flags, and measure them with --run; return the exit status.

    It is 1 if all were refused or failed. What --output holds as measured is not run again.
    """
    swept, sweeping, common = parse(argv)
    combinations = [dict(zip(swept, values)) for values in itertools.product(*swept.values())]
    _check_flags([_words(values) + common for values in combinations])
    output = Path(sweeping.output)
    rows, tried = {(row["setting"], row["job"]): row for row in read_rows(output)}, []
    for values in combinations:
        words = _words(values)
        side, row = plan_row(words, common)
        key = row["setting"], row["job"]
        earlier = rows.get(key)
        if earlier and earlier["status"].startswith("measured"):
            row = earlier
        elif sweeping.run and row["fits"] == "yes":
            print(f"{row['setting']}: measuring", file=sys.stderr, flush=True)
            row.update(measure_run(words + common, sweeping.steps, sweeping.timeout))
        if row != earlier:
            rows[key] = row
            write_rows(output, rows.values())
            if sweeping.run:
                print(f"{row['setting']}: {row['status']}", file=sys.stderr)
        tried.append((values, side, row))
    tried.sort(key=lambda one: (one[2]["fits"] != "yes", -_speed(one[2])))
    tried = [(values, side.with_row(str(place), row), row)
             for place, (values, side, row) in enumerate(tried, 1)]
    others = f", {len(rows) - len(tried)} of other jobs" if len(rows) > len(tried) else ""
    present([side for _, side, _ in tried], sweeping, "Sweep", text=_answer(tried) +
            f"\n{counted(len(rows), 'row')} in {output}{others}", ranking=ranking([
                (side.name, {name[2:]: value.split() for name, value in values.items()},
                 _cells(row))
                for values, side, row in tried]),
            notes=[f"{side.name}: {row['status']}" for _, side, row in tried if _failed(row)])
    return int(all(_failed(row) for _, _, row in tried))


def parse(argv: Sequence[str]) -> Tuple[Dict[str, List[str]], SweepSettings, List[str]]:
    """Return ({flag: values to try}, sweep's own flags, the words after "--")."""
    further, sweeping, common = parse_around(
        argv, SweepSettings, "sweep", "Plan, and with --run measure, every combination of some "
        f"flags of train.py. {USAGE}")
    swept: Dict[str, List[str]] = {}
    name = "sweep"
    for word in further:
        if word in swept:
            raise UsageError(f"{word} is swept twice: give all its values at once")
        if word.startswith("--"):
            name, swept[word] = word, []
        elif not swept:
            raise UsageError(f"{word}: a value without a flag; usage: {USAGE}")
        else:
            swept[name].append(word)
    for flag in swept or [name]:
        if not swept.get(flag):
            raise UsageError(f"{flag}: give the values to try; usage: {USAGE}")
    return swept, sweeping, common


def _words(combination: Dict[str, str]) -> List[str]:
    return [word for name, value in combination.items() for word in (name, *value.split())]


def _check_flags(combinations: Sequence[List[str]]) -> None:
    """Raise UsageError, before any work, for flags that are wrong in each of the combinations."""
    for words in combinations:
        try:
            parse_train(words, JobSettings, program="sweep", description=USAGE)
            return
        except UsageError as error:
            wrong = error
    raise wrong


def plan_row(words: List[str], common: List[str]) -> Tuple[Side, Dict[str, Any]]:
    """Return a combination as a side, and its row; without a plan, the row's status says why."""
    setting = " ".join(words)
    row = {**dict.fromkeys(COLUMNS, ""), "setting": setting, "status": "planned"}
    try:
        side = Side.from_flags("", words + common, item=setting)
    except (UsageError, RunError) as error:
        return Side("", setting, "flags", setting, {}), {
            **row, "status": "refused: " + " ".join(str(error).split())}
    plan = side.plan
    known = [side.settings, plan["windows_per_row"], plan["windows"], plan["efficiencies"]]
    return side, {
        **row, "job": hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12],
        "fits": "yes" if plan["fits"] else "no",
        "planned_windows_per_second": f"{plan['windows_per_second']:.1f}",
        "bubble_percent": f"{100 * plan['bubble_fraction']:.1f}",
        "fullest_mib": mib(plan["ipus"][plan["fullest_ipu"]]["total_bytes"])}


def measure_run(words: Sequence[str], steps: int, timeout: int) -> Dict[str, str]:
    """Run train.py on synthetic data, for at most `timeout` seconds; return the row's columns."""
    from qa.run.log import SYNTHETIC_LOG, read_log

    flags = train_flags(words, JobSettings, program="sweep", description=USAGE)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        flags.update(synthetic_data=True, max_steps=steps, max_eval_samples=1,
                     logging_steps=max(1, steps // 2), output_dir=folder + "/run")
        command = [sys.executable, str(TRAIN), *flag_words(
            {name: value for name, value in flags.items() if name not in OF_PLANS})]
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout, text=True)
        except subprocess.TimeoutExpired:
            return {"status": f"failed: no result after {timeout} s"}
        log = read_log(Path(folder, "run", SYNTHETIC_LOG))
    speeds = [line["windows_per_second"] for line in log if line["event"] == "log"]
    if done.returncode or not speeds:
        lines = done.stderr.strip().splitlines() or ["no output"]
        return {"status": f"failed ({done.returncode}): {lines[-1]}"}
    device = THIS_HOST if log[0]["device"] == "host" else log[0]["device"]
    return {
        "measured_windows_per_second": f"{speeds[-1]:.1f}", "measured_on": device,
        "status": f"measured on {device} in {time.perf_counter() - begin:.0f} s"}


def read_rows(path: Path, flag: str = "--output") -> List[Dict[str, str]]:
    """Return the rows of an earlier sweep, [] without the file. Raises UsageError if it is none."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UsageError(f"{flag} {path} is not a CSV that sweep has written: name another "
                             "file")
        return list(reader)


def measured_runs(measured: str) -> List[Tuple[Dict[str, Any], float]]:
    """Return (flags beside the command's, windows/s) of each run of IPUs that --measured gives."""
    source, path = f"--measured {measured}".strip(), Path(measured)
    name, _, value = measured.partition("=")
    with suppress(ValueError):
        if name == "windows_per_second" and 0 < float(value) < float("inf"):
            return [({}, float(value))]
    if path.suffix != ".csv":
        raise UsageError(f"{source}: give what the run reached, as --measured "
                         "windows_per_second=1234, or a table of `sweep --run`")
    if not path.is_file():
        raise UsageError(f"{source}: no such file; `python -m planner sweep --run --output {path}` "
                         "writes one")
    rows = read_rows(path, "--measured")
    runs = [(row["setting"].split(), float(row["measured_windows_per_second"]))
            for row in rows if row["measured_on"] == "IPU"]
    if not runs:
        raise UsageError(f"{source}: no row of its {len(rows)} was measured on an IPU; "
                         "`sweep --run` on an IPU host measures them")
    return [(train_flags(words, JobSettings, program="calibrate", description=""), speed)
            for words, speed in runs]


def write_rows(path: Path, rows: Iterable[Dict[str, Any]]) -> None:
    """Write all rows to `path`: an interrupted sweep leaves a complete file."""
    with writing(f"--output {path}"), written_whole(path) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _failed(row: Dict[str, Any]) -> bool:
    return row["status"].startswith(("refused", "failed"))


def _speed(row: Dict[str, Any]) -> float:
    return float(row["measured_windows_per_second"] or row["planned_windows_per_second"] or 0)


def _answer(tried: Sequence[Tuple[Any, Side, Dict[str, Any]]]) -> str:
    _, side, row = tried[0]
    if row["fits"] != "yes" or _failed(row):
        return "None of the combinations fits and runs."
    how = f"measured on {row['measured_on']}" if row["measured_on"] else "planned"
    return f"1 is the fastest of {len(tried)}, {count(_speed(row))} windows/s ({how}): {side.title}"


def _cells(row: Dict[str, Any]) -> Dict[str, str]:
    return {"fits": row["fits"], "planned": row["planned_windows_per_second"],
            "measured": row["measured_windows_per_second"], "on": row["measured_on"],
            "bubbles": row["bubble_percent"] and f"{row['bubble_percent']} %",
            "fullest\nMiB": row["fullest_mib"], "status": re.split("[ :]", row["status"])[0]}
