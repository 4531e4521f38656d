"""The state of a training as files: tensors in safetensors, everything around them in JSON. Nothing
is pickled.
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

from ipu_options.errors import UsageError
from ipu_options.files import write_json

TENSORS, STRUCTURE = "training_state.safetensors", "training_state.json"


def write_state(folder: Path, state: Dict[str, Any]) -> None:
    """Write `state`, any nesting of dictionaries, lists and tuples around tensors, numbers, texts
    and None. Raises OSError.
    """
    tensors: Dict[str, torch.Tensor] = {}
    structure = _encode(state, "", tensors)
    memory = set()
    for key, tensor in tensors.items(
    ):  # safetensors refuses tensors that share memory; few do, so few are copied
        if tensor.untyped_storage().data_ptr() in memory:
            tensors[key] = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
    safetensors.torch.save_file(tensors, folder / TENSORS)
    write_json(folder / STRUCTURE, structure, indent=None)


def read_state(folder: Path) -> Any:
    """What `write_state` has written. Raises OSError, ValueError, KeyError, TypeError or
    SafetensorError for damaged files.
    """
    structure = json.loads((folder / STRUCTURE).read_text("utf-8"))
    return _decode(structure, safetensors.torch.load_file(folder / TENSORS))


def random_state() -> Dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global random generators, for
    `set_random_state`.
    """
    algorithm, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), *rest),
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode("ascii"),
    }


def set_random_state(state: Dict[str, Any]) -> None:
    """Put Python's, NumPy's and PyTorch's global random generators where they were
    (`Checkpoint.random_state`).

    Raises UsageError if they do not take it.
    """
    try:
        if not 0 <= state["numpy"][2] <= 624:  # NumPy would read beyond its 624 words
            raise ValueError("NumPy's position in its state")
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(
            torch.frombuffer(bytearray(base64.b64decode(state["torch"])), dtype=torch.uint8))
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, OverflowError) as error:
        raise UsageError(f"the checkpoint's random state cannot be used ({error})") from error


def _encode(value: Any, name: str, tensors: Dict[str, torch.Tensor]) -> Any:
    """`value` as JSON that keeps tuples and number keys; its tensors go to `tensors`, under names
    that say where they stood.
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
    """The inverse of `_encode`. Raises KeyError, TypeError or ValueError on anything that `_encode`
    does not write.
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
