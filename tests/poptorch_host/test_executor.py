"""poptorch_host's executor is compared with plain PyTorch.

Tested are batching, reduction, output modes, anchors, weights, saved state and refusals.
"""
from __future__ import annotations

import copy
import io

import pytest
import torch

import poptorch_host as poptorch
from poptorch_host.ops import for_the_host


class Net(torch.nn.Module):
    """Two linear layers in two blocks; the loss is the mean over a micro-batch."""

    def __init__(self, dropout=0.0, ipus=(0, 0)):
        super().__init__()
        self.first = poptorch.BeginBlock(torch.nn.Linear(6, 5), "first", ipu_id=ipus[0])
        self.second = poptorch.BeginBlock(torch.nn.Linear(5, 3), "second", ipu_id=ipus[1])
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x, target=None):
        out = self.second(self.dropout(torch.relu(self.first(x))))
        if target is None:
            return out
        return out, poptorch.identity_loss(torch.nn.functional.cross_entropy(out.float(), target),
                                           reduction="none")


def options(iterations=1, accumulation=1, replicas=1, mode=None, period=None, reduction=None):
    opts = poptorch.Options().deviceIterations(iterations).replicationFactor(replicas)
    opts.Training.gradientAccumulation(accumulation)
    if mode is not None:
        opts.outputMode(mode, period)
    if reduction is not None:
        opts.Training.accumulationAndReplicationReductionType(reduction)
    return opts


def data(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows, ),
                                                                    generator=generator)


def train_plainly(model, optimizer, x, y, iterations, accumulation, replicas, mean=True):
    """Make the same updates in plain PyTorch.

    Returns the output and loss of every micro-batch, in PopTorch's order.
    """
    count = accumulation * replicas
    seen = []
    for update in zip(x.chunk(iterations), y.chunk(iterations)):
        optimizer.zero_grad()
        for micro_x, micro_y in zip(update[0].chunk(count), update[1].chunk(count)):
            out, loss = model(micro_x, micro_y)
            (loss / (count if mean else 1)).backward()
            seen.append((out.detach(), loss.detach()))
        optimizer.step()
    return seen


@pytest.mark.parametrize("reduction", [poptorch.ReductionType.Mean, poptorch.ReductionType.Sum])
@pytest.mark.parametrize("iterations, accumulation, replicas", [(1, 1, 1), (3, 1, 1), (1, 4, 1),
                                                                (1, 1, 4), (2, 3, 2)])
