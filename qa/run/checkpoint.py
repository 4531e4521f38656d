"""Checkpoints that are complete or absent, and from which a run continues bit for bit.

A checkpoint is the folder OUTPUT_DIR/checkpoint-STEP:

    config.json, model.safetensors, tokenizer files, ipu_config.json    Hugging Face's layout (`Training.write_files`)
    training_state.safetensors, training_state.json                     optimizer and random states (qa/run/state.py)
    trainer_state.json                                                  step, losses, and what a resumed run has to agree with
    manifest.json                                                       size and SHA-256 of every file above

It is written in a folder beside it, flushed to disk and renamed, so that a kill at any moment
leaves it complete or absent. Nothing is ever pickled: a checkpoint from someone else holds numbers
and text, and cannot run code.
"""
from __future__ import annotations

import json
import logging
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Union

import safetensors.torch
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from ipu_options.errors import RunError, UsageError
from ipu_options.files import (
    delete,
    delete_folder,
    folder_written_aside,
    rename_folder,
    sha256,
    sync_and_hash,
    sync_folder,
    system_error,
    write_json,
)
from qa.data.rows import TrainingRows
from qa.run.state import STRUCTURE, TENSORS, random_state, read_state, set_random_state, write_state
from qa.settings import MUST_MATCH, TrainSettings

log = logging.getLogger(__name__)
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# What a killed process may leave behind: half-written, replaced or removed checkpoints, a
# half-written model, a half-written file.
_LEFTOVER = re.compile(
    r"\.(checkpoint-\d+)\.(tmp|removed|replaced)|\.final-model\.tmp|\..+\.[0-9a-f]{8}\.tmp")


class Checkpoint(NamedTuple):
    """What `load_checkpoint` reads. The weights stay in `folder`, to be loaded like any Hugging
    Face model.
    """

    folder: Path
    step: int
    optimizer: Dict[str, Any]  # for optimizer.load_state_dict()
    rng_state: Optional[
        List[int]]  # for training_model.rng_state, which takes it once the model is compiled
    random_state: Dict[str, Any]  # for set_random_state()
    progress: Dict[str, Any]  # "losses" of the last steps, and "must_match"


class Training(NamedTuple):
    """What a training run changes: the model, and PopTorch's optimizer and executor for it.

    write_files(folder): writes the model (safetensors), its tokenizer and its settings.
    """

    model: torch.nn.Module
    optimizer: Any  # a poptorch optimizer, whose state_dict() reads its state from the device
    training_model: Any  # a poptorch.PoplarExecutor
    write_files: Callable[[Path], Any]


