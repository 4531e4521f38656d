"""Blocks, stages and execution strategies: which part of a model runs on which IPU.

A host has one processor, so a block changes nothing in how the model runs. While a model is
compiled the blocks are recorded, and what PopTorch would refuse is refused (see _trace.py).
"""
from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional

import torch

from ._errors import Error
from .enums import AutoStage


class Stage:
    """One or more blocks that run on one IPU."""

    def __init__(self, *block_ids: str) -> None:
        assert all(isinstance(b, str)
                   for b in block_ids), f"Block IDs are supposed to be strings but got {block_ids}"
        self._blocks = block_ids
        self._stage_id = -1
        self._ipu = None

    @property
    def blocks(self) -> List[str]:
        """Ids of the stage's blocks."""
        return self._blocks

    def ipu(self, ipu: int) -> "Stage":
        """Set the IPU the stage runs on; it takes precedence over the blocks' own."""
        assert isinstance(ipu, int)
        self._ipu = ipu
        return self


class ExecutionStrategy:
    """Gives every block its stage: the stages listed, or one for each IPU or block (AutoStage)."""

    def __init__(self, *args: Any):
        self._auto_stage = AutoStage.SameAsIpu
        self._block_map: Dict[str, Stage] = {}
        self._explicit = not (len(args) == 1 and isinstance(args[0], AutoStage)) and bool(args)
        if args and not self._explicit:
            self._auto_stage = args[0]
        for stage_id, arg in enumerate(args if self._explicit else ()):
            stage = arg if isinstance(
                arg, Stage) else Stage(arg) if isinstance(arg, str) else Stage(*arg)
            stage._stage_id = stage_id
            for block in stage.blocks:
                assert block not in self._block_map, f"{block} associated with more than one stage"
                self._block_map[block] = stage

    def stage(self, block_id: str) -> Stage:
        """The stage a block belongs to."""
        assert block_id in self._block_map, f"Unknown block {block_id}"
        return self._block_map[block_id]

    def backendOptions(self) -> Dict[str, int]:
        """PopTorch's number for the strategy."""
        raise NotImplementedError

    def stage_of(self, block_id: str, ipu: Optional[int]) -> Stage:
        """The stage of a block met while a model is compiled; AutoStage numbers new blocks from 1,
        as PopTorch does.
        """
        if block_id not in self._block_map:
            assert not self._explicit, f"Unknown Block '{block_id}' list of expected Blocks: {list(self._block_map)}"
            stage = self._block_map[block_id] = Stage(block_id)
            if self._auto_stage == AutoStage.SameAsIpu:
                assert ipu is not None, f"poptorch.AutoStage.SameAsIpu was selected but no IPU was specified for block {block_id}"
                stage._stage_id = ipu
            else:
                stage._stage_id = len(self._block_map)
        return self._block_map[block_id]

    def __repr__(self):
        stages = {block: (stage._stage_id, stage._ipu) for block, stage in self._block_map.items()}
        return f"{type(self).__name__}({self._auto_stage.name if not self._explicit else stages})"


class PipelinedExecution(ExecutionStrategy):
    """Stages work on different micro-batches at the same time. Arguments: an AutoStage, or Stages
    or block ids in order.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)

    def backendOptions(self) -> Dict[str, int]:
        """PopTorch's number for the strategy."""
        return {"execution_mode": 0}


class ShardedExecution(PipelinedExecution):
    """Stages work one after the other on the same micro-batch."""

    def backendOptions(self) -> Dict[str, int]:
        """PopTorch's number for the strategy."""
        return {"execution_mode": 1}


class Recorder:
    """The blocks met in one trace of a model: (user id, stage, ipu) in the order they begin.

    `ipu` is where operations go now: 0 before the first block, None after the end of a `with
    Block`.
    """

    def __init__(self, strategy: ExecutionStrategy):
        self.strategy = strategy
        self.blocks: List[tuple] = []
        self.ipu: Optional[int] = 0
        self.next_auto_id = 0

    def auto_id(self) -> str:
        """The id of a block that has none of its own."""
        self.next_auto_id += 1
        return str(self.next_auto_id - 1)

    def begin(self, user_id: Optional[str], ipu_id: Optional[int]) -> None:
        """A block begins; its stage's IPU takes precedence over its own, and without either it is
        the stage's number.
        """
        user_id = user_id or self.auto_id()
        stage = self.strategy.stage_of(user_id, ipu_id)
        ipu = stage._ipu if stage._ipu is not None else ipu_id if ipu_id is not None else stage._stage_id
        self.blocks.append((user_id, stage._stage_id, ipu))
        self.ipu = ipu

    def end(self) -> None:
        """A `with Block` ends."""
        self.ipu = None

    def ipus(self) -> List[int]:
        """The IPUs in order of execution, neighbours that are the same merged: one entry is one
        pipeline stage.
        """
        order = [ipu for _, _, ipu in self.blocks] or [0]
        return [ipu for i, ipu in enumerate(order) if i == 0 or ipu != order[i - 1]]


