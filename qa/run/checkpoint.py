"""Checkpoints that are complete or absent, and from which a run continues bit for bit.

A checkpoint is the folder OUTPUT_DIR/checkpoint-STEP with these files:

    config.json, model.safetensors,   the model in Hugging Face's layout, as `Training.write_files`
    tokenizer files, ipu_config.json  writes it
    training_state.safetensors,       the states of the optimizer and of the random generators
    training_state.json               (qa/run/state.py)
    trainer_state.json                the step, the losses, and the settings that a resumed run must
                                      share
    manifest.json                     size and SHA-256 of every file above

A checkpoint is written to a temporary folder in OUTPUT_DIR, flushed to disk and renamed, so that it
is complete or absent even if the process is killed at any moment. Nothing is pickled: a checkpoint
from an untrusted source contains only numbers and text, and cannot run code.
"""
from __future__ import annotations

import json
import logging
import os
import re
import stat
import zlib
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Union

import safetensors.torch
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from ipu_options.config import IPUConfig
from ipu_options.popvision import Spans
from qa.data.rows import TrainingRows
from qa.model.optimizer import optimizer_state, set_optimizer_state
from qa.model.parallelize import set_weights, weights_of
from qa.run.log import RunLog
from qa.run.state import STRUCTURE, TENSORS, random_state, read_state, set_random_state, write_state
from qa.settings import MUST_MATCH, TrainSettings
from runtime import processes
from runtime.errors import RunError, UsageError
from runtime.files import (
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

log = logging.getLogger(__name__)
TRAINER_STATE = "trainer_state.json"
# What a user calls the arguments of the rows that a resumed run must share.
_AS_FLAGS = {
    "row_length": "--max_seq_length", "updates_per_step": "--device_iterations",
    "max_windows_per_row": "the windows of a row (--pack, --max_windows_per_row)",
    "micro_batches_per_update": "the micro-batches of a weight update "
                                "(--gradient_accumulation_steps x --replication_factor)",
    "epochs": "--num_train_epochs", "pad_token_id": "the tokenizer's padding token",
    "first_position": "the model's family", "token_types": "the model's family",
    "data": "the data (training questions, tokenizer, --doc_stride, or the version of datasets)"}
_NAME = re.compile(r"checkpoint-(\d+)")
# What a killed process may leave behind: checkpoints that were being written, replaced or removed,
# a final model that was being written, and temporary files.
_LEFTOVER = re.compile(
    r"\.(checkpoint-\d+)\.(tmp|removed|replaced)|\.final-model\.tmp|\..+\.[0-9a-f]{8}\.tmp")


class Checkpoint(NamedTuple):
    """The content of a checkpoint, except for the weights.

    The weights remain in `folder`, from where they are loaded like those of any Hugging Face model.
    """

    folder: Path
    step: int
    optimizer: Dict[str, Any]  # for set_optimizer_state()
    rng_state: Optional[List[int]]  # for training_model.rng_state, once the model is compiled
    random_state: Dict[str, Any]  # for set_random_state()
    progress: Dict[str, Any]  # "losses" of the last steps, and "must_match"


class Training(NamedTuple):
    """What a training run changes: the model, and PopTorch's optimizer and executor for it.

    write_files(folder) writes the model (safetensors), its tokenizer and its settings.
    """

    model: torch.nn.Module
    optimizer: Any  # a poptorch optimizer, whose state_dict() reads its state from the device
    training_model: Any  # a poptorch.PoplarExecutor
    write_files: Callable[[Path], Any]

    def detached_weights(self) -> Dict[str, torch.Tensor]:
        """Free the IPUs, and return the weights as `weights_of` gives them."""
        if self.training_model.isAttachedToDevice():
            self.training_model.detachFromDevice()  # copies the weights to the host
        return weights_of(self.model)


class Checkpoints:
    """The checkpoints of one run in its output folder, for which the run must hold the lock.

    With several processes all call the same methods: what is on the devices is read by all, and
    written by the first. The checkpoint is the same whatever the number of processes.

    must_match: the settings, by name, that must be the same in the checkpoint and in a run that
    resumes from it. save_total_limit: how many checkpoints to keep (default: all); the oldest are
    removed first. spans: names the phase for PopVision. log: gets a line when the run begins and
    when something is saved. best_by: the metric of the evaluations whose best checkpoint is kept
    and becomes the final model (default: none).
    """

    def __init__(self, output_dir: Union[str, Path], must_match: Dict[str, Any],
                 save_total_limit: Optional[int] = None, spans: Optional[Spans] = None,
                 log: Optional[RunLog] = None, best_by: Optional[str] = None):
        self.output_dir = Path(output_dir)
        self.must_match, self.save_total_limit = must_match, save_total_limit
        self._metric, self._log = best_by, log
        self._span = partial(spans, "save") if spans else nullcontext
        # The checkpoint that this run started from, if any, and those that it has written since.
        # The folder may also hold later ones, of an earlier run.
        self._own: List[Path] = []
        self._saved_step: Optional[int] = None  # of the newest one that this run has written
        # The best evaluation so far: its step, its metric, and the metric's name.
        self._best: Optional[Dict[str, Any]] = None
        self._best_folder: Optional[Path] = None  # the checkpoint of it
        self._compared: Optional[int] = None  # the step of the last evaluation of this process

    @classmethod
    def of_run(cls, settings: TrainSettings, ipu_config: IPUConfig, rows: TrainingRows,
               spans: Spans, log: RunLog) -> "Checkpoints":
        """Return the checkpoints of a run with these settings and these training rows.

        ipu_config: that of the training pipeline.
        """
        must_match = {
            **rows.arguments, "data": rows.windows.fingerprint,
            **{name: getattr(settings, name) for name in MUST_MATCH}}
        # LAMB scales the update of each parameter tensor by its norm, and so that of each part.
        if settings.optimizer == "lamb":
            name = "embedding_serialization_factor"
            must_match[name] = getattr(ipu_config, name)
        best_by = settings.metric_for_best_model if settings.load_best_model_at_end else None
        return cls(settings.output_dir, must_match, settings.save_total_limit, spans, log, best_by)

    def start_or_resume(self, settings: TrainSettings) -> Optional[Checkpoint]:
        """Return the checkpoint from which this run continues, or None if it starts from scratch.

        settings.resume_from_checkpoint: None, "auto" or a path, see `find_checkpoint`. A run from
        scratch removes the checkpoints of earlier runs, which `check_output_folder` has allowed.
        What a killed run left unfinished is removed in any case. A run that trains nothing
        (settings.dry_run) leaves the folder as it is. Says where a resumed run continues.

        Raises UsageError if the checkpoint's must_match differs from that of this run, or if there
        is no complete checkpoint at the given path.
        """
        if settings.dry_run:
            return None
        found = processes.on_first(self._find, settings.resume_from_checkpoint)
        if found is None:
            return None
        folder = Path(found)
        checkpoint = load_checkpoint(folder)
        _check_match(checkpoint, self.must_match)
        print(f"resuming from {folder}, after step {checkpoint.step}")
        self._own.append(folder)
        self._resume_best(checkpoint)
        return checkpoint

    def _resume_best(self, checkpoint: Checkpoint) -> None:
        """Continue to look for the best evaluation, if this run looks for it by the same metric."""
        best = checkpoint.progress.get("best")
        if self._metric is None or best is None or best.get("by") != self._metric:
            return
        folder = checkpoint.folder.parent / f"checkpoint-{best['step']}"
        fault = processes.on_first(find_fault, folder)
        if fault is None:
            self._best, self._best_folder = best, folder
        else:
            log.warning("%s, the best checkpoint so far, is left out of the comparison: %s",
                        folder, fault)

    def _find(self, resume_from_checkpoint: Optional[str]) -> Optional[str]:
        """Clear the output folder for this run; return the checkpoint to continue from, or None."""
        _clear_leftovers(self.output_dir)
        if resume_from_checkpoint is None:
            for folder in list_checkpoints(self.output_dir):
                delete_folder(folder)
            return None
        found = find_checkpoint(self.output_dir, resume_from_checkpoint)
        if found is None:
            print(f"no checkpoint in {self.output_dir}: the run starts from the beginning")
        return found and str(found)

    def save(self, training: Training, step: int, losses: List[float]) -> Path:
        """Save OUTPUT_DIR/checkpoint-STEP and return its path.

        losses: those of the steps so far, of which the last 200 are saved. The current random
        states of Python, NumPy and PyTorch are saved too. Afterwards the oldest checkpoints beyond
        the limit are removed, but not that of the best evaluation. Nothing is done if this process
        has just saved the same step.

        Raises RunError if the checkpoint cannot be written (disk full, read-only, removed, ...).
        Earlier checkpoints are then unchanged, and the incomplete one is removed.
        """
        folder = self.output_dir / f"checkpoint-{step}"
        if self._saved_step == step:
            return folder
        with self._span():
            training.training_model.copyWeightsToHostIfNeeded()  # it may be detached
            state = {
                "optimizer": optimizer_state(training.optimizer),
                "rng_state": _rng_of_all(training.training_model), "random_state": random_state()}
            progress = {"must_match": self.must_match, "losses": losses[-200:],
                        "replicas": _replicas(training.training_model)}
            if self._best:
                progress["best"] = self._best
            processes.on_first(_write, folder, training, state, step, progress)
        self._saved_step = step
        self._own.append(folder)
        self.note("saved", step, path=str(folder))
        if processes.is_first():
            _remove_oldest(self.output_dir, step, self.save_total_limit,
                           keep=self._best["step"] if self._best else None)
        return folder

    def save_if_best(self, training: Training, step: int, losses: List[float],
                     metrics: Dict[str, float]) -> None:
        """Save a checkpoint if the evaluation after `step` is the best so far.

        metrics: of the evaluation. Does nothing without --load_best_model_at_end.
        """
        metric = metrics.get(self._metric)
        self._compared = step
        if metric is not None and (self._best is None or metric > self._best["metric"]):
            before, self._best = self._best, {"step": step, "metric": metric, "by": self._metric}
            self._saved_step = None  # one that has just been saved does not know yet
            if self.save_or_warn(training, step, losses):
                self._best_folder = self._own[-1]
            else:
                self._best = before

    def load_best(self, training: Training, step: int, losses: List[float],
                  evaluate: Callable[[int], Dict[str, float]]) -> int:
        """Put the weights of the best evaluation into the model; returns its step.

        step: the last step of the training, whose weights stay if they are the best, or without
        --load_best_model_at_end. evaluate: returns the metrics of a step; it is called if the run
        was stopped while it evaluated the last one, and is resumed.
        """
        if self._metric and self._compared != step:
            self.save_if_best(training, step, losses, evaluate(step))
        best = self._best["step"] if self._best else step
        if best != step:
            # Frees the IPUs, so that no later call brings their weights back.
            training.detached_weights()
            file = self._best_folder / "model.safetensors"
            set_weights(training.model, safetensors.torch.load_file(file))
            print(f"the best model is that of step {best}")
        return best

    def save_or_warn(self, training: Training, step: int, losses: List[float]) -> bool:
        """Save a checkpoint like `save`, but only print a warning if that fails.

        A full disk may have room again when the next checkpoint is saved. Returns whether it was
        saved.
        """
        try:
            self.save(training, step, losses)
            return True
        except RunError as error:
            tqdm.write(f"warning: {error}; the run goes on")
            return False

    def save_final(self, training: Training) -> None:
        """Write the trained model into OUTPUT_DIR itself.

        Each file is replaced by its complete new version or left unchanged. Raises RunError as
        `save` does.
        """
        with self._span():
            training.training_model.copyWeightsToHostIfNeeded()
            processes.on_first(self._write_final, training)

    def _write_final(self, training: Training) -> None:
        with _written(self.output_dir / "final-model") as aside:
            training.write_files(aside)
            sync_and_hash(aside)
            former = self.output_dir / "metrics.json"
            if former.is_file():  # of the model that is replaced
                former.unlink()
            for path in sorted(aside.iterdir()):
                os.replace(path, self.output_dir / path.name)
            aside.rmdir()
            sync_folder(self.output_dir)

    def note(self, event: str, step: int, **values: Any) -> None:
        """Add a line to the log of the run, if it keeps one (see `RunLog.add`)."""
        if self._log:
            self._log.add(event, step, **values)

    def newest_of_run(self) -> Checkpoint:
        """Return the newest complete checkpoint that this run has written or has started from.

        Raises RunError if there is none.
        """
        return load_checkpoint(processes.on_first(self._newest_whole))

    def _newest_whole(self) -> str:
        for folder in reversed(self._own):
            if find_fault(folder) is None:
                return str(folder)
        raise RunError(
            f"there is no whole checkpoint of this run in {self.output_dir} to go back to; "
            "save some with --save_steps")


def go_back(checkpoint: Checkpoint, training: Training) -> None:
    """Reset weights and optimizer of a running training to those of `checkpoint`.

    This is for a step with a loss, gradient or weight that is not finite. The step cannot be left
    out, because the device has updated the weights before the host sees the loss. After the reset
    the training loop continues with the next batch, and the batches since the checkpoint are
    skipped, as in the training of PaLM (Chowdhery et al. 2022, section 5.1).

    The device is detached, and the next call attaches to it again. Only this initialises the
    gradient accumulators: with accumulators of float16 their mean is a running one (PopTorch,
    _optimizer_attributes.py, convertOptimizerToDict), for which PopART multiplies the old value by
    0 instead of setting it to 0 (popart, popx/op/accumulatex.cpp, AccumulationType::Mean), and NaN
    stays NaN.
    """
    if training.training_model.isAttachedToDevice():
        training.training_model.detachFromDevice()
    set_weights(training.model, safetensors.torch.load_file(checkpoint.folder /
                                                            "model.safetensors"))
    set_optimizer_state(training.optimizer, training.model, checkpoint.optimizer)
    training.training_model.setOptimizer(training.optimizer)


def check_output_folder(settings: TrainSettings) -> None:
    """Raise UsageError where a run from scratch would replace an earlier run's work.

    That is: checkpoints or a finished model, unless --overwrite_output_dir is set.
    """
    folder, resume = Path(settings.output_dir), settings.resume_from_checkpoint
    if settings.overwrite_output_dir or not settings.trains or settings.dry_run:
        return
    checkpoints = list_checkpoints(folder)
    if resume is None and checkpoints:
        raise UsageError(
            f"--output_dir {folder}: holds {checkpoints[0].name} of an earlier run; go on with "
            "--resume_from_checkpoint auto, start over with --overwrite_output_dir, or name "
            "another folder")
    if (folder / "model.safetensors").exists() and (
            resume is None or resume == "auto" and not checkpoints):
        raise UsageError(f"--output_dir {folder}: holds a finished model; replace it with "
                         "--overwrite_output_dir, or name another folder")


def restore_states(checkpoint: Optional[Checkpoint], training_model: Any, optimizer: Any) -> None:
    """Restore the states of the optimizer and of the random generators from `checkpoint`, if any.

    training_model: a poptorch.PoplarExecutor that has the checkpoint's weights already. It must be
    compiled, because rng_state is on the device (PopTorch, _poplar_executor.py).
    optimizer: its poptorch optimizer. The number of processes may be another than when it was
    saved. Raises UsageError if the checkpoint's random state cannot be used, or if another process
    has other weights.
    """
    if processes.count() > 1:
        weights = weights_of(training_model.model).values()
        hashes = [zlib.crc32(each.detach().flatten().view(torch.uint8).numpy()) for each in weights]
        processes.agree({"the checksum of the model's weights": zlib.crc32(repr(hashes).encode())})
    if checkpoint is None:
        return
    set_optimizer_state(optimizer, training_model.model, checkpoint.optimizer)
    training_model.setOptimizer(optimizer)
    training_model.rng_state = _rng_of_process(checkpoint, _replicas(training_model))
    set_random_state(checkpoint.random_state)


def _rng_of_all(training_model: Any) -> List[int]:
    """Collective: return rng_state as it would be with all replicas in one process.

    PopTorch's rng_state is the seed, then the states of this process's replicas. The seeds of other
    processes than the first may differ by an offset.
    """
    states = processes.share(training_model.rng_state)
    return states[0] + [number for state in states[1:] for number in state[1:]]


def _replicas(training_model: Any) -> int:
    """Return the number of replicas of all processes."""
    return training_model.options.replication_factor * processes.count()


def _rng_of_process(checkpoint: Checkpoint, replicas: int) -> List[int]:
    """Return this process's part of the checkpoint's `_rng_of_all`.

    How long a replica's state is, only the device knows, and before its first run PopTorch does not
    ask it (_poplar_executor.py, rng_state). replicas: of all processes of this run. Raises
    UsageError for a checkpoint of another number of replicas.
    """
    seed, *states = checkpoint.rng_state
    length = len(states) // processes.count()
    if checkpoint.progress.get("replicas", replicas) != replicas:
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint.folder}: holds the random state of another "
            "number of replicas; go on with the --replication_factor that it was begun with, or "
            f"start another run from its weights: --model_name_or_path {checkpoint.folder} and a "
            "new --output_dir")
    first = processes.place().index * length
    return [seed, *states[first:first + length]]


