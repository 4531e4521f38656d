"""PopTorch's error classes. Real PopTorch defines them in its compiled core, which this module stands for."""
from __future__ import annotations


class Error(RuntimeError):
    """What PopTorch refuses or cannot do. `type`, `message` and `location` as in PopTorch."""

    def __init__(self, message: str, kind: str = "poptorch_py_error"):
        super().__init__(f"'{kind}': {message}")
        self.type, self.message, self.location = kind, message, ""


class RecoverableError(Error):
    """A failure after which the device can be reset; never raised on the host."""


class UnrecoverableError(Error):
    """A failure of the hardware; never raised on the host."""


class NotOffered(Error, AttributeError):
    """A part of PopTorch that poptorch_host leaves out. An AttributeError too, so that hasattr() says no."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"poptorch.{name} is not offered by poptorch_host: {reason}")


def isCompilingWithDispatcher() -> bool:
    """True while a model is being traced."""
    from . import blocks
    return blocks.recorder is not None


def _validateOptions(options: dict) -> None:
    """Error for options of PopART that do not exist; what PopTorch's own tests call."""
    from . import _checks, options as own
    known = own.Options()
    known.outputMode(own.enums.OutputMode.All)
    _checks.popart_options({k: v for k, v in options.items() if k not in known.toDict()})
