"""PopTorch's optimizers: PyTorch's, extended by loss scaling and the types of the device's state.

An optimizer holds hyperparameters in PyTorch's param_groups and, as state_dict()["ipu_state"], a
copy of the device's state. The formulas that the device applies are in _formulas.py.
"""
from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import torch

from ._errors import NotOffered, refuse

# The hyperparameters of a parameter group, by kind of optimizer, and those of a whole optimizer.
HYPER = {
    "SGD": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    "AdamW": ("lr", "betas", "eps", "weight_decay"),
    "LAMB": ("lr", "betas", "eps", "weight_decay", "max_weight_norm")}
GLOBAL = ("loss_scaling", "bias_correction", "max_grad_norm")


class VariableAttributes:
    """Which attributes may change after compilation: at first, those given to the constructor."""

    def __init__(self, variable_attributes: List[str], allowed_attributes: List[str]) -> None:
        self._variable_attributes = variable_attributes
        self._allowed_attributes = allowed_attributes

    def isConstant(self, attr: str) -> bool:
        return attr not in self._variable_attributes

    def markAsConstant(self, attr: str) -> None:
        self._check(attr)
        self._variable_attributes = [a for a in self._variable_attributes if a != attr]

    def markAsVariable(self, attr: str) -> None:
        self._check(attr)
        self._variable_attributes.append(attr)

    def _check(self, attr):
        assert attr in self._allowed_attributes, (
            f"Unknown attribute {attr}, allowed values: {self._allowed_attributes}")


class Optimizer:
    """The base class of all optimizers here, with the copy of the device's state."""

    _own: Tuple[str, ...] = ()  # constructor arguments that PyTorch's optimizer lacks

    def __init__(self):
        self._state_dict = {"ipu_state": None, "ipu_param": None}
        self.ipu_state_is_dirty = False   # the state here is newer than the device's
        self.host_state_is_dirty = False  # the device's state is newer than the one here
        self._executor = None             # weak reference to the executor that uses it

    def _construct(self, parent_init, arguments):
        arguments = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
        given = [k for k, v in arguments.items() if v is not None]
        Optimizer.__init__(self)
        parent_init(self, **{k: arguments[k] for k in given if k not in self._own})
        for name in self._own:
            value = arguments[name] if arguments[name] is not None else OWN_DEFAULTS[name]
            assert not name.endswith("accum_type") or value in (torch.float16, torch.float32), (
                "Accumulation types must be either torch.float32 or torch.float16")
            setattr(self, name, value)
        self.variable_attrs = VariableAttributes(given, list(self.defaults) + ["loss_scaling"])

    def state_dict(self) -> Dict[str, Any]:
        """Return PyTorch's state_dict() extended by the device's "ipu_state" and "ipu_param"."""
        executor = self._executor() if self._executor is not None else None
        if executor is not None:
            executor._read_optimizer_state()
        return self.get_state_dict()

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore what state_dict() returned. The device receives it before its next run.

        Raises RuntimeError if `state` has no "ipu_state" and "ipu_param".
        """
        torch.optim.Optimizer.load_state_dict(self, state)
        self.set_state_dict(state)

    def get_state_dict(self) -> Dict[str, Any]:
        """Return state_dict() without reading from the device."""
        return {**self._state_dict, **torch.optim.Optimizer.state_dict(self)}

    def set_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore only the device's part of what state_dict() returned."""
        if not state:
            raise RuntimeError("Cannot load optimizer state dictionary because it is empty.")
        if "ipu_state" not in state or "ipu_param" not in state:
            raise RuntimeError("Only IPU optimizer states can be loaded onto the IPU.")
        self._state_dict = {name: state[name] for name in ("ipu_state", "ipu_param")}
        self.ipu_state_is_dirty = True
        self.host_state_is_dirty = False

    def has_state(self) -> bool:
        return None not in (self._state_dict["ipu_state"], self._state_dict["ipu_param"])

    def __getstate__(self) -> Dict[str, Any]:
        return {
            **self.__dict__, "_executor": None, "ipu_state_is_dirty": self.has_state(),
            "host_state_is_dirty": False}


OWN_DEFAULTS = {
    "loss_scaling": 1.0, "velocity_scaling": 1.0, "use_combined_accum": False,
    "accum_type": torch.float32, "velocity_accum_type": torch.float32,
    "first_order_momentum_accum_type": torch.float32,
    "second_order_momentum_accum_type": torch.float32, "max_grad_norm": float("inf"),
    "bias_correction": True, "max_weight_norm": 65500.0}  # close to the largest float16 number


