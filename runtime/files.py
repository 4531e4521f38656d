"""Atomic writes: a reader finds the old content or the new, never a part, even after a crash."""
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

from runtime.errors import RunError, UsageError, one_line


@contextmanager
def written_whole(path: Union[str, Path], mode: str = "w") -> Iterator[IO]:
    """Context manager that yields a temporary file, which replaces `path` when the block ends.

    mode: "w" (UTF-8) or "wb". The file is flushed to disk (fsync) and renamed; if the block fails,
    it is removed. Its random name lets several processes write one file of a shared cache. A
    symbolic link is replaced, not followed. Raises OSError.
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
            # For the message: the error of a full disk names no file, others the temporary one.
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def user_file(path: Union[str, Path]) -> Iterator[IO]:
    """Context manager that yields a text file for output to a path that the user has named.

    A regular file is written whole, where a link points to; a pipe or a device as it is.
    """
    path = Path(path)
    if path.parts[:2] in (("/", "dev"), ("/", "proc")) or (path.exists() and not path.is_file()):
        with open(path, "a", encoding="utf-8") as file:
            yield file
    else:
        with written_whole(path.resolve()) as file:
            yield file


def write_json(path: Union[str, Path], value: Any, indent: Optional[int] = 2) -> None:
    """Write `value` to `path` as ASCII JSON, atomically. Raises OSError."""
    with written_whole(path) as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


def read_json_object(path: Union[str, Path], source: str) -> Dict[str, Any]:
    """Return the JSON object in a file. Raises UsageError, which calls the file `source`."""
    try:
        value = json.loads(Path(path).read_bytes())  # in any encoding of Unicode
    except RecursionError as error:
        raise UsageError(f"{source}: its values are nested too deep") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: not readable as JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{source}: holds a {type(value).__name__}, it should be a JSON object")
    return value


@contextmanager
def writing(what: str, part: str = "it", more: str = "") -> Iterator[None]:
    """Turn an OSError of the block into a RunError that begins with `what`, as "--trace FILE"."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{what}: cannot write {part} ({error.strerror or error}){more}") from error


@contextmanager
def folder_written_aside(target: Path, tag: str = "") -> Iterator[Path]:
    """Context manager that yields an empty folder .NAME.tmp beside `target`, for `rename_folder`.

    If the block fails, it is removed. tag: of one of several processes. Raises OSError.
    """
    aside = target.with_name(f".{target.name}{tag}.tmp")
    try:
        delete(aside)
        aside.mkdir()
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def rename_folder(aside: Path, target: Path) -> None:
    """Rename the folder `aside` to `target`. If that fails (OSError), `target` is as before.

    rename(2) cannot replace a folder that holds files: an earlier one becomes .NAME.replaced first.
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
    # The new folder is in place; the next run removes at its start what is left of the old one.
    with suppress(OSError):
        delete(replaced)


def delete_folder(folder: Path) -> None:
    """Delete `folder`, first renamed to .NAME.removed: under its name it is always complete."""
    removed = folder.with_name(f".{folder.name}.removed")
    folder.rename(removed)
    delete(removed)


def delete(path: Path) -> None:
    """Delete the file or folder at `path`, if there is one; of a symbolic link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_and_hash(folder: Path) -> Dict[str, Dict[str, Any]]:
    """Flush all files in `folder` to disk; returns {name: {"size": bytes, "sha256": digits}}."""
    files = {}
    for path in sorted(folder.iterdir()):
        # Newer releases of safetensors make their files readable by the owner alone.
        path.chmod(folder.stat().st_mode & 0o666)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return files


def sha256(path: Union[str, Path]) -> str:
    """Return the SHA-256 of the file's content, as hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Union[str, Path]) -> None:
    """Flush the directory itself: only then its new names survive a power failure (fsync(2))."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def system_error(error: BaseException) -> Optional[str]:
    """Return the operating system's reason for `error`, if it came from there."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # Those of safetensors and tokenizers, written in Rust, have the number in their text.
    number = re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error))
    return os.strerror(int(number.group(1) or number.group(2))) if number else None
