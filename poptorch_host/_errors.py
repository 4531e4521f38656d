"""PopTorch's error classes."""
from __future__ import annotations


class Error(RuntimeError):
    """The error for what PopTorch refuses or cannot do.

    Its attributes `type`, `message` and `location` are those of PopTorch's class.
    """

    def __init__(self, message: str, kind: str = "poptorch_py_error"):
        super().__init__(f"'{kind}': {message}")
        self.type, self.message, self.location = kind, message, ""


class NotOffered(Error, AttributeError):
    """The error for the use of a part of PopTorch that poptorch_host leaves out.

    It is also an AttributeError: hasattr() returns False.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"poptorch.{name} is not offered by poptorch_host: {reason}")
