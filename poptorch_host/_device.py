"""The device: it has its own copy of the weights, runs the micro-batches and updates the weights.

A combined batch is ordered by device iteration, then gradient accumulation step, then replica, then
row of the micro-batch, because PopART's StepIOSplitter hands micro-batches to the replicas in turn.
The replicas run one after another, each through all micro-batches of an update, with random numbers
and gradients of their own, so that it makes no difference which process a replica belongs to.

A float16 model has float16 tensors on the host. A training has float32 weights on the device. The
model runs in bfloat16, with a copy of the weights, if the processor can multiply bfloat16, and in
float32 otherwise. Its gradients are accumulated in float32. What leaves the device has PopTorch's
types, float16 among them, in both cases.
"""
from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, Tuple

import torch

from . import _formulas, _hyperparameters, _structure, _trace, enums, ops
from ._anchors import Anchors
from ._errors import Error
from ._logging import logger
from ._outputs import Outputs, output_type
from ._reduction import Gradients, PairwiseSum, sum_over_processes

PIECE = 1 << 20  # number of elements that _add converts at a time; they fit in a processor's cache


@functools.lru_cache(maxsize=None)
def half_type() -> torch.dtype:
    """Return the type that replaces float16 in computations.

    It is the one that the environment variable POPTORCH_HOST_HALF names. Without the variable it is
    bfloat16 if the processor has instructions to multiply it, and float32 otherwise. Raises Error
    if the variable names anything else.
    """
    named = os.environ.get("POPTORCH_HOST_HALF")
    if named is not None:
        if named not in ("bfloat16", "float32"):
            raise Error(f"POPTORCH_HOST_HALF must be bfloat16 or float32, not {named!r}")
        return getattr(torch, named)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
        if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags):
            return torch.bfloat16
    return torch.float32


