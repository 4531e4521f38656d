"""Checkpoints that are whole or not there, and from which a run goes on bit for bit.

A checkpoint is the folder OUTPUT_DIR/checkpoint-STEP:

    config.json, model.safetensors, tokenizer files, ipu_config.json    what `write_model` writes: Hugging Face's layout
    training_state.safetensors, training_state.json                     optimizer and random state: tensors, and all around them
    trainer_state.json                                                  step, epoch, losses, what must be the same to go on
    manifest.json                                                       size and SHA-256 of every file above

It is written in a folder beside it, flushed to disk and renamed, so a kill at any moment leaves it whole or absent. Nothing is
ever pickled: a checkpoint made by someone else holds numbers and text, and cannot run code.
"""
from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import random
import re
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Union

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from ipu_options.errors import RunError, UsageError
from qa.files import sync_folder, system_error, write_json

log = logging.getLogger(__name__)
_STATE_FILES = ("training_state.safetensors", "training_state.json", "trainer_state.json")
_NAME = re.compile(r"checkpoint-(\d+)")
# What a kill may leave: of a checkpoint, of save_final, of a file of qa.files.written_whole.
_LEFTOVER = re.compile(r"\.(checkpoint-\d+)\.(tmp|removed|replaced)|\.final-model\.tmp|\..+\.[0-9a-f]{8}\.tmp")


class Checkpoint(NamedTuple):
    """What `load_checkpoint` reads; the weights in `folder` are loaded as any Hugging Face model is."""

    folder: Path
    step: int
    optimizer: Dict[str, Any]  # for optimizer.load_state_dict()
    rng_state: Optional[List[int]]  # for training_model.rng_state, which takes it once the model is compiled
    random_state: Dict[str, Any]  # for set_random_state()
    progress: Dict[str, Any]  # as it was given to save_checkpoint()


def save_checkpoint(
    output_dir: Union[str, Path],
    step: int,
    write_model: Callable[[Path], Any],
    *,
    optimizer: Dict[str, Any],
    rng_state: Optional[List[int]],
    progress: Dict[str, Any],
    save_total_limit: Optional[int] = None,
) -> Path:
    """Save OUTPUT_DIR/checkpoint-STEP and return its path; then remove the oldest beyond `save_total_limit`.

    write_model(folder) writes weights (safetensors), tokenizer and ipu_config.json. `optimizer` is `optimizer.state_dict()`,
    which in PopTorch reads the state from the device ("ipu_state", "ipu_param"); `rng_state` is `training_model.rng_state`;
    `progress` is anything JSON can hold; its "must_match" is what a resumed run has to agree with (`open_run`). Python's,
    NumPy's and PyTorch's random states are taken as they are now.
    Raises RunError where the disk is full, read-only, gone ...: earlier checkpoints are as they were, nothing half-written stays.
    """
    output_dir = Path(output_dir)
    folder = output_dir / f"checkpoint-{step}"
    with _written_aside(folder) as aside:
        write_model(aside)
        _write_training_state(aside, {"optimizer": optimizer, "rng_state": rng_state, "random_state": _random_state()})
        write_json(aside / "trainer_state.json", {"step": step, "progress": progress})
        write_json(aside / "manifest.json", {"step": step, "files": _sync_and_hash(aside)})
        sync_folder(aside)
        _rename_into_place(aside, folder)
    _remove_oldest(output_dir, step, save_total_limit)
    return folder


def save_final(output_dir: Union[str, Path], write_model: Callable[[Path], Any]) -> None:
    """Put the trained model into OUTPUT_DIR itself, each file whole or as it was. Raises RunError as `save_checkpoint` does."""
    output_dir = Path(output_dir)
    with _written_aside(output_dir / "final-model") as aside:
        write_model(aside)
        _sync_and_hash(aside)
        for path in sorted(aside.iterdir()):
            os.replace(path, output_dir / path.name)
        aside.rmdir()
        sync_folder(output_dir)


def open_run(
    output_dir: Union[str, Path], resume_from_checkpoint: Optional[str], overwrite_output_dir: bool, must_match: Dict[str, Any]
) -> Optional[Checkpoint]:
    """The checkpoint that this run goes on from, or None: from the beginning. For the holder of the folder's lock.

    Clears away what a killed run left half-written, and with `overwrite_output_dir` the checkpoints of earlier runs. must_match:
    what the checkpoint's `progress["must_match"]` has to say too. Raises UsageError where it says otherwise, where there is no
    whole checkpoint at the path given, and where a run from the beginning would mix its checkpoints with another run's.
    """
    output_dir = Path(output_dir)
    _clean_leftovers(output_dir)
    if resume_from_checkpoint is None:
        for folder in list_checkpoints(output_dir):
            if not overwrite_output_dir:
                raise UsageError(
                    f"--output_dir {output_dir}: holds {folder.name} of an earlier run; go on with --resume_from_checkpoint auto, "
                    "start over with --overwrite_output_dir, or name another folder"
                )
            _remove(folder)
        return None
    folder = find_checkpoint(output_dir, resume_from_checkpoint)
    if folder is None:
        return None
    checkpoint = load_checkpoint(folder)
    _check_same(checkpoint, must_match)
    return checkpoint


