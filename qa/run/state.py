"""What a training run changes, and how it is saved, restored and reset."""
from __future__ import annotations

import base64
import json
import random
import shlex
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
import safetensors.torch
import torch

from ipu_options import poptorch
from qa.model.optimizer import optimizer_state, set_optimizer_state
from qa.model.parallelize import set_weights, weights_of
from runtime import processes
from runtime.errors import UsageError
from runtime.files import write_json

# The files of a state: its tensors, and all around them.
STATE_FILES = ("training_state.safetensors", "training_state.json")


class Checkpoint(NamedTuple):
    """The content of a checkpoint except for the weights, which are read from its folder."""

    folder: Path
    step: int
    losses: List[float]  # the newest of TrainingState.losses
    run_loss: List[float]  # the fields of TrainingState.run_loss, [] in old checkpoints
    logged_loss: List[float]
    must_match: Dict[str, Any]  # settings, by name, that a run which continues from it must share
    replicas: Optional[int]  # of all processes; None in old checkpoints
    best: Optional[Dict[str, Any]]  # of qa.run.checkpoint.Best.to_json
    optimizer: Dict[str, Any]  # qa.model.optimizer.optimizer_state
    rng_state: List[int]  # the seed, then the device's random state of each replica
    random_state: Dict[str, Any]  # of `random_state`

    def another_run(self) -> str:
        """Return what to do where a run cannot continue from it."""
        return ("start another run from its weights: --model_name_or_path "
                f"{shlex.quote(str(self.folder))} and a new --output_dir")


class MeanLoss(NamedTuple):
    """The mean loss of windows."""

    sum: float = 0.0
    windows: int = 0

    def plus(self, loss: float, windows: int) -> "MeanLoss":
        """Return the mean with so many more windows, whose own mean is `loss`."""
        return MeanLoss(self.sum + loss * windows, self.windows + windows)

    @property
    def mean(self) -> Optional[float]:
        return self.sum / self.windows if self.windows else None


@dataclass
class TrainingState:
    """What a training run changes. All processes call the same methods."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer  # of poptorch: state_dict() reads its state from the device
    executor: "poptorch.PoplarExecutor"
    step: int = 0  # steps that are done
    losses: List[float] = field(default_factory=list)  # means of the steps that were not skipped
    run_loss: MeanLoss = MeanLoss()  # over the windows of all these steps
    logged_loss: MeanLoss = MeanLoss()  # of those since the last log line

    def add_loss(self, loss: float, windows: int) -> None:
        """Count the loss of a step, the mean of so many windows."""
        self.losses.append(loss)
        self.run_loss = self.run_loss.plus(loss, windows)
        self.logged_loss = self.logged_loss.plus(loss, windows)

    def weights(self) -> Dict[str, torch.Tensor]:
        """Free the IPUs, and return the weights: `weights_of`."""
        self._free_ipus()
        return weights_of(self.model)

    @property
    def replicas(self) -> int:
        """The number of replicas in all processes."""
        return self.executor.options.replication_factor * processes.count()

    def saved(self) -> Dict[str, Any]:
        """Collective: copy the weights to the host; return the other states, as in `Checkpoint`."""
        self.executor.copyWeightsToHostIfNeeded()  # the device may be detached
        optimizer = optimizer_state(self.optimizer)
        # PopTorch's rng_state is the seed, then the states of this process's replicas. The seeds of
        # other processes than the first may differ by an offset.
        first, *others = processes.share(self.executor.rng_state)
        rng_state = first + [number for states in others for number in states[1:]]
        return {"optimizer": optimizer, "rng_state": rng_state, "random_state": random_state()}

    def restore(self, checkpoint: Optional[Checkpoint]) -> None:
        """Continue from `checkpoint`, if any. The model must have its weights, and be compiled."""
        if processes.count() > 1:
            checksum = 0
            for weight in weights_of(self.model).values():
                checksum = zlib.crc32(weight.detach().flatten().view(torch.uint8).numpy(), checksum)
            processes.agree({"the checksum of the model's weights": checksum})
        if checkpoint is None:
            return
        self.step, self.losses = checkpoint.step, list(checkpoint.losses)
        self.run_loss, self.logged_loss = (
            MeanLoss(*saved) for saved in (checkpoint.run_loss, checkpoint.logged_loss))
        set_optimizer_state(self.optimizer, self.model, checkpoint.optimizer)
        self.executor.setOptimizer(self.optimizer)
        # rng_state is on the device (PopTorch, _poplar_executor.py): hence the compiled model.
        self.executor.rng_state = rng_of_process(checkpoint, self.replicas)
        set_random_state(checkpoint.random_state)

    def go_back(self, checkpoint: Checkpoint) -> None:
        """Reset weights and optimizer to `checkpoint`; step, losses and random states stay.

        The device has updated the weights before the host sees the loss. The batches since then are
        skipped, as in the training of PaLM (Chowdhery et al. 2022, section 5.1).
        """
        # The next call attaches again. Only that initialises the gradient accumulators: with
        # accumulators of float16 their mean is a running one (PopTorch, _optimizer_attributes.py,
        # convertOptimizerToDict), for which PopART multiplies the old value by 0 instead of setting
        # it to 0 (popart, popx/op/accumulatex.cpp, AccumulationType::Mean), and NaN stays NaN.
        self._free_ipus()
        self.load_weights(checkpoint.folder)
        set_optimizer_state(self.optimizer, self.model, checkpoint.optimizer)
        self.executor.setOptimizer(self.optimizer)

    def load_weights(self, folder: Path) -> None:
        """Free the IPUs, and put a checkpoint's weights into the model."""
        self._free_ipus()  # or a later call would bring their weights back
        set_weights(self.model, safetensors.torch.load_file(folder / "model.safetensors"))

    def _free_ipus(self) -> None:
        if self.executor.isAttachedToDevice():
            self.executor.detachFromDevice()  # copies the weights to the host


