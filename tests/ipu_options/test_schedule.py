"""The schedule is compared with a brute-force pipeline that knows only what depends on what."""
from __future__ import annotations

import random
import time

import pytest

from ipu_options.plan.schedule import StageWork, bubble_fraction, simulate, stash_depth


def brute_force(stages, micro_batches):
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
    slowest = max(sum(s.seconds for s in stages if s.ipu == ipu) for ipu in {s.ipu for s in stages})
    while backward[0] < micro_batches:
        before_forward, before_backward = list(forward), list(backward)
        for s in range(count):
            ready = micro_batches if s == 0 else before_forward[s - 1]
            forward[s] += forward[s] < ready
            kept[s] = max(kept[s], forward[s] - backward[s])
        for s in reversed(range(count)):
            ready = forward[s] if s == count - 1 else before_backward[s + 1]
            backward[s] += backward[s] < ready
        steps, seconds = steps + 1, seconds + slowest
    return steps, seconds, kept


@pytest.mark.parametrize("count", range(1, 17))
def test_balanced_stages_take_n_plus_2s_minus_2_steps(count):
    stages = [StageWork(i, 1.0, 1.0, 2.0) for i in range(count)]
    schedule = simulate(stages, 40)
    assert schedule.steps == 40 + 2 * (count - 1)
    assert schedule.seconds == pytest.approx(4.0 * (40 + 2 * (count - 1)))
    idle = 1 - schedule.busy_seconds[0] / schedule.seconds
    assert idle == pytest.approx(bubble_fraction(count, 40))


def test_unbalanced_and_interleaved_stages_agree_with_brute_force():
    choose = random.Random(0)
    for _ in range(60):
        count = choose.randint(1, 16)
        ipus = [
            choose.randrange(max(1, count // 2)) if choose.random() < 0.5 else i
            for i in range(count)]
        stages = [StageWork(ipu, *(choose.randint(1, 9) for _ in range(3))) for ipu in ipus]
        batches = choose.randint(2 * count - 1, 60)
        steps, seconds, kept = brute_force(stages, batches)
        schedule = simulate(stages, batches)
        assert (schedule.steps, schedule.seconds) == (steps, seconds)
        assert kept == [stash_depth(s, count) for s in range(count)]


def test_events_respect_dependencies_and_never_overlap_on_an_ipu():
    stages = [
        StageWork(0, 2.0, 1.0, 3.0),
        StageWork(1, 1.0, 1.0, 2.0),
        StageWork(0, 1.0, 0.5, 2.0),
        StageWork(2, 4.0, 0.0, 5.0)]
    schedule = simulate(stages, 9, copy_seconds=0.25)
    start = {(e.kind, e.stage): e for e in schedule.events}
    for s in range(1, 4):
        assert (start["forward", s].start
                >= start["forward", s - 1].start + stages[s - 1].forward).all()
        assert (start["backward", s - 1].start
                >= start["backward", s].start + stages[s].backward).all()
    assert (start["backward", 3].start >= start["forward", 3].start + stages[3].forward).all()
    for ipu in range(3):
        spans = sorted((t, t + e.seconds) for e in schedule.events if e.ipu == ipu for t in e.start)
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))
    assert max(e.start[-1] + e.seconds for e in schedule.events) <= schedule.seconds


def test_thousands_of_micro_batches_take_no_time():
    begin = time.perf_counter()
    schedule = simulate([StageWork(i, 1.0, 1.0, 2.0) for i in range(16)], 8192)
    assert schedule.steps == 8192 + 30
    assert time.perf_counter() - begin < 0.5
