"""The trace of a model: one observed forward pass, which is run when the model is compiled.

It finds out which tensor is the loss, what structure the outputs have and which blocks the model
has. It refuses what PopTorch's compiler would refuse.
"""
from __future__ import annotations

from typing import Any, Collection, List, Optional

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import blocks, ops
from ._errors import Error
from ._outputs import output_type
from ._structure import flatten, map_tensors

LOSSES = {
    "l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss", "nll_loss", "nll_loss_nd",
    "cross_entropy", "kl_div", "poisson_nll_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "hinge_embedding_loss", "soft_margin_loss", "ctc_loss",
    "cosine_embedding_loss", "margin_ranking_loss", "triplet_margin_loss", "multi_margin_loss",
    "gaussian_nll_loss", "multilabel_margin_loss", "multilabel_soft_margin_loss",
    "triplet_margin_with_distance_loss"}
WEIGHTED = {"linear", "conv1d", "conv2d", "conv3d"}
PRODUCTS = WEIGHTED | {"matmul", "bmm", "mm", "addmm", "baddbmm", "einsum"}
# These are not operations of their own on a device, and are allowed outside all blocks.
FREE = {"detach", "alias", "_to_copy", "lift_fresh", "clone"}


class LossFinder(TorchFunctionMode):
    """Appends the results of torch's loss functions to ops.marked_losses, as identity_loss does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in LOSSES and isinstance(out, torch.Tensor):
            ops.marked_losses.append((out, False))
        return out


class HalfCasts(TorchFunctionMode):
    """Casts tensors inside a model as PopTorch does, with the type `half` in place of float16.

    A tensor that the model itself requests in float16 gets the type `half`. If torch refuses
    `half`, or a mixture of it and float32, the arguments of the operation are cast: those of a
    linear operation or convolution to the type of its input, others to float32. After a forward
    pass, `needed` tells whether the model needed any of this.

    slow: names of functions that are computed in float32 because `half` would take long.
    """

    def __init__(self, half: torch.dtype, slow: Collection[str] = ()):
        super().__init__()
        self.half, self.needed, self._refused, self._slow = half, False, set(), slow

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func, args, kwargs = self._asking_for_half(func, args, kwargs or {})
        name = getattr(func, "__name__", "")
        kinds = {t.dtype for t in flatten([args, kwargs])}
        if self.half not in kinds or self.half == torch.float32:
            return func(*args, **kwargs)
        mixed = torch.float32 in kinds
        if name in self._slow and not mixed:
            return self._cast(func, name, mixed, args, kwargs)
        # torch accepts a loss of mixed types, but its backward pass fails.
        if name in self._refused or mixed and name in LOSSES:
            self.needed = True
            return self._cast(func, name, mixed, args, kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if name.endswith("_"):  # an in-place operation, whose tensor must keep its type
                raise
            self._refused.add(name)
            self.needed = True
            return self._cast(func, name, mixed, args, kwargs)

    def _cast(self, func, name, mixed, args, kwargs):
        kind = flatten([args, kwargs])[0].dtype if mixed and name in WEIGHTED else torch.float32
        args, kwargs = map_tensors(
            lambda t: t.to(kind) if t.dtype in (self.half, torch.float32) else t, [args, kwargs])
        out = func(*args, **kwargs)
        return out if mixed else map_tensors(
            lambda t: t.to(self.half) if t.dtype == torch.float32 else t, out)

    def _asking_for_half(self, func, args, kwargs):
        if getattr(func, "__name__", "") == "half":
            func, args = torch.Tensor.to, (*args, torch.float16)
        if any(a is torch.float16 for a in (*args, *kwargs.values())):
            self.needed = True
            args = tuple(self.half if a is torch.float16 else a for a in args)
            kwargs = {name: self.half if a is torch.float16 else a for name, a in kwargs.items()}
        return func, args, kwargs


class _BlockCheck(TorchDispatchMode):
    """Refuses operations that are outside all blocks after the end of a `with Block`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if blocks.recorder.ipu is None and name not in FREE and any(
                isinstance(a, torch.Tensor) for a in args):
            raise Error(f"No active Block, all the ops must belong to a Block (aten::{name})")
        return func(*args, **(kwargs or {}))


class Trace:
    """The result of tracing a model.

    recorder: the blocks that the model has.
    outputs: what the model returned, which shows its structure.
    output_types: the types that PopTorch gives to the tensors in it.
    loss_index: the index of the loss among the losses marked in a forward pass.
    needs_finder: whether the loss is the result of a torch loss function, which is marked only
        while a LossFinder is active.
    """

    def __init__(self, recorder: blocks.Recorder, outputs: Any):
        self.recorder, self.outputs = recorder, outputs
        self.output_types = [output_type(t.dtype) for t in flatten(outputs)]
        self.loss_index: Optional[int] = None
        self.needs_finder = False


def run(model, args_and_kwargs, strategy, training: bool) -> Trace:
    """Run `model` once and return its Trace. Raises Error where PopTorch's compiler would.

    `strategy` assigns the model's blocks to stages.
    """
    recorder = blocks.recorder = blocks.Recorder(strategy)
    try:
        ops.marked_losses = []
        with torch.set_grad_enabled(training), LossFinder(), _BlockCheck():
            outputs = model(*args_and_kwargs[0], **args_and_kwargs[1])
        trace = Trace(recorder, outputs)
        if training:
            found = ops.marked_losses
            final = _final_loss([loss for loss, _ in found])
            trace.needs_finder = not found[final][1]
            trace.loss_index = final if trace.needs_finder else sum(
                identity for _, identity in found[:final])
        return trace
    finally:
        blocks.recorder, ops.marked_losses = None, None


BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)


def check_reassigned(model: torch.nn.Module, slots: List[tuple]) -> None:
    """Raise Error if the forward pass has removed or reassigned a parameter or buffer.

    Assigning another tensor is refused, while copying into the tensor is allowed. The buffers of
    batch norms are exempt.
    """
    free = [module._buffers for module in model.modules() if isinstance(module, BATCH_NORMS)]
    for container, key, weight in slots:
        kind = "Parameter" if weight.is_parameter else "Buffer"
        if isinstance(container, dict) and key not in container:
            raise Error(
                f"{kind} {weight.name} is removed from the model when calling the forward method.")
        if not any(container is other for other in free) and container[key] is not weight.working:
            raise Error(
                f"{kind} {weight.name} is reassigned within the model when calling the forward "
                "method. This is not supported. "
                f"Consider using self.{weight.name}.copy_(src) to copy data from a source tensor, "
                "where src is the name of the source tensor.")


def _final_loss(losses: List[torch.Tensor]) -> int:
    """Return the index of the one loss from which no other loss is computed.

    Raises Error if there is none or more than one. PopTorch does this in
    RemoveSurplusIdentityLosses.cpp.
    """
    if not losses:
        raise Error("Couldn't find a loss in graph!")
    final = [
        i for i, loss in enumerate(losses)
        if not any(_depends(other, loss) for other in losses if other is not loss)]
    if len(final) != 1:
        raise Error("Multiple independent losses found in graph. Graph must have one final loss. "
                    "Wrap final graph loss in poptorch.identity_loss.")
    return final[0]


def _depends(later: torch.Tensor, earlier: torch.Tensor) -> bool:
    seen, todo = set(), [later.grad_fn]
    while todo:
        node = todo.pop()
        if node is earlier.grad_fn and node is not None:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return False
