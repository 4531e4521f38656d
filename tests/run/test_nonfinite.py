"""How losses that are not finite are explained, and when a run gives up skipping them.

The losses are real ones, from a least-squares fit by gradient descent.
"""
from __future__ import annotations

import math

import pytest
import torch
from transformers import RobertaConfig

from ipu_options import poptorch
from qa.model.pretrained import save_model
from qa.model.roberta import RobertaForSpans
from qa.run.checkpoint import Checkpoints
from qa.run.nonfinite import NonfiniteGuard, explain_nonfinite, find_nonfinite
from qa.run.state import TrainingState
from qa.settings import TrainSettings
from runtime.errors import RunError


def fit(*, learning_rate, loss_scaling=1.0, half_gradients=False, growth=1.0, steps=200):
    """The losses of a fit, up to the first that is not finite.

    Gradients are scaled, with `half_gradients` rounded to float16 as on an IPU, and unscaled.
    """
    torch.manual_seed(0)
    weight, losses = torch.zeros(8), []
    inputs = torch.randn(64, 8)
    target = inputs @ torch.randn(8) + torch.randn(64)
    for step in range(steps):
        error = inputs @ weight - target
        losses.append(error.square().mean().item())
        if not math.isfinite(losses[-1]):
            return losses
        gradient = inputs.t() @ error / 32 * loss_scaling * growth ** step
        weight = weight - learning_rate * (
            gradient.half().float() if half_gradients else gradient) / loss_scaling
    return losses


def explained(losses, **known):
    assert not math.isfinite(losses[-1])
    return explain_nonfinite(step=len(losses), loss=losses[-1], earlier_losses=losses[:-1], **known)


def test_divergence_and_overflow_are_told_apart():
    diverged = fit(learning_rate=3.0)
    # The rate that is explained is one of fine-tuning; the regression diverges at another.
    message = explained(diverged, learning_rate=3e-3, loss_scaling=64.0, precision="float16")
    assert (f"step {len(diverged)}: the loss is" in message and "the run diverged" in message
            and "--learning_rate 0.001 " in message)
    overflowed = fit(learning_rate=0.01, loss_scaling=1024.0, half_gradients=True, growth=1.1)
    assert len(overflowed) > 10
    message = explained(overflowed, learning_rate=0.01, loss_scaling=1024.0, precision="float16")
    assert ("float16 overflowed" in message and "--loss_scaling 128" in message
            and "diverged" not in message)
    assert "\n" not in message
    huge = explained(overflowed, learning_rate=1e-5, loss_scaling=1e300, precision="float16")
    assert float(huge.split("--loss_scaling ")[1].split(",")[0]) < 65504 / math.log(384)
    steady = explained([2.0] * 8 + [math.nan], learning_rate=3e-3, loss_scaling=1.0,
                       precision="float32")
    assert "--learning_rate 0.001" in steady and "overflow" not in steady
    # With the loss scaling that the message advises, every loss is finite.
    assert all(map(math.isfinite,
                   fit(learning_rate=0.01, loss_scaling=1024.0 / 8, half_gradients=True)))


@pytest.mark.parametrize("rate", [1e300, 1e30, 2.0])
@pytest.mark.parametrize("losses", [[math.nan], [2.0] * 8 + [math.inf], [1.0, 9.0, 99.0, math.nan]])
def test_an_absurd_learning_rate_is_answered_by_one_of_fine_tuning(rate, losses):
    for precision, scaling in (("float16", 1024.0), ("float32", 1.0)):
        message = explained(losses, learning_rate=rate, loss_scaling=scaling, precision=precision)
        assert 1e-5 <= float(message.split("try --learning_rate ")[1]) <= 1e-4
        assert "--loss_scaling" not in message and "--precision" not in message


def test_the_first_step_and_weights_found_bad_before_a_save_are_explained_too():
    known = dict(learning_rate=2e-5, loss_scaling=64.0, precision="float16")
    assert "step 1: the loss is nan" in explain_nonfinite(step=1, loss=math.nan, earlier_losses=[],
                                                          **known)
    tensors = {"count": torch.tensor(3), "good": torch.ones(2),
               "half": torch.tensor([1.0, 70000.0]).half()}
    bad = find_nonfinite(tensors.items())
    message = explain_nonfinite(step=8, loss=1.5, earlier_losses=[1.5] * 8, bad_tensor=bad, **known)
    assert (bad == "half" and "half is not finite after the update (the loss was 1.5)" in message
            and "--loss_scaling 8" in message)
    bad = "Gradient___embeddings.bias"
    message = explain_nonfinite(step=8, loss=1.5, earlier_losses=[1.5] * 8, bad_tensor=bad, **known)
    assert ("the gradient of embeddings.bias is not finite (the loss was 1.5)" in message
            and message.endswith("try --loss_scaling 8"))
    unscaled = dict(known, loss_scaling=1.0)
    for precision, remedy in (("float16", "--precision float32"), ("float32", "--learning_rate")):
        message = explain_nonfinite(step=8, loss=1.5, earlier_losses=[1.5] * 8, bad_tensor=bad,
                                    **{**unscaled, "precision": precision})
        assert remedy in message and "--loss_scaling" not in message
    adjusted = dict(known, loss_scaling=None)  # by the device, which no flag's factor changes
    message = explain_nonfinite(step=8, loss=1.5, earlier_losses=[1.5] * 8, bad_tensor=bad,
                                **adjusted)
    assert "automatic loss scaling, float16: " in message
    assert message.endswith("try --auto_loss_scaling false, or --precision float32")
    del tensors["half"]
    assert find_nonfinite(tensors.items()) is None


def test_a_run_that_comes_back_to_the_same_checkpoint_a_second_time_stops(tmp_path):
    """Of the steps 1 to 6, those with an infinite loss weight (3 and 5) have an infinite loss."""
    torch.manual_seed(0)
    model = RobertaForSpans(RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=14, type_vocab_size=1)).train()
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.01)
    options = poptorch.Options()
    training_model = poptorch.trainingModel(model, options, optimizer)
    state = TrainingState(model, optimizer, training_model)
    checkpoints = Checkpoints(tmp_path, {}, save_model)
    guard = NonfiniteGuard(TrainSettings(on_nonfinite="skip"), checkpoints, state, options)
    ids, label, passed = torch.ones(1, 12, dtype=torch.int32), torch.tensor([[3]]), []
    with pytest.raises(RunError, match="^step 5: the loss is inf.* had already gone back to the "
                                       "weights of step 2 and come to this again$"):
        for state.step, weight in enumerate([1.0, 1.0, math.inf, 1.0, math.inf, 1.0], start=1):
            loss = training_model(ids, ids, ids, label.int(), label.int(), torch.tensor([[weight]]))
            passed.append(guard.check_or_go_back(loss.item(), 0.01, False))
            if state.step == 2:
                checkpoints.save(state)
    assert passed == [True, True, False, True]
