"""A state in two files without pickle: its tensors in safetensors, all around them in JSON."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict

import safetensors.torch
import torch

from runtime.files import write_json

TENSORS, STRUCTURE = "training_state.safetensors", "training_state.json"


def write_state(folder: Path, state: Dict[str, Any]) -> None:
    """Write dictionaries, lists and tuples of tensors, numbers, strings and None to `folder`.

    Raises OSError, and TypeError if `state` contains anything else.
    """
    tensors: Dict[str, torch.Tensor] = {}
    structure, memory = _encode(state, "", tensors), set()
    # safetensors refuses tensors that share memory: copy the few that do.
    for key, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() in memory:
            tensors[key] = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
    safetensors.torch.save_file(tensors, folder / TENSORS)
    write_json(folder / STRUCTURE, structure, indent=None)


def read_state(folder: Path) -> Any:
    """Return what `write_state` wrote to `folder`.

    Raises OSError, ValueError, KeyError, TypeError or SafetensorError for a damaged or missing one.
    """
    structure = json.loads((folder / STRUCTURE).read_text("utf-8"))
    return _decode(structure, safetensors.torch.load_file(folder / TENSORS))


def _encode(value: Any, name: str, tensors: Dict[str, torch.Tensor]) -> Any:
    """Return `value`, at `name` in the state, as JSON that preserves tuples and types of keys.

    tensors: gets the tensors, under names that tell where in the state they were.
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