class Checkpoints:
    """The checkpoints of one run in its output folder, which the run holds locked.

    must_match: settings by name that a resumed run has to share with the checkpoint.
    save_total_limit: how many checkpoints to keep; the oldest go first.
    """

    def __init__(self, output_dir: Union[str, Path], must_match: Dict[str, Any],
                 save_total_limit: Optional[int] = None):
        self.output_dir = Path(output_dir)
        self.must_match, self.save_total_limit = must_match, save_total_limit
        self._saved_step: Optional[
            int] = None  # of the newest checkpoint that this process has written

    @classmethod
    def of_run(cls, settings: TrainSettings, rows: TrainingRows) -> "Checkpoints":
        """The checkpoints of a run with these settings over these rows."""
        must_match = {
            **rows.arguments, "data": rows.windows.fingerprint, **{
                name: getattr(settings, name) for name in MUST_MATCH}}
        return cls(settings.output_dir, must_match, settings.save_total_limit)

    def open(self, resume_from_checkpoint: Optional[str],
             overwrite_output_dir: bool) -> Optional[Checkpoint]:
        """The checkpoint that this run continues, or None for a run from the beginning.

        Clears away what a killed run left half-written, and with `overwrite_output_dir` the
        checkpoints of earlier runs. Raises UsageError where the checkpoint's must_match says
        otherwise, where there is no complete checkpoint at the path given, and where a run from the
        beginning would mix its checkpoints with those of another run.
        """
        _clear_leftovers(self.output_dir)
        if resume_from_checkpoint is None:
            for folder in list_checkpoints(self.output_dir):
                if not overwrite_output_dir:
                    raise UsageError(
                        f"--output_dir {self.output_dir}: holds {folder.name} of an earlier run; go on with "
                        "--resume_from_checkpoint auto, start over with --overwrite_output_dir, or name another folder"
                    )
                delete_folder(folder)
            return None
        folder = find_checkpoint(self.output_dir, resume_from_checkpoint)
        if folder is None:
            return None
        checkpoint = load_checkpoint(folder)
        _check_match(checkpoint, self.must_match)
        return checkpoint

    def save(self, training: Training, step: int, losses: List[float]) -> Path:
        """Save OUTPUT_DIR/checkpoint-STEP, unless this process has just done so, and return its
        path.

        losses: of the steps so far; the last 200 are kept. Python's, NumPy's and PyTorch's random
        states are saved as they are now. The oldest checkpoints beyond the limit are removed.
        Raises RunError where the disk is full, read-only, gone ...: earlier checkpoints are as they
        were, no half-written one stays.
        """
        folder = self.output_dir / f"checkpoint-{step}"
        if self._saved_step == step:
            return folder
        training.training_model.copyWeightsToHost()
        with _written(folder) as aside:
            training.write_files(aside)
            write_state(
                aside, {
                    "optimizer": training.optimizer.state_dict(),
                    "rng_state": training.training_model.rng_state, "random_state": random_state()})
            progress = {"must_match": self.must_match, "losses": losses[-200:]}
            write_json(aside / TRAINER_STATE, {"step": step, "progress": progress})
            write_json(aside / "manifest.json", {"step": step, "files": sync_and_hash(aside)})
            sync_folder(aside)
            rename_folder(aside, folder)
        self._saved_step = step
        _remove_oldest(self.output_dir, step, self.save_total_limit)
        return folder

    def save_or_warn(self, training: Training, step: int, losses: List[float]) -> None:
        """`save` that only warns where it fails: a full disk may have room again at the next save.
        """
        try:
            self.save(training, step, losses)
        except RunError as error:
            tqdm.write(f"warning: {error}; the run goes on")

    def save_final(self, training: Training) -> None:
        """Put the trained model into OUTPUT_DIR itself, each file complete or as it was. Raises
        RunError as `save` does.
        """
        training.training_model.copyWeightsToHost()
        with _written(self.output_dir / "final-model") as aside:
            training.write_files(aside)
            sync_and_hash(aside)
            for path in sorted(aside.iterdir()):
                os.replace(path, self.output_dir / path.name)
            aside.rmdir()
            sync_folder(self.output_dir)

    def go_back(
            self, training: Training,
            set_weights: Callable[[torch.nn.Module, Dict[str, torch.Tensor]], None]) -> Checkpoint:
        """Put weights and optimizer of a running training back to the newest complete checkpoint,
        which is returned.

        For a step whose numbers went wrong: the device has updated the weights before the host sees
        the loss, so the step cannot be left out. The loop then continues with the next batch, and
        the batches since the checkpoint are passed over, as in the training of PaLM (Chowdhery et
        al. 2022, section 5.1). set_weights(model, weights): puts the tensors of model.safetensors
        into the model on the host. Raises RunError if there is no complete checkpoint.
        """
        folder = find_checkpoint(self.output_dir, "auto")
        if folder is None:
            raise RunError(
                f"there is no whole checkpoint in {self.output_dir} to go back to; save some with --save_steps"
            )
        checkpoint = load_checkpoint(folder)
        set_weights(training.model, safetensors.torch.load_file(folder / "model.safetensors"))
        training.training_model.copyWeightsToDevice()
        training.optimizer.load_state_dict(checkpoint.optimizer)
        training.training_model.setOptimizer(training.optimizer)
        return checkpoint