def test_updates_and_outputs_equal_plain_pytorch(iterations, accumulation, replicas, reduction):
    model = Net()
    reference = copy.deepcopy(model)
    executor = poptorch.trainingModel(
        model,
        options(iterations, accumulation, replicas, poptorch.OutputMode.All, reduction=reduction),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for seed in range(2):
        x, y = data(2 * iterations * accumulation * replicas, seed)
        seen = train_plainly(reference, plain, x, y, iterations, accumulation, replicas,
                             reduction == poptorch.ReductionType.Mean)
        out, loss = executor(x, y)
        torch.testing.assert_close(out, torch.cat([o for o, _ in seen]))
        losses = torch.stack([micro_loss for _, micro_loss in seen])
        torch.testing.assert_close(loss, losses if len(losses) > 1 else losses[0])
    for ours, theirs in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(ours.data, theirs.data)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", list(poptorch.OutputMode))
def test_output_modes(mode, training):
    model = Net()
    iterations, accumulation, replicas = 4, 3 if training else 1, 2
    opts = options(iterations, accumulation, replicas, mode, 2)
    x, y = data(2 * iterations * accumulation * replicas)
    with torch.no_grad():
        every = torch.stack([model(part) for part in x.chunk(iterations * accumulation * replicas)])
    every = every.view(iterations, accumulation, replicas, 2, 3)
    if training:
        out, loss = poptorch.trainingModel(model, opts, torch.optim.SGD(model.parameters(),
                                                                        lr=0.0))(x, y)
    else:
        out = poptorch.inferenceModel(model, opts)(x)
    if mode == poptorch.OutputMode.Default:
        mode = poptorch.OutputMode.Final if training else poptorch.OutputMode.All
    expected = {
        poptorch.OutputMode.All: every, poptorch.OutputMode.Final: every[-1, -1],
        poptorch.OutputMode.Sum: every.sum(
            (0, 1)), poptorch.OutputMode.EveryN: every[1::2]}[mode].reshape(-1, 3)
    torch.testing.assert_close(out, expected)
    if training:
        assert loss.shape == (len(expected) // 2,)


def gradients_plainly(model, parameter, x, y, count):
    """The gradients of the losses of the single micro-batches, in PopTorch's order."""
    return torch.stack([
        torch.autograd.grad(model(*part)[1], parameter)[0]
        for part in zip(x.chunk(count), y.chunk(count))])


@pytest.mark.parametrize("mode", list(poptorch.OutputMode))
def test_an_anchored_gradient_is_each_micro_batchs_own_in_the_outputs_mode(mode):
    """It is the gradient of the scaled loss, not divided by the number of micro-batches."""
    iterations, accumulation, replicas = 4, 3, 2
    model = Net()
    opts = options(iterations, accumulation, replicas, mode, 2)
    opts.anchorTensor("weight", "Gradient___first.weight", poptorch.OutputMode.All)  # ignored
    x, y = data(2 * iterations * accumulation * replicas)
    gradients = gradients_plainly(model, model.first.weight, x, y, 24).view(
        iterations, accumulation, replicas, 5, 6) * 16
    executor = poptorch.trainingModel(
        model, opts, poptorch.optim.SGD(model.parameters(), lr=0.0, loss_scaling=16.0))
    expected = {
        poptorch.OutputMode.All: gradients, poptorch.OutputMode.EveryN: gradients[1::2],
        poptorch.OutputMode.Sum: gradients.sum((0, 1))}.get(mode, gradients[-1, -1])
    for _ in range(2):
        executor(x, y)
        torch.testing.assert_close(executor.getAnchoredTensor("weight"), expected.reshape(-1, 6))


class Lookup(torch.nn.Module):
    """Scores of the next token from an embedding; the output layer shares its weight if `tied`."""

    def __init__(self, tied):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 4)
        self.out = torch.nn.Linear(4, 11)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, x, target):
        scores = self.out(self.embedding(x))
        return scores, poptorch.identity_loss(
            torch.nn.functional.cross_entropy(scores.float(), target), reduction="none")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_an_embeddings_gradient_is_that_of_plain_pytorch(tied, half):
    torch.manual_seed(0)
    # Tokens 0 to 4 occur many times as input, the others never.
    x, y = torch.randint(0, 5, (48, )), torch.randint(0, 11, (48, ))
    model = Lookup(tied)
    if half:
        model.half()
    plain = copy.deepcopy(model).float()
    first = gradients_plainly(plain, plain.embedding.weight, x[:24], y[:24], 3)
    train_plainly(plain, torch.optim.SGD(plain.parameters(), lr=0.5), x, y, 2, 3, 1)
    opts = options(1, 3, mode=poptorch.OutputMode.All)
    opts.anchorTensor("embedding", "Gradient___embedding.weight")
    executor = poptorch.trainingModel(model, opts, poptorch.optim.SGD(model.parameters(), lr=0.5))
    executor(x[:24], y[:24])
    close = dict(rtol=0.02, atol=0.005) if half else {}
    torch.testing.assert_close(
        executor.getAnchoredTensor("embedding").view_as(first).float(), first, **close)
    executor(x[24:], y[24:])
    torch.testing.assert_close(model.embedding.weight.detach().float(),
                               plain.embedding.weight.detach(), **close)
    assert not model.embedding.sparse


