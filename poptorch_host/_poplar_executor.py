"""PoplarExecutor, which trainingModel() and inferenceModel() return.

It synchronises host and device as PopTorch does. Weights are copied to the device when the model
is compiled or attached, and by copyWeightsToDevice(). They are copied back when they are read (see
_user_model.py), by copyWeightsToHost(), and when the model is detached or destroyed.
"""
from __future__ import annotations

import weakref
from typing import Any, Dict, List, Optional

import torch

from . import _checks, _hyperparameters, _structure, _user_model, enums, optim, profiling
from ._arguments import Parser
from ._device import Device, micro_batches_per_call
from ._errors import Error, refuse
from ._logging import logger
from ._threads import choose_threads
from .options import Options


class PoplarExecutor:
    """A model that runs on a device, as created by trainingModel() or inferenceModel()."""

    def __init__(self, model: torch.nn.Module, options: Optional[Options], training: bool,
                 poptorch_version: str, optimizer: Optional[torch.optim.Optimizer] = None,
                 user_model: Optional[torch.nn.Module] = None):
        if options and not isinstance(options, Options):
            raise Error(
                f"Invalid type: 'options' is of type {type(options)} (Expected poptorch.Options)")
        if options:
            options._freeze()
        options = options.clone() if options else Options()
        if not training:
            _checks.inference_options(options)
        if options.defaultOutputMode():
            options.outputMode(enums.OutputMode.Final if training else enums.OutputMode.All)
        self._model, self._user_model, self._options, self._training = (
            model, user_model or model, options, training)
        self._parser = Parser(model)
        self._device: Optional[Device] = None
        self._compiled_arguments = None
        self._dirty_host_weights = False
        self._host_weights_version = 0
        self._rng_state: Optional[List[int]] = [options.random_seed] if options.exists(
            "random_seed") else None
        self._rng_has_run = False  # whether the device's state is another than `_rng_state`
        self._anchored: Dict[str, torch.Tensor] = {}
        self._settings: Dict[str, Any] = {}
        self._optimizer = None
        self._profiling = profiling.Channel(
            "poptorch.trainingModel" if training else "poptorch.inferenceModel")
        self._profiling.instrument(self, "copyWeightsToHost", "copyWeightsToDevice", "setOptimizer",
                                   "compile", "destroy")
        if training:
            _user_model.watch(self._user_model, self)
            self.setOptimizer(optimizer or optim.SGD(self._user_model.parameters(), lr=0.01))
        options._freeze()

    # ---- the user's model ----

    model = property(lambda self: self._user_model)
    options = property(lambda self: self._options)  # the executor's own copy, which is frozen

    def __getattr__(self, name):
        if name.startswith("__") or "_user_model" not in self.__dict__:
            raise AttributeError(name)
        refuse("PoplarExecutor." + name)
        return getattr(self._user_model, name)

    def __repr__(self):
        return repr(self._user_model)

    def load_state_dict(self, state_dict: Dict[str, torch.Tensor], strict: bool = True):
        """Call load_state_dict() of the user's model, and copy the new weights to the device."""
        out = self._user_model.load_state_dict(state_dict, strict)
        if self.isAttachedToDevice():
            self.copyWeightsToDevice()
        return out

    def copyWeightsToHostIfNeeded(self) -> bool:
        """Copy the weights to the host if the device's are newer; return whether they were."""
        if self._dirty_host_weights:
            logger.debug("Implicit copyWeightsToHost()")
            self.copyWeightsToHost()
            return True
        return False

    def copyWeightsToHost(self) -> None:
        """Copy parameters and buffers from the device to the host; Error with synthetic data."""
        self._require_compiled()
        self._device.download()
        self._dirty_host_weights = False
        self._host_weights_version += 1

    def copyWeightsToDevice(self) -> None:
        """Copy all parameters and buffers from the host to the device."""
        self._require_compiled()
        # PopTorch first reads the optimizer's state, which PopART writes together with the weights.
        # Here it could stay where it is, but the reading would fail with synthetic data.
        if self._device.synthetic:
            self._read_optimizer_state()
        self._dirty_host_weights = False
        self._device.upload()

    # ---- optimizer ----

    def setOptimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Train with the current hyperparameters of `optimizer` from now on.

        Raises Error if a constant has changed since the model was compiled.
        """
        if optimizer is not self._optimizer:
            self._change_optimizer(optimizer)
        if self._options._Popart.options.get("automaticLossScalingSettings.enabled") and isinstance(
                optimizer, optim.Optimizer):
            optimizer.variable_attrs.markAsVariable("loss_scaling")  # an IPU would change it
        settings = optim.snapshot(optimizer)
        _checks.accumulation_type(optimizer, self._options, self.isCompiled())
        if self.isCompiled():
            _hyperparameters.check_constants(self._constants, settings)
        changed, self._settings = settings != self._settings, settings
        if self.isAttachedToDevice():
            if changed:
                self._device.set_optimizer(settings, self._groups())
            self._write_optimizer_state()

    def _change_optimizer(self, optimizer):
        _hyperparameters.warn(optimizer)
        if isinstance(self._optimizer, optim.Optimizer):
            self._read_optimizer_state()
            self._optimizer._executor = None
        if isinstance(optimizer, optim.Optimizer):
            optimizer._executor = weakref.ref(self)
            optimizer.ipu_state_is_dirty = optimizer.has_state()
        self._optimizer = optimizer

    def _groups(self):
        return [group["params"] for group in self._optimizer.param_groups]

    def _read_optimizer_state(self) -> None:
        optimizer = self._optimizer
        if not isinstance(optimizer, optim.Optimizer):
            return
        if optimizer.host_state_is_dirty and self.isCompiled():
            optimizer.set_state_dict(self._device.read_state())
            optimizer.ipu_state_is_dirty = False
        else:
            logger.debug("Using cached optimiser state dict")

    def _write_optimizer_state(self) -> None:
        optimizer = self._optimizer
        if isinstance(optimizer, optim.Optimizer) and optimizer.ipu_state_is_dirty:
            if optimizer.has_state():
                self.copyWeightsToHostIfNeeded()
                self._device.write_state(optimizer._state_dict)
            optimizer.ipu_state_is_dirty = False

    # ---- compile, attach, run ----

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model for arguments of these shapes and types, and attach to the device.

        With ConnectionType.Never the model is only compiled.
        """
        if self.isCompiled():
            logger.warning("Call to compile() ignored: the executable is already compiled")
            return
        self._compile(self._parser(args, kwargs))

    def _compile(self, arguments) -> None:
        _checks.options(self._options)
        micro_batches = micro_batches_per_call(self._options)
        arguments.check_batch(self._options, micro_batches)
        choose_threads(self._model, max(
            (tensor.numel() // micro_batches for tensor in arguments.tensors), default=0))
        device = Device(self._model, self._options, self._training)
        _checks.types([*arguments.tensors, *(w.host for w in device.weights.values())])
        device.compile(arguments)
        if self._training:
            _checks.loss_scaling(self._settings, self._options, any(
                w.is_half and w.working.requires_grad for w in device.weights.values()))
        _checks.pipeline(device.trace.recorder, self._options, self._training)
        self._device, self._compiled_arguments = device, arguments.compiled()
        if self._training:
            self._constants = _hyperparameters.constants(self._optimizer, self._settings)
        if self._options.connection_type != enums.ConnectionType.Never:
            self._attach()

    def _attach(self) -> None:
        self._device.attach()
        self.copyWeightsToDevice()
        if self._training:
            self._device.set_optimizer(self._settings, self._groups())
            if isinstance(self._optimizer, optim.Optimizer):
                self._optimizer.ipu_state_is_dirty = self._optimizer.has_state()
                self._optimizer.host_state_is_dirty = not self._optimizer.has_state()
            self._write_optimizer_state()
        if self._rng_state is not None:
            self._device.set_rng(self._rng_state)

    def isCompiled(self) -> bool:
        return self._device is not None

    def isAttachedToDevice(self) -> bool:
        return self.isCompiled() and self._device.attached

    def attachToDevice(self) -> None:
        """Attach to the device again; AssertionError with ConnectionType.Never."""
        self._require_compiled()
        assert self._options.connection_type != enums.ConnectionType.Never, (
            "Trying to attach to an offline device (ConnectionType.Never)")
        if self._device.attached:
            raise Error("Device is already attached")
        self._attach()

    def detachFromDevice(self) -> None:
        """Copy weights, optimizer state and random state to the host, and release the device."""
        self._require_compiled()
        if not self._device.attached:
            raise Error("Device is not attached")
        _ = self.rng_state
        if self._training:
            self.copyWeightsToHostIfNeeded()
            self._read_optimizer_state()
        self._device.attached = False

    def destroy(self) -> None:
        """Copy weights and optimizer state to the host, and discard the compiled model."""
        if not self.isCompiled():
            return
        if self._training:
            self.copyWeightsToHostIfNeeded()
            self._read_optimizer_state()
            _user_model.unwatch(self._user_model)
        self._device = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a combined batch, after compiling it if necessary.

        Returns a structure like the one that the model returns. Each of its tensors holds the
        outputs of the micro-batches that the output mode keeps, joined along dimension 0. Raises
        Error if the arguments do not match those that the model was compiled for, and
        AssertionError with ConnectionType.Never.
        """
        assert self._options.connection_type != enums.ConnectionType.Never, (
            "Trying to run a model on an offline device (ConnectionType.Never): use "
            "model.compile(inputs) instead of model(inputs)")
        arguments = self._parser(args, kwargs)
        if not self.isCompiled():
            self._compile(arguments)
        if not self._device.attached:
            self.attachToDevice()
        if not self._training:
            self._take_trained_weights()
        self._compiled_arguments.check_same(arguments)
        if self._training:
            self._write_optimizer_state()
        with self._profiling.tracepoint("modelExecution"):
            outputs = self._device.run(arguments)
        self._rng_has_run = True
        count = len(self._device.trace.output_types)
        self._anchored = dict(zip(self._options.anchored_tensors, outputs[count:]))
        self._dirty_host_weights = self._training
        if isinstance(self._optimizer, optim.Optimizer):
            self._optimizer.host_state_is_dirty = True
        for out in outputs[:count]:
            out.backward = _refuse_backward
        return _structure.rebuild(self._device.trace.outputs, iter(outputs[:count]))

    def getAnchoredTensor(self, short_name: str) -> torch.Tensor:
        """Return the gradient that Options.anchorTensor() named `short_name`, of the last call.

        It is each micro-batch's own, times the loss scaling, in the parameter's type, and the
        outputs' mode joins the micro-batches along dimension 0. AssertionError if there is none.
        """
        assert short_name in self._anchored, f"No tensor with name {short_name} found."
        return self._anchored[short_name]

    def _take_trained_weights(self) -> None:
        """If another executor trains the same model, copy its current weights to this device."""
        trainer = self._device.trainer()
        if trainer is not None:
            trainer.copyWeightsToHostIfNeeded()
            if self._host_weights_version != trainer._host_weights_version:
                logger.debug("Implicit copyWeightsToDevice()")
                self.copyWeightsToDevice()
                self._host_weights_version = trainer._host_weights_version

    @property
    def rng_state(self) -> Optional[List[int]]:
        """The seed and state of the device's random number generator, as integers.

        As in PopTorch (_poplar_executor.py, rng_state), it is what was set as long as the model has
        not run since: at first the seed alone, or None without Options.randomSeed.
        """
        self._require_compiled()
        if self._rng_has_run:
            self._rng_has_run = False
            self._rng_state = self._device.get_rng()
        return self._rng_state

    @rng_state.setter
    def rng_state(self, state: List[int]) -> None:
        self._require_compiled()
        self._rng_state, self._rng_has_run = state.copy(), False
        self._device.set_rng(self._rng_state)

    def _require_compiled(self) -> None:
        if not self.isCompiled():
            raise Error("Model has not been compiled or has been destroyed.")


def _refuse_backward():
    raise Error(
        "backward() cannot be called explicitly on outputs of a PopTorch model. If you're using a "
        "trainingModel, the backwards pass is performed automatically when invoking the model. If "
        "you're using an inferenceModel, you should use a trainingModel instead.")
