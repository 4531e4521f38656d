"""PopVision: what makes a run write reports for Graph Analyser and System Analyser, and the loop's
phases as named spans.

How a script uses it (without --profile_dir and --trace both do nothing):

    profiling_environment(settings, ipu_config, "training")     # before PopTorch is imported
    with Spans("train", settings) as spans:
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
from typing import Any, Dict, Iterator, List, Tuple

from ipu_options.config import DeviceSettings, IPUConfig
from ipu_options.errors import RunError, UsageError
from ipu_options.files import writing

_NOTHING = nullcontext()  # one object for every span of a run that records none


def profiling_environment(settings: DeviceSettings, ipu_config: IPUConfig, *phases: str) -> None:
    """Make this process write System Analyser's trace below settings.profile_dir, and note the
    configuration; nothing if it is None.

    Graph Analyser's report is switched on by `options.enableProfiling(profile_dir)`, see
    options.py; PopTorch names the engines "training" and "inference", and Poplar keeps each
    engine's report in a folder of its name.

    phases: of "training" and "inference", for each of which the configuration is written to
    profile_dir/PHASE/framework.json. Must run before PopTorch is imported, which reads PVTI_OPTIONS
    once (poptorch/profiling.py). What the user has set there stays as it is, only missing keys are
    added. Raises RunError if the folder cannot be written, UsageError if the variable is not JSON.
    """
    if settings.profile_dir is None:
        return
    folder = Path(settings.profile_dir).absolute()
    given = os.environ.get("PVTI_OPTIONS") or "{}"
    try:
        os.environ["PVTI_OPTIONS"] = json.dumps({
            "enable": "true", "directory": str(folder / "host"), **json.loads(given)})
    except (ValueError, TypeError):
        raise UsageError(
            f"PVTI_OPTIONS={given}: it should be a JSON object; correct or unset it") from None
    note = json.dumps({**settings.values(), **ipu_config.values()}, indent=2, sort_keys=True,
                      default=str)
    try:
        (folder / "host").mkdir(parents=True, exist_ok=True)
        for phase in phases:
            (folder / phase).mkdir(exist_ok=True)
            (folder / phase / "framework.json").write_text(note + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"--profile_dir {settings.profile_dir}: cannot write there ({error})") from error


class Spans:
    """Names the phases of a loop, `with spans("step"): ...`, for System Analyser and for a Chrome
    trace.

    channel: the name of the spans' group.  settings.trace: file to write in Chrome trace format
    (https://ui.perfetto.dev opens it) when the `with Spans(...)` block ends, however it ends.  With
    settings.profile_dir the spans are also marked in PopVision's own trace, through
    poptorch.profiling.Channel.  With neither, a span costs one call that returns a shared empty
    context.
    """

    def __init__(self, channel: str, settings: DeviceSettings) -> None:
        self._trace = settings.trace
        self._events: List[Tuple[str, int, int]] = []  # name, start and duration in nanoseconds
        self._channel = None
        self._name = channel
        if settings.profile_dir is not None:
            from ipu_options import poptorch
            self._channel = poptorch.profiling.Channel(channel)
        self._off = settings.trace is None and settings.profile_dir is None

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
            events = [
                trace_event(name, start / 1000, length / 1000, lane=0)
                for name, start, length in self._events]
            write_trace(self._trace, events, process=self._name, lanes=["host"])


def trace_event(name: str, start_us: float, duration_us: float, lane: int,
                **args: Any) -> Dict[str, Any]:
    """A complete event ("X") of the Trace Event Format; times in microseconds, lane = thread id,
    args shown on click.
    """
    return {
        "name": name, "ph": "X", "ts": start_us, "dur": duration_us, "pid": 0, "tid": lane,
        "args": args}


def write_trace(path: str, events: List[Dict[str, Any]], process: str, lanes: List[str]) -> None:
    """Write `events` as a Chrome trace (the JSON Object Format of the Trace Event Format document)
    with named lanes.

    Raises RunError if the file cannot be written.
    """
    names = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": process}}]
    names += [{"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": lane}}
              for i, lane in enumerate(lanes)]
    with writing(f"--trace {path}"), open(path, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": names + events, "displayTimeUnit": "ms"}, file)