@pytest.mark.parametrize("half", [False, True])
def test_an_anchor_shows_the_update_whose_gradient_is_not_finite_and_changes_nothing(half):
    def train(anchored):
        torch.manual_seed(0)
        model = Net().half() if half else Net()
        opts = options(2, 2)
        if anchored:
            opts.anchorTensor("bias", "Gradient___second.bias")
        executor = poptorch.trainingModel(model, opts,
                                          poptorch.optim.AdamW(model.parameters(), lr=0.1))
        x, y = data(8)
        x = x.half() if half else x
        executor(x, y)
        weights = [p.detach().clone() for p in model.parameters()]
        if anchored:
            assert executor.getAnchoredTensor("bias").dtype == model.second.bias.dtype
            assert torch.isfinite(executor.getAnchoredTensor("bias")).all()
            x[3] = float("inf")
            executor(x, y)
            assert not torch.isfinite(executor.getAnchoredTensor("bias")).all()
        return weights

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True)))


@pytest.mark.parametrize("nan_on_overflow", [False, True])
def test_float16_saturates_unless_the_engine_option_makes_it_nan(nan_on_overflow):
    """The update, which the host makes with float32 gradients, stays finite in both cases."""
    torch.manual_seed(0)
    model = Net().half()
    reference = copy.deepcopy(model).float()
    opts = options()
    opts.anchorTensor("bias", "Gradient___second.bias")
    if nan_on_overflow:
        opts._Popart.setEngineOptions({"debug.nanOverflowMode": "true"})
    executor = poptorch.trainingModel(
        model, opts, poptorch.optim.SGD(model.parameters(), lr=0.1, loss_scaling=2.0 ** 20))
    x, y = data(4)
    expected = gradients_plainly(reference, reference.second.bias, x, y, 1)[0] * 2 ** 20
    assert (expected.abs() > 70_000).any()
    executor(x.half(), y)
    gradient = executor.getAnchoredTensor("bias")
    assert gradient.dtype == torch.float16
    over = expected.abs() > 65_504
    shown = torch.full_like(expected, float("nan")) if nan_on_overflow else expected.sign() * 65_504
    torch.testing.assert_close(gradient.float(), torch.where(over, shown, expected), rtol=0.05,
                               atol=2000.0, equal_nan=True)
    assert all(p.isfinite().all() for p in model.parameters())


def test_outputs_beyond_float16_saturate():
    executor = poptorch.inferenceModel(Wrong(lambda self, x: x * 2))
    assert executor(torch.tensor([[60000.0, -60000.0, 1.0, float("inf")]]).half()).tolist() == [
        [65504.0, -65504.0, 2.0, float("inf")]]