def rng_of_process(checkpoint: Checkpoint, replicas: int) -> List[int]:
    """Return this process's part of rng_state. Raises UsageError if it is of other replicas."""
    # How long a replica's state is, only the device knows, and before its first run PopTorch does
    # not ask it (_poplar_executor.py, rng_state).
    seed, *states = checkpoint.rng_state
    if checkpoint.replicas not in (None, replicas):
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint.folder}: holds the random state of another "
            "number of replicas; go on with the --replication_factor that it was begun with, or "
            f"{checkpoint.another_run()}")
    length = len(states) // processes.count()
    first = processes.place().index * length
    return [seed, *states[first:first + length]]


def random_state() -> Dict[str, Any]:
    """Return the states of the global random generators of Python, NumPy and PyTorch."""
    algorithm, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(), "numpy": (algorithm, keys.tolist(), *rest),
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode("ascii")}


def set_random_state(state: Dict[str, Any]) -> None:
    """Restore what `random_state` returned. Raises UsageError if it is not valid."""
    try:
        # NumPy does not check the position, and would read beyond the 624 words of its state.
        if not 0 <= state["numpy"][2] <= 624:
            raise ValueError("NumPy's position in its state")
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(
            torch.frombuffer(bytearray(base64.b64decode(state["torch"])), dtype=torch.uint8))
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, OverflowError) as error:
        raise UsageError(f"the checkpoint's random state cannot be used ({error})") from error


def write_state(folder: Path, state: Dict[str, Any]) -> None:
    """Write dictionaries, lists and tuples of tensors, numbers, texts and None, without pickle."""
    tensors: Dict[str, torch.Tensor] = {}
    structure, memory = _encode(state, "", tensors), set()
    # safetensors refuses tensors that share memory: copy the few that do.
    for key, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() in memory:
            tensors[key] = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
    safetensors.torch.save_file(tensors, folder / STATE_FILES[0])
    write_json(folder / STATE_FILES[1], structure, indent=None)


def read_state(folder: Path) -> Any:
    """Return what `write_state` wrote; a damaged one raises what `load_checkpoint` catches."""
    structure = json.loads((folder / STATE_FILES[1]).read_text("utf-8"))
    return _decode(structure, safetensors.torch.load_file(folder / STATE_FILES[0]))


def _encode(value: Any, name: str, tensors: Dict[str, torch.Tensor]) -> Any:
    """Return `value`, at `name` in the state, as JSON; its tensors go into `tensors`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        key = f"{len(tensors)}{name}"
        tensors[key] = value.detach().cpu().contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        return {
            "dict": [[key, _encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise TypeError(f"training state{name}: cannot save a {type(value).__name__}")


def _decode(value: Any, tensors: Dict[str, torch.Tensor]) -> Any:
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