def find_checkpoint(output_dir: Union[str, Path], which: str) -> Optional[Path]:
    """Return the folder of the checkpoint that --resume_from_checkpoint refers to.

    which: a path, or "auto" for the newest complete checkpoint in `output_dir`. With "auto" an
    incomplete checkpoint is skipped with a warning, and the result is None if none is complete.
    Raises UsageError if `which` is a path that is not a complete checkpoint.
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
    """Read everything but the weights of a complete checkpoint (see `find_checkpoint`).

    Raises UsageError if it cannot be read.
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
    """Return all checkpoint-STEP folders in `output_dir`, complete or not, sorted by step."""
    try:
        found = [
            path for path in Path(output_dir).iterdir()
            if _NAME.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=_step)


def find_fault(folder: Path) -> Optional[str]:
    """Return why `folder` is not a complete checkpoint, or None if it is one.

    The size and the SHA-256 of every file are compared with the manifest.
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
    """Raise UsageError if the checkpoint's must_match differs from `now`, that of this run.

    The message names each setting that differs, with both values.
    """
    then = checkpoint.progress.get("must_match", {})
    different = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    differences = [f"{_AS_FLAGS.get(name, '--' + name)} was {_given(then.get(name))}, "
                   f"is {_given(now.get(name))}" for name in different]
    if differences:
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint.folder}: {'; '.join(differences)}. "
            "Go on with what it was begun with, or start another run from its weights: "
            f"--model_name_or_path {checkpoint.folder} and a new --output_dir")


def _given(value: Any) -> str:
    """Return a setting's value as a message shows it. Without --max_steps, the rows have -1."""
    return "not given" if value in (None, -1) else str(value)


