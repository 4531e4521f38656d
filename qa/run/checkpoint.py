"""Checkpoints that are complete or absent, and from which a run continues bit for bit.

A checkpoint is the folder OUTPUT_DIR/checkpoint-STEP with these files:

    config.json, model.safetensors,   the model in Hugging Face's layout, as qa/model/pretrained.py
    tokenizer files, ipu_config.json  (write_checkpoint_files) writes it
    training_state.safetensors,       the states of the optimizer and of the random generators
    training_state.json               (qa.run.state.write_state)
    trainer_state.json                the other fields of qa.run.state.Checkpoint
    manifest.json                     size and SHA-256 of every file above

A checkpoint is written to a temporary folder in OUTPUT_DIR, flushed to disk and renamed. Nothing is
pickled: it is numbers and text, and cannot run code.
"""
from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import stat
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Union

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from ipu_options.config import IPUConfig
from ipu_options.popvision import PhaseTimer
from qa.data.rows import TrainingRows
from qa.run.log import RunLog
from qa.run.state import STATE_FILES, Checkpoint, TrainingState, read_state, write_state
from qa.settings import MUST_MATCH, TrainSettings
from runtime import files, processes
from runtime.errors import RunError, UsageError, counted

_log = logging.getLogger(__name__)
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


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far."""

    metric: Optional[str]  # name of the metric that decides; None: the last model is the final one
    step: Optional[int] = None
    value: float = -math.inf
    folder: Optional[Path] = None  # the checkpoint

    @classmethod
    def resumed(cls, metric: Optional[str], checkpoint: Checkpoint) -> "Best":
        """Return the best evaluation of the run that saved `checkpoint`, if by `metric`."""
        best = checkpoint.best
        if metric is not None and best is not None and best.get("by") == metric:
            folder = checkpoint.folder.parent / f"checkpoint-{best['step']}"
            fault = processes.on_first(find_fault, folder)
            if fault is None:
                return cls(metric, best["step"], best["metric"], folder)
            _log.warning("%s, the best checkpoint so far, is left out of the comparison: %s",
                         folder, fault)
        return cls(metric)

    def to_json(self) -> Optional[Dict[str, Any]]:
        return None if self.step is None else {
            "step": self.step, "metric": self.value, "by": self.metric}


@dataclass
class Checkpoints:
    """The checkpoints of one run in its output folder, for which the run must hold the lock.

    All processes call the same methods: all read the devices, the first one writes.
    """

    output_dir: Path
    must_match: Dict[str, Any]  # settings, by name, that a resumed run must share
    write_model: Callable[..., Any]  # writes the model, its tokenizer and its settings
    save_total_limit: Optional[int] = None  # how many are kept; None: all
    best: Best = Best(None)
    timer: Callable[[str], Any] = nullcontext
    log: Optional[RunLog] = None
    # The checkpoint that this run started from, if any, then those that it has written. The folder
    # may also hold later ones, of an earlier run.
    _of_this_run: List[Path] = field(default_factory=list)
    _saved_step: Optional[int] = None  # of the newest one that this run has written
    _evaluated_step: Optional[int] = None  # of this process's last evaluation

    @classmethod
    def of_run(cls, settings: TrainSettings, ipu_config: IPUConfig, rows: TrainingRows,
               write_model: Callable[..., Any], timer: PhaseTimer, log: RunLog) -> "Checkpoints":
        """Return the checkpoints of a run. ipu_config: the training pipeline's."""
        must_match = {
            **rows.arguments, "data": rows.windows.fingerprint,
            **{name: getattr(settings, name) for name in MUST_MATCH}}
        if settings.optimizer == "lamb":  # it scales each tensor's update by the tensor's norm
            name = "embedding_serialization_factor"
            must_match[name] = getattr(ipu_config, name)
        best_by = settings.metric_for_best_model if settings.load_best_model_at_end else None
        return cls(Path(settings.output_dir), must_match, write_model, settings.save_total_limit,
                   Best(best_by), timer, log)

    def start_or_resume(self, settings: TrainSettings) -> Optional[Checkpoint]:
        """Return the checkpoint from which this run continues, or None if it starts from scratch.

        What a killed run left unfinished is removed, and by a run from scratch the checkpoints of
        earlier runs, which `check_output_folder` has allowed. Raises UsageError if the checkpoint's
        must_match differs from this run's, or if the one that settings name is not complete.
        """
        if settings.dry_run:
            return None
        folder = processes.on_first(self._clear_and_find, settings.resume_from_checkpoint)
        if folder is None:
            return None
        checkpoint = load_checkpoint(folder)
        _check_match(checkpoint, self.must_match)
        print(f"resuming from {folder}, after step {checkpoint.step}")
        self._of_this_run.append(checkpoint.folder)
        self.best = Best.resumed(self.best.metric, checkpoint)
        return checkpoint

    def _clear_and_find(self, resume_from_checkpoint: Optional[str]) -> Optional[str]:
        _clear_leftovers(self.output_dir)
        if resume_from_checkpoint is None:
            for folder in list_checkpoints(self.output_dir):
                files.delete_folder(folder)
            return None
        folder = find_checkpoint(self.output_dir, resume_from_checkpoint)
        if folder is None:
            print(f"no checkpoint in {self.output_dir}: the run starts from the beginning")
        return folder and str(folder)

    def save(self, state: TrainingState) -> Path:
        """Save OUTPUT_DIR/checkpoint-STEP, unless it just was, and return its path.

        The oldest ones beyond the limit are removed, except the best. Raises RunError if it cannot
        be written; earlier ones are then unchanged.
        """
        folder = self.output_dir / f"checkpoint-{state.step}"
        if self._saved_step == state.step:
            return folder
        with self.timer("save"):
            trainer_state = {"step": state.step, "losses": state.losses[-200:],
                             "run_loss": state.run_loss, "logged_loss": state.logged_loss,
                             "must_match": self.must_match, "replicas": state.replicas,
                             "best": self.best.to_json()}
            processes.on_first(self._write, folder, trainer_state, state.saved(), state.model)
        self._saved_step = state.step
        self._of_this_run.append(folder)
        self.note("saved", state.step, path=str(folder))
        if processes.is_first() and self.save_total_limit is not None:
            self._remove_oldest(state.step)
        return folder

    def save_or_warn(self, state: TrainingState) -> bool:
        """Return whether `save` succeeds; if not, print a warning."""
        try:
            self.save(state)
            return True
        except RunError as error:  # a full disk may have room again when the next one is saved
            tqdm.write(f"warning: {error}; the run goes on")
            return False

    def save_stopped(self, state: TrainingState, number: signal.Signals) -> None:
        """Save the state of a run that a signal ends, and print how to go on. Raises RunError."""
        try:
            self.save(state)
        except RunError as error:
            raise RunError(f"stopped by {number.name} after step {state.step}, whose state is not "
                           f"saved: {error}") from error
        self.note("stopped", state.step, signal=number.name)
        tqdm.write(f"stopped by {number.name} after step {state.step}; "  # the bar is still there
                   "the same command with --resume_from_checkpoint auto goes on")

    def save_if_best(self, state: TrainingState, metrics: Dict[str, float]) -> None:
        """Save a checkpoint if `state`, evaluated with these metrics, is the best so far."""
        former, self._evaluated_step = self.best, state.step
        value = metrics.get(former.metric)
        if value is None or value <= former.value:
            return
        self.best = Best(former.metric, state.step, value,
                         self.output_dir / f"checkpoint-{state.step}")
        # The checkpoint just saved does not record that it is the best: write it again.
        self._saved_step = None
        if not self.save_or_warn(state):
            self.best = former

    def load_best(self, state: TrainingState, evaluate: Callable[[], Dict[str, float]]) -> int:
        """Put the weights of the best evaluation, if asked for, into the model; return its step.

        evaluate: returns the metrics of `state`.
        """
        # The run may have been stopped while it evaluated the last step.
        if self.best.metric and self._evaluated_step != state.step:
            self.save_if_best(state, evaluate())
        if self.best.step in (None, state.step):
            return state.step
        state.load_weights(self.best.folder)
        print(f"the best model is that of step {self.best.step}")
        return self.best.step

    def save_final(self, state: TrainingState) -> None:
        """Write the model into OUTPUT_DIR itself, each file whole. Raises RunError."""
        with self.timer("save"):
            processes.on_first(self._write_final, state.model, state.saved())

    def _write(self, folder: Path, trainer_state: Dict[str, Any], device_state: Dict[str, Any],
               model: torch.nn.Module) -> None:
        with _written(folder) as aside:
            self.write_model(model, aside, device_state["optimizer"])
            write_state(aside, device_state)
            files.write_json(aside / TRAINER_STATE, trainer_state)
            files.write_json(aside / "manifest.json", {
                "step": trainer_state["step"], "files": files.sync_and_hash(aside)})
            files.sync_folder(aside)
            files.rename_folder(aside, folder)

    def _write_final(self, model: torch.nn.Module, device_state: Dict[str, Any]) -> None:
        with _written(self.output_dir / "final-model") as aside:
            self.write_model(model, aside, device_state["optimizer"])
            files.sync_and_hash(aside)
            for name in ("metrics.json", "confidence.json"):  # of the model that is replaced
                with suppress(OSError):
                    (self.output_dir / name).unlink()
            for path in sorted(aside.iterdir()):
                os.replace(path, self.output_dir / path.name)
            aside.rmdir()
            files.sync_folder(self.output_dir)

    def _remove_oldest(self, step: int) -> None:
        """Keep save_total_limit of the checkpoints up to `step`, just written, and the best.

        Later ones, damaged ones that the resume passed over, stay until the run reaches their step.
        """
        earlier = [folder for folder in list_checkpoints(self.output_dir)
                   if _step(folder) < step and _step(folder) != self.best.step]
        for folder in earlier[: max(0, len(earlier) + 1 - self.save_total_limit)]:
            try:
                files.delete_folder(folder)
            except OSError as error:
                _log.warning("could not remove %s: %s", folder, error.strerror)

    def note(self, event: str, step: int, **values: Any) -> None:
        if self.log:
            self.log.add(event, step, **values)

    def newest_of_run(self) -> Checkpoint:
        """Return the newest complete checkpoint of this run. Raises RunError if there is none."""
        complete = (str(folder) for folder in reversed(self._of_this_run)
                    if find_fault(folder) is None)
        newest = processes.on_first(next, complete, None)
        if newest is None:
            raise RunError(
                f"there is no whole checkpoint of this run in {self.output_dir} to go back to; "
                "save some with --save_steps")
        return load_checkpoint(newest)


