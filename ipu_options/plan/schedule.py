"""Schedules the pipeline of one weight update, step by step, as PopART runs it.

With S forward stages, forward stage s (from 0) works on micro-batch c - s in step c, and its
backward stage on micro-batch c - 2(S - 1) + s. The last stage therefore does both for the same
micro-batch in one step. Copies between the IPUs end every step, so that a step takes as long as the
slowest IPU's forward work, recomputation and backward work together, plus the copies. N
micro-batches take N + 2(S - 1) steps (PopTorch user guide, "Pipelining"; Graphcore's technical note
"Model parallelism on the IPU"). Stage s keeps 2(S - 1 - s) + 1 micro-batches waiting.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import List, NamedTuple, Sequence

import numpy as np

KINDS = ("forward", "recompute", "backward")


class StageWork(NamedTuple):
    """Seconds that one micro-batch takes on a forward stage and on its backward stage."""

    ipu: int
    forward: float
    recompute: float = 0.0
    backward: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the stage's whole work in a step, outside of ramp-up and ramp-down."""
        return self.forward + self.recompute + self.backward


class Events(NamedTuple):
    """One kind of work of one stage, for all N micro-batches.

    kind: one of KINDS. start: [N], the time in seconds at which the work on each micro-batch
    begins. seconds: its duration, the same for each.
    """

    ipu: int
    stage: int
    kind: str
    start: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """The pipeline of one weight update, without the update of the weights itself.

    steps: their number, each of `step_seconds` seconds. events: what each stage does and when.
    busy_seconds: the work of each IPU, in ascending order of the IPUs.
    """

    steps: int
    step_seconds: float
    events: List[Events]
    busy_seconds: List[float]

    @property
    def seconds(self) -> float:
        """Duration of all steps."""
        return self.steps * self.step_seconds


def simulate(stages: Sequence[StageWork], micro_batches: int, copy_seconds: float = 0.0,
             training: bool = True) -> Schedule:
    """Return the Schedule of `micro_batches` micro-batches through the pipeline.

    stages: in forward order. Several may be on one IPU, which then does their work one after the
    other. copy_seconds: of the copies between IPUs that end each step. training: False leaves out
    the backward stages, and N micro-batches then take N + S - 1 steps.

    In each step, an IPU first does its forward work in the order of the stages. Then, from the last
    stage to the first, it restores the stash, recomputes and does the backward work.
    """
    count = len(stages)
    ipus = sorted({stage.ipu for stage in stages})
    work = {
        ipu: sum(s.seconds if training else s.forward for s in stages if s.ipu == ipu)
        for ipu in ipus}
    step_seconds = max(work.values()) + copy_seconds
    batch = np.arange(micro_batches)
    clock = dict.fromkeys(ipus, 0.0)  # seconds after the start of a step at which the IPU is free
    events = []

    def add(index: int, kind: str, first_step: int) -> None:
        stage = stages[index]
        seconds = getattr(stage, kind)
        if seconds:
            events.append(
                Events(stage.ipu, index, kind,
                       (batch + first_step) * step_seconds + clock[stage.ipu], seconds))
            clock[stage.ipu] += seconds

    for index in range(count):
        add(index, "forward", index)
    for index in reversed(range(count if training else 0)):
        add(index, "recompute", 2 * (count - 1) - index)
        add(index, "backward", 2 * (count - 1) - index)
    ramp = (2 if training else 1) * (count - 1)
    return Schedule(micro_batches + ramp, step_seconds, events,
                    [work[ipu] * micro_batches for ipu in ipus])


def stash_depth(stage: int, stages: int) -> int:
    """Return how many micro-batches' activations a forward stage keeps for the backward pass.

    stage: its index among the `stages` forward stages. The number holds outside of ramp-up and
    ramp-down.
    """
    return 2 * (stages - 1 - stage) + 1


def bubble_fraction(stages: int, micro_batches: int) -> float:
    """Return the share of a training pipeline's steps in which a stage has nothing to do.

    These are the steps of ramp-up and ramp-down; the share is the same for every stage.
    """
    return 2 * (stages - 1) / (micro_batches + 2 * (stages - 1))
