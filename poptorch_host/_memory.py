"""How the C library gives out the memory of tensors."""
from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3), as in malloc.h


def keep_freed_memory() -> None:
    """Have freed memory kept for the next tensor, where the C library is glibc.

    By default glibc returns a large block at once, and each step gets the memory of its activations
    anew, page by page and filled with zeros: 10 % of its time (measured, two layers of
    roberta-base). The user's own settings of the allocator take precedence.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
