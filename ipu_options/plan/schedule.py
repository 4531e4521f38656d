"""The pipeline of one weight update, step by step, as PopART runs it.

In step c, forward stage s works on micro-batch c - s, and the backward stage of s on micro-batch c
- 2(S - 1) + s: the last stage turns around within a step. Copies between the IPUs end every step,
so it lasts as long as the slowest IPU's forward, recomputation and backward work together, and N
micro-batches take N + 2(S - 1) steps (PopTorch user guide, "Pipelining"; Graphcore's technical note
"Model parallelism on the IPU"). A stage keeps 2(S - 1 - s) + 1 micro-batches waiting.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import List, NamedTuple, Sequence

import numpy as np

KINDS = ("forward", "recompute", "backward")


class StageWork(NamedTuple):
    """Seconds that one micro-batch takes on a forward stage and on the backward stage that belongs
    to it.
    """

    ipu: int
    forward: float
    recompute: float = 0.0
    backward: float = 0.0

    @property
    def seconds(self) -> float:
        """All the work of one step in steady state."""
        return self.forward + self.recompute + self.backward


class Events(NamedTuple):
    """What one stage does with each micro-batch in turn: `start` [N] in seconds, each lasting
    `seconds`.
    """

    ipu: int
    stage: int
    kind: str
    start: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """One weight update: `steps` of `step_seconds` each, and who does what when (without the update
    of the weights).
    """

    steps: int
    step_seconds: float
    events: List[Events]
    busy_seconds: List[float]

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds


def simulate(stages: Sequence[StageWork], micro_batches: int, copy_seconds: float = 0.0,
             training: bool = True) -> Schedule:
    """Run `micro_batches` through the pipeline.

    stages: in forward order; several may be on one IPU, which then does their work one after the
    other. copy_seconds: the copies between IPUs that end each step.  training: with backward
    stages; without, N + S - 1 steps. Each IPU does its forward work first, in stage order, then
    restores, recomputes and goes backward, last stage first.
    """
    count = len(stages)
    ipus = sorted({stage.ipu for stage in stages})
    work = {
        ipu: sum(s.seconds if training else s.forward for s in stages if s.ipu == ipu)
        for ipu in ipus}
    step_seconds = max(work.values()) + copy_seconds
    batch = np.arange(micro_batches)
    clock = dict.fromkeys(ipus, 0.0)  # seconds into the step at which the IPU is free
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
    """Micro-batches whose activations forward stage `stage` keeps for their backward pass (in
    steady state).
    """
    return 2 * (stages - 1 - stage) + 1


def bubble_fraction(stages: int, micro_batches: int) -> float:
    """Share of a training pipeline's steps in which a given stage has nothing to do: ramp-up and
    ramp-down.
    """
    return 2 * (stages - 1) / (micro_batches + 2 * (stages - 1))
