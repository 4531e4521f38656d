"""PoplarExecutor: what trainingModel() and inferenceModel() return. It keeps host and device in
step as PopTorch does.

Weights go to the device when the model is compiled or attached, and on copyWeightsToDevice(). They
come back when they are read (see _user_model.py), on copyWeightsToHost(), and when the device is
given up.
"""
from __future__ import annotations

import collections
import datetime
import time
from typing import Any, Callable, Dict, List, Optional

import torch

from . import _checks, _hyperparameters, _structure, _user_model, enums, optim, profiling
from ._arguments import Parser
from ._device import Device, micro_batches_per_call
from ._errors import Error, NotOffered
from ._logging import logger
from .options import Options

NOT_COMPILED = "Model has not been compiled or has been destroyed."
EXECUTABLE = "a host has no executable to keep, and a model is pickled code; save model.state_dict() and optimizer.state_dict()"
NOT_OFFERED_METHODS = {
    **dict.fromkeys(("save", "compileAndExport", "loadExecutable"), EXECUTABLE), "getTensorNames": "it names tensors of PopART's graph",
    **dict.fromkeys(("getPerfCounters", "getHostIpuLatency", "getComputeLatency", "getIpuHostLatency", "getLatency"), "it times transfers between host and IPU"),
}
OFFLINE = "Trying to {} an offline device (ConnectionType.Never)"