def _with_half(half: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.to(half) if tensor.dtype == torch.float16 else tensor


class Weight:
    """One parameter or buffer on the device."""

    def __init__(self, name: str, host: torch.Tensor, training: bool):
        self.name, self.host = name, host  # host: the user's tensor
        self.type = output_type(host.dtype)  # of PopTorch's tensor
        self.is_parameter = isinstance(host, torch.nn.Parameter)
        self.is_half = host.dtype == torch.float16
        # What the optimizer updates: float32 for float16. Without training it has the host's type.
        self.value = host.detach().to(torch.float32 if self.is_half and training else host.dtype,
                                      copy=True)
        # What the model runs with. In one step, PyTorch takes twice as long from float16 to
        # bfloat16.
        self.working = self.value.float().to(half_type()) if self.is_half else self.value
        self.has_copy = self.working is not self.value
        if self.is_parameter:
            self.working = torch.nn.Parameter(self.working, requires_grad=host.requires_grad)
        # The accumulated gradient, in the type of `value`, where autograd cannot accumulate it in
        # place; and for sparse gradients a tensor to accumulate the next one in, of any content.
        self.gradient: Optional[torch.Tensor] = None
        self.has_sparse_gradient, self.spare = False, None
        # Which elements of PopART's accumulator are not finite (see Device._keep_nonfinite)
        self.nonfinite: Optional[torch.Tensor] = None

    def traced(self) -> torch.Tensor:
        """Return a new tensor that stands for `working` in the trace, in bfloat16 for float16."""
        traced = self.value.to(torch.bfloat16 if self.is_half else self.value.dtype, copy=True)
        return torch.nn.Parameter(
            traced, self.working.requires_grad) if self.is_parameter else traced

    def upload(self) -> None:
        """Copy the host's tensor to the device."""
        self.value.copy_(self.host.detach())
        self.refresh()

    def refresh(self) -> None:
        """Copy `value` to `working`, if it is a copy."""
        if self.has_copy:
            self.working.detach().copy_(self.value.float())

    def download(self) -> None:
        """Copy the device's value to the host's tensor.

        A buffer is copied from its working tensor, because the model itself changes that one.
        """
        if self.has_copy and not self.is_parameter:
            self.value.copy_(self.working)
        self.host.detach().copy_(self.value)

    def accumulate(self) -> None:
        """Add the gradient of a micro-batch to `gradient`, where autograd cannot do so in place.

        This concerns sparse gradients, weights whose `working` is a separate copy, and all further
        gradients once there is a `gradient`.
        """
        gradient = self.working.grad
        if gradient is None or not (self.has_copy or gradient.is_sparse or
                                    self.gradient is not None):
            return
        self.working.grad = None
        if gradient.is_sparse:
            if self.gradient is None:
                self.gradient = (torch.empty_like(self.value) if self.spare is None else
                                 self.spare).zero_()
                self.has_sparse_gradient, self.spare = True, None
            self.gradient.index_add_(0,
                                     gradient._indices()[0],
                                     gradient._values().to(self.gradient.dtype))
        elif self.gradient is None:
            self.gradient = gradient.float()
        else:
            _add(self.gradient, gradient)

    def take_gradient(self) -> Optional[torch.Tensor]:
        """Return the accumulated gradient and reset it.

        Returns None if the loss does not depend on the weight.
        """
        gradient = self.working.grad if self.gradient is None else self.gradient
        self.gradient = self.working.grad = None
        return gradient


class Device:
    """A compiled model with its own weights, optimizer state and random number generators."""

    def __init__(self, model: torch.nn.Module, options: Any, training: bool, seed: int):
        self.model, self.options, self.training = model, options, training
        self.attached = False
        self.synthetic = bool(options._Popart.options.get("syntheticDataMode"))
        self.processes = options.Distributed.numProcesses
        self.set_rng([seed])
        with torch._C.DisableTorchFunctionSubclass():
            self.weights = {
                id(t): Weight(name, t, training)
                for name, t in (*model.named_parameters(), *model.named_buffers())}
        # (container, key, weight) for each place where the model keeps a tensor
        self.slots = list(self._find_slots())
        self.embeddings = [
            m for m in model.modules()
            if isinstance(m, torch.nn.Embedding) and not m.scale_grad_by_freq] if training else []
        self.anchors = Anchors(options, list(self.weights.values()), training)
        self.trace: Optional[_trace.Trace] = None
        self.casts: Callable[[], ContextManager] = contextlib.nullcontext
        self.settings: Dict[str, Any] = {}  # of the optimizer (see optim.snapshot)
        # (weight, index of its parameter group) for each weight that the optimizer updates
        self.trained: List[Tuple[Weight, int]] = []
        self.hyper: Dict[str, Dict[str, Any]] = {}  # of each trained weight, by its name
        self.state: Dict[str, Dict[str, torch.Tensor]] = {}  # of the optimizer, likewise

    def _find_slots(self) -> Iterator[tuple]:
        """Yield (container, key, weight) for each place where the model keeps a tensor.

        A shared weight has several places.
        """
        for module in self.model.modules():
            # Recurrent modules such as torch.nn.LSTM keep their weights a second time.
            flat = module.__dict__.get("_flat_weights", [])
            for container in (module._parameters, module._buffers, flat):
                for key, tensor in (enumerate(container)
                                    if container is flat else container.items()):
                    if id(tensor) in self.weights:
                        yield container, key, self.weights[id(tensor)]

    @contextlib.contextmanager
    def _installed(self):
        """Return a context in which the model uses the device's tensors.

        Embeddings return sparse gradients in it, of the rows that were looked up. A dense gradient
        would be mostly zeros, for a whole vocabulary in every micro-batch.
        """
        sparse = [embedding.sparse for embedding in self.embeddings]
        held = [container[key] for container, key, _ in self.slots]
        for container, key, weight in self.slots:
            container[key] = weight.working
        for embedding in self.embeddings:
            embedding.sparse = True
        try:
            yield
        finally:
            for (container, key, _), tensor in zip(self.slots, held):
                container[key] = tensor
            for embedding, was in zip(self.embeddings, sparse):
                embedding.sparse = was

    @contextlib.contextmanager
    def _random(self, replica: int):
        """Return a context in which random numbers are those of a local replica."""
        host = torch.get_rng_state()
        torch.set_rng_state(self.rngs[replica])
        try:
            yield
        finally:
            self.rngs[replica] = torch.get_rng_state()
            torch.set_rng_state(host)

    def compile(self, arguments) -> None:
        """Trace the model with one micro-batch.

        Whatever the device computes in, float16 is bfloat16 in the trace, so that the outputs'
        types tell the two apart from float32. Afterwards the device's tensors and random numbers
        are what they were before.
        """
        rngs = list(self.rngs)
        saved = [(w, w.working) for w in self.weights.values() if not w.is_parameter
                 or w.is_half and w.working.dtype != torch.bfloat16]
        for weight, _ in saved:
            weight.working = weight.traced()  # a new tensor starts with _version 0
        try:
            with self._installed(), self._random(0):
                micro_batch = arguments.micro_batches(_with_half(torch.bfloat16),
                                                      micro_batches_per_call(self.options))(0)
                self.trace = self._traced(micro_batch)
                _trace.check_reassigned(self.model, self.slots)
            changed = [w for w, _ in saved if not w.is_parameter and w.working._version != 0]
        finally:
            self.rngs = rngs
            for weight, working in saved:
                weight.working = working
        if changed and self.options.replication_factor > 1:
            raise Error(
                "PopTorch does not support broadcasting buffers. If your model is able to tolerate "
                "buffers becoming out of sync between replicas, you can disable buffer "
                "broadcasting using poptorch.Options.broadcastBuffers(False).")

    def _traced(self, micro_batch) -> _trace.Trace:
        casts = _trace.HalfCasts(torch.bfloat16,
                                 _trace.PRODUCTS if half_type() == torch.float32 else ())
        with casts:
            trace = _trace.run(self.model, micro_batch, self.options._execution_strategy,
                               self.training)
        casts.half = half_type()
        if casts.needed:
            self.casts = lambda: casts
        return trace

    # ---- weights and optimizer ----

    def attach(self) -> None:
        """Load the model, with accumulators that are zero."""
        self.attached = True
        self._zero_accumulators()

    def upload(self) -> None:
        """Copy all weights from the host to the device."""
        logger.debug("Writing weights from host to IPU memory")
        self._write_accumulators()
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for weight in self.weights.values():
                weight.upload()

    def download(self) -> None:
        """Copy all weights from the device to the host; Error with synthetic data."""
        self._refuse_synthetic("weights")
        logger.debug("Writing weights from IPU to host")
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for weight in self.weights.values():
                weight.download()

    def set_optimizer(self, settings: Dict[str, Any], groups: List[list]) -> None:
        """Use the hyperparameters in `settings` (see optim.snapshot) from now on.

        `groups` lists the parameters of each parameter group. The first call takes from it which
        weights are trained.
        """
        if not self.trained:
            self.trained = [(self.weights[id(p)], i) for i, group in enumerate(groups)
                            for p in group if id(p) in self.weights]
            self.state = {w.name: _formulas.new_state(settings, w.value) for w, _ in self.trained}
        for i, group in enumerate(settings["groups"]):
            logger.debug("Updating group %d optimizer: %s %s", i, settings["kind"], group)
        self.settings = settings
        self.hyper = {w.name: dict(settings["groups"][i]) for w, i in self.trained}

    def read_state(self) -> Dict[str, Dict[str, torch.Tensor]]:
        """Return the optimizer state on the device, in PopTorch's form.

        It is {"ipu_state": tensors, "ipu_param": hyperparameters}. Master___NAME is the float32
        value of a weight that is float16 on the host. Raises Error with synthetic data.
        """
        self._refuse_synthetic("optimizer state")
        logger.debug("Writing optimiser state tensors from IPU to host.")
        state = {
            f"{slot}___{w.name}": self.state[w.name][slot].clone() for w, _ in self.trained
            for slot in self.state[w.name]}
        state.update({f"Master___{w.name}": w.value.clone() for w, _ in self.trained if w.is_half})
        return {
            "ipu_state": state, "ipu_param": _hyperparameters.parameters(self.settings, self.hyper)}

    def write_state(self, state: Dict[str, Dict[str, torch.Tensor]]) -> None:
        """Restore what read_state() returned, or a part of it.

        A Master___NAME that, rounded to float16, is no longer equal to its weight is ignored.
        """
        logger.debug("Writing optimiser state tensors from host to IPU memory")
        self._write_accumulators()
        for weight, _ in self.trained:
            for slot, tensor in self.state[weight.name].items():
                tensor.copy_(state["ipu_state"].get(f"{slot}___{weight.name}", tensor))
            master = state["ipu_state"].get(f"Master___{weight.name}")
            if weight.is_half and master is not None and torch.equal(master.half(),
                                                                      weight.value.half()):
                weight.value.copy_(master)
                weight.refresh()
        self.settings = _hyperparameters.set_parameters(self.settings, self.hyper,
                                                        state["ipu_param"])

    def _refuse_synthetic(self, what: str) -> None:
        """Raise Error if the model runs with synthetic data, with which PopART cannot read `what`.

        Compiler::copyWeightsToHost and ::fillHostOptimizerStateTensorData (Compiler.cpp) call
        PopART's Devicex::readWeights, which copies from getD2hWeightData() (devicex.cpp). That
        buffer is made by initD2hWeightBuffer(), which is not called with synthetic data.
        """
        if self.synthetic:
            raise Error(
                f"Cannot read {what} from a device that runs with synthetic data "
                "(Options.enableSyntheticData): PopART has no buffer for it and crashes")

    def _zero_accumulators(self) -> None:
        for weight in self.weights.values():
            weight.nonfinite = None

    def _write_accumulators(self) -> None:
        """Zero PopART's accumulators, which it writes with the weights unless an option stops it.

        See Ir::streamingIsDisabledForTensor (ir.cpp). The host's copies of them are always zero.
        """
        if not self.options._Popart.options.get("disableGradAccumulationTensorStreams"):
            self._zero_accumulators()

    def _keeps_accumulators(self) -> bool:
        """Return whether PopART never zeroes accumulators (OptimizerDecompose, adamdecompose.cpp).

        It computes a running mean of the gradients as old * (1 - 1 / n) + new / n, and leaves the
        last update's value where it is, because the first factor is 0 (accumulatex.cpp).
        """
        training = self.options.Training
        return (training.gradient_accumulation > 1 and
                training.accumulation_and_replication_reduction_type == enums.ReductionType.Mean and
                training.meanAccumulationAndReplicationReductionStrategy ==
                enums.MeanReductionStrategy.Running)

    def _keep_nonfinite(self, ready: List[tuple]) -> None:
        """Make gradients NaN where an earlier one was not finite, because 0 * NaN is NaN.

        `ready` lists (weight, gradient) of an update. Finite gradients cost a sum of each.
        """
        for weight, gradient in ready:
            if weight.nonfinite is not None:
                gradient.masked_fill_(weight.nonfinite, float("nan"))
        if not torch.stack([gradient.sum() for _, gradient in ready]).isfinite().all():
            for weight, gradient in ready:
                nonfinite = ~gradient.isfinite()
                weight.nonfinite = nonfinite if nonfinite.any() else None

    def _update_weights(self, gradients: Gradients) -> None:
        """Update the trained weights; gradients: one for each of them."""
        ready = [(w, g) for (w, _), g in zip(self.trained, gradients) if g is not None]
        if not ready:
            return
        with torch.no_grad():
            if self._keeps_accumulators():
                self._keep_nonfinite(ready)
            if self.settings["max_grad_norm"] != float("inf"):
                _formulas.clip([g for _, g in ready], self.settings["max_grad_norm"])
            groups: Dict[tuple, list] = {}
            for weight, gradient in ready:
                groups.setdefault(tuple(self.hyper[weight.name].items()), []).append(
                    (weight, gradient))
            for hyper, members in groups.items():
                _formulas.apply(self.settings, dict(hyper), [w.value for w, _ in members],
                                [g for _, g in members], [self.state[w.name] for w, _ in members])
            for weight, gradient in ready:
                weight.refresh()
                if weight.has_sparse_gradient:
                    weight.spare = gradient

    def trainer(self) -> Any:
        """Return the executor that trains the weights of this inference model, or None.

        A training executor leaves a reference to itself in the host's tensors
        (see _user_model.watch).
        """
        host = next((w.host for w in self.weights.values()), None)
        executor = getattr(host, "__dict__", {}).get("_executor", lambda: None)()
        return None if self.training else executor

    def get_rng(self) -> List[int]:
        """Return the seed, then the states of the replicas' generators as 64-bit integers.

        The replicas are the local ones. With synthetic data PopART returns a seed that nothing has
        written and no state (Devicex::getRandomSeedToHost and ::getRngStateToHost, devicex.cpp):
        here [0].
        """
        return [0] if self.synthetic else [
            self.seed, *torch.cat(self.rngs).view(torch.int64).tolist()]

    def set_rng(self, state: List[int]) -> None:
        """Restore what get_rng() returned. If `state` is only a seed, start from that seed.

        Then each replica draws random numbers of its own: its seed is `seed` plus its index among
        the replicas of all processes. Raises Error for a state of another number of replicas.
        """
        self.seed, count = state[0], self.options.replication_factor
        first = self.options.Distributed.processId * count
        rngs = [seeded(self.seed + first + replica) for replica in range(count)]
        if state[1:]:
            if (len(state) - 1) * 8 != sum(map(len, rngs)):
                raise Error(f"rng_state has {len(state)} numbers, which are not those of {count} "
                            "replica(s)")
            # Copies: torch.set_rng_state reads outside of a view that begins within its storage.
            rngs = [each.clone()
                    for each in torch.tensor(state[1:]).view(torch.uint8).chunk(count)]
        self.rngs = rngs

    # ---- running ----

    def run(self, arguments) -> List[torch.Tensor]:
        """Run all micro-batches and weight updates of one combined batch.

        Returns the outputs that the output mode keeps, then the anchored gradients, all with
        micro-batches along dimension 0. The gradients are those of each micro-batch's own scaled
        loss, as on an IPU.
        """
        options = self.options
        accumulation, replicas = options.Training.gradient_accumulation, options.replication_factor
        micro_batch = arguments.micro_batches(
            _synthetic if self.synthetic else _with_half(half_type()),
            micro_batches_per_call(options))
        outputs = Outputs(options, [
            *self.trace.output_types, *(w.type for w in self.anchors.weights.values())])
        for weight, _ in self.trained:
            weight.take_gradient()  # discard what an interrupted call may have left
        with self._installed(), torch.set_grad_enabled(
                self.training), self.casts(), self.anchors.collecting(
                    self.settings.get("loss_scaling", 1.0) / self.gradient_scale):
            for iteration in range(options.device_iterations):
                gradients = PairwiseSum()
                for replica in range(replicas):
                    with self._random(replica):
                        for step in range(iteration * accumulation, (iteration + 1) * accumulation):
                            args, kwargs = micro_batch(step * replicas + replica)
                            outputs.add(step, replica, [
                                *self._run_micro_batch(args, kwargs), *self.anchors.take()])
                    gradients.add([weight.take_gradient() for weight, _ in self.trained])
                if self.training:
                    self._update_weights(sum_over_processes(gradients.total(), self.processes))
        return outputs.joined()

    def _run_micro_batch(self, args, kwargs) -> List[torch.Tensor]:
        if not self.training:
            return _structure.flatten(self.model(*args, **kwargs))
        ops.marked_losses = []
        try:
            with _trace.LossFinder() if self.trace.needs_finder else contextlib.nullcontext():
                result = self.model(*args, **kwargs)
            loss = ops.marked_losses[self.trace.loss_index][0]
        finally:
            ops.marked_losses = None
        loss.backward(torch.full_like(loss, self.gradient_scale))
        for weight, _ in self.trained:
            weight.accumulate()
        return [t.detach() for t in _structure.flatten(result)]

    @property
    def gradient_scale(self) -> float:
        """The factor of a micro-batch's gradient in its weight update.

        Loss scaling is not part of it. On an IPU it multiplies the loss and is divided out in the
        optimizer, to keep float16 gradients in range; float32 and bfloat16 gradients have enough
        range without it.
        """
        training = self.options.Training
        if training.accumulation_and_replication_reduction_type == enums.ReductionType.Sum:
            return 1.0
        return 1.0 / (training.gradient_accumulation * self.options.replication_factor *
                      self.processes)


def _add(total: torch.Tensor, part: torch.Tensor) -> None:
    """Add `part`, which may have another type, to `total` in place, piece by piece.

    PyTorch first converts a tensor of another type into a new one. If that is as large as the
    gradient of an embedding, it is read from memory instead of the cache, which takes five times as
    long (measured for 50,265 x 768).
    """
    rows = max(1, PIECE * len(part) // part.numel()) if part.numel() > PIECE else 0
    for piece, of in zip(total.split(rows), part.split(rows)) if rows else [(total, part)]:
        piece.add_(of)


def seeded(seed: int) -> torch.Tensor:
    """Return the state of a random number generator that starts from `seed`."""
    return torch.Generator().manual_seed(seed & ((1 << 63) - 1)).get_state()


def micro_batches_per_call(options) -> int:
    """Return the number of micro-batches in the combined batch of one call."""
    return (options.device_iterations * options.Training.gradient_accumulation *
            options.replication_factor)


def _synthetic(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(_with_half(
        half_type())(tensor)) if tensor.is_floating_point() else torch.zeros_like(tensor)
