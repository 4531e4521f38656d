"""Writing files so that a reader, also one after a crash, finds the old content or the new one and nothing between."""
from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Iterator, Optional, Union


def sync_folder(folder: Union[str, Path]) -> None:
    """Make creations, renames and removals in `folder` survive a loss of power: they live in the directory itself (fsync(2))."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: Union[str, Path], mode: str = "w") -> Iterator[IO]:
    """A file to write `path` in: it is flushed to disk and takes its name when the block ends, and is gone where that fails.

    mode: "w" (UTF-8) or "wb". It stands beside `path` under a name of its own, .NAME.8 HEX DIGITS.tmp, so that several
    processes may write the same file (a shared cache). A link called `path` is replaced, never followed. Raises OSError.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(aside, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and (error.filename is None or str(error.filename) == str(aside)):
            error.filename, error.filename2 = str(path), None  # for the message; a full disk by itself names no file
        raise


def write_json(path: Union[str, Path], value: Any, indent: Optional[int] = 2) -> None:
    """Write `value` to `path` as ASCII JSON, whole or not at all. Raises OSError."""
    with written_whole(path) as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


def system_error(error: BaseException) -> Optional[str]:
    """The operating system's reason behind `error` ("No space left on device"), or None where it has another cause.

    The writers in Rust (safetensors, tokenizers) raise exceptions of their own, with the number of the error in the text only.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error))
    return os.strerror(int(number.group(1) or number.group(2))) if number else None