def check_output_folder(settings: TrainSettings) -> None:
    """Raise UsageError where a run would replace a model or what stands beside one."""
    folder, resume = Path(settings.output_dir), settings.resume_from_checkpoint
    if settings.overwrite_output_dir or settings.dry_run:
        return
    checkpoints = list_checkpoints(folder)
    if not settings.trains and (checkpoints or (folder / "model.safetensors").exists()):
        raise UsageError(
            f"--output_dir {folder}: holds a model, whose metrics and predictions this evaluation "
            "would replace; name another folder, or replace them with --overwrite_output_dir")
    if resume is None and checkpoints:
        raise UsageError(
            f"--output_dir {folder}: holds {checkpoints[0].name} of an earlier run; go on with "
            "--resume_from_checkpoint auto, start over with --overwrite_output_dir, or name "
            "another folder")
    if (folder / "model.safetensors").exists() and (
            resume is None or resume == "auto" and not checkpoints):
        raise UsageError(f"--output_dir {folder}: holds a finished model; replace it with "
                         "--overwrite_output_dir, or name another folder")


def find_checkpoint(output_dir: Union[str, Path], which: str) -> Optional[Path]:
    """Return the folder of the checkpoint that --resume_from_checkpoint `which` refers to.

    "auto" is the newest complete one in `output_dir`, if any. Raises UsageError for a path of none.
    """
    if which == "auto":
        for folder in reversed(list_checkpoints(output_dir)):
            fault = find_fault(folder)
            if fault is None:
                return folder
            _log.warning("passing over %s: %s", folder, fault)
        return None
    fault = find_fault(Path(which).resolve())
    if fault is not None:
        raise UsageError(f"--resume_from_checkpoint {which}: {fault}; {_what_is_left(output_dir)}")
    return Path(which)


