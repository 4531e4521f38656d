"""Writing files and folders so that a reader, even one after a crash, finds the old content or the
new one, never a part of it.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Dict, Iterator, Optional, Union

from ipu_options.errors import RunError


@contextmanager
def written_whole(path: Union[str, Path], mode: str = "w") -> Iterator[IO]:
    """A file to write the content of `path` to. When the block ends it is flushed to disk and takes
    its name; if the block fails it is removed.

    mode: "w" (UTF-8) or "wb". The file stands beside `path` under a name of its own, .NAME.8 HEX
    DIGITS.tmp, so that several processes may write the same file (a shared cache). A link called
    `path` is replaced, never followed. Raises OSError.
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
        if isinstance(error, OSError) and (error.filename is None or
                                           str(error.filename) == str(aside)):
            error.filename, error.filename2 = str(
                path), None  # for the message: the error of a full disk names no file
        raise


def write_json(path: Union[str, Path], value: Any, indent: Optional[int] = 2) -> None:
    """Write `value` to `path` as ASCII JSON, the whole file or nothing. Raises OSError."""
    with written_whole(path) as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn an OSError of the block into a RunError that says that `what`, a flag and its value,
    cannot be written, and why.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{what}: cannot write it ({error.strerror or error})") from error


@contextmanager
def folder_written_aside(target: Path) -> Iterator[Path]:
    """An empty folder .NAME.tmp beside `target` to write the content of `target` to; it is removed
    if the block fails.
    """
    aside = target.with_name(f".{target.name}.tmp")
    try:
        delete(aside)
        aside.mkdir()
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def rename_folder(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`, which may exist: rename(2) cannot replace a folder that holds
    files, so that an earlier `target` is first renamed to .NAME.replaced. Raises OSError; `target`
    is then as it was.
    """
    replaced = target.with_name(f".{target.name}.replaced")
    exists = os.path.lexists(target)
    if exists:
        target.rename(replaced)
    try:
        aside.rename(target)
    except BaseException:
        if exists:
            replaced.rename(target)
        raise
    sync_folder(target.parent)
    with suppress(
            OSError
    ):  # the new folder is in place; the start of the next run removes what is left of the old one
        delete(replaced)


def delete_folder(folder: Path) -> None:
    """Delete `folder`, which is first renamed to .NAME.removed: under its own name it is complete
    to the last. Raises OSError.
    """
    removed = folder.with_name(f".{folder.name}.removed")
    folder.rename(removed)
    delete(removed)


def delete(path: Path) -> None:
    """Delete the file or folder at `path`, if there is one; of a link the link itself, not what it
    points to. Raises OSError.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_and_hash(folder: Path) -> Dict[str, Dict[str, Any]]:
    """Flush every file in `folder` to disk; returns {name: {"size": bytes, "sha256": hex digest}}.

    The files get the permissions of the folder, since newer releases of safetensors make theirs
    readable by the owner alone. Hashing reads the bytes back from the page cache: about 0.6 s a
    gigabyte, a fraction of what writing them takes.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(folder.stat().st_mode & 0o666)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return files


def sha256(path: Union[str, Path]) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Union[str, Path]) -> None:
    """Make creations, renames and removals in `folder` survive a loss of power: they live in the
    directory itself (fsync(2)).
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def system_error(error: BaseException) -> Optional[str]:
    """The operating system's reason behind `error` ("No space left on device"), or None where it
    has another cause.

    The writers in Rust (safetensors, tokenizers) raise exceptions of their own, with the number of
    the error only in the text.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error))
    return os.strerror(int(number.group(1) or number.group(2))) if number else None
