"""Store the state of a training run in files, without pickle.

Tensors are stored in safetensors, the structure around them in JSON.
"""
from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any, Dict

import numpy as np
import safetensors.torch
import torch

from runtime.errors import UsageError
from runtime.files import write_json

TENSORS, STRUCTURE = "training_state.safetensors", "training_state.json"


def write_state(folder: Path, state: Dict[str, Any]) -> None:
    """Write `state` to two files in `folder`.

    state: any nesting of dictionaries, lists and tuples that contains tensors, numbers, strings and
    None. Raises OSError, and TypeError if `state` contains anything else.
    """
    tensors: Dict[str, torch.Tensor] = {}
    structure = _encode(state, "", tensors)
    memory = set()
    # safetensors refuses tensors that share memory. Only those few that do are copied.
    for key, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() in memory:
            tensors[key] = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
    safetensors.torch.save_file(tensors, folder / TENSORS)
    write_json(folder / STRUCTURE, structure, indent=None)


def read_state(folder: Path) -> Any:
    """Return the state that `write_state` has written to `folder`.

    Raises OSError, ValueError, KeyError, TypeError or SafetensorError if a file is missing or
    damaged.
    """
    structure = json.loads((folder / STRUCTURE).read_text("utf-8"))
    return _decode(structure, safetensors.torch.load_file(folder / TENSORS))


def random_state() -> Dict[str, Any]:
    """Return the states of the global random generators of Python, NumPy and PyTorch.

    `set_random_state` restores them.
    """
    algorithm, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), *rest),
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode("ascii"),
    }


def set_random_state(state: Dict[str, Any]) -> None:
    """Restore the states of the global random generators of Python, NumPy and PyTorch.

    state: the result of `random_state`, or `Checkpoint.random_state`. Raises UsageError if it is
    not valid.
    """
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


def _encode(value: Any, name: str, tensors: Dict[str, torch.Tensor]) -> Any:
    """Return `value` as JSON values that preserve tuples and the types of keys.

    Tensors are moved to `tensors`, under names that tell where in the state they were. name: where
    `value` is in the state. Raises TypeError for a value of any other type.
    """
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
    """Return the value that `_encode` has encoded.

    Raises KeyError, TypeError or ValueError if `value` is not a result of `_encode`.
    """
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
