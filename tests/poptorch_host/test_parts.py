"""poptorch_host's optimizers, data loader and blocks, against PyTorch's own or definitions."""
from __future__ import annotations

import copy
import gc
import multiprocessing

import pytest
import torch

import poptorch_host as poptorch
from poptorch_host import blocks
from poptorch_host._logging import logger


class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        return poptorch.identity_loss((self.layer(x) ** 2).sum(-1), reduction="mean")


def adam_plainly(weight, gradient, state, lr, decay, correct=True):
    """AdamW's update by hand (Loshchilov and Hutter 2019); `correct` is the bias correction."""
    state["step"] = state.get("step", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * gradient
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * gradient ** 2
    m_hat = state["m"] / (1 - 0.9 ** state["step"] if correct else 1)
    v_hat = state["v"] / (1 - 0.999 ** state["step"] if correct else 1)
    return m_hat / (v_hat.sqrt() + 1e-8) + decay * weight


def lamb_plainly(weight, gradient, state, lr, decay, correct=True):
    """LAMB's update by hand (You et al. 2020): AdamW's times |weight| / |update|."""
    update = adam_plainly(weight, gradient, state, lr, decay, correct)
    return update * weight.norm() / update.norm()


TORCH = torch.optim
PAIRS = [(lambda p: poptorch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
          lambda p: TORCH.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
         (lambda p: poptorch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, loss_scaling=8.0),
          lambda p: TORCH.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)),
         (lambda p: poptorch.optim.AdamW(p, lr=0.1, loss_scaling=64.0),
          lambda p: TORCH.AdamW(p, lr=0.1)),
         (lambda p: TORCH.AdamW(p, lr=0.1, eps=1e-3), lambda p: TORCH.AdamW(p, lr=0.1, eps=1e-3))]


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_optimizers_equal_torchs(ours, theirs):
    model = Regression()
    reference = copy.deepcopy(model)
    executor = poptorch.trainingModel(model, poptorch.Options(), ours(model.parameters()))
    optimizer = theirs(reference.parameters())
    for seed in range(4):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        executor(x)
        optimizer.zero_grad()
        reference(x).backward()
        optimizer.step()
    torch.testing.assert_close(model.layer.weight.data, reference.layer.weight.data)


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("kind, formula", [(poptorch.optim.AdamW, adam_plainly),
                                           (poptorch.optim.LAMB, lamb_plainly)])
def test_adamw_and_lamb_with_and_without_bias_correction(kind, formula, correct):
    """PopTorch's compiler ignores that AdamW is to have none."""
    model = Regression()
    # Two groups, each with its own learning rate and weight decay.
    decayed, other = [model.layer.weight], [model.layer.bias]
    optimizer = kind([{"params": decayed, "weight_decay": 0.1}, {
        "params": other, "lr": 0.02, "weight_decay": 0.0}], lr=0.05, bias_correction=correct)
    reference = copy.deepcopy(model)
    executor = poptorch.trainingModel(model, poptorch.Options(), optimizer)
    states = {}
    for seed in range(4):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        executor(x)
        gradients = torch.autograd.grad(reference(x), list(reference.parameters()))
        for (name, p), gradient, lr, decay in zip(reference.named_parameters(), gradients,
                                                  (0.05, 0.02), (0.1, 0.0)):
            with torch.no_grad():
                p -= lr * formula(p, gradient, states.setdefault(name, {}), lr, decay,
                                  correct or kind is poptorch.optim.AdamW)
    torch.testing.assert_close(model.layer.weight.data, reference.layer.weight.data)
    torch.testing.assert_close(model.layer.bias.data, reference.layer.bias.data)


def test_dampening_applies_to_the_first_update_too():
    """PopART's velocity starts from zero (sgd.hpp): v = momentum * v + (1 - dampening) * g."""
    model = Regression()
    reference = copy.deepcopy(model)
    executor = poptorch.trainingModel(
        model, poptorch.Options(),
        poptorch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.25))
    velocity = torch.zeros(4, 4)
    for seed in range(3):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        executor(x)
        gradients = torch.autograd.grad(reference(x), list(reference.parameters()))
        velocity = 0.9 * velocity + 0.75 * gradients[0]
        with torch.no_grad():
            reference.layer.weight -= 0.1 * velocity
            reference.layer.bias.copy_(model.layer.bias)
    torch.testing.assert_close(model.layer.weight.data, reference.layer.weight.data)


