"""float16 as an IPU computes with it: a slow reference."""
from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class Float16(TorchDispatchMode):
    """Computes every operation on float16 tensors in float32 and rounds its result to float16.

    That is 11 bits of mantissa for every value, and sums in float32. What leaves tensors as they
    are, and casts between types, run as they are.
    """

    AS_IT_IS = {"aten::_to_copy", "aten::copy_", "aten::clone", "aten::fill_.Scalar"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        half = any(isinstance(a, torch.Tensor) and a.dtype == torch.float16
                   for a in tree_flatten([args, kwargs])[0])
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not half or view or func.name() in self.AS_IT_IS:
            return func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map(_widen, args), tree_map(_widen, kwargs)
        out = func(*wide_args, **wide_kwargs)
        if not any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments):
            return tree_map(_narrow, out)
        name = "out" if "out" in kwargs else None  # an operation in place, or with out=
        target, result = (kwargs[name], wide_kwargs[name]) if name else (args[0], wide_args[0])
        return target.copy_(result)


def _widen(value):
    if value is torch.float16:
        return torch.float32
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float16 else (
        value)


def _narrow(value):
    return value.half() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else (
        value)
