"""PopVision reports for Graph Analyser and System Analyser, and the loop's timed phases.

Content of profile_dir after a run on an IPU, where PHASE is training or inference:

    PHASE/profile.pop, debug.cbor    for Graph Analyser; from Python: pva.openReport
    PHASE/framework.json             the configuration, on the Summary page of Graph Analyser
    host/*.pvti                      for System Analyser; from Python: pva.openTrace
"""
from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, List

from ipu_options.config import DeviceSettings, IPUConfig
from runtime import processes
from runtime.errors import UsageError
from runtime.files import user_file, writing


def profiling_environment(settings: DeviceSettings, ipu_config: IPUConfig, *phases: str) -> None:
    """Set up System Analyser's trace and write the configuration, both below settings.profile_dir.

    phases: the ones of "training" and "inference" that will run. Without --profile_dir nothing
    happens. options.py switches Graph Analyser's report on.

    This must be called before PopTorch is imported, which reads PVTI_OPTIONS once
    (poptorch/profiling.py). What the user has set in this variable stays. Raises RunError if the
    folder cannot be written, UsageError if the variable is not JSON.
    """
    if settings.profile_dir is None:
        return
    folder = Path(processes.process_path(settings.profile_dir)).absolute()
    text = os.environ.get("PVTI_OPTIONS") or "{}"
    try:
        os.environ["PVTI_OPTIONS"] = json.dumps({
            "enable": "true", "directory": str(folder / "host"), **json.loads(text)})
    except (ValueError, TypeError):
        raise UsageError(
            f"PVTI_OPTIONS={text}: it should be a JSON object; correct or unset it") from None
    note = json.dumps({**settings.values(), **ipu_config.values()}, indent=2, sort_keys=True,
                      default=str)
    with writing(f"--profile_dir {settings.profile_dir}"):
        (folder / "host").mkdir(parents=True, exist_ok=True)
        for phase in phases:
            (folder / phase).mkdir(exist_ok=True)
            (folder / phase / "framework.json").write_text(note + "\n", encoding="utf-8")


class PhaseTimer:
    """Measures the phases of a loop, for the log, for System Analyser and for a Chrome trace.

    `with timer("step"): ...` names a phase. With settings.profile_dir phases are also marked in
    PopVision's own trace. With settings.trace they are written to that file (https://ui.perfetto.dev
    opens it), however the `with PhaseTimer(...)` block ends. channel: the name of all phases.
    """

    def __init__(self, channel: str, settings: DeviceSettings) -> None:
        self.seconds: Dict[str, float] = defaultdict(float)  # of each phase so far
        self._begin = time.perf_counter()
        self._trace = settings.trace and processes.process_path(settings.trace)
        self._name = channel
        self._events: List[Dict[str, Any]] = []  # of the trace
        self._tracepoint: Callable[[str], ContextManager] = nullcontext
        if settings.profile_dir is not None:
            from ipu_options import poptorch
            self._tracepoint = poptorch.profiling.Channel(channel).tracepoint

    def total(self) -> float:
        """Return the seconds since this object was made."""
        return time.perf_counter() - self._begin

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Context manager around one phase."""
        start = time.perf_counter_ns()
        with self._tracepoint(name):
            try:
                yield
            finally:
                duration = time.perf_counter_ns() - start
                self.seconds[name] += duration / 1e9
                if self._trace:
                    self._events.append(trace_event(name, start / 1000, duration / 1000, lane=0))

    def __enter__(self) -> "PhaseTimer":
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._trace:
            write_trace(self._trace, self._events, process=self._name, lanes=["host"])


def trace_event(name: str, start_us: float, duration_us: float, lane: int,
                **args: Any) -> Dict[str, Any]:
    """Return a complete event ("X") of the Trace Event Format. args: shown when it is clicked."""
    return {"name": name, "ph": "X", "ts": start_us, "dur": duration_us, "pid": 0, "tid": lane,
            "args": args}


def write_trace(path: str, events: List[Dict[str, Any]], process: str, lanes: List[str]) -> None:
    """Write `events` to `path` as a Chrome trace (Trace Event Format, JSON Object Format).

    process: the name shown for all lanes together. lanes: the name of each lane, from lane 0 on.
    Raises RunError if the file cannot be written.
    """
    names = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": process}}]
    names += [{"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": lane}}
              for i, lane in enumerate(lanes)]
    with writing(f"--trace {path}"), user_file(path) as file:
        json.dump({"traceEvents": names + events, "displayTimeUnit": "ms"}, file)