def restore(checkpoint: Checkpoint, training_model: Any, optimizer: Any) -> None:
    """Continue from `checkpoint`, whose weights the compiled `training_model` holds already:
    optimizer state, random states.

    Raises UsageError if the checkpoint's random state cannot be used.
    """
    optimizer.load_state_dict(checkpoint.optimizer)
    training_model.setOptimizer(optimizer)
    training_model.rng_state = checkpoint.rng_state
    set_random_state(checkpoint.random_state)


def find_checkpoint(output_dir: Union[str, Path], which: str) -> Optional[Path]:
    """The checkpoint that --resume_from_checkpoint means: "auto" (the newest whole one, None if
    there is none) or a path.

    With "auto" a checkpoint that is not whole is named in a warning and passed over. A path that is
    not a whole checkpoint raises UsageError.
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
    """Read what a complete checkpoint (see `find_checkpoint`) holds beside the model. Raises
    UsageError if it cannot be read.
    """
    folder = Path(folder)
    try:
        trainer_state = json.loads((folder / TRAINER_STATE).read_text("utf-8"))
        step, progress = trainer_state["step"], dict(trainer_state["progress"])
        if type(step) is not int or step < 0:
            raise ValueError(f"step {step!r}")
        return Checkpoint(folder, step, progress=progress, **read_state(folder))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UsageError(
            f"{folder}: cannot be read as a checkpoint ({type(error).__name__}: {error})"
        ) from error


def list_checkpoints(output_dir: Union[str, Path]) -> List[Path]:
    """All checkpoint-STEP folders, whole or not, by step."""
    try:
        found = [
            path for path in Path(output_dir).iterdir()
            if _NAME.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=_step)


def find_fault(folder: Path) -> Optional[str]:
    """Why `folder` is not a whole checkpoint, or None: every file's size and SHA-256 are compared
    with its manifest.
    """
    try:
        if folder.is_symlink():
            return "it is a symbolic link"
        files = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
        absent = [name for name in (TENSORS, STRUCTURE, TRAINER_STATE) if name not in files]
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
            if sha256(folder / name) != expected["sha256"]:
                return f"{name} is damaged (SHA-256 differs from manifest.json)"
    except OSError as error:
        return f"{Path(error.filename).name if error.filename else folder}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its manifest.json is damaged"
    return None


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name).group(1))


def _check_match(checkpoint: Checkpoint, now: Dict[str, Any]) -> None:
    """Raise UsageError, naming what differs, where the rest of the run would not be the rest of the
    run that was begun.
    """
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


def _clear_leftovers(output_dir: Path) -> None:
    """Clear away what a killed run left half-written or half-removed."""
    for path in output_dir.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if not match:
            continue
        checkpoint, kind = match.groups()
        if kind == "replaced" and not os.path.lexists(
                path.with_name(checkpoint)):  # killed between the renames of rename_folder
            path.rename(path.with_name(checkpoint))
        else:
            delete(path)


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """`folder_written_aside`, with an error of the system as a RunError that says which checkpoint
    is left.
    """
    try:
        with folder_written_aside(target) as aside:
            yield aside
    except Exception as error:
        reason = system_error(error)
        if reason is None:
            raise
        raise RunError(
            f"could not save {target}: {reason}; {_what_is_left(target.parent)}") from error


def _remove_oldest(output_dir: Path, step: int, save_total_limit: Optional[int]) -> None:
    """Keep `save_total_limit` checkpoints up to `step`, which has just been written and is whole.
    Later ones are not touched: they are damaged ones that the resume passed over, and are replaced
    when the run comes to their step.
    """
    if save_total_limit is None:
        return
    earlier = [folder for folder in list_checkpoints(output_dir) if _step(folder) < step]
    for folder in earlier[: max(0, len(earlier) + 1 - save_total_limit)]:
        try:
            delete_folder(folder)
        except OSError as error:
            log.warning("could not remove %s: %s", folder, error.strerror)
