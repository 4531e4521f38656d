"""Replaces PopTorch's compiled core, poptorch.poptorch_core.

It has those names of the core that scripts and PopTorch's own tests use.
"""
from __future__ import annotations

from . import _checks, blocks, enums
from ._errors import Error, RecoverableError, UnrecoverableError  # noqa: F401
from .options import Options


def isCompilingWithDispatcher() -> bool:
    """Return whether a model is being traced."""
    return blocks.recorder is not None


def _validateOptions(options: dict) -> None:
    """Raise Error for an option that PopART does not have, as PopTorch's own tests expect."""
    known = Options()
    known.outputMode(enums.OutputMode.All)
    _checks.popart_options({
        name: value for name, value in options.items() if name not in known.toDict()})
