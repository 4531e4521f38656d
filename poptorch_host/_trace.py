"""The trace of a model: one observed forward pass, which is run when the model is compiled.

It finds out which tensor is the loss, what structure the outputs have and which blocks the model
has. It refuses what PopTorch's compiler would refuse. In the trace, float16 is bfloat16 (see
Float16Casts).
"""
from __future__ import annotations

from typing import Any, List, Optional, Set

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import blocks, ops
from ._checks import COMPILER
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
HANDLERS = {name for names in COMPILER["handlers"].values() for name in names}
# PopTorch treats these without a handler, for example aten::empty_strided.
OWN = {name for name, function in COMPILER["dispatcher"].items() if function != "fallback"}
# PopTorch never sees these, by which a CPU or a newer PyTorch computes supported operations.
UNSEEN = {"_safe_softmax", "_scaled_dot_product_flash_attention_for_cpu", "mkldnn_rnn_layer"}
# In-place operations that it replaces by another one than that without the final underscore
# (poptorch/source/include/poptorch/InplaceOpsPyTorch.hpp_nolint).
REPLACED = {"aten::fill_": "aten::full_like", "aten::zero_": "aten::zeros_like"}
COMPOSITE = "CompositeExplicitAutograd"  # PyTorch's key of operations that it can decompose


def is_handled(name: str) -> bool:
    """Return whether PopTorch translates an operation, for example "aten::add.Tensor".

    In-place operations are replaced by those without the final underscore (outplaceKind in
    InplaceOps.cpp).
    """
    kind = name.split(".")[0]
    kind = REPLACED.get(kind, kind)
    return name in OWN or kind in HANDLERS or kind.endswith("_") and kind[:-1] in HANDLERS


class LossFinder(TorchFunctionMode):
    """Marks the results of torch's loss functions, as identity_loss does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in LOSSES and isinstance(out, torch.Tensor):
            ops.marked_losses.append((out, False))
        return out


class Float16Casts(TorchFunctionMode):
    """Puts `half` in place of float16; in a trace, casts between it and float32 as PopTorch does.

    half: bfloat16 in a trace, whose outputs then tell float16 from float32; float32 otherwise. If
    torch refuses a mixture of bfloat16 and float32, the arguments of the operation are cast: those
    of a linear operation or convolution to the type of its input, others to float32.
    """

    def __init__(self, half: torch.dtype):
        super().__init__()
        self.half, self._refused = half, set()
        self.needed = False  # whether the model itself has asked for float16

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func, args, kwargs = self._asking_for_half(func, args, kwargs or {})
        name = getattr(func, "__name__", "")
        kinds = {t.dtype for t in flatten([args, kwargs])}
        if self.half not in kinds or self.half == torch.float32:
            return func(*args, **kwargs)
        mixed = torch.float32 in kinds
        if name == "linear" and mixed:
            _refuse_mixed_linear(*args, **kwargs)
        # A processor may take long for products of bfloat16. torch accepts a loss of mixed types,
        # but its backward pass fails.
        if name in self._refused or name in (LOSSES if mixed else PRODUCTS):
            return self._cast(func, name, mixed, args, kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if name.endswith("_"):  # an in-place operation, whose tensor must keep its type
                raise
            self._refused.add(name)
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


def _refuse_mixed_linear(input, weight, bias=None):
    """Raise the error of torch's addmm, the one product of mixed types that is refused."""
    if input.dtype != weight.dtype and bias is not None and input.dim() > 1:
        raise RuntimeError("mat1 and mat2 must have the same dtype")


