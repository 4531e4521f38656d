"""Fits the efficiencies to published runs, or to a run of the user's own.

Three numbers are fitted to few runs, sometimes to one, so that the runs alone do not determine
them. Each fit therefore has a prior, centred on its starting values. It minimises the sum of two
terms: the squared errors of the logarithm of the predicted throughput, in units of NOISE (for the
user's own run, OWN_NOISE), and the squared changes of the logarithms of the three numbers, in units
of FREEDOM. This is a maximum a posteriori estimate with log-normal noise and prior.
"""
from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ipu_options.config import IPUConfig
from ipu_options.errors import UsageError
from ipu_options.files import write_json, writing
from ipu_options.plan.count import CountedBlock
from ipu_options.plan.job import Job
from ipu_options.plan.machine import MACHINES, Efficiencies
from ipu_options.plan.planner import make_plan

FITTED = ("peak_utilisation", "matmul_cycles", "call_seconds")
# Start of the fit to published runs: round numbers of the right order of magnitude, which is all
# that is known without a run. 2/5 of the peak rate, some 20,000 cycles (15 microseconds) around
# each matrix multiplication, and 60 ms of host and Python time per call.
START = Efficiencies(0.40, 22e3, 0.060, source="round numbers")
# Standard deviations of logarithms, that is, relative errors.
NOISE = 0.10      # of a published throughput: the same job ran at 1,317 and at 1,391 windows/s
FREEDOM = 0.25    # of the prior of each fitted number
OWN_NOISE = 0.02  # of the throughput that the user measured
PUBLISHED = Path(__file__).with_name("published_runs.json")

Counter = Callable[..., Sequence[CountedBlock]]


class PublishedRun(NamedTuple):
    """A public run.

    use: "fit" (the efficiencies are fitted to it), "held out" (predicted only), "at least" (its
    throughput is a lower bound) or "fits" (only known to fit). windows_per_second: the published
    throughput, None if there is none. source: where it is published.
    """

    name: str
    use: str
    windows_per_second: Optional[float]
    source: str
    job: Job


def published_runs(count: Counter) -> List[PublishedRun]:
    """Return the runs of published_runs.json.

    count(name of the model, IPUConfig, max_seq_length, micro_batch_size) must return the counted
    blocks of a run.
    """
    runs = []
    for run in json.loads(PUBLISHED.read_text(encoding="utf-8"))["runs"]:
        config = IPUConfig(**run["ipu_config"])
        blocks = count(run["model"], config, run["max_seq_length"], run["micro_batch_size"])
        layout = config.layout(sum(block.kind == "layer" for block in blocks))
        job = Job(tuple(blocks), layout, config, MACHINES[run["machine"]], run["micro_batch_size"],
                  run["max_seq_length"])
        runs.append(PublishedRun(run["name"], run["use"], run.get("windows_per_second"),
                                 run["source"], job))
    return runs


def fit(runs: Sequence[Tuple[Job, float]], start: Efficiencies, noise: float,
        source: str) -> Efficiencies:
    """Return the efficiencies that best explain `runs`, with a prior centred on `start`.

    runs: (job, measured windows/s) of each. noise: relative error of the measurements. source: the
    description of the runs that is kept in the result.

    The method is Gauss-Newton on the logarithms of the three numbers with a numerical derivative; a
    dozen steps are plenty. See the top of this file for what is minimised.
    """
    def at(x: np.ndarray) -> Efficiencies:
        return replace(start, **{
            name: getattr(start, name) * math.exp(v) for name, v in zip(FITTED, x)}, source=source)

    def residuals(x: np.ndarray) -> np.ndarray:
        errors = [
            math.log(make_plan(job, at(x)).windows_per_second / measured) / noise
            for job, measured in runs]
        return np.array(errors + list(x / FREEDOM))

    x, step = np.zeros(len(FITTED)), 1e-4
    for _ in range(12):
        now = residuals(x)
        jacobian = np.stack(
            [(residuals(x + step * unit) - now) / step for unit in np.eye(len(FITTED))], axis=1)
        x = x - np.linalg.lstsq(jacobian, now, rcond=None)[0]
    return at(x)


def fit_published(runs: Sequence[PublishedRun]) -> Efficiencies:
    """Return the fit to those `runs` whose use is "fit": the defaults of machine.Efficiencies."""
    return fit([(run.job, run.windows_per_second) for run in runs if run.use == "fit"], START,
               NOISE, "published runs")


def fit_own(runs: Sequence[Tuple[Job, float]], start: Efficiencies) -> Efficiencies:
    """Return the fit to runs of the user's own, which count more than the published runs.

    runs: (the run as the planner sees it, measured windows/s) of each. start: the efficiencies
    fitted to the published runs. Raises UsageError unless each windows/s is a finite number above
    0.
    """
    for _, measured in runs:
        if not (measured > 0 and math.isfinite(measured)):
            raise UsageError(
                f"--measured windows_per_second={measured:g}: it should be more than 0")
    source = (f"your run at {runs[0][1]:g} windows/s" if len(runs) == 1 else
              f"your {len(runs)} runs")
    return fit(runs, start, OWN_NOISE, source)


def fit_table(runs: Sequence[PublishedRun], efficiencies: Efficiencies) -> List[Dict[str, Any]]:
    """Return the prediction for each of `runs` beside its published throughput.

    Each row is a dictionary with the name, the use, published and predicted windows/s, the error in
    percent (None without a published throughput), whether it is predicted to fit, and the source.
    """
    rows = []
    for run in runs:
        plan = make_plan(run.job, efficiencies)
        published = run.windows_per_second
        rows.append({
            "name": run.name, "use": run.use, "published_windows_per_second": published,
            "predicted_windows_per_second": plan.windows_per_second,
            "error_percent": (None if published is None else
                              100 * (plan.windows_per_second / published - 1)),
            "fits": plan.fits, "source": run.source})
    return rows


def calibration_file(path: Optional[str] = None) -> Path:
    """Return the path of the user's calibration.

    It is `path` (--calibration) if given, else a file in the user's configuration folder (XDG Base
    Directory Specification).
    """
    if path is not None:
        return Path(path)
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(folder) / "ipu_options" / "calibration.json"


def save(efficiencies: Efficiencies, path: Path) -> None:
    """Write `efficiencies` to `path` as JSON. Raises RunError if that is not possible."""
    with writing(f"--calibration {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(efficiencies))


def load(path: Optional[str] = None) -> Efficiencies:
    """Return the user's calibration if there is one, else the fit to published runs.

    path: see `calibration_file`. Raises UsageError if a given `path` does not exist, or if the file
    is not a calibration.
    """
    file = calibration_file(path)
    if not file.is_file():
        if path is not None:
            raise UsageError(
                f"--calibration {path}: no such file; `python -m ipu_options calibrate --measured "
                "windows_per_second=N` writes one")
        return Efficiencies()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        efficiencies = Efficiencies(**values)
        if not all(isinstance(getattr(efficiencies, name), (int, float)) and
                   getattr(efficiencies, name) > 0 for name in FITTED):
            raise ValueError("its numbers should be more than 0")
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{file} is not a calibration ({error}): correct it or delete it")
    return replace(efficiencies, source=f"{efficiencies.source}, {file}")
