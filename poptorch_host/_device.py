"""The device: it has its own copy of the weights, runs the micro-batches and updates the weights.

A combined batch is ordered by device iteration, then gradient accumulation step, then replica, then
row of the micro-batch, because PopART's StepIOSplitter hands micro-batches to the replicas in turn.
The replicas run one after another, each through all micro-batches of an update, with its own random
numbers and gradients: it makes no difference which process a replica belongs to.

A float16 model has float16 tensors on the host, and runs in float32 on the device, because that is
nearest to an IPU's float16 (see README.md). What leaves the device has PopTorch's types, float16
among them.
"""
from __future__ import annotations

import contextlib
import os
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch

from . import _formulas, _hyperparameters, _structure, _trace, enums, ops
from ._anchors import Anchors
from ._errors import Error
from ._logging import logger
from ._outputs import Outputs, output_type
from ._reduction import Gradients, PairwiseSum, sum_over_processes


def _with_half(half: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.to(half) if tensor.dtype == torch.float16 else tensor


class Weight:
    """One parameter or buffer on the device."""

    def __init__(self, name: str, host: torch.Tensor):
        self.name, self.host = name, host  # host: the user's tensor
        self.type = output_type(host.dtype)  # of PopTorch's tensor
        self.is_parameter = isinstance(host, torch.nn.Parameter)
        self.is_half = host.dtype == torch.float16
        self.value = host.detach().to(torch.float32 if self.is_half else host.dtype, copy=True)
        self.working = self._as_host(self.value)  # what the model runs with
        # The accumulated gradient where autograd cannot accumulate it in place, because it is
        # sparse; and a tensor to accumulate the next one in, of any content
        self.gradient: Optional[torch.Tensor] = None
        self.has_sparse_gradient, self.spare = False, None

    def _as_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.Parameter(
            tensor, self.host.requires_grad) if self.is_parameter else tensor

    def traced(self) -> torch.Tensor:
        """Return a new tensor that stands for `working` in the trace, in bfloat16 for float16."""
        return self._as_host(self.value.to(torch.bfloat16 if self.is_half else self.value.dtype,
                                           copy=True))

    def accumulate(self) -> None:
        """Add a sparse gradient of a micro-batch, and all later ones, to `gradient`."""
        gradient = self.working.grad
        if gradient is None or not (gradient.is_sparse or self.gradient is not None):
            return
        self.working.grad = None
        if gradient.is_sparse:
            if self.gradient is None:
                self.gradient = (torch.empty_like(self.value) if self.spare is None else
                                 self.spare).zero_()
                self.has_sparse_gradient, self.spare = True, None
            self.gradient.index_add_(0, gradient._indices()[0], gradient._values())
        else:
            self.gradient.add_(gradient)

    def take_gradient(self) -> Optional[torch.Tensor]:
        """Return the accumulated gradient, None if there is none, and reset it."""
        gradient = self.working.grad if self.gradient is None else self.gradient
        self.gradient = self.working.grad = None
        return gradient


class Device:
    """A compiled model with its own weights, optimizer state and random number generators."""

    def __init__(self, model: torch.nn.Module, options: Any, training: bool):
        self.model, self.options, self.training = model, options, training
        self.attached = False
        self.synthetic = bool(options._Popart.options.get("syntheticDataMode"))
        self.processes = options.Distributed.numProcesses
        self.set_rng([torch.initial_seed()])
        with torch._C.DisableTorchFunctionSubclass():
            self.weights = {
                id(t): Weight(name, t)
                for name, t in (*model.named_parameters(), *model.named_buffers())}
        # (container, key, weight) for each place where the model keeps a tensor
        self.slots = [
            (container, key, self.weights[id(tensor)]) for module in model.modules()
            for container in (module._parameters, module._buffers)
            for key, tensor in container.items() if id(tensor) in self.weights]
        self.embeddings = [
            m for m in model.modules()
            if isinstance(m, torch.nn.Embedding) and not m.scale_grad_by_freq] if training else []
        self.trace: Optional[_trace.Trace] = None
        self.anchors: Optional[Anchors] = None
        self.asks_for_half = False  # whether the model itself makes float16 tensors
        self.settings: Dict[str, Any] = {}  # of the optimizer (see optim.snapshot)
        # (weight, index of its parameter group) for each weight that the optimizer updates
        self.trained: List[Tuple[Weight, int]] = []
        self.hyper: Dict[str, Dict[str, Any]] = {}  # of each trained weight, by its name
        self.state: Dict[str, Dict[str, torch.Tensor]] = {}  # of the optimizer, likewise
        # which elements of a weight's accumulator in PopART are not finite, likewise
        self.nonfinite: Dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def _installed(self):
        """Return a context in which the model uses the device's tensors.

        Embeddings return sparse gradients in it: a dense one would be mostly zeros, for a whole
        vocabulary in every micro-batch.
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
        """Trace the model with one micro-batch; the device's state stays as it is."""
        rngs = list(self.rngs)
        saved = [(w, w.working) for w in self.weights.values() if w.is_half or not w.is_parameter]
        for weight, _ in saved:
            weight.working = weight.traced()  # a new tensor starts with _version 0
        casts = _trace.Float16Casts(torch.bfloat16)
        try:
            with self._installed(), self._random(0), casts:
                micro_batch = arguments.micro_batches(_with_half(torch.bfloat16),
                                                      micro_batches_per_call(self.options))(0)
                self.trace = _trace.run(self.model, micro_batch, self.options._execution_strategy,
                                        self.training)
                _trace.check_reassigned(self.model, self.slots)
            self.anchors = Anchors(self.options, [
                w for w in self.weights.values() if id(w.working) in self.trace.leaves])
            changed = any(not w.is_parameter and w.working._version != 0 for w, _ in saved)
        finally:
            self.rngs = rngs
            for weight, working in saved:
                weight.working = working
        self.asks_for_half = casts.needed
        if changed and self.options.replication_factor > 1:
            raise Error(
                "PopTorch does not support broadcasting buffers. If your model is able to tolerate "
                "buffers becoming out of sync between replicas, you can disable buffer "
                "broadcasting using poptorch.Options.broadcastBuffers(False).")

    # ---- weights and optimizer ----

    def attach(self) -> None:
        self.attached = True
        self.nonfinite.clear()

    def upload(self) -> None:
        """Copy all weights from the host to the device."""
        logger.debug("Writing weights from host to IPU memory")
        self._write_accumulators()
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for weight in self.weights.values():
                weight.value.copy_(weight.host)

    def download(self) -> None:
        """Copy all weights from the device to the host; Error with synthetic data."""
        self._refuse_synthetic("weights")
        logger.debug("Writing weights from IPU to host")
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for weight in self.weights.values():
                weight.host.copy_(weight.value)

    def set_optimizer(self, settings: Dict[str, Any], groups: List[list]) -> None:
        """Use the hyperparameters in `settings` (see optim.snapshot) from now on.

        groups: the parameters of each group. Those of the first call are the trained ones.
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
        """Return {"ipu_state": tensors, "ipu_param": hyperparameters}; Error with synthetic data.

        Master___NAME is the float32 value of a weight that is float16 on the host.
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

    def _write_accumulators(self) -> None:
        """Zero PopART's accumulators, which it writes with the weights unless an option stops it.

        See Ir::streamingIsDisabledForTensor (ir.cpp). The host's copies of them are always zero.
        """
        if not self.options._Popart.options.get("disableGradAccumulationTensorStreams"):
            self.nonfinite.clear()

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
            if weight.name in self.nonfinite:
                gradient.masked_fill_(self.nonfinite[weight.name], float("nan"))
        if not torch.stack([gradient.sum() for _, gradient in ready]).isfinite().all():
            for weight, gradient in ready:
                nonfinite = ~gradient.isfinite()
                if nonfinite.any():
                    self.nonfinite[weight.name] = nonfinite

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
                if weight.has_sparse_gradient:
                    weight.spare = gradient

    def trainer(self) -> Any:
        """Return the executor that trains the weights of this inference model, or None.

        It has left a reference to itself in the host's tensors (see _user_model.watch).
        """
        host = next((w.host for w in self.weights.values()), None)
        executor = getattr(host, "__dict__", {}).get("_executor", lambda: None)()
        return None if self.training else executor

    def get_rng(self) -> List[int]:
        """Return the seed, then the states of the local replicas' generators as 64-bit integers.

        With synthetic data PopART returns a seed that nothing has written and no state
        (Devicex::getRandomSeedToHost and ::getRngStateToHost, devicex.cpp): here [0].
        """
        return [0] if self.synthetic else [
            self.seed, *torch.cat(self.rngs).view(torch.int64).tolist()]

    def set_rng(self, state: List[int]) -> None:
        """Restore what get_rng() returned, or start from a seed alone.

        Then the seed of a replica is `seed` plus its index among the replicas of all processes.
        Raises Error for a state of another number of replicas.
        """
        self.seed, count = state[0], self.options.replication_factor
        first = self.options.Distributed.processId * count
        rngs = [torch.Generator().manual_seed((self.seed + first + replica) % (1 << 63)).get_state()
                for replica in range(count)]
        if state[1:]:
            if (len(state) - 1) * 8 != sum(map(len, rngs)):
                raise Error(f"rng_state has {len(state)} numbers, which are not those of {count} "
                            "replica(s)")
            # Copies: torch.set_rng_state reads outside of a view that begins within its storage.
            rngs = [part.clone()
                    for part in torch.tensor(state[1:]).view(torch.uint8).chunk(count)]
        self.rngs = rngs

    # ---- running ----

    def run(self, arguments) -> List[torch.Tensor]:
        """Run all micro-batches and weight updates of one combined batch.

        Returns the outputs that the output mode keeps, then the anchored gradients (of each
        micro-batch's own scaled loss, as on an IPU), with micro-batches along dimension 0.
        """
        options = self.options
        accumulation, replicas = options.Training.gradient_accumulation, options.replication_factor
        micro_batch = arguments.micro_batches(
            _synthetic if self.synthetic else _with_half(torch.float32),
            micro_batches_per_call(options))
        outputs = Outputs(options, [
            *self.trace.output_types, *(w.type for w in self.anchors.weights.values())])
        for weight, _ in self.trained:
            weight.take_gradient()  # discard what an interrupted call may have left
        casts = (_trace.Float16Casts(torch.float32) if self.asks_for_half else
                 contextlib.nullcontext())
        half = any(weight.is_half for weight in self.weights.values())
        with self._installed(), casts, _multiplications(half), torch.set_grad_enabled(
                self.training), self.anchors.collecting(
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

        Loss scaling, which an IPU's optimizer divides out again, is not part of it: it keeps
        float16 gradients in range, and float32 gradients have enough.
        """
        training = self.options.Training
        if training.accumulation_and_replication_reduction_type == enums.ReductionType.Sum:
            return 1.0
        return 1.0 / (training.gradient_accumulation * self.options.replication_factor *
                      self.processes)


@contextlib.contextmanager
def _multiplications(half: bool) -> Iterator[None]:
    """Let a float16 model multiply in bfloat16, if the environment's POPTORCH_HOST_HALF says so."""
    named = os.environ.get("POPTORCH_HOST_HALF", "float32")
    if named not in ("bfloat16", "float32"):
        raise Error(f"POPTORCH_HOST_HALF must be bfloat16 or float32, not {named!r}")
    before = torch.get_float32_matmul_precision()
    if half and named == "bfloat16":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def micro_batches_per_call(options) -> int:
    """Return the number of micro-batches in the combined batch of one call."""
    return (options.device_iterations * options.Training.gradient_accumulation *
            options.replication_factor)


def _synthetic(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(_with_half(
        torch.float32)(tensor)) if tensor.is_floating_point() else torch.zeros_like(tensor)