def find_checkpoint(output_dir: Union[str, Path], which: str) -> Optional[Path]:
    """The checkpoint that --resume_from_checkpoint means: "auto" (the newest whole one, None if there is none) or a path.

    With "auto" a checkpoint that is not whole is named in a warning and passed over. A path that is not a whole checkpoint
    raises UsageError.
    """
    if which == "auto":
        for folder in reversed(list_checkpoints(output_dir)):
            fault = find_fault(folder)
            if fault is None:
                return folder
            log.warning("passing over %s: %s", folder, fault)
        return None
    fault = find_fault(Path(which).resolve())
    if fault is not None:
        raise UsageError(f"--resume_from_checkpoint {which}: {fault}; {_what_is_left(output_dir)}")
    return Path(which)


def load_checkpoint(folder: Union[str, Path]) -> Checkpoint:
    """Read what a whole checkpoint (see `find_checkpoint`) holds beside the model. Raises UsageError if it cannot be read."""
    folder = Path(folder)
    try:
        trainer_state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
        structure = json.loads((folder / "training_state.json").read_text("utf-8"))
        tensors = safetensors.torch.load_file(folder / "training_state.safetensors")
        step, progress = trainer_state["step"], dict(trainer_state["progress"])
        if type(step) is not int or step < 0:
            raise ValueError(f"step {step!r}")
        return Checkpoint(folder, step, progress=progress, **_decode(structure, tensors))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UsageError(f"{folder}: cannot be read as a checkpoint ({type(error).__name__}: {error})") from error


def go_back(
    output_dir: Union[str, Path], training_model: Any, optimizer: Any, set_weights: Callable[[Dict[str, torch.Tensor]], None]
) -> Checkpoint:
    """Put the weights and the optimizer of a running training back to the newest whole checkpoint, which is returned.

    For a step whose numbers went wrong: the device has updated the weights before the host sees the loss, so the step cannot
    be left out. The loop then goes on with the next batch, and the batches since the checkpoint are passed over, as in the
    training of PaLM (Chowdhery et al. 2022, section 5.1).  set_weights: puts the tensors of model.safetensors in the model
    on the host.  Raises RunError if there is no whole checkpoint.
    """
    folder = find_checkpoint(output_dir, "auto")
    if folder is None:
        raise RunError(f"there is no whole checkpoint in {output_dir} to go back to; save some with --save_steps")
    checkpoint = load_checkpoint(folder)
    set_weights(safetensors.torch.load_file(folder / "model.safetensors"))
    training_model.copyWeightsToDevice()
    optimizer.load_state_dict(checkpoint.optimizer)
    training_model.setOptimizer(optimizer)
    return checkpoint


def set_random_state(state: Dict[str, Any]) -> None:
    """Put Python's, NumPy's and PyTorch's global random generators where they were (`Checkpoint.random_state`).

    Raises UsageError if they do not take it.
    """
    try:
        if not 0 <= state["numpy"][2] <= 624:  # NumPy would read beyond its 624 words
            raise ValueError("NumPy's position in its state")
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch"])), dtype=torch.uint8))
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, OverflowError) as error:
        raise UsageError(f"the checkpoint's random state cannot be used ({error})") from error


def list_checkpoints(output_dir: Union[str, Path]) -> List[Path]:
    """All checkpoint-STEP folders, whole or not, by step."""
    try:
        found = [path for path in Path(output_dir).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=_step)


def find_fault(folder: Path) -> Optional[str]:
    """Why `folder` is not a whole checkpoint, or None: every file's size and SHA-256 are compared with its manifest."""
    try:
        if folder.is_symlink():
            return "it is a symbolic link"
        files = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
        absent = [name for name in _STATE_FILES if name not in files]
        if absent:
            return f"its manifest.json does not name {absent[0]}"
        for name, expected in files.items():
            if name != os.path.basename(name) or name in ("", ".", ".."):
                return f"its manifest.json names {name!r}, which is not a file of this folder"
            status = os.lstat(folder / name)
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a regular file"
            if status.st_size != expected["size"]:
                return f"{name} has {status.st_size} bytes instead of {expected['size']}"
            if _sha256(folder / name) != expected["sha256"]:
                return f"{name} is damaged (SHA-256 differs from manifest.json)"
    except OSError as error:
        return f"{Path(error.filename).name if error.filename else folder}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its manifest.json is damaged"
    return None


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name).group(1))