class _HostAccess(TorchFunctionMode):
    """Refuses to read a tensor's values: a device has none while a model is compiled."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if not ops.unchecked and name in ("tolist", "cpu", "__repr__"):
            raise Error("Illegal move to CPU (via `.to(\"cpu\")`) when using the dispatcher. "
                        "Instead, return this output as an IPU tensor.")
        if not ops.unchecked and name == "numpy":
            raise TypeError("can't convert ipu:0 device type tensor to numpy. Use Tensor.cpu() to "
                            "copy the tensor to host memory first.")
        # PopTorch takes these whole; here torch takes them apart or looks for wrong values.
        if name in ("kl_div", "ctc_loss", "one_hot"):
            func = ops.for_the_host(func)
        return func(*args, **(kwargs or {}))


class _Compiler(TorchDispatchMode):
    """Refuses operations outside all blocks and those whose results depend on values.

    `unsupported` collects those that PopTorch has no handler for. PyTorch decomposes an operation
    that PopTorch does not register for IPU tensors, if it can.
    """

    def __init__(self):
        super().__init__()
        self.unsupported: Set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if ops.unchecked:
            return func(*args, **kwargs)
        name = func.name()
        kind = func.overloadpacket.__name__
        if blocks.recorder.ipu is None and kind not in FREE and any(
                isinstance(a, torch.Tensor) for a in args):
            raise Error(f"No active Block, all the ops must belong to a Block (aten::{kind})")
        self._refuse_dependence_on_values(func, kind, args)
        if not is_handled(name) and kind not in UNSEEN:
            if torch._C._dispatch_has_kernel_for_dispatch_key(name, COMPOSITE):
                with self:
                    return func._op_dk(getattr(torch._C.DispatchKey, COMPOSITE), *args, **kwargs)
            self.unsupported.add(name.split(".")[0])
        return func(*args, **kwargs)

    def _refuse_dependence_on_values(self, func, kind, args):
        if kind == "_local_scalar_dense":
            raise NotImplementedError(
                "Could not run 'aten::_local_scalar_dense' with arguments from the 'Meta' backend.")
        if kind == "nonzero":
            raise Error(
                "Operations using aten::nonzero are unsupported because the output shape is "
                "determined by the tensor values. The IPU cannot support dynamic output shapes.")
        if kind == "index" and any(t.dtype == torch.bool for t in flatten(args[1])):
            raise DynamicOutputShapeException(func)
        if torch.Tag.dynamic_output_shape in func.tags and kind != "index":
            raise Error(f"Type inference failed for aten::{kind} because the operator doesn't have "
                        "an implementation for the Meta backend.")

    def check(self) -> None:
        """Raise Error if there were unsupported operations."""
        if self.unsupported:
            raise Error(
                f"Unsupported ops found in compiled model: [{', '.join(sorted(self.unsupported))}]."
                " Not all operations are supported yet by Graphcore's PyTorch compiler. If you "
                "believe any of these should be, please report this message to "
                "support@graphcore.ai.")


class Trace:
    """The result of tracing a model."""

    def __init__(self, recorder: blocks.Recorder, outputs: Any):
        self.recorder = recorder  # the blocks that the model has
        self.outputs = outputs    # what the model returned, which shows its structure
        self.output_types = [output_type(t.dtype) for t in flatten(outputs)]
        # The index of the loss among the losses marked in a forward pass
        self.loss_index: Optional[int] = None
        # Whether it is the result of a torch loss function, marked only by an active LossFinder
        self.needs_finder = False
        self.leaves: Set[int] = set()  # ids of the parameters that the loss depends on


def run(model, args_and_kwargs, strategy, training: bool) -> Trace:
    """Run `model` once and return its Trace. Raises Error where PopTorch's compiler would.

    `strategy` assigns the model's blocks to stages.
    """
    recorder = blocks.recorder = blocks.Recorder(strategy)
    compiler = _Compiler()
    try:
        ops.marked_losses = []
        with torch.set_grad_enabled(training), LossFinder(), _HostAccess(), compiler:
            outputs = model(*args_and_kwargs[0], **args_and_kwargs[1])
        compiler.check()
        trace = Trace(recorder, outputs)
        if training:
            losses = ops.marked_losses
            final = _final_loss([loss for loss, _ in losses], flatten(outputs))
            trace.needs_finder = not losses[final][1]
            trace.loss_index = final if trace.needs_finder else sum(
                identity for _, identity in losses[:final])
            trace.leaves = {id(node.variable) for node in _graph(losses[final][0].grad_fn)
                            if hasattr(node, "variable")}
        return trace
    finally:
        blocks.recorder, ops.marked_losses = None, None


BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)


def check_reassigned(model: torch.nn.Module, slots: List[tuple]) -> None:
    """Raise Error if the forward pass has removed or reassigned a parameter or buffer."""
    free = [module._buffers for module in model.modules() if isinstance(module, BATCH_NORMS)]
    for container, key, weight in slots:
        kind = "Parameter" if weight.is_parameter else "Buffer"
        if key not in container:
            raise Error(
                f"{kind} {weight.name} is removed from the model when calling the forward method.")
        if not any(container is other for other in free) and container[key] is not weight.working:
            raise Error(
                f"{kind} {weight.name} is reassigned within the model when calling the forward "
                "method. This is not supported. "
                f"Consider using self.{weight.name}.copy_(src) to copy data from a source tensor, "
                "where src is the name of the source tensor.")


def _final_loss(losses: List[torch.Tensor], outputs: List[torch.Tensor]) -> int:
    """Return the index of the one loss from which no other loss is computed.

    A loss that no output depends on does not count. Raises Error if there is not exactly one, or if
    it is no scalar (RemoveSurplusIdentityLosses.cpp; PopART's Ir::setFinalLoss, ir.cpp).
    """
    used = set().union(*(_graph(t.grad_fn) for t in outputs))
    returned = [i for i, loss in enumerate(losses)
                if loss.grad_fn in used or loss.data_ptr() in {t.data_ptr() for t in outputs}]
    if not returned:
        raise Error("Couldn't find a loss in graph!")
    final = [i for i in returned if not any(
        losses[i].grad_fn in _graph(losses[j].grad_fn) for j in returned if j != i)]
    if len(final) != 1:
        raise Error("Multiple independent losses found in graph. Graph must have one final loss. "
                    "Wrap final graph loss in poptorch.identity_loss.")
    if losses[final[0]].numel() > 1:
        raise Error("Loss tensor, 'IdentityLoss:0', must be a scalar tensor")
    return final[0]


def _graph(node: Any) -> Set[Any]:
    """Return the nodes of autograd's graph that `node`, a grad_fn or None, depends on."""
    nodes, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return nodes