def load_checkpoint(folder: Union[str, Path]) -> Checkpoint:
    """Read a complete checkpoint but for the weights. Raises UsageError if it cannot be read."""
    folder = Path(folder)
    try:
        values = json.loads((folder / TRAINER_STATE).read_text("utf-8"))
        # Older checkpoints hold all but the step under "progress", and lack some of it.
        values = {"replicas": None, "best": None, "run_loss": [], "logged_loss": [],
                  **values.pop("progress", {}), **values}
        if type(values["step"]) is not int or values["step"] < 0:
            raise ValueError(f"step {values['step']!r}")
        return Checkpoint(folder, **values, **read_state(folder))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UsageError(
            f"{folder}: cannot be read as a checkpoint ({type(error).__name__}: {error})"
        ) from error


def list_checkpoints(output_dir: Union[str, Path]) -> List[Path]:
    """Return all checkpoint-STEP folders in `output_dir`, complete or not, sorted by step."""
    return sorted((path for path in Path(output_dir).glob("checkpoint-*")
                   if _NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def find_fault(folder: Path) -> Optional[str]:
    """Return in what `folder` differs from its manifest, or None if it is a whole checkpoint."""
    try:
        if folder.is_symlink():
            return "it is a symbolic link"
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
        absent = [name for name in (*STATE_FILES, TRAINER_STATE) if name not in manifest]
        if absent:
            return f"its manifest.json does not name {absent[0]}"
        for name, expected in manifest.items():
            if name != os.path.basename(name) or name in ("", ".", ".."):
                return f"its manifest.json names {name!r}, which is not a file of this folder"
            status = os.lstat(folder / name)
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a regular file"
            if status.st_size != expected["size"]:
                return (f"{name} has {counted(status.st_size, 'byte')} instead of "
                        f"{expected['size']}")
            if files.sha256(folder / name) != expected["sha256"]:
                return f"{name} is damaged (SHA-256 differs from manifest.json)"
    except OSError as error:
        return f"{Path(error.filename).name if error.filename else folder}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its manifest.json is damaged"
    return None


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name).group(1))