recorder: Optional[
    Recorder] = None  # set while a model is traced; without it every block is a no-op


class Block(torch.nn.Module):
    """A context manager: what is called inside it runs on the block's IPU."""

    def __init__(self, user_id: Optional[str] = None, ipu_id: Optional[int] = None):
        super().__init__()
        self._user_id = user_id
        self._ipu_id = ipu_id

    @staticmethod
    def useAutoId() -> None:
        """Number the blocks without an id of their own from "0" in each forward pass; call it first
        in forward().
        """
        if recorder is not None:
            recorder.next_auto_id = 0

    @staticmethod
    def start(user_id: Optional[str] = None, ipu_id: Optional[int] = None) -> None:
        """Begin a block that lasts until another one begins."""
        if recorder is not None:
            recorder.begin(user_id, ipu_id)

    def __enter__(self):
        Block.start(self._user_id, self._ipu_id)

    def __exit__(self, type, value, traceback):
        if recorder is not None:
            recorder.end()


class LegacyBeginBlockFn(torch.nn.Module):
    """BeginBlock of a function."""

    def __init__(self, layer_to_call: Callable, user_id: Optional[str] = None,
                 ipu_id: Optional[int] = None):
        super().__init__()
        self._layer_to_call = layer_to_call
        self._user_id = user_id
        self._ipu_id = ipu_id
        self._begin = _BlockHook(user_id, ipu_id)

    def __call__(self, *input, **kwargs):
        self._begin(self, input)
        return self._layer_to_call(*input, **kwargs)


class _BlockHook:
    """A forward pre-hook that begins a block. It keeps its automatic id, so that the module is the
    same block every time.
    """

    def __init__(self, user_id, ipu_id):
        self._user_id = user_id
        self._ipu_id = ipu_id

    def __call__(self, module, input):
        if recorder is not None:
            if self._user_id is None:
                self._user_id = recorder.auto_id()
            recorder.begin(self._user_id, self._ipu_id)

    def __repr__(self):
        return f"BeginBlock(user_id={self._user_id}, ipu_id={self._ipu_id})"


def BeginBlock(layer_to_call: torch.nn.Module, user_id: str = None,
               ipu_id: int = None) -> torch.nn.Module:
    """Begin a block whenever `layer_to_call` is called; it lasts until another block begins.
    Returns the module.

    A function is wrapped in a module. Error if the module begins a block already, or is neither
    module nor function.
    """
    if not isinstance(layer_to_call, torch.nn.Module):
        if callable(layer_to_call):
            return LegacyBeginBlockFn(layer_to_call, user_id, ipu_id)
        raise Error("module is not an instance of torch.nn.Module or function.")
    if any(isinstance(hook, _BlockHook) for hook in layer_to_call._forward_pre_hooks.values()):
        raise Error("module has already been assigned to a block.")
    layer_to_call.register_forward_pre_hook(_BlockHook(user_id, ipu_id))
    return layer_to_call


def removeBlocks(module: torch.nn.Module) -> None:
    """Take BeginBlock off `module` and all modules in it."""
    assert isinstance(module, torch.nn.Module)
    for m in module.modules():
        for key in [
                key for key, hook in m._forward_pre_hooks.items() if isinstance(hook, _BlockHook)]:
            del m._forward_pre_hooks[key]


def BlockFunction(user_id: Optional[str] = None, ipu_id: Optional[int] = None) -> Callable:
    """A decorator that runs a function inside `Block(user_id, ipu_id)`."""

    def decorator(func):
        def wrapper(*args, **kwargs):
            with Block(user_id, ipu_id):
                return func(*args, **kwargs)
        return wrapper
    return decorator