@pytest.mark.parametrize("library", [torch.optim, poptorch.optim])
def test_maximize_is_ignored_as_poptorch_does(library):
    model = Regression()
    executor = poptorch.trainingModel(model, poptorch.Options(),
                                      library.SGD(model.parameters(), lr=0.01, maximize=True))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    losses = [float(executor(x)) for _ in range(3)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_gradient_clipping_is_by_the_joint_norm():
    model = Regression()
    reference = copy.deepcopy(model)
    x = torch.randn(3, 4) * 10
    executor = poptorch.trainingModel(
        model, poptorch.Options(), poptorch.optim.SGD(model.parameters(), lr=1.0,
                                                      max_grad_norm=0.5))
    executor(x)
    reference(x).backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    TORCH.SGD(reference.parameters(), lr=1.0).step()
    torch.testing.assert_close(model.layer.weight.data, reference.layer.weight.data, rtol=1e-4,
                               atol=1e-5)


def test_transfers_are_logged_where_they_happen(capfd):
    model = Regression()
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1)
    executor = poptorch.trainingModel(model, poptorch.Options(), optimizer)
    logger.setLevel("DEBUG")
    try:
        executor(torch.ones(3, 4))
        assert "Writing weights from host to IPU memory" in capfd.readouterr().err
        executor(torch.ones(3, 4))
        assert "Writing" not in capfd.readouterr().err
        model.layer.weight.sum()
        optimizer.state_dict()
        log = capfd.readouterr().err
        assert log.index("[debug] Writing weights from IPU to host") < log.index(
            "Writing optimiser state tensors from IPU to host.")
    finally:
        logger.setLevel("WARNING")


# ---- Data loader


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"x": torch.full((2,), float(index)), "y": torch.tensor(index)}


def loader(size=50, mode=poptorch.DataLoaderMode.Sync, **kwargs):
    opts = poptorch.Options().deviceIterations(2).replicationFactor(2)
    opts.Training.gradientAccumulation(3)
    return poptorch.DataLoader(opts, Numbers(size), batch_size=1, mode=mode, **kwargs)


def test_combined_batches():
    loading = loader()
    assert loading.combinedBatchSize == 12 and len(loading) == 4
    assert [batch["y"].tolist() for batch in loading] == [
        list(range(i, i + 12)) for i in range(0, 48, 12)]
    assert [len(batch["y"]) for batch in loader(drop_last=False)] == [12, 12, 12, 12, 2]
    shuffled = loader(shuffle=True, generator=torch.Generator().manual_seed(1))
    first, second = ([i for batch in shuffled for i in batch["y"].tolist()] for _ in range(2))
    assert first != second and len(set(first)) == len(first) == 48


def test_asynchronous_loader_gives_the_same_batches_in_memory_that_it_writes_again():
    loading = loader(mode=poptorch.DataLoaderMode.Async)
    # A user's mistake: the ring has three places, and the first of them is written twice.
    kept = [batch["y"] for batch in loading]
    copies = [batch["y"].clone() for batch in loading]
    assert [c.tolist() for c in copies] == [list(range(i, i + 12)) for i in range(0, 48, 12)]
    assert kept[0].is_shared() and kept[0].tolist() != copies[0].tolist()
    half_way = iter(loading)
    next(half_way)
    assert next(iter(loading))["y"].tolist() == list(range(12))  # a new iterator starts again
    loading.terminate()


@pytest.mark.slow
def test_a_loader_that_is_dropped_takes_its_process_along():
    loading = loader(mode=poptorch.DataLoaderMode.Async, num_workers=1)
    next(iter(loading))
    assert multiprocessing.active_children()
    del loading
    gc.collect()
    assert not multiprocessing.active_children()


def test_asynchronous_loader_keeps_the_rest():
    loading = loader(mode=poptorch.DataLoaderMode.Async, drop_last=False)
    assert len(loading) == 5
    assert [len(batch["y"]) for batch in loading] == [12, 12, 12, 12, 2]
    loading.terminate()


# ---- Blocks


def recorded(strategy, function):
    blocks.recorder = blocks.Recorder(strategy)
    try:
        function()
        return blocks.recorder.blocks
    finally:
        blocks.recorder = None


def test_stages_and_ipus_of_blocks():
    def auto_ids():
        poptorch.Block.useAutoId()
        for ipu in (0, 1, 0):
            with poptorch.Block(ipu_id=ipu):
                pass

    increment = poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement)
    assert recorded(increment, auto_ids) == [("0", 1, 0), ("1", 2, 1), ("2", 3, 0)]
    assert recorded(poptorch.PipelinedExecution(), auto_ids) == [("0", 0, 0), ("1", 1, 1),
                                                                 ("2", 0, 0)]


def test_begin_block_is_put_on_once_and_taken_off():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    poptorch.BeginBlock(model[1], "second", ipu_id=1)
    assert recorded(poptorch.PipelinedExecution(), lambda: model(torch.zeros(1, 2))) == [
        ("second", 1, 1)]
    with pytest.raises(poptorch.Error, match="already been assigned"):
        poptorch.BeginBlock(model[1])
    poptorch.removeBlocks(model)
    assert recorded(poptorch.PipelinedExecution(), lambda: model(torch.zeros(1, 2))) == []