class EitherWay(torch.nn.Module):
    """An embedding whose gradient is sparse for the token 0 and dense for other tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)

    @for_the_host  # which may look at a value
    def forward(self, x):
        loss = self.embedding(x).sum() if x[0] == 0 else (self.embedding.weight ** 2).sum()
        return poptorch.identity_loss(loss, "none")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tokens", [[0, 1], [1, 0], [0, 1, 0]])
def test_sparse_and_dense_gradients_of_a_weight_are_added(tokens, half):
    model = EitherWay().half() if half else EitherWay()
    plain = copy.deepcopy(model).float()
    executor = poptorch.trainingModel(model, options(1, len(tokens)),
                                      poptorch.optim.SGD(model.parameters(), lr=0.5))
    executor(torch.tensor(tokens))
    (sum(plain(torch.tensor([t])) for t in tokens) / len(tokens)).backward()
    torch.optim.SGD(plain.parameters(), lr=0.5).step()
    torch.testing.assert_close(model.embedding.weight.detach().float(),
                               plain.embedding.weight.detach(),
                               **dict(rtol=0.02, atol=0.01) if half else {})


@pytest.mark.parametrize("name, train, message",
                         [("loss", True, "tensor of PopART's graph"),
                          ("UpdatedVar___first.weight", True, "tensor of PopART's graph"),
                          ("Gradient___third.weight", True, "' not in Ir Tensors"),
                          ("Gradient___first.bias", True, "' not in Ir Tensors"),
                          ("Gradient___unused.weight", True, "' not in Ir Tensors"),
                          ("Gradient___first.weight", False, "' not in Ir Tensors")])
def test_an_anchor_that_is_no_gradient_is_refused_when_compiling(name, train, message):
    model = Net()
    model.unused = torch.nn.Linear(2, 2)
    model.first.bias.requires_grad = False
    opts = options()
    opts.anchorTensor("anchor", name)
    x, y = data(2)
    executor = poptorch.trainingModel(model, opts) if train else poptorch.inferenceModel(
        model, opts)
    with pytest.raises(AssertionError, match="No tensor with name anchor found"):
        executor.getAnchoredTensor("anchor")
    with pytest.raises(poptorch.Error, match=message):
        executor.compile(x, y)


def test_a_changed_learning_rate_waits_for_set_optimizer():
    model = Net()
    optimizer = poptorch.optim.SGD(model.parameters(), lr=0.0)
    executor = poptorch.trainingModel(model, options(), optimizer)
    before = model.first.weight.detach().clone()
    x, y = data(4)
    executor(x, y)
    optimizer.param_groups[0]["lr"] = 0.5
    executor(x, y)
    assert torch.equal(model.first.weight, before)
    executor.setOptimizer(optimizer)
    executor(x, y)
    assert not torch.equal(model.first.weight, before)


def test_a_constant_of_the_optimizer_cannot_change_after_compilation():
    model = Net()
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.variable_attrs.markAsConstant("weight_decay")
    executor = poptorch.trainingModel(model, options(), optimizer)
    executor.compile(*data(2))
    optimizer.param_groups[0]["weight_decay"] = 0.2
    with pytest.raises(poptorch.Error, match="markAsVariable"):
        executor.setOptimizer(optimizer)


@pytest.mark.parametrize("half", [False, True])
def test_every_loss_scaling_gives_the_same_weights(half):
    def train(**scaling):
        torch.manual_seed(0)
        model = Net().half() if half else Net()
        optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1, max_grad_norm=0.5, **scaling)
        executor = poptorch.trainingModel(model, options(1, 3), optimizer)
        x, y = data(6)
        executor(x.half() if half else x, y)
        if scaling:
            optimizer.loss_scaling *= 2
            executor.setOptimizer(optimizer)
        executor(x.half() if half else x, y)
        return [p.detach().clone() for p in model.parameters()]

    unscaled = train()
    for scaling in (1.0, 3.0, 16384.0):
        assert all(torch.equal(a, b) for a, b in zip(unscaled, train(loss_scaling=scaling)))


@pytest.mark.parametrize("automatic", [False, True])
def test_a_loss_scaling_not_given_is_constant_unless_it_is_automatic(automatic):
    model = Net().half() if automatic else Net()
    opts = options()
    opts.Training.setAutomaticLossScaling(automatic)
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1)
    executor = poptorch.trainingModel(model, opts, optimizer)
    x, y = data(2)
    executor.compile(x.half() if automatic else x, y)
    optimizer.loss_scaling = 8.0
    if automatic:
        executor.setOptimizer(optimizer)
    else:
        with pytest.raises(poptorch.Error, match="loss_scaling was compiled as a constant"):
            executor.setOptimizer(optimizer)


def test_automatic_loss_scaling_without_a_float16_gradient_is_refused():
    opts = options()
    opts.Training.setAutomaticLossScaling(True)
    with pytest.raises(poptorch.Error, match="No tracked gradient tensors of type fp16 were found"):
        poptorch.trainingModel(Net(), opts).compile(*data(2))


@pytest.mark.parametrize("replicas, half", [(1, False), (1, True), (2, False)])
def test_saved_state_continues_exactly(replicas, half):
    """A new model gets back weights, moments, float32 masters and random numbers bit by bit."""
    x, y = data(8 * replicas)
    x = x.half() if half else x

    def start(state=None):
        torch.manual_seed(7)
        model = Net(dropout=0.5)
        model = model.half() if half else model
        if state:
            model.load_state_dict(state["model"])
        optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.05, loss_scaling=64.0)
        if state:
            optimizer.load_state_dict(state["optimizer"])
        executor = poptorch.trainingModel(model, options(2, 2, replicas).randomSeed(3),
                                          optimizer)
        executor.compile(x, y)
        if state:
            executor.rng_state = state["rng"]
        return model, optimizer, executor

    model, optimizer, executor = start()
    assert executor.rng_state == [3]  # PopTorch asks the device only after a run
    executor(x, y)
    assert len(executor.rng_state) > 1
    file = io.BytesIO()
    torch.save(
        {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "rng": executor.rng_state}, file)
    file.seek(0)
    executor(x, y)
    other_model, _, other = start(torch.load(file))
    other(x, y)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                          other_model.state_dict().values()))
    assert torch.equal(executor(x, y)[1], other(x, y)[1])


def test_half_model_keeps_half_tensors_and_trains_in_float32():
    model = Net().half()
    reference = copy.deepcopy(model).float()
    executor = poptorch.trainingModel(model, options(1, 2),
                                      poptorch.optim.SGD(model.parameters(), lr=1e-4))
    plain = torch.optim.SGD(reference.parameters(), lr=1e-4)
    x, y = data(4)
    for _ in range(20):
        train_plainly(reference, plain, x, y, 1, 2, 1)
        out, loss = executor(x.half(), y)
    assert (out.dtype == torch.float16 and model.first.weight.dtype == torch.float16
            and loss.dtype == torch.float32)
    # Each of the 20 updates is so small that a float16 weight alone would not have changed.
    torch.testing.assert_close(model.second.bias.float(), reference.second.bias, atol=2e-4,
                               rtol=1e-2)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_running_mean_keeps_what_is_not_finite_until_the_device_is_attached_anew(half, streamed):
    """PopART scales the old accumulator by 0 instead of zeroing it, and 0 times NaN is NaN.

    Without disableGradAccumulationTensorStreams it is written together with the weights.
    """
    torch.manual_seed(0)
    model = Net().half() if half else Net()
    opts = options(1, 2)
    if not streamed:
        opts._Popart.set("disableGradAccumulationTensorStreams", True)
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1, accum_type=torch.float16)
    executor = poptorch.trainingModel(model, opts, optimizer)
    x, y = data(4)
    x = x.half() if half else x
    bad = x.clone()
    bad[0] = float("nan")

    def restore():
        executor.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])

    def finite():
        return all(p.isfinite().all() for p in model.parameters())

    executor(x, y)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    executor(x, y)
    expected = copy.deepcopy(model.state_dict())
    executor(bad, y)
    assert not finite()
    restore()
    _, loss = executor(x, y)
    assert loss.isfinite() and finite() == streamed
    executor.detachFromDevice()
    restore()
    executor(x, y)
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize("accumulation, kind, reduction",
                         [(1, torch.float16, poptorch.ReductionType.Mean),
                          (2, torch.float32, poptorch.ReductionType.Mean),
                          (2, torch.float16, poptorch.ReductionType.Sum)])
def test_other_accumulators_are_zeroed_after_each_update(accumulation, kind, reduction):
    model = Net()
    opts = options(1, accumulation, reduction=reduction)
    opts._Popart.set("disableGradAccumulationTensorStreams", True)
    executor = poptorch.trainingModel(
        model, opts, poptorch.optim.SGD(model.parameters(), lr=0.1, accum_type=kind))
    x, y = data(4)
    saved = copy.deepcopy(model.state_dict())
    executor(x * float("nan"), y)
    executor.load_state_dict(saved)
    executor(x, y)
    assert all(p.isfinite().all() for p in model.parameters())


REFUSED = "PopART has no buffer for it"


def test_synthetic_data_leaves_outputs_unwritten_and_nothing_to_read():
    model = Net().half()
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1)
    opts = options(2, 3, mode=poptorch.OutputMode.All).enableSyntheticData(True)
    opts.anchorTensor("bias", "Gradient___second.bias")
    executor = poptorch.trainingModel(model, opts, optimizer)
    x, y = data(12)
    for _ in range(2):
        out, loss = executor(x.half(), y)
        optimizer.param_groups[0]["lr"] /= 2
        executor.setOptimizer(optimizer)
    assert (out.shape, out.dtype) == ((12, 3), torch.float16)
    assert (loss.shape, loss.dtype) == ((6, ), torch.float32)
    gradient = executor.getAnchoredTensor("bias")
    assert (gradient.shape, gradient.dtype) == ((18, ), torch.float16)
    assert all(t.isnan().all() for t in (out, loss, gradient))
    assert executor.rng_state == [0]
    for read in (executor.copyWeightsToHost, model.state_dict, lambda: model.first.weight + 1,
                 optimizer.state_dict, executor.copyWeightsToDevice, executor.detachFromDevice,
                 executor.destroy):
        for _ in range(2):
            with pytest.raises(poptorch.Error, match=REFUSED):
                read()


def test_what_does_not_read_from_the_device_works_with_synthetic_data():
    model = Net()
    executor = poptorch.inferenceModel(model, options().enableSyntheticData(True))
    x, y = data(2)
    executor(x)
    executor.copyWeightsToDevice()
    executor.detachFromDevice()
    assert executor(x).isnan().all()
    executor.destroy()
    for make in (torch.optim.AdamW, poptorch.optim.AdamW):
        # Neither weights nor random numbers have changed yet. A new optimizer's state, however, is
        # read from the device (PoplarExecutor._read_optim_state_dict_if_needed).
        optimizer = make(model.parameters(), lr=0.1)
        training = poptorch.trainingModel(model, options().enableSyntheticData(True), optimizer)
        training.compile(x, y)
        assert model.first.weight.isfinite().all()
        if make is torch.optim.AdamW:
            training(x, y)
            training.copyWeightsToDevice()  # overwrites what the step has changed
            training.detachFromDevice()
            training.destroy()
        else:
            with pytest.raises(poptorch.Error, match=REFUSED):
                training.detachFromDevice()


def test_weights_are_shared_by_training_inference_and_the_users_model():
    model = Net()
    training = poptorch.trainingModel(model, options(), torch.optim.SGD(model.parameters(), lr=0.5))
    inference = poptorch.inferenceModel(model)
    x, y = data(4)
    first = inference(x)
    training(x, y)
    assert not torch.equal(inference(x), first)
    torch.testing.assert_close(inference(x), model(x).detach())
    with torch.no_grad():
        model.first.weight.zero_()  # the device keeps its own copy until copyWeightsToDevice
    assert not torch.equal(training(x, y)[0], model.second.bias.expand(4, 3))
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.zero_()
    training.copyWeightsToDevice()
    out, _ = training(x, y)
    torch.testing.assert_close(out, out[:1].expand(4, 3))


def test_attach_detach_compile_destroy():
    model = Net()
    executor = poptorch.trainingModel(model, options())
    x, y = data(2)
    assert not executor.isCompiled() and not executor.isAttachedToDevice()
    with pytest.raises(poptorch.Error, match="not been compiled"):
        executor.detachFromDevice()
    with pytest.raises(RuntimeError, match="already been wrapped"):
        poptorch.trainingModel(model)
    executor.compile(x, y)
    with pytest.raises(poptorch.Error, match="already attached"):
        executor.attachToDevice()
    executor.detachFromDevice()
    with pytest.raises(poptorch.Error, match="not attached"):
        executor.detachFromDevice()
    executor(x, y)  # attaches to the device again
    executor.destroy()
    assert not executor.isCompiled() and type(model) is Net and type(
        model.first.weight) is torch.nn.Parameter
    poptorch.trainingModel(model, options())(x, y)


def test_reproducible_and_apart_from_the_hosts_random_numbers():
    x, y = data(4)

    def losses():
        torch.manual_seed(1)
        model = Net(dropout=0.5)
        executor = poptorch.trainingModel(model, options().randomSeed(5))
        out = []
        for _ in range(3):
            out.append(executor(x, y)[1])
            torch.rand(3)
        return torch.stack(out), torch.rand(1)

    (first, host), (second, _) = losses(), losses()
    assert torch.equal(first, second) and len(set(first.tolist())) == 3
    torch.manual_seed(5)
    assert host != torch.rand(1)


class Wrong(torch.nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.layer = torch.nn.Linear(6, 3)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def test_sharded_execution_needs_no_accumulation():
    opts = options().setExecutionStrategy(poptorch.ShardedExecution())
    poptorch.trainingModel(Net(ipus=(0, 1)), opts)(*data(2))


def test_an_interrupted_call_leaves_no_gradient_behind():
    model = Net()
    reference = copy.deepcopy(model)
    executor = poptorch.trainingModel(model, options(1, 2),
                                      torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = data(4)
    executor.compile(x, y)
    calls = []

    def fail_second_time(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = model.second.register_forward_hook(fail_second_time)
    with pytest.raises(KeyboardInterrupt):
        executor(x, y)
    hook.remove()
    executor(x, y)
    train_plainly(reference, torch.optim.SGD(reference.parameters(), lr=0.1), x, y, 1, 2, 1)
    torch.testing.assert_close(model.second.weight.data, reference.second.weight.data)


def test_shapes_are_fixed_and_options_frozen():
    model = Net()
    opts = options(2)
    executor = poptorch.inferenceModel(model, opts)
    with pytest.raises(AssertionError, match="must be a multiple of"):
        executor(data(3)[0])
    executor(data(4)[0])
    with pytest.raises(poptorch.Error, match="Shape mismatch for x"):
        executor(data(6)[0])
    with pytest.raises(AttributeError, match="frozen"):
        opts.deviceIterations(3)


def test_offline_target_compiles_and_does_not_run():
    executor = poptorch.trainingModel(Net(), options().useOfflineIpuTarget())
    executor.compile(*data(2))
    assert executor.isCompiled() and not executor.isAttachedToDevice()
    with pytest.raises(AssertionError, match="offline device"):
        executor(*data(2))


@pytest.mark.parametrize("use, name", [
    (lambda: poptorch.custom_op, "custom_op"),
    (lambda: poptorch.optim.RMSprop, "optim.RMSprop"),
    (lambda: poptorch.trainingModel(Net(), None, torch.optim.Adam(Net().parameters())),
     "optim.Adam"),
    (lambda: options().broadcastBuffers(False), "Options.broadcastBuffers"),
    (lambda: options().Precision.halfFloatCasting, "Options.Precision.halfFloatCasting"),
    (lambda: poptorch.PipelinedExecution("A", "B"), "Stage"),
    (lambda: poptorch.inferenceModel(Net()).getLatency(), "PoplarExecutor.getLatency"),
    (lambda: poptorch.DataLoader(options(), [1], async_options={}), "AsynchronousDataAccessor")])
def test_what_is_left_out_is_named(use, name):
    with pytest.raises(poptorch.Error, match=f"poptorch.{name} is not offered by poptorch_host: "):
        use()
    assert not hasattr(poptorch, "MultiConv")


def test_replicas_cannot_share_a_buffer_that_the_model_changes():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen += x.sum()
            return self.seen

    assert poptorch.inferenceModel(Counting(), options(3))(torch.ones(3))[-1] == 3
    with pytest.raises(poptorch.Error, match="does not support broadcasting buffers"):
        poptorch.inferenceModel(Counting(), options(3, 1, 2))(torch.ones(6))


@pytest.mark.parametrize("weights, inputs, expected", [("float32", "float16", torch.float16),
                                                       ("float16", "float32", torch.float32)])
def test_mixed_types_have_the_type_that_poptorch_gives_them(weights, inputs, expected):
    model = torch.nn.Linear(3, 3).to(getattr(torch, weights))
    executor = poptorch.inferenceModel(model)
    assert executor(torch.randn(3, dtype=getattr(torch, inputs))).dtype == expected
    with pytest.raises(RuntimeError, match="mat1 and mat2 must have the same dtype"):
        poptorch.inferenceModel(model)(torch.randn(2, 3, dtype=getattr(torch, inputs)))
    made_inside = Wrong(lambda self, x: x.half() + torch.ones(2, 6, dtype=torch.float16))
    assert poptorch.inferenceModel(made_inside)(torch.zeros(2, 6)).dtype == torch.float16