def _what_is_left(output_dir: Union[str, Path]) -> str:
    """Return which checkpoint is the newest, as the end of an error message.

    The checkpoint is not verified: hashing its files can take long, and a resume does it anyway.
    """
    checkpoints = list_checkpoints(output_dir)
    newest = (f"the newest checkpoint in {output_dir} is {checkpoints[-1].name}"
              if checkpoints else None)
    return newest or f"there is no checkpoint in {output_dir}"


def _clear_leftovers(output_dir: Path) -> None:
    """Remove what a killed run left unfinished in `output_dir`.

    A checkpoint that it was replacing is put back if the replacement is not in place.
    """
    for path in output_dir.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if not match:
            continue
        checkpoint, kind = match.groups()
        # Only a kill between the two renames of rename_folder leaves ".replaced" without its
        # replacement.
        if kind == "replaced" and not os.path.lexists(path.with_name(checkpoint)):
            path.rename(path.with_name(checkpoint))
        else:
            delete(path)


def _write(folder: Path, training: Training, state: Dict[str, Any], step: int,
           progress: Dict[str, Any]) -> None:
    """Write the checkpoint `folder`, whole or not at all. Raises RunError."""
    with _written(folder) as aside:
        training.write_files(aside)
        write_state(aside, state)
        write_json(aside / TRAINER_STATE, {"step": step, "progress": progress})
        write_json(aside / "manifest.json", {"step": step, "files": sync_and_hash(aside)})
        sync_folder(aside)
        rename_folder(aside, folder)


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """Give the temporary folder of `folder_written_aside`, but turn system errors into RunError.

    The message of the RunError names the newest checkpoint that is left.
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


def _remove_oldest(output_dir: Path, step: int, save_total_limit: Optional[int],
                   keep: Optional[int] = None) -> None:
    """Remove the oldest checkpoints, so that `save_total_limit` remain of those up to `step`.

    The checkpoint of `step` has just been written and is complete. Later checkpoints are left
    alone: the resume passed over them, usually because they are damaged, and they are replaced when
    the run reaches their steps.
    """
    if save_total_limit is None:
        return
    earlier = [folder for folder in list_checkpoints(output_dir)
               if _step(folder) < step and _step(folder) != keep]
    for folder in earlier[: max(0, len(earlier) + 1 - save_total_limit)]:
        try:
            delete_folder(folder)
        except OSError as error:
            log.warning("could not remove %s: %s", folder, error.strerror)
