"""Blocks, stages and execution strategies: they determine which IPU runs which part of a model.

A block does not change how a model runs on the host. It is recorded while the model is compiled,
because what PopTorch would refuse is refused here too (see _trace.py).
"""
from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional

import torch

from ._errors import Error
from .enums import AutoStage


class Stage:
    """One or more blocks that run on one IPU."""

    def __init__(self, *block_ids: str) -> None:
        assert all(isinstance(b, str) for b in block_ids), (
            f"Block IDs are supposed to be strings but got {block_ids}")
        self._blocks = block_ids
        self._stage_id = -1
        self._ipu = None

    @property
    def blocks(self) -> List[str]:
        """The ids of the stage's blocks."""
        return self._blocks

    def ipu(self, ipu: int) -> "Stage":
        """Set the IPU that the stage runs on, which takes precedence over those of its blocks."""
        assert isinstance(ipu, int)
        self._ipu = ipu
        return self


class ExecutionStrategy:
    """Assigns blocks to stages.

    The arguments are an AutoStage, or the stages in order: Stages, block ids or lists of block
    ids. Without arguments it is AutoStage.SameAsIpu.
    """

    def __init__(self, *args: Any):
        self._auto_stage = AutoStage.SameAsIpu
        self._block_map: Dict[str, Stage] = {}
        self._explicit = not (len(args) == 1 and isinstance(args[0], AutoStage)) and bool(args)
        if args and not self._explicit:
            self._auto_stage = args[0]
        for stage_id, arg in enumerate(args if self._explicit else ()):
            stage = (arg if isinstance(arg, Stage) else
                     Stage(arg) if isinstance(arg, str) else Stage(*arg))
            stage._stage_id = stage_id
            for block in stage.blocks:
                assert block not in self._block_map, f"{block} associated with more than one stage"
                self._block_map[block] = stage

    def stage(self, block_id: str) -> Stage:
        """Return the stage of a block; AssertionError if it has none."""
        assert block_id in self._block_map, f"Unknown block {block_id}"
        return self._block_map[block_id]

    def backendOptions(self) -> Dict[str, int]:
        """Return {"execution_mode": PopTorch's number for the strategy}."""
        raise NotImplementedError

    def stage_of(self, block_id: str, ipu: Optional[int]) -> Stage:
        """Return the stage of a block that was met while a model is compiled.

        A new block gets a new stage: that of number `ipu` with AutoStage.SameAsIpu, and the next
        number, from 1 as in PopTorch, with AutoStage.AutoIncrement. Raises AssertionError if the
        strategy lists its blocks and this is none of them, or if SameAsIpu has no `ipu`.
        """
        if block_id not in self._block_map:
            assert not self._explicit, (
                f"Unknown Block '{block_id}' list of expected Blocks: {list(self._block_map)}")
            stage = self._block_map[block_id] = Stage(block_id)
            if self._auto_stage == AutoStage.SameAsIpu:
                assert ipu is not None, (
                    "poptorch.AutoStage.SameAsIpu was selected but no IPU was specified for block "
                    f"{block_id}")
                stage._stage_id = ipu
            else:
                stage._stage_id = len(self._block_map)
        return self._block_map[block_id]

    def __repr__(self):
        stages = {block: (stage._stage_id, stage._ipu) for block, stage in self._block_map.items()}
        return f"{type(self).__name__}({self._auto_stage.name if not self._explicit else stages})"


class PipelinedExecution(ExecutionStrategy):
    """The strategy by which stages work on different micro-batches at the same time."""

    def __init__(self, *args: Any):
        super().__init__(*args)

    def backendOptions(self) -> Dict[str, int]:
        """Return {"execution_mode": PopTorch's number for the strategy}."""
        return {"execution_mode": 0}


