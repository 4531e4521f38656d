"""PopVision's tracepoints on the host.

They are recorded if the environment variable PVTI_OPTIONS is set and Graphcore's libpvti can be
imported. Otherwise nothing in this module has an effect.
"""
from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, ContextManager

pvti = None
if "PVTI_OPTIONS" in os.environ:
    with contextlib.suppress(ImportError):
        import libpvti as pvti


@functools.lru_cache(maxsize=None)
def _trace_channel(name: str):
    return pvti.createTraceChannel(name)


class Channel:
    """A named row of time spans in PopVision's System Analyser."""

    def __init__(self, name: str):
        self._name = name

    def instrument(self, obj: Any, *methods: str) -> Any:
        """Record a span around every call of the named methods of `obj`. Returns `obj`."""
        if pvti is not None:
            pvti.instrument(obj, methods, _trace_channel(self._name))
        return obj

    def tracepoint(self, name: str) -> ContextManager:
        """Return a context manager that records a span called `name`."""
        if pvti is None:
            return contextlib.nullcontext()
        return pvti.Tracepoint(_trace_channel(self._name), f"{self._name}.{name}")
