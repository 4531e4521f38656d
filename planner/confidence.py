"""The range in which the throughput of a plan is expected.

Two things make a prediction uncertain: the fitted numbers, whose covariance comes from the fit, and
all that the model leaves out, which is as large as the errors of the cross-validation show.
"""
from __future__ import annotations

import math
from dataclasses import replace
from typing import Tuple

import numpy as np

from planner.machine import FITTED
from planner.plan import Plan, make_plan
from planner.throughput import host_parts

CONFIDENCE = 0.9  # the share of runs that should lie in their expected range
# Relative errors that the fitted numbers do not explain, as standard deviations:
RUN_ERROR = 0.04        # of any run: the same job ran at 1,317 and at 1,391 rows/s
HOST_ERROR = 0.30       # of the host's part, which depends on server and framework
INFERENCE_ERROR = 0.20  # of inference, of which no throughput is published with its settings
# Half of the 90 % range of Student's t distribution in standard deviations, for the published runs'
# 6 publishers (5 degrees of freedom).
QUANTILE = 2.02
# Relative errors of the default efficiencies against the measured published runs, root of the mean
# square: as fitted, and in cross-validation (`calibrate --show` prints both).
PUBLISHED_RMS = (0.032, 0.045)


def sensitivity(plan: Plan) -> np.ndarray:
    """Return how the logarithm of rows/s changes with that of each fitted number."""
    step, changes = 1e-4, []
    for name in FITTED:
        value = getattr(plan.efficiencies, name) * math.exp(step)
        changed = make_plan(plan.job, replace(plan.efficiencies, **{name: value}))
        changes.append(math.log(changed.rows_per_second / plan.rows_per_second) / step)
    return np.array(changes)


def unexplained_error(plan: Plan) -> float:
    """Return the relative error that would remain if the fitted numbers were known exactly."""
    host = HOST_ERROR * plan.host_seconds / plan.update_seconds
    inference = 0.0 if plan.job.training else INFERENCE_ERROR
    return math.sqrt(RUN_ERROR ** 2 + host ** 2 + inference ** 2)


def host_range(plan: Plan) -> Tuple[float, float]:
    """Return the lowest and the highest seconds of the host's part that are expected."""
    call, tokens = (part / plan.host_seconds for part in host_parts(plan.job, plan.efficiencies))
    # The time of an inference call is not fitted.
    slopes = np.array([0.0, 0.0, 0.0, call if plan.job.training else 0.0, tokens])
    fitted = slopes @ np.array(plan.efficiencies.covariance) @ slopes
    factor = math.exp(QUANTILE * math.sqrt(fitted + HOST_ERROR ** 2))
    return plan.host_seconds / factor, plan.host_seconds * factor


def expected_error(plan: Plan) -> Tuple[float, float]:
    """Return the lowest and the highest relative deviation from the plan: of CONFIDENCE of runs."""
    slopes = sensitivity(plan)  # of the logarithm of rows/s, as the width
    fitted = slopes @ np.array(plan.efficiencies.covariance) @ slopes
    width = QUANTILE * math.sqrt(fitted + unexplained_error(plan) ** 2)
    return math.exp(-width) - 1, math.exp(width) - 1