class ShardedExecution(PipelinedExecution):
    """The strategy by which stages work one after the other on the same micro-batch."""

    def backendOptions(self) -> Dict[str, int]:
        """Return {"execution_mode": PopTorch's number for the strategy}."""
        return {"execution_mode": 1}


class Recorder:
    """Records the blocks in one trace of a model.

    blocks: (user id, stage number, IPU) for each block, in the order in which they begin.
    ipu: the IPU that operations currently run on. It is 0 before the first block, and None after
        the end of a `with Block`.
    """

    def __init__(self, strategy: ExecutionStrategy):
        self.strategy = strategy
        self.blocks: List[tuple] = []
        self.ipu: Optional[int] = 0
        self.next_auto_id = 0

    def auto_id(self) -> str:
        """Return an id for a block that has none of its own."""
        self.next_auto_id += 1
        return str(self.next_auto_id - 1)

    def begin(self, user_id: Optional[str], ipu_id: Optional[int]) -> None:
        """Record the beginning of a block.

        Its IPU is that of its stage, otherwise its own `ipu_id`, otherwise the stage's number.
        """
        user_id = user_id or self.auto_id()
        stage = self.strategy.stage_of(user_id, ipu_id)
        ipu = (stage._ipu if stage._ipu is not None else
               ipu_id if ipu_id is not None else stage._stage_id)
        self.blocks.append((user_id, stage._stage_id, ipu))
        self.ipu = ipu

    def end(self) -> None:
        """Record the end of a `with Block`."""
        self.ipu = None

    def ipus(self) -> List[int]:
        """Return the IPUs in order of execution, without immediate repetitions.

        Each entry is one pipeline stage.
        """
        order = [ipu for _, _, ipu in self.blocks] or [0]
        return [ipu for i, ipu in enumerate(order) if i == 0 or ipu != order[i - 1]]


# Set while a model is traced. At other times blocks do nothing.
recorder: Optional[Recorder] = None


class Block(torch.nn.Module):
    """A context manager; operations inside it run on the IPU of the block."""

    def __init__(self, user_id: Optional[str] = None, ipu_id: Optional[int] = None):
        super().__init__()
        self._user_id = user_id
        self._ipu_id = ipu_id

    @staticmethod
    def useAutoId() -> None:
        """Number the blocks that have no id of their own from "0" in each forward pass.

        Call this at the beginning of forward().
        """
        if recorder is not None:
            recorder.next_auto_id = 0

    @staticmethod
    def start(user_id: Optional[str] = None, ipu_id: Optional[int] = None) -> None:
        """Begin a block, which lasts until another one begins."""
        if recorder is not None:
            recorder.begin(user_id, ipu_id)

    def __enter__(self):
        Block.start(self._user_id, self._ipu_id)

    def __exit__(self, type, value, traceback):
        if recorder is not None:
            recorder.end()


class LegacyBeginBlockFn(torch.nn.Module):
    """A module that begins a block and then calls a function."""

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
    """A forward pre-hook that begins a block.

    An id that it was given automatically is kept, so that a module that is called several times is
    always the same block.
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
    """Begin a block whenever `layer_to_call` is called, and return `layer_to_call`.

    The block lasts until another one begins. If `layer_to_call` is a function, a module that wraps
    it is returned. Raises Error if it is neither a module nor a function, or if the module already
    begins a block.
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
    """Undo BeginBlock for `module` and all modules in it."""
    assert isinstance(module, torch.nn.Module)
    for m in module.modules():
        for key in [
                key for key, hook in m._forward_pre_hooks.items() if isinstance(hook, _BlockHook)]:
            del m._forward_pre_hooks[key]


def BlockFunction(user_id: Optional[str] = None, ipu_id: Optional[int] = None) -> Callable:
    """Return a decorator that runs a function inside `Block(user_id, ipu_id)`."""

    def decorator(func):
        def wrapper(*args, **kwargs):
            with Block(user_id, ipu_id):
                return func(*args, **kwargs)
        return wrapper
    return decorator