class SGD(Optimizer, torch.optim.SGD):
    """Stochastic gradient descent with momentum.

    As in PopART (popart/sgd.hpp; OptimizerDecompose::addStateTensor), the velocity starts from zero
    and `dampening` applies to the first update; PyTorch's starts from the first gradient.
    """

    _own = ("loss_scaling", "velocity_scaling", "use_combined_accum", "accum_type",
            "velocity_accum_type", "max_grad_norm")

    def __init__(self, params: Iterable, lr: float, momentum: Optional[float] = None,
                 dampening: Optional[float] = None, weight_decay: Optional[float] = None,
                 nesterov: Optional[bool] = None, maximize: Optional[bool] = None,
                 foreach: Optional[bool] = None, differentiable: Optional[bool] = None,
                 loss_scaling: Optional[float] = None, velocity_scaling: Optional[float] = None,
                 use_combined_accum: Optional[bool] = None,
                 accum_type: Optional[torch.dtype] = None,
                 velocity_accum_type: Optional[torch.dtype] = None,
                 max_grad_norm: Optional[float] = None) -> None:
        self._construct(torch.optim.SGD.__init__, locals())
        if self.use_combined_accum:
            raise NotOffered("optim.SGD", "with use_combined_accum; this project trains with AdamW")


class AdamW(Optimizer, torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    `bias_correction` has no effect: PopTorch's compiler gives PopART the corrected Adam in both
    cases (CompilerImpl::getPopartOptimizer, OptimizerType::ADAMW_NO_BIAS).
    """

    _own = ("loss_scaling", "bias_correction", "accum_type", "first_order_momentum_accum_type",
            "second_order_momentum_accum_type", "max_grad_norm")

    def __init__(self, params: Iterable, lr: Optional[float] = None,
                 betas: Optional[Tuple[float, float]] = None, eps: Optional[float] = None,
                 weight_decay: Optional[float] = None, amsgrad: Optional[bool] = None,
                 maximize: Optional[bool] = None, foreach: Optional[bool] = None,
                 capturable: Optional[bool] = None, differentiable: Optional[bool] = None,
                 fused: Optional[bool] = None, loss_scaling: Optional[float] = None,
                 bias_correction: Optional[bool] = None, accum_type: Optional[torch.dtype] = None,
                 first_order_momentum_accum_type: Optional[torch.dtype] = None,
                 second_order_momentum_accum_type: Optional[torch.dtype] = None,
                 max_grad_norm: Optional[float] = None) -> None:
        self._construct(torch.optim.AdamW.__init__, locals())


def _lamb_init(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2,
               max_weight_norm=65500.0):
    defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                    max_weight_norm=max_weight_norm)
    torch.optim.Optimizer.__init__(self, params, defaults)


class LAMB(Optimizer, torch.optim.Optimizer):
    """LAMB (You et al. 2020): AdamW's update times min(|weight|, max_weight_norm) / |update|."""

    _own = ("bias_correction", "loss_scaling", "accum_type", "first_order_momentum_accum_type",
            "second_order_momentum_accum_type")

    def __init__(self, params: Iterable, lr: Optional[float] = None,
                 betas: Tuple[float, float] = None,
                 eps: Optional[float] = None, weight_decay: Optional[float] = None,
                 bias_correction: Optional[bool] = None, loss_scaling: Optional[float] = None,
                 max_weight_norm: Optional[float] = None, accum_type: Optional[torch.dtype] = None,
                 first_order_momentum_accum_type: Optional[torch.dtype] = None,
                 second_order_momentum_accum_type: Optional[torch.dtype] = None) -> None:
        self._construct(_lamb_init, locals())

    def step(self, closure: Optional[Callable] = None) -> Optional[float]:
        """Raise NotOffered: the device updates the weights."""
        refuse("optim.LAMB.step")


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of the optimizer's formula, a key of HYPER; AssertionError if it has none."""
    for kind, parent in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW), ("LAMB", LAMB)):
        if isinstance(optimizer, parent):
            return kind
    for parent in type(optimizer).__mro__:
        refuse("optim." + parent.__name__)
    raise AssertionError(
        f"Unsupported optimizer type. Types supported {', '.join(HYPER)}")


def snapshot(optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """Return the current settings of `optimizer`, which setOptimizer() passes to the device.

    The result has the key "kind" (see kind_of), a key for each name in GLOBAL, and "groups", the
    hyperparameters of each parameter group. Raises ValueError for an amsgrad optimizer.
    """
    kind = kind_of(optimizer)
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError("Only non-amsgrad Adam/AdamW optimizers are supported.")
    numbers = {name: getattr(optimizer, name, OWN_DEFAULTS[name]) for name in GLOBAL}
    groups = [{name: _number(group[name], name) for name in HYPER[kind]}
              for group in optimizer.param_groups]
    return {"kind": kind, **numbers, "groups": groups}


def _number(value, name):
    values = value if isinstance(value, (tuple, list)) else (value,)
    assert all(isinstance(v, (int, float))
               for v in values), f"Expected a number for {name} but got {value} instead"
    return tuple(values) if name == "betas" else value
