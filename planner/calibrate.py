"""Fits the efficiencies to published runs, or to a run of the user's own.

A few runs, sometimes one, do not determine five numbers: each fit has a prior, centred on its
starting values. It minimises the sum of the squared errors of the logarithm of the throughput, in
units of the error that is to be expected, and the squared changes of the logarithms of the numbers,
in units of the prior's standard deviations: a maximum a posteriori estimate. Its curvature gives
the covariance of the five logarithms (Laplace's approximation).
"""
from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from planner.confidence import RUN_ERROR, expected_error, sensitivity, unexplained_error
from planner.job import Job
from planner.machine import FITTED, Efficiencies
from planner.plan import Plan, make_plan
from runtime.errors import UsageError
from runtime.files import write_json, writing

# Start of the fit to published runs: large multiplications reach three quarters of the peak rate on
# such chips, within 15 %. The others are known within a factor of e: 30,000 cycles (20 us) around
# each multiplication, 2 cycles an element, and on the host 60 ms a call and 100 ns a token, about
# 100 MB/s of input.
START = Efficiencies(0.75, 30e3, 2.0, 0.060, 100e-9, source="round numbers")
START_FREEDOM = (0.15, 1.0, 1.0, 1.0, 1.0)
# Standard deviations of logarithms, that is, relative errors, of the fit to the user's own run.
OWN_FREEDOM = (0.25, 0.25, 0.25, 0.25, 0.25)
OWN_ERROR = 0.02  # of the throughput that the user measured
# What differs from its plan by more than FAR times the expected range, or from the fit by more than
# three times what equal runs differ by, is another run than its flags say.
FAR, LARGEST_MISS = 3, 3 * RUN_ERROR


class PublishedRun(NamedTuple):
    """A public run; its throughput, if published, is "measured", "held" back or "at least" that."""

    name: str
    use: str                            # measured, at least, held, fits, does not fit
    rows_per_second: Optional[float]
    source: str                         # where it is published: before the first colon, by whom
    job: Job
    framework: str = "PyTorch"

    @property
    def publisher(self) -> str:
        return self.source.split(":")[0]  # whose runs may share an unknown


def fit(runs: Sequence[Tuple[Job, float]], start: Efficiencies, freedom: Sequence[float],
        error: Callable[[Plan], float], source: str) -> Efficiencies:
    """Return the efficiencies that best explain `runs`, by Gauss-Newton on their logarithms.

    runs: (job, measured rows/s). start, freedom: centre of the prior, and the standard deviation of
    each logarithm. error(plan): standard deviation of a run's relative error.
    """
    x, prior = np.zeros(len(FITTED)), np.diag(1 / np.asarray(freedom))
    for _ in range(8):
        now = replace(start, **{
            name: float(getattr(start, name) * np.exp(v)) for name, v in zip(FITTED, x)})
        plans = [make_plan(job, now) for job, _ in runs]
        weights = np.array([1 / error(plan) for plan in plans])
        errors = np.array([math.log(plan.rows_per_second / measured)
                           for plan, (_, measured) in zip(plans, runs)])
        slopes = np.array([sensitivity(plan) for plan in plans])
        jacobian = np.concatenate([weights[:, None] * slopes, prior])
        residuals = np.concatenate([weights * errors, prior @ x])
        x = x - np.linalg.lstsq(jacobian, residuals, rcond=None)[0]
    covariance = np.linalg.inv(jacobian.T @ jacobian)
    return replace(now, source=source, covariance=tuple(map(tuple, covariance.tolist())))


def fit_published(runs: Sequence[PublishedRun]) -> Efficiencies:
    """Return the fit to the measured ones of `runs`: the defaults of machine.Efficiencies."""
    return fit([(run.job, run.rows_per_second) for run in runs if run.use == "measured"], START,
               START_FREEDOM, unexplained_error, "published runs")


def fit_own(runs: Sequence[Tuple[Job, float]]) -> Efficiencies:
    """Return the fit to own runs, (job, windows/s). Raises UsageError for one it cannot be."""
    source = (f"your run at {runs[0][1]:g} windows/s" if len(runs) == 1 else
              f"your {len(runs)} runs")
    fitted = fit([(job, measured / job.windows_per_row) for job, measured in runs], Efficiencies(),
                 OWN_FREEDOM, lambda plan: OWN_ERROR, source)
    for job, measured in runs:
        before, after = (make_plan(job, by).windows_per_second for by in (Efficiencies(), fitted))
        low, high = (before * (1 + error) for error in expected_error(make_plan(job)))
        beyond = ", with multiplications beyond the peak rate" * (fitted.peak_utilisation > 1)
        near = (low / before) ** FAR <= measured / before <= (high / before) ** FAR
        if beyond or not near or abs(math.log(measured / after)) > LARGEST_MISS:
            raise UsageError(
                f"--measured windows_per_second={measured:g}: the plan of these flags expects "
                f"{low:,.0f} to {high:,.0f}, and the nearest fit reaches {after:,.0f}{beyond}; "
                "give the flags of that run (--pack, --ipu, --pod_type, --replication_factor), and "
                "its windows/s, not its rows/s")
    return fitted


def compare(runs: Sequence[PublishedRun], efficiencies: Efficiencies) -> List[Dict[str, Any]]:
    """Return each of `runs` beside its plan, as a dictionary for JSON.

    A measured run is also planned by a fit without its publisher's runs: cross-validated.
    """
    others = {
        publisher: fit_published([run for run in runs if run.publisher != publisher])
        for publisher in {run.publisher for run in runs if run.use == "measured"}}
    records = []
    for run in runs:
        plan, published = make_plan(run.job, efficiencies), run.rows_per_second
        # About memory and, where only that is known, about a bound.
        right = plan.fits == (run.use != "does not fit") and (
            run.use != "at least" or plan.rows_per_second >= published)
        records.append({
            "name": run.name, "use": run.use, "source": run.source, "framework": run.framework,
            "machine": run.job.machine.name, "published_rows_per_second": published,
            "planned_rows_per_second": plan.rows_per_second, "planned_fits": plan.fits,
            "free_bytes": plan.free_bytes, "right": right})
        if run.use in ("measured", "held"):
            blind = make_plan(run.job, others[run.publisher]) if run.use == "measured" else plan
            low, high = expected_error(blind)
            records[-1].update(
                error_percent=100 * (plan.rows_per_second / published - 1),
                within_expected=low <= published / blind.rows_per_second - 1 <= high,
                cross_validated_error_percent=100 * (blind.rows_per_second / published - 1),
                expected_low_percent=100 * low, expected_high_percent=100 * high)
    return records


def calibration_file(path: Optional[str] = None) -> Path:
    """Return `path`, else the user's own calibration (XDG Base Directory Specification)."""
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
    """Return the user's calibration, else the fit to published runs. Raises UsageError."""
    file = calibration_file(path)
    if not file.is_file():
        if path is not None:
            raise UsageError(
                f"--calibration {path}: no such file; `python -m planner calibrate --measured "
                "windows_per_second=N` writes one")
        return Efficiencies()
    try:
        efficiencies = Efficiencies(**json.loads(file.read_text(encoding="utf-8")))
        if not all(isinstance(getattr(efficiencies, name), (int, float)) and
                   getattr(efficiencies, name) > 0 for name in FITTED):
            raise ValueError("its numbers should be more than 0")
        if np.shape(efficiencies.covariance) != (len(FITTED), len(FITTED)):
            raise ValueError("its covariance should have a row and a column for each number")
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{file} is not a calibration ({error}): correct it or delete it")
    return replace(efficiencies, source=f"{efficiencies.source}, {file}")