class PoplarExecutor:
    """A model that runs on a device. Made by trainingModel() and inferenceModel()."""

    _precompile_hooks: Dict[int, Callable] = collections.OrderedDict()
    _postcompile_hooks: Dict[int, Callable] = collections.OrderedDict()

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
        self._model, self._user_model, self._options, self._training = model, user_model or model, options, training
        self._parser = Parser(model)
        self._device: Optional[Device] = None
        self._compiled_arguments = None
        self._dirty_host_weights = False
        self._host_weights_version = 0
        self._rng_state: Optional[List[int]] = None
        self._anchored: Dict[str, torch.Tensor] = {}
        self._settings: Dict[str, Any] = {}
        self._optimizer = None
        self._check_attributes = _hyperparameters.AttributeCheck(options._relax_optimizer_checks)
        self._profiling = profiling.Channel(
            "poptorch.trainingModel" if training else "poptorch.inferenceModel")
        self._profiling.instrument(self, "copyWeightsToHost", "copyWeightsToDevice", "setOptimizer",
                                   "compile", "destroy")
        if training:
            _user_model.watch(self._user_model, self)
            self.setOptimizer(optimizer or optim.SGD(self._user_model.parameters(), lr=0.01))
        options._freeze()

    # ---- the user's model
    # ------------------------------------------------------------------------------------------

    @property
    def model(self) -> torch.nn.Module:
        """The user's model."""
        return self._user_model

    @property
    def options(self) -> Options:
        """The options, frozen."""
        return self._options

    def __getattr__(self, name):
        if name.startswith("__") or "_user_model" not in self.__dict__:
            raise AttributeError(name)
        if name in NOT_OFFERED_METHODS:
            raise NotOffered(f"PoplarExecutor.{name}", NOT_OFFERED_METHODS[name])
        return getattr(self._user_model, name)

    def __repr__(self):
        return _user_model.module_repr(self._user_model)

    def load_state_dict(self, state_dict: Dict[str, torch.Tensor], strict: bool = True):
        """load_state_dict() of the user's model, and the new weights go to the device. Returns what
        PyTorch returns.
        """
        out = self._user_model.load_state_dict(state_dict, strict)
        if self.isAttachedToDevice():
            self.copyWeightsToDevice()
        return out

    def copyWeightsToHostIfNeeded(self) -> bool:
        """Fetch the weights if the device has newer ones. True if it had."""
        if self._dirty_host_weights:
            logger.debug("Implicit copyWeightsToHost()")
            self.copyWeightsToHost()
            return True
        return False

    def copyWeightsToHost(self) -> None:
        """Fetch parameters and buffers from the device."""
        self._require_compiled()
        self._dirty_host_weights = False
        self._device.download()
        self._host_weights_version += 1

    def copyWeightsToDevice(self) -> None:
        """Send parameters and buffers to the device."""
        self._require_compiled()
        self._dirty_host_weights = False
        self._device.upload()

    def copyNamedBuffersToDevice(self) -> None:
        """Send the buffers named by Options.updatableNamedBuffers to the device. Error if there are
        none.
        """
        self._require_compiled()
        names = self._options._Popart.options.get("updatableNamedBuffers")
        if names is None:
            raise Error("No named buffers marked as updatable via updatableNamedBuffers option")
        self._device.upload(only=names)

    # ---- optimizer
    # -------------------------------------------------------------------------------------------------

    def setOptimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Train with the numbers that `optimizer` has now. Error if a constant has changed since
        the model was compiled.
        """
        if optimizer is not self._optimizer:
            self._change_optimizer(optimizer)
        if self._options._Popart.options.get("automaticLossScalingSettings.enabled") and isinstance(
                optimizer, optim.Optimizer):
            optimizer.variable_attrs.markAsVariable("loss_scaling")  # a device changes it
        settings = optim.snapshot(optimizer)
        _checks.accumulation_type(optimizer, self._options, self.isCompiled())
        if self.isCompiled():
            _hyperparameters.check_constants(self._constants, settings)
        changed, self._settings = settings != self._settings, settings
        self._check_attributes(optimizer)
        if self.isAttachedToDevice():
            if changed:
                self._device.set_optimizer(settings, self._groups())
            self._write_optimizer_state()

    def _change_optimizer(self, optimizer):
        _hyperparameters.warn_subclass(optimizer)
        if isinstance(self._optimizer, optim.Optimizer):
            self._read_optimizer_state()
            self._optimizer._used_by(None)
        if isinstance(optimizer, optim.Optimizer):
            optimizer._used_by(self)
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

    # ---- compile, attach, run
    # --------------------------------------------------------------------------------------

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model for arguments like these, and attach to the device unless the options
        say never to.
        """
        if self.isCompiled():
            logger.warning("Call to compile() ignored: the executable is already compiled")
            return
        self._compile(self._parser(args, kwargs))

    def _compile(self, arguments) -> None:
        began = time.monotonic()
        for hook in self._precompile_hooks.values():
            hook()
        try:
            _checks.options(self._options)
            arguments.check_batch(self._options, micro_batches_per_call(self._options))
            seed = self._options.random_seed if self._options.exists(
                "random_seed") else torch.initial_seed()
            device = Device(self._model, self._options, self._training, seed)
            unknown = set(self._options._Popart.options.get("updatableNamedBuffers", [])) - {
                w.name for w in device.weights.values()}
            if unknown:
                raise Error(
                    f"updatableNamedBuffers names buffers that the model does not have: {sorted(unknown)}"
                )
            device.compile(arguments)
            _checks.pipeline(device.trace.recorder, self._options, self._training)
        finally:
            for hook in self._postcompile_hooks.values():
                hook()
        self._device, self._compiled_arguments = device, arguments.compiled()
        self._compilation_time = datetime.timedelta(seconds=time.monotonic() - began)
        if self._training:
            self._constants = _hyperparameters.constants(self._optimizer, self._settings)
        self._rng_state = None
        if self._options.connection_type != enums.ConnectionType.Never:
            self._attach()

    def _attach(self) -> None:
        self._device.attached = True
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
        """True between compile() and destroy()."""
        return self._device is not None

    def isAttachedToDevice(self) -> bool:
        """True if the device is there to run."""
        return self.isCompiled() and self._device.attached

    def attachToDevice(self) -> None:
        """Attach again after detachFromDevice(). Error if attached, or not compiled."""
        self._require_compiled()
        assert self._options.connection_type != enums.ConnectionType.Never, OFFLINE.format(
            "attach to")
        if self._device.attached:
            raise Error("Device is already attached")
        self._attach()

    def detachFromDevice(self) -> None:
        """Fetch weights, optimizer state and random state, and free the device. Error if not
        attached.
        """
        self._require_compiled()
        if not self._device.attached:
            raise Error("Device is not attached")
        self._rng_state = self.rng_state
        if self._training:
            self.copyWeightsToHostIfNeeded()
            self._read_optimizer_state()
        self._device.attached = False

    def destroy(self) -> None:
        """Fetch weights and optimizer state and give the device up; the user's model is plain
        PyTorch again.
        """
        if not self.isCompiled():
            return
        if self._training:
            self.copyWeightsToHostIfNeeded()
            self._read_optimizer_state()
            _user_model.unwatch(self._user_model)
        self._device = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model over a combined batch, compiling it first if need be. Returns the model's
        own structure with the outputs of the micro-batches that the output mode keeps, one after
        the other along dimension 0.
        """
        assert self._options.connection_type != enums.ConnectionType.Never, (
            "Trying to run a model on an offline device (ConnectionType.Never): use model.compile(inputs) instead of model(inputs)"
        )
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
        self._anchored = self._device.anchors.joined()
        self._dirty_host_weights = self._training
        if isinstance(self._optimizer, optim.Optimizer):
            self._optimizer.host_state_is_dirty = True
        for out in outputs:
            out.backward = _refuse_backward
        return _structure.rebuild(self._device.trace.outputs, iter(outputs))

    def getAnchoredTensor(self, short_name: str) -> torch.Tensor:
        """What Options.anchorTensor() kept of the last call under this name: each micro-batch's
        gradient, times the loss scaling, micro-batches along dimension 0 as the anchor's output
        mode says. float32, also of a float16 parameter, so that it is finite where the host's
        update is. AssertionError for a name that is no anchor, or before the first call.
        """
        assert short_name in self._anchored, f"No tensor with name {short_name} found."
        return self._anchored[short_name]

    def _take_trained_weights(self) -> None:
        """If the same model is being trained, run with what it has learned so far."""
        trainer = self._device.trainer()
        if trainer is not None:
            trainer.copyWeightsToHostIfNeeded()
            if self._host_weights_version != trainer._host_weights_version:
                logger.debug("Implicit copyWeightsToDevice()")
                self.copyWeightsToDevice()
                self._host_weights_version = trainer._host_weights_version

    @property
    def rng_state(self) -> List[int]:
        """Seed and state of the device's random numbers, as integers."""
        self._require_compiled()
        return self._device.get_rng()

    @rng_state.setter
    def rng_state(self, state: List[int]) -> None:
        self._require_compiled()
        self._rng_state = list(state)
        self._device.set_rng(self._rng_state)

    def compilationTime(self) -> datetime.timedelta:
        """How long the compilation took. Error if there was none, or without
        Options.showCompilationProgressBar.
        """
        if not self.isCompiled():
            raise Error("Please compile the model before obtaining compilation time.")
        if not self._options._show_compilation_progress_bar:
            raise Error("Please set showCompilationProgressBar option to obtain compilation time.")
        return self._compilation_time

    def cycleCount(self) -> int:
        """IPU cycles of the last run: there are none, so always Error."""
        if not self._options._Popart.options["instrumentWithHardwareCycleCounter"]:
            raise Error(
                "Cycle count logging is disabled. Please set option logCycleCount to True to enable."
            )
        if not self.isCompiled():
            raise Error("Please run the model at least once before obtaining cycle count.")
        raise NotOffered("PoplarExecutor.cycleCount", "a host has no IPU cycles to count")

    def _require_compiled(self) -> None:
        if not self.isCompiled():
            raise Error(NOT_COMPILED)


def _refuse_backward():
    raise Error(
        "backward() cannot be called explicitly on outputs of a PopTorch model. If you're using a trainingModel, the backwards "
        "pass is performed automatically when invoking the model. If you're using an inferenceModel, you should use a "
        "trainingModel instead.")


def _register(hooks, hook, when):
    if not callable(hook):
        raise RuntimeError(f"{when}-compile hook must be callable")
    handle = torch.utils.hooks.RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def registerPreCompileHook(hook: Callable) -> torch.utils.hooks.RemovableHandle:
    """Call `hook()` before each compilation. Returns a handle whose remove() ends that;
    RuntimeError if not callable.
    """
    return _register(PoplarExecutor._precompile_hooks, hook, "Pre")


def registerPostCompileHook(hook: Callable) -> torch.utils.hooks.RemovableHandle:
    """Call `hook()` after each compilation. Returns a handle whose remove() ends that; RuntimeError
    if not callable.
    """
    return _register(PoplarExecutor._postcompile_hooks, hook, "Post")
