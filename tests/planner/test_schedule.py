"""The schedule is compared with a brute-force pipeline that knows only what depends on what."""
from __future__ import annotations

import random
import time

import pytest

from planner.phase import INFERENCE, TRAINING
from planner.schedule import Schedule, StageWork, stash_depth


def brute_force(stages, micro_batches, training):
    """Run a pipeline step by step.

    In each step a stage takes the next micro-batch whose input was ready before the step began; the
    last stage's backward pass takes one that became ready within the step. Returns the number of
    steps, the seconds, and for each stage the largest number of micro-batches it kept after the
    forward work of a step.
    """
    count = len(stages)
    forward, backward = [0] * count, [0] * count  # number of micro-batches done by each stage
    kept = [0] * count
    steps, seconds = 0, 0.0
    slowest = max(sum(s.forward + (s.recompute + s.backward if training else 0)
                      for s in stages if s.ipu == ipu) for ipu in {s.ipu for s in stages})
    while (backward[0] if training else forward[-1]) < micro_batches:
        before_forward, before_backward = list(forward), list(backward)
        for s in range(count):
            ready = micro_batches if s == 0 else before_forward[s - 1]
            forward[s] += forward[s] < ready
            kept[s] = max(kept[s], forward[s] - backward[s])
        for s in reversed(range(count if training else 0)):
            ready = forward[s] if s == count - 1 else before_backward[s + 1]
            backward[s] += backward[s] < ready
        steps, seconds = steps + 1, seconds + slowest
    return steps, seconds, kept


@pytest.mark.parametrize("training, ramps", [(True, 2), (False, 1)])
def test_balanced_stages_idle_for_the_ramps_alone(training, ramps):
    for count in range(1, 17):
        stages = [StageWork(i, 1.0, 1.0, 2.0) for i in range(count)]
        schedule = Schedule(stages, 40, phase=TRAINING if training else INFERENCE)
        steps = 40 + ramps * (count - 1)
        assert schedule.steps == steps
        assert schedule.seconds == pytest.approx(steps * (4.0 if training else 1.0))
        busy = 40 * schedule.load[0]
        assert schedule.bubble_fraction == pytest.approx(1 - busy / schedule.seconds)


def test_unbalanced_and_interleaved_stages_agree_with_brute_force():
    choose = random.Random(0)
    for trial in range(60):
        training, count = trial % 3 > 0, choose.randint(1, 16)
        ipus = [
            choose.randrange(max(1, count // 2)) if choose.random() < 0.5 else i
            for i in range(count)]
        stages = [StageWork(ipu, *(choose.randint(1, 9) for _ in range(3))) for ipu in ipus]
        batches = choose.randint(2 * count - 1, 60)
        steps, seconds, kept = brute_force(stages, batches, training)
        schedule = Schedule(stages, batches, phase=TRAINING if training else INFERENCE)
        assert (schedule.steps, schedule.seconds) == (steps, seconds)
        assert not training or kept == [stash_depth(s, count) for s in range(count)]


@pytest.mark.parametrize("training", [True, False])
def test_events_respect_dependencies_and_never_overlap_on_an_ipu(training):
    stages = [
        StageWork(0, 2.0, 1.0, 3.0),
        StageWork(1, 1.0, 1.0, 2.0),
        StageWork(0, 1.0, 0.5, 2.0),
        StageWork(2, 4.0, 0.0, 5.0)]
    schedule = Schedule(stages, 9, copy_seconds=0.25,
                        phase=TRAINING if training else INFERENCE)
    events = schedule.events()
    start = {(event.kind, event.stage): event for event in events}
    kinds = {"forward", "recompute", "backward"} if training else {"forward"}
    assert {kind for kind, _ in start} == kinds and len(start["forward", 0].start) == 9
    for s in range(1, 4):
        assert (start["forward", s].start
                >= start["forward", s - 1].start + stages[s - 1].forward).all()
        if training:
            assert (start["backward", s - 1].start
                    >= start["backward", s].start + stages[s].backward).all()
    if training:
        assert (start["backward", 3].start >= start["forward", 3].start + stages[3].forward).all()
    for ipu in range(3):
        spans = sorted((t, t + e.seconds) for e in events if e.ipu == ipu for t in e.start)
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))
    assert max(e.start[-1] + e.seconds for e in events) <= schedule.seconds


def test_thousands_of_micro_batches_take_no_time():
    begin = time.perf_counter()
    schedule = Schedule([StageWork(i, 1.0, 1.0, 2.0) for i in range(16)], 8192)
    assert schedule.steps == 8192 + 30 and len(schedule.events()) == 3 * 16
    assert time.perf_counter() - begin < 0.5