def _check_match(checkpoint: Checkpoint, now: Dict[str, Any]) -> None:
    then = checkpoint.must_match
    different = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    differences = [f"{_AS_FLAGS.get(name, '--' + name)} was {_as_text(then.get(name))}, "
                   f"is {_as_text(now.get(name))}" for name in different]
    if differences:
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint.folder}: {'; '.join(differences)}. "
            f"Go on with what it was begun with, or {checkpoint.another_run()}")


def _as_text(value: Any) -> str:
    return "not given" if value in (None, -1) else str(value)  # -1: the rows' --max_steps


def _what_is_left(output_dir: Union[str, Path]) -> str:
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return f"there is no checkpoint in {output_dir}"
    return f"the newest checkpoint in {output_dir} is {checkpoints[-1].name}"


def _clear_leftovers(output_dir: Path) -> None:
    """Remove what a killed run left, but put back a checkpoint without its replacement."""
    for path in output_dir.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if not match:
            continue
        checkpoint, kind = match.groups()
        # This is what a kill between the two renames of rename_folder leaves.
        if kind == "replaced" and not os.path.lexists(path.with_name(checkpoint)):
            path.rename(path.with_name(checkpoint))
        else:
            files.delete(path)


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    try:
        with files.folder_written_aside(target) as aside:
            yield aside
    except Exception as error:
        reason = files.system_error(error)
        if reason is None:
            raise
        raise RunError(
            f"could not save {target}: {reason}; {_what_is_left(target.parent)}") from error