def _check_same(checkpoint: Checkpoint, now: Dict[str, Any]) -> None:
    """With another data set, seed, batch size ... the rest of the run would not be the run that was begun: name what differs."""
    then = checkpoint.progress.get("must_match", {})
    different = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    differences = [f"{name} was {then.get(name)}, is {now.get(name)}" for name in different]
    if differences:
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint.folder}: {'; '.join(differences)}. Go on with what it was begun with, "
            f"or start another run from its weights: --model_name_or_path {checkpoint.folder} and a new --output_dir"
        )


def _what_is_left(output_dir: Union[str, Path]) -> str:
    """For error messages; sizes and checksums are left for the resume to compare."""
    checkpoints = list_checkpoints(output_dir)
    newest = f"the newest checkpoint in {output_dir} is {checkpoints[-1].name}" if checkpoints else None
    return newest or f"there is no checkpoint in {output_dir}"


def _clean_leftovers(output_dir: Path) -> None:
    """Clear away what a killed run left half-written or half-removed."""
    for path in output_dir.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if not match:
            continue
        checkpoint, kind = match.groups()
        if kind == "replaced" and not os.path.lexists(path.with_name(checkpoint)):  # killed between the renames of _rename_into_place
            path.rename(path.with_name(checkpoint))
        else:
            _delete(path)


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` to write it in, of which nothing is left where that fails. The system's errors become RunError."""
    aside = target.with_name(f".{target.name}.tmp")
    try:
        _delete(aside)
        aside.mkdir()
        yield aside
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = system_error(error)
        if reason is None:
            raise
        raise RunError(f"could not save {target}: {reason}; {_what_is_left(target.parent)}") from error


def _rename_into_place(aside: Path, folder: Path) -> None:
    """rename(2) cannot replace a folder with files in it: an earlier checkpoint of the same step steps aside first."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    exists = os.path.lexists(folder)
    if exists:
        folder.rename(replaced)
    try:
        aside.rename(folder)
    except BaseException:
        if exists:
            replaced.rename(folder)
        raise
    sync_folder(folder.parent)
    with suppress(OSError):  # the new one is in place; what is left of the old one goes at the next start
        _delete(replaced)


def _remove_oldest(output_dir: Path, step: int, save_total_limit: Optional[int]) -> None:
    """Keep `save_total_limit` checkpoints up to `step`, which has just been written and is whole. Later ones are not touched:
    they are damaged ones that the resume passed over, and are replaced when the run comes to their step."""
    if save_total_limit is None:
        return
    earlier = [folder for folder in list_checkpoints(output_dir) if _step(folder) < step]
    for folder in earlier[: max(0, len(earlier) + 1 - save_total_limit)]:
        try:
            _remove(folder)
        except OSError as error:
            log.warning("could not remove %s: %s", folder, error.strerror)


def _remove(folder: Path) -> None:
    """By a rename first, so that what is called checkpoint-N is whole to the last."""
    removed = folder.with_name(f".{folder.name}.removed")
    folder.rename(removed)
    _delete(removed)


def _delete(path: Path) -> None:
    """Whatever stands there, if anything: a link is taken away, not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_and_hash(folder: Path) -> Dict[str, Dict[str, Any]]:
    """Flush every file in `folder` to disk; return {name: {size, sha256}} for the manifest.

    Who may read the folder may read the files: newer releases of safetensors make them their owner's alone. The bytes are
    read back from the page cache: about 0.6 s a gigabyte, a fraction of what writing them takes.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(folder.stat().st_mode & 0o666)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    return files


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _random_state() -> Dict[str, Any]:
    algorithm, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), *rest),
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode("ascii"),
    }


def _write_training_state(folder: Path, state: Dict[str, Any]) -> None:
    tensors: Dict[str, torch.Tensor] = {}
    structure = _encode(state, "", tensors)
    memory = set()
    for key, tensor in tensors.items():  # safetensors refuses tensors that share memory; few do, so few are copied
        if tensor.untyped_storage().data_ptr() in memory:
            tensors[key] = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
    safetensors.torch.save_file(tensors, folder / "training_state.safetensors")
    write_json(folder / "training_state.json", structure, indent=None)


def _encode(value: Any, name: str, tensors: Dict[str, torch.Tensor]) -> Any:
    """`value` as JSON that keeps tuples and number keys; its tensors go to `tensors`, under names that say where they stood."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        key = f"{len(tensors)}{name}"
        tensors[key] = value.detach().cpu().contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise TypeError(f"training state{name}: cannot save a {type(value).__name__}")


def _decode(value: Any, tensors: Dict[str, torch.Tensor]) -> Any:
    """The inverse of `_encode`. Raises KeyError, TypeError or ValueError on anything that `_encode` does not write."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    raise ValueError(f"unknown kind {kind!r}")
