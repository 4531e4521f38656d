"""The model's graph keeps PopTorch 3.4's rules.

All its operations have handlers in PopTorch, their tensors have types that it supports, and no
shape and no branch depends on data. The model runs on torch's meta device, whose tensors have a
shape but no values: whatever reads a value, or needs one to determine a shape, raises an error.
The names of PopTorch's handlers were read from its sources (tests/tools/poptorch_compiler.py).
The backward pass is made by PopART; PopTorch's dispatcher sees nothing of it
(dispatch_tracer/README.md).
"""
from __future__ import annotations

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig

from ipu_options.ipu_kernels import IPU_KERNELS, Kernels
from ipu_options.layout import make_layout
from poptorch_host._checks import COMPILER
from poptorch_host._trace import COMPOSITE, is_handled
from qa.model.parallelize import parallelize
from qa.model.roberta import model_class


class Operations(TorchDispatchMode):
    """Records the operations that would reach PopTorch, and the types of their tensors.

    PyTorch decomposes an operation that PopTorch does not register for IPU tensors, if it can.
    """

    def __init__(self):
        super().__init__()
        self.types = collections.defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name(), kwargs or {}
        if name not in COMPILER["dispatcher"] and torch._C._dispatch_has_kernel_for_dispatch_key(
                name, COMPOSITE):
            with self:
                return func._op_dk(getattr(torch._C.DispatchKey, COMPOSITE), *args, **kwargs)
        out = func(*args, **kwargs)
        self.types[name].update(
            t.dtype for t in tree_flatten([args, kwargs, out])[0] if isinstance(t, torch.Tensor))
        return out


# ELECTRA's embedding is 128 wide by default, and projected to the width of the layers.
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
DEBERTA = {**SIZES, "relative_attention": True, "position_biased_input": False,
           "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
FAMILIES = {
    "roberta": {**SIZES, "type_vocab_size": 1}, "bert": SIZES, "electra": SIZES,
    "distilbert": dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "deberta": DEBERTA, "deberta-v2": {
        **DEBERTA, "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}}


def graph(windows, training, parts, kernels=IPU_KERNELS, batch=2, length=24, family="roberta"):
    """{operation: types of its tensors} in a forward pass over rows of `windows` windows."""
    config = AutoConfig.for_model(family, **FAMILIES[family], vocab_size=60,
                                  max_position_embeddings=length + 2)
    model = model_class(config)(config, kernels).half().train(training)
    parallelize(model, make_layout([1, 1], 2), embedding_serialization_factor=parts)
    model = model.to("meta")
    tokens = [torch.zeros(batch, length, dtype=torch.int32, device="meta") for _ in range(3)]
    labels = [
        torch.zeros(batch, windows, dtype=kind, device="meta")
        for kind in (torch.int32, torch.int32, torch.float32)]
    types = {"token_type_ids": tokens[0]} if getattr(config, "type_vocab_size", 1) > 1 else {}
    operations = Operations()
    with torch.device("meta"), operations:
        model(*tokens, *(labels if training else []), **types)
    return operations.types


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_supported_operations_and_types_and_no_dependence_on_data(windows, training, parts,
                                                                       family):
    found = graph(windows, training, parts, family=family)
    assert "aten::bmm" in found and ("aten::nll_loss_forward" in found) == training
    unknown = sorted(name for name in found if not is_handled(name))
    assert not unknown, f"no handler in PopTorch {COMPILER['version']}: {unknown}"
    # PopTorch computes in these types. It turns int64 into int32 and float64 into float32 without
    # asking (coerceToSupportedType in Utils.cpp), and bfloat16 inputs into float16
    # (CastUnsupportedInputs.cpp). Only the labels are int64 here, because torch's nll_loss wants
    # that; on an IPU they are created as int32 (TensorStore::allocateTensor).
    allowed = {torch.float32, torch.float16, torch.int32, torch.bool}
    labels = {"aten::empty_strided", "aten::copy_", "aten::nll_loss_forward"} if training else ()
    surprising = {name: types - allowed for name, types in found.items()
                  if types - allowed - ({torch.int64} if name in labels else set())}
    assert not surprising


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_dropout_of_nothing_is_no_operation(p):
    x, operations = torch.ones(2, device="meta"), Operations()
    with operations:
        IPU_KERNELS.dropout(x, p, True)
    assert bool(operations.types) == bool(p)


def test_what_poptorch_cannot_do_is_noticed():
    def strange(qkv, heads, mask, dropout_p=0.0, training=False, stage=0):
        # PopTorch has no handler for sinc, and PyTorch does not decompose it.
        query, _, value = qkv.chunk(3, dim=-1)
        return value * torch.special.sinc(query).double().sum().half()

    found = graph(1, True, 1, Kernels(strange, IPU_KERNELS.dropout))
    assert [name for name in found if not is_handled(name)] == ["aten::sinc"]
    assert torch.float64 in found["aten::copy_"]


def test_a_branch_on_a_tensors_value_is_noticed():
    def branches(qkv, heads, mask, dropout_p=0.0, training=False, stage=0):
        return qkv.chunk(3, dim=-1)[0 if mask.max() > 1 else 2]

    with pytest.raises((RuntimeError, NotImplementedError)):
        graph(1, True, 1, Kernels(branches, IPU_KERNELS.dropout))


def test_a_shape_that_depends_on_data_is_noticed():
    def selects(qkv, heads, mask, dropout_p=0.0, training=False, stage=0):
        return qkv[mask.nonzero()]

    with pytest.raises((RuntimeError, NotImplementedError)):
        graph(1, True, 1, Kernels(selects, IPU_KERNELS.dropout))
