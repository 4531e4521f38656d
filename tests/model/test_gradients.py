"""A training step's gradient is compared with plain PyTorch's.

The reference is the gradient of the mean loss of Hugging Face's model, run on each window alone.
"""
from dataclasses import replace

import pytest
import torch
from transformers import RobertaConfig, RobertaForQuestionAnswering

from ipu_options import poptorch
from ipu_options.config import IPUConfig
from qa.data.loader import collate
from qa.data.rows import InferenceRows, TrainingRows
from qa.model.optimizer import make_optimizer
from qa.model.roberta import RobertaForSpans
from qa.settings import TrainSettings
from tests.reference.synthetic_windows import SyntheticWindows

CONFIG = RobertaConfig(vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                       intermediate_size=64, max_position_embeddings=100, type_vocab_size=1,
                       pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                       initializer_range=0.2)
LENGTHS = [9, 40, 17, 25, 33, 12, 60, 8, 29, 31, 14, 22, 45, 38, 11, 19, 27, 50, 16, 35, 21, 13]
# SGD's learning rate is so large that the change of a weight gives its gradient in full precision.
RATE = 1e4


@pytest.fixture(scope="module")
def windows():
    return SyntheticWindows(LENGTHS, seed=4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return RobertaForSpans(CONFIG).train()


def plain_model(model):
    plain = RobertaForQuestionAnswering(CONFIG)
    plain.load_state_dict(model.state_dict())
    return plain


def plain_gradient(model, windows, chosen):
    """The gradient of the mean loss over the chosen windows, each computed alone and unpadded."""
    plain = plain_model(model)
    for window in chosen:
        tokens = torch.from_numpy(windows.input_ids(window).astype("int64")).unsqueeze(0)
        labels = [
            torch.tensor([int(positions[window])])
            for positions in (windows.start_position, windows.end_position)]
        (plain(tokens, start_positions=labels[0], end_positions=labels[1]).loss /
         len(chosen)).backward()
    return {name: parameter.grad for name, parameter in plain.named_parameters()}


def windows_in(rows, indices, windows):
    """The numbers of the windows in these rows, recognised by their tokens."""
    by_tokens = {
        tuple(windows.input_ids(window).tolist()): window for window in range(len(windows))}
    found = []
    for index in indices:
        row = rows[index]
        for number in range(1, int(row["window_ids"].max()) + 1):
            found.append(by_tokens[tuple(row["input_ids"][row["window_ids"] == number].tolist())])
    return found


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("micro_batch_size, accumulation, replicas",
                         [(1, 8, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1), (1, 2, 4)])
def test_gradient_of_a_step_is_that_of_the_mean_loss(model, windows, most, micro_batch_size,
                                                     accumulation, replicas):
    plan = dict(row_length=64, max_windows_per_row=most, pad_token_id=1,
                micro_batch_size=micro_batch_size, micro_batches_per_update=accumulation * replicas,
                seed=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(TrainingRows(windows, **plan).updates_per_epoch):  # the last has empty rows
        rows = TrainingRows(windows, **plan, first_step=step)
        options = poptorch.Options()
        options.replicationFactor(replicas)
        options.Training.gradientAccumulation(accumulation)
        options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
        trained = RobertaForSpans(CONFIG).train()
        trained.load_state_dict(before)
        training_model = poptorch.trainingModel(trained, options,
                                                poptorch.optim.SGD(trained.parameters(), lr=RATE))
        batch = next(
            iter(poptorch.DataLoader(options, rows, batch_size=micro_batch_size,
                                     collate_fn=collate)))
        training_model(**batch)
        training_model.copyWeightsToHost()
        chosen = windows_in(rows, range(rows.rows_per_step), windows)
        assert len(chosen) == rows.windows_in_step(step)
        expected = plain_gradient(model, windows, chosen)
        # Some gradients are 0 except for rounding, since adding a constant to all inputs of a
        # softmax changes nothing.
        least = 1e-2 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        for name, parameter in trained.named_parameters():
            difference = (before[name] - parameter.detach()) / RATE - expected[name]
            assert difference.norm() <= 1e-5 * max(expected[name].norm(), least), name
    assert len(chosen) < 8 * most


@pytest.mark.parametrize("accumulation, replicas", [(4, 1), (2, 2)])
def test_clipping_is_torchs_over_the_mean_gradient_of_an_update(model, windows, accumulation,
                                                                replicas):
    """The weights after some updates are those of clip_grad_norm_ and torch's AdamW.

    The norms that a plain run has lie on both sides of the limit.
    """
    # With this epsilon, gradients that are 0 except for rounding move no weight.
    settings = TrainSettings(learning_rate=1e-2, max_grad_norm=0.5, loss_scaling=64.0,
                             adam_epsilon=1e-3)
    arguments = dict(row_length=64, max_windows_per_row=4, pad_token_id=1, micro_batch_size=1,
                     micro_batches_per_update=accumulation * replicas, seed=1, epochs=2)
    rows = TrainingRows(windows, **arguments)
    trained = {}
    for limit in (settings.max_grad_norm, None):
        options = poptorch.Options()
        options.replicationFactor(replicas)
        options.Training.gradientAccumulation(accumulation)
        options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
        mine = RobertaForSpans(CONFIG).train()
        mine.load_state_dict(model.state_dict())
        optimizer = make_optimizer(mine, replace(settings, max_grad_norm=limit), IPUConfig())
        training_model = poptorch.trainingModel(mine, options, optimizer)
        for step in range(rows.total_steps):
            first = step * rows.rows_per_step
            training_model(**rows.__getitems__(range(first, first + rows.rows_per_step)))
        training_model.copyWeightsToHost()
        trained[limit] = mine

    plain, norms = plain_model(model), []
    groups = [{"params": [p for p in plain.parameters() if (p.dim() > 1) == decayed],
               "weight_decay": settings.weight_decay * decayed} for decayed in (True, False)]
    reference = torch.optim.AdamW(groups, lr=settings.learning_rate, eps=settings.adam_epsilon)
    for step in range(rows.total_steps):
        first = step * rows.rows_per_step
        chosen = windows_in(rows, range(first, first + rows.rows_per_step), windows)
        gradients = plain_gradient(plain, windows, chosen)
        for name, parameter in plain.named_parameters():
            parameter.grad = gradients[name]
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(),
                                                          settings.max_grad_norm)))
        reference.step()
    assert min(norms) < settings.max_grad_norm < max(norms), norms
    clipped, free = (torch.cat([(p - plain.get_parameter(name)).flatten()
                                for name, p in each.named_parameters()]).norm()
                     for each in (trained[settings.max_grad_norm], trained[None]))
    assert clipped < 1e-3 * free, (float(clipped), float(free))


def test_packing_leaves_a_windows_logits_as_they_are(model, windows):
    rows = InferenceRows(windows, row_length=64, max_windows_per_row=4, pad_token_id=1,
                         rows_per_step=4)
    plain = plain_model(model).eval()
    with torch.no_grad():
        batch = rows.__getitems__(range(len(rows)))
        logits = torch.stack(model.eval()(**batch))
        for row in range(len(rows)):
            for window, first, length in rows.slices(row):
                tokens = torch.from_numpy(windows.input_ids(window).astype("int64")).unsqueeze(0)
                alone = plain(tokens)
                for packed, expected in zip(logits[:, row, first:first + length],
                                            (alone.start_logits[0], alone.end_logits[0])):
                    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)
    assert logits.isfinite().all()
