"""PopVision: what makes a run write reports for Graph Analyser and System Analyser, and the loop's phases as named spans.

How a script uses it (without folder and file both do nothing):

    profiling_environment(args.profile_dir, "training", configuration)     # before PopTorch is imported
    with Spans("train", trace=args.trace, profile=args.profile_dir is not None) as spans:
        with spans("data"):
            batch = next(batches)
        with spans("step"):
            loss = training_model(**batch)

What stands in profile_dir afterwards (on an IPU):

    training/profile.pop, inference/profile.pop, debug.cbor      Graph Analyser; from Python: pva.openReport
    training/framework.json, inference/framework.json            the configuration, shown on Graph Analyser's Summary page
    host/*.pvti                                                   System Analyser; from Python: pva.openTrace
"""
from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from ipu_options.errors import RunError, UsageError

PHASES = ("training", "inference")
_NOTHING = nullcontext()  # one object for every span of a run that records none


def profiling_environment(profile_dir: Optional[str], phase: str, configuration: Optional[Dict[str, Any]] = None) -> None:
    """Make this process write System Analyser's trace below `profile_dir`, and note the configuration; nothing if it is None.

    Graph Analyser's report is switched on by `options.enableProfiling(profile_dir)`, see options.py; PopTorch names the
    engines "training" and "inference", and Poplar keeps each engine's report in a folder of its name.

    profile_dir: folder, made where missing.  phase: "training" or "inference".  configuration: written as
    `profile_dir`/`phase`/framework.json.  Must run before PopTorch is imported, which looks at PVTI_OPTIONS once
    (poptorch/profiling.py). What the user has set there stays as it is, only missing keys are added.
    Raises RunError if the folder cannot be written, UsageError if the variable is not JSON.
    """
    if profile_dir is None:
        return
    if phase not in PHASES:
        raise ValueError(f"phase is one of {PHASES}, not {phase!r}")
    folder = Path(profile_dir).absolute()
    given = os.environ.get("PVTI_OPTIONS") or "{}"
    try:
        os.environ["PVTI_OPTIONS"] = json.dumps({"enable": "true", "directory": str(folder / "host"), **json.loads(given)})
    except (ValueError, TypeError):
        raise UsageError(f"PVTI_OPTIONS={given}: it should be a JSON object; correct or unset it")
    try:
        (folder / "host").mkdir(parents=True, exist_ok=True)
        (folder / phase).mkdir(exist_ok=True)
        note = json.dumps(configuration or {}, indent=2, sort_keys=True, default=str)
        (folder / phase / "framework.json").write_text(note + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"--profile_dir {profile_dir}: cannot write there ({error})")


class Spans:
    """Names the phases of a loop, `with spans("step"): ...`, for System Analyser and for a Chrome trace.

    channel: the name of the spans' group.  trace: file to write in Chrome trace format (https://ui.perfetto.dev opens it)
    when the `with Spans(...)` block ends, however it ends.  profile: also mark the spans in PopVision's own trace, through
    poptorch.profiling.Channel.  With neither, a span costs one call that returns a shared empty context.
    """

    def __init__(self, channel: str, trace: Optional[str] = None, profile: bool = False) -> None:
        self._trace = trace
        self._events: List[Tuple[str, int, int]] = []  # name, start and duration in nanoseconds
        self._channel = None
        self._name = channel
        if profile:
            from ipu_options import poptorch
            self._channel = poptorch.profiling.Channel(channel)
        self._off = trace is None and not profile

    def __call__(self, name: str):
        """A context manager around one phase."""
        return _NOTHING if self._off else self._span(name)

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        start = time.perf_counter_ns()
        with self._channel.tracepoint(name) if self._channel else _NOTHING:
            try:
                yield
            finally:
                if self._trace:
                    self._events.append((name, start, time.perf_counter_ns() - start))

    def __enter__(self) -> "Spans":
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._trace:
            events = [trace_event(name, start / 1000, length / 1000, lane=0) for name, start, length in self._events]
            write_trace(self._trace, events, process=self._name, lanes=["host"])


def trace_event(name: str, start_us: float, duration_us: float, lane: int, **args: Any) -> Dict[str, Any]:
    """A complete event ("X") of the Trace Event Format; times in microseconds, lane = thread id, args shown on click."""
    return {"name": name, "ph": "X", "ts": start_us, "dur": duration_us, "pid": 0, "tid": lane, "args": args}


def write_trace(path: str, events: List[Dict[str, Any]], process: str, lanes: List[str]) -> None:
    """Write `events` as a Chrome trace (the JSON Object Format of the Trace Event Format document) with named lanes.

    Raises RunError if the file cannot be written.
    """
    names = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": process}}]
    names += [{"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": lane}} for i, lane in enumerate(lanes)]
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": names + events, "displayTimeUnit": "ms"}, file)
    except OSError as error:
        raise RunError(f"--trace {path}: cannot write it ({error})")
