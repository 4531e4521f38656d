"""The model's graph keeps PopTorch 3.4's rules.

All its operations are supported, and no shape and no branch depends on data. The model runs on
torch's meta device, whose tensors have a shape but no values: whatever reads a value, or needs one
to determine a shape, raises an error. Every operation that reaches the dispatcher is looked up in
the user guide's "IPU supported operations".
"""
from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RobertaConfig

from ipu_options.ipu_kernels import IPU_KERNELS, Kernels
from ipu_options.layout import make_layout
from qa.model.parallelize import parallelize
from qa.model.roberta import RobertaForSpans

# {aten operation: its name in the user guide's list}
LISTED = {
    "_log_softmax": "torch.nn.LogSoftmax", "_softmax": "torch.nn.Softmax", "add": "torch.add",
    "addmm": "torch.addmm", "arange": "torch.arange", "bernoulli_": "torch.bernoulli",
    "bmm": "torch.bmm", "cat": "torch.cat", "div": "torch.div", "div_": "torch.div",
    "embedding": "torch.nn.Embedding", "eq": "torch.eq", "expand": "tensor.expand",
    "ge": "torch.ge", "gelu": "torch.nn.GELU", "logical_and": "torch.logical_and", "lt": "torch.lt",
    "mm": "torch.matmul", "mul": "torch.mul", "native_dropout": "torch.nn.dropout",
    "native_layer_norm": "torch.nn.LayerNorm", "nll_loss_forward": "torch.nn.NLLLoss",
    "rsub": "torch.sub", "split": "torch.split", "sub": "torch.sub", "sum": "torch.sum",
    "t": "torch.t", "transpose": "torch.transpose", "unbind": "torch.unbind",
    "unsqueeze": "torch.unsqueeze"}
# Views, casts and copies, which the guide says are supported without listing them. PopTorch handles
# them in ReshapeOps.cpp and other files.
UNLISTED = {
    "_reshape_alias", "_to_copy", "_unsafe_view", "clone", "detach", "empty_like", "permute",
    "select", "slice", "view"}
SUPPORTED = set(LISTED) | UNLISTED


class Operations(TorchDispatchMode):
    """Records the names of all operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def graph(windows, training, parts, kernels=IPU_KERNELS, batch=2, length=24):
    """The names of all operations in a forward pass over rows of `windows` windows."""
    config = RobertaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=32, vocab_size=60, max_position_embeddings=length + 2,
                           type_vocab_size=1)
    model = RobertaForSpans(config, kernels).half().train(training)
    parallelize(model, make_layout([1, 1], 2), embedding_serialization_factor=parts)
    model = model.to("meta")
    tokens = [torch.zeros(batch, length, dtype=torch.int32, device="meta") for _ in range(3)]
    labels = [
        torch.zeros(batch, windows, dtype=kind, device="meta")
        for kind in (torch.int32, torch.int32, torch.float32)]
    operations = Operations()
    with torch.device("meta"), operations:
        model(*tokens, *(labels if training else []))
    return operations.names


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("windows", [1, 4])
def test_only_supported_operations_and_no_dependence_on_data(windows, training, parts):
    names = graph(windows, training, parts)
    assert "bmm" in names and ("nll_loss_forward" in names) == training
    assert names <= SUPPORTED, (
        f"not in PopTorch's list of supported operations: {sorted(names - SUPPORTED)}")


def test_a_branch_on_a_tensors_value_is_noticed():
    def branches(query, key, value, window_ids, dropout_p=0.0, training=False):
        return query if window_ids.max() > 1 else value

    with pytest.raises((RuntimeError, NotImplementedError)):
        graph(1, True, 1, Kernels(branches, IPU_KERNELS.dropout))


def test_a_shape_that_depends_on_data_is_noticed():
    def selects(query, key, value, window_ids, dropout_p=0.0, training=False):
        return query[window_ids.nonzero()]

    with pytest.raises((RuntimeError, NotImplementedError)):
        graph(1, True, 1, Kernels(selects, IPU_KERNELS.dropout))
