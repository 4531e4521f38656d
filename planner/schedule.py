"""Schedules the pipeline of one weight update, step by step, as PopART runs it.

With S forward stages, forward stage s (from 0) works on micro-batch c - s in step c, and its
backward stage on micro-batch c - 2(S - 1) + s. The last stage therefore does both for the same
micro-batch in one step. Copies between the IPUs end every step, so that a step takes as long as the
slowest IPU's forward work, recomputation and backward work together, plus the copies. N
micro-batches take N + 2(S - 1) steps (PopTorch user guide, "Pipelining"; Graphcore's technical note
"Model parallelism on the IPU"), in inference N + S - 1. Stage s keeps 2(S - 1 - s) + 1 waiting.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Sequence

import numpy as np

from planner.phase import TRAINING, Phase


class StageWork(NamedTuple):
    """Seconds that one micro-batch takes on a forward stage and on its backward stage."""

    ipu: int
    forward: float
    recompute: float = 0.0
    backward: float = 0.0


class Events(NamedTuple):
    """One kind of work of one stage, for all N micro-batches."""

    ipu: int
    stage: int
    kind: str           # of Phase.kinds
    start: np.ndarray   # [N], the seconds at which the work on each micro-batch begins
    seconds: float      # that it takes on each


@dataclass(frozen=True)
class Schedule:
    """The pipeline of one weight update or inference call, without the update of the weights."""

    stages: Sequence[StageWork]   # in forward order; those on one IPU work one after the other
    micro_batches: int            # N
    copy_seconds: float = 0.0     # of the copies between IPUs that end each step
    phase: Phase = TRAINING

    @property
    def load(self) -> Dict[int, float]:
        """{IPU: seconds of work of one micro-batch}."""
        return {
            ipu: sum(getattr(stage, kind) for stage in self.stages if stage.ipu == ipu
                     for kind in self.phase.kinds)
            for ipu in sorted({stage.ipu for stage in self.stages})}

    @property
    def steps(self) -> int:
        """With those in which the pipeline fills and empties."""
        return self.phase.steps(self.micro_batches, len(self.stages))

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: the slowest IPU's work, and the copies."""
        return max(self.load.values()) + self.copy_seconds

    @property
    def seconds(self) -> float:
        """Duration of all steps."""
        return self.steps * self.step_seconds

    @property
    def bubble_fraction(self) -> float:
        """Share of the steps in which a stage, any of them, has nothing to do."""
        return 1 - self.micro_batches / self.steps

    def events(self) -> List[Events]:
        """Return what each stage does and when.

        In a step, an IPU does its forward work in the order of the stages, then recomputes and does
        the backward work from the last stage to the first.
        """
        last, batch, events = len(self.stages) - 1, np.arange(self.micro_batches), []
        # Seconds after the start of a step at which each IPU is free.
        clock = dict.fromkeys((stage.ipu for stage in self.stages), 0.0)
        work = [(index, "forward", index) for index in range(last + 1)]
        if self.phase is TRAINING:
            work += [(index, kind, 2 * last - index) for index in range(last, -1, -1)
                     for kind in ("recompute", "backward")]
        for index, kind, first_step in work:
            ipu, seconds = self.stages[index].ipu, getattr(self.stages[index], kind)
            if seconds:
                start = (batch + first_step) * self.step_seconds + clock[ipu]
                events.append(Events(ipu, index, kind, start, seconds))
                clock[ipu] += seconds
        return events


def stash_depth(stage: int, stages: int) -> int:
    """Return how many micro-batches' activations a forward stage keeps for the backward pass."""
    return 2 * (stages - 1 - stage) + 1
