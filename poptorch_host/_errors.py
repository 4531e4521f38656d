"""PopTorch's error classes."""
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
    """A part of PopTorch that poptorch_host leaves out. An AttributeError too, so that hasattr()
    says no.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"poptorch.{name} is not offered by poptorch_host: {reason}")
