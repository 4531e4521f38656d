"""Blocks, stages and execution strategies: they determine which IPU runs which part of a model.

A block does not change how a model runs on the host. It is recorded while the model is compiled,
because what PopTorch would refuse is refused here too (see _trace.py).
"""
from __future__ import annotations

from typing import Any, Dict, List, Optional

import torch

from ._errors import Error, refuse
from .enums import AutoStage


class PipelinedExecution:
    """The strategy by which stages work on different micro-batches at the same time.

    An AutoStage assigns blocks to stages, by default AutoStage.SameAsIpu.
    """

    execution_mode = 0  # PopTorch's number for the strategy

    def __init__(self, *args: Any):
        if len(args) > 1 or args and not isinstance(args[0], AutoStage):
            refuse("Stage")
        self._auto_stage = args[0] if args else AutoStage.SameAsIpu
        self._stages: Dict[str, int] = {}  # stage of each block met so far

    def backendOptions(self) -> Dict[str, int]:
        return {"execution_mode": self.execution_mode}

    def stage_of(self, block_id: str, ipu: Optional[int]) -> int:
        """Return the stage of a block that was met while a model is compiled.

        A new block's stage is its IPU with SameAsIpu, and the next number, from 1 as in PopTorch,
        with AutoIncrement. Raises AssertionError if SameAsIpu has no `ipu`.
        """
        if block_id not in self._stages:
            same = self._auto_stage == AutoStage.SameAsIpu
            assert ipu is not None or not same, (
                "poptorch.AutoStage.SameAsIpu was selected but no IPU was specified for block "
                f"{block_id}")
            self._stages[block_id] = ipu if same else len(self._stages) + 1
        return self._stages[block_id]


class ShardedExecution(PipelinedExecution):
    """The strategy by which stages work one after the other on the same micro-batch."""

    execution_mode = 1


class Recorder:
    """Records the blocks in one trace of a model."""

    def __init__(self, strategy: PipelinedExecution):
        self.strategy = strategy
        # (user id, stage number, IPU) for each block, in the order in which they begin
        self.blocks: List[tuple] = []
        # the IPU that operations run on: 0 before the first block, None after a `with Block`
        self.ipu: Optional[int] = 0
        self.next_auto_id = 0

    def auto_id(self) -> str:
        self.next_auto_id += 1
        return str(self.next_auto_id - 1)

    def begin(self, user_id: Optional[str], ipu_id: Optional[int]) -> None:
        """Record a block that begins; without an IPU it runs on its stage's."""
        user_id = user_id or self.auto_id()
        stage = self.strategy.stage_of(user_id, ipu_id)
        self.ipu = stage if ipu_id is None else ipu_id
        self.blocks.append((user_id, stage, self.ipu))

    def ipus(self) -> List[int]:
        """Return the IPU of each pipeline stage, in order of execution."""
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
            recorder.ipu = None


class _BlockHook:
    """A forward pre-hook that begins a block. A module keeps an id that it gets automatically."""

    def __init__(self, user_id, ipu_id):
        self._user_id = user_id
        self._ipu_id = ipu_id

    def __call__(self, module, input):
        if recorder is not None:
            if self._user_id is None:
                self._user_id = recorder.auto_id()
            recorder.begin(self._user_id, self._ipu_id)


def BeginBlock(layer_to_call: torch.nn.Module, user_id: str = None,
               ipu_id: int = None) -> torch.nn.Module:
    """Begin a block whenever `layer_to_call` is called, and return `layer_to_call`.

    The block lasts until another one begins. Raises Error if `layer_to_call` is no module or
    already begins a block.
    """
    if not isinstance(layer_to_call, torch.nn.Module):
        if callable(layer_to_call):
            refuse("LegacyBeginBlockFn")
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
