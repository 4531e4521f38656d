"""The annotated model is compared with transformers' own RobertaForQuestionAnswering.

Logits, loss, gradients and saved files are the same, packed and unpacked.
"""
import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    CamembertConfig,
    CamembertForQuestionAnswering,
    RobertaConfig,
    RobertaForQuestionAnswering,
    XLMRobertaConfig,
    XLMRobertaForQuestionAnswering,
)

from ipu_options.errors import UsageError
from ipu_options.host_kernels import HOST_KERNELS
from ipu_options.ipu_kernels import IPU_KERNELS
from ipu_options.layout import make_layout
from qa.model.parallelize import (
    SerializedEmbedding,
    deparallelize,
    parallelize,
    set_weights,
    weights_of,
)
from qa.model.pretrained import load_config, load_model, save_model
from qa.model.roberta import RobertaForSpans
from qa.settings import TrainSettings

# The weights are large enough that attention is far from uniform.
SMALL = dict(vocab_size=203, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
             intermediate_size=96, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1,
             bos_token_id=0, eos_token_id=2, hidden_dropout_prob=0.0,
             attention_probs_dropout_prob=0.0, initializer_range=0.2)
LENGTHS = (40, 17, 33)
FAMILY = [(RobertaConfig, RobertaForQuestionAnswering),
          (XLMRobertaConfig, XLMRobertaForQuestionAnswering),
          (CamembertConfig, CamembertForQuestionAnswering)]


@pytest.fixture(params=FAMILY, ids=lambda pair: pair[0].model_type)
def saved(request, tmp_path):
    torch.manual_seed(0)
    config, reference = request.param
    model = reference(config(**SMALL)).eval()
    model.save_pretrained(tmp_path / "hf")
    return model, tmp_path / "hf"


def windows():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, SMALL["vocab_size"], (length, ), generator=generator)
        for length in LENGTHS]


def one_window_a_row(length=48):
    batch, ids = len(LENGTHS), torch.ones(len(LENGTHS), length, dtype=torch.int32)
    positions, window_ids = (torch.ones(batch, length, dtype=torch.int32),
                             torch.zeros(batch, length, dtype=torch.int32))
    for i, window in enumerate(windows()):
        ids[i, :len(window)], window_ids[i, :len(window)] = window.int(), 1
        positions[i, :len(window)] = torch.arange(2, len(window) + 2).int()
    return ids, positions, window_ids


def all_windows_in_one_row():
    ids = torch.cat(windows()).int().unsqueeze(0)
    positions = torch.cat([torch.arange(2, n + 2) for n in LENGTHS]).int().unsqueeze(0)
    window_ids = torch.cat([
        torch.full((n, ), i + 1) for i, n in enumerate(LENGTHS)]).int().unsqueeze(0)
    return ids, positions, window_ids


def reference_logits(model):
    outputs = [model(window.unsqueeze(0)) for window in windows()]
    return torch.stack([
        torch.cat([output.start_logits[0] for output in outputs]),
        torch.cat([output.end_logits[0] for output in outputs])])


def real_tokens(logits, window_ids):
    return torch.stack([part[window_ids > 0] for part in logits])


def checkpoint(folder):
    settings = TrainSettings(model_name_or_path=str(folder), max_seq_length=64)
    return settings, load_config(settings)


def load(folder, kernels=None):
    return RobertaForSpans.from_pretrained(folder, kernels)


@pytest.fixture(params=[HOST_KERNELS, IPU_KERNELS], ids=["host kernels", "PopTorch's operations"])
def kernels(request):
    return request.param


@pytest.mark.parametrize("rows", [one_window_a_row, all_windows_in_one_row])
def test_logits_equal_transformers_packed_and_unpacked(saved, rows, kernels):
    reference, folder = saved
    model = load(folder, kernels).eval()
    parallelize(model, make_layout([1, 1, 1], 3), embedding_serialization_factor=4)
    ids, positions, window_ids = rows()
    with torch.no_grad():
        ours = real_tokens(model(ids, positions, window_ids), window_ids)
        assert torch.allclose(ours, reference_logits(reference), atol=1e-5, rtol=0)
        padded = torch.nn.functional.pad(ids, (0, 0))
        mask = (window_ids > 0).long()
        # transformers' model gives the same with padding and an attention mask, too.
        if rows is one_window_a_row:
            out = reference(padded.long(), attention_mask=mask)
            assert torch.allclose(ours, real_tokens((out.start_logits, out.end_logits), window_ids),
                                  atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [one_window_a_row, all_windows_in_one_row])
def test_loss_and_gradients_equal_the_mean_of_transformers_losses(saved, rows, kernels):
    reference, folder = saved
    reference.train()
    starts, ends = (3, 0, 12), (5, 0, 30)
    losses = [
        reference(window.unsqueeze(0), start_positions=torch.tensor([s]),
                  end_positions=torch.tensor([e])).loss
        for window, s, e in zip(windows(), starts, ends)]
    (sum(losses) / len(losses)).backward()

    model = load(folder, kernels).train()
    parallelize(model, make_layout([1, 1, 1], 3))
    ids, positions, window_ids = rows()
    packed = rows is all_windows_in_one_row
    begin = [0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]] if packed else [0, 0, 0]
    shape = (1, 4) if packed else (3, 1)  # the packed row has a fourth slot, which stays empty
    start_positions, end_positions, weights = (torch.zeros(4 if packed else 3) for _ in range(3))
    for i in range(3):
        start_positions[i], end_positions[i], weights[i] = (
            begin[i] + starts[i], begin[i] + ends[i], 1 / 3)
    loss = model(ids, positions, window_ids,
                 start_positions.int().view(shape),
                 end_positions.int().view(shape), weights.view(shape))
    assert torch.allclose(loss, sum(losses) / 3, rtol=1e-5)
    loss.backward()
    ours, scale = dict(model.named_parameters()), max(
        p.grad.norm() for p in reference.parameters() if p.grad is not None)
    for name, parameter in reference.named_parameters():
        if parameter.grad is None:
            assert ours[name].grad is None
            continue
        # Key biases add a constant to the inputs of a softmax, which changes nothing: their
        # gradients are 0 except for rounding.
        if parameter.grad.norm() < 1e-6 * scale:
            assert ours[name].grad.norm() < 1e-6 * scale
            continue
        error = (ours[name].grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, (name, float(error))


def test_an_empty_row_has_a_finite_loss_and_no_gradient():
    torch.manual_seed(0)
    model = RobertaForSpans(RobertaConfig(**SMALL)).train()
    empty = torch.zeros(2, 16, dtype=torch.int32)
    loss = model(empty + 1, empty + 1, empty, empty[:, :3], empty[:, :3], torch.zeros(2, 3))
    loss.backward()
    assert loss == 0 and all(
        torch.all(p.grad == 0) for p in model.parameters() if p.grad is not None)


def test_a_saved_checkpoint_is_transformers_own(saved, tmp_path):
    reference, folder = saved
    model = load_model(*checkpoint(folder)).eval()
    # The embedding has 203 rows, so the last of 5 parts is smaller than the others.
    parallelize(model, make_layout([1, 1, 1], 3), embedding_serialization_factor=5)
    save_model(model, tmp_path / "ours")
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(reference) and again.config.architectures == [
        type(reference).__name__]
    assert sorted(again.state_dict()) == sorted(reference.state_dict())
    with torch.no_grad():
        assert torch.equal(reference_logits(again), reference_logits(reference))


def test_annotations_can_be_taken_off_and_weights_moved_between_layouts():
    torch.manual_seed(0)
    plain = RobertaForSpans(RobertaConfig(**SMALL)).eval()
    other = RobertaForSpans(RobertaConfig(**SMALL)).eval()
    names = list(plain.state_dict())
    inputs = one_window_a_row()
    with torch.no_grad():
        before = plain(*inputs)[0]
        parallelize(other, make_layout([0, 2, 1], 3), embedding_serialization_factor=3)
        assert isinstance(other.roberta.embeddings.word_embeddings, SerializedEmbedding)
        set_weights(other, weights_of(plain))
        assert torch.equal(other(*inputs)[0], before)
        parallelize(other, make_layout([3], 3), embedding_serialization_factor=2)
        assert torch.equal(other(*inputs)[0], before)
        deparallelize(other)
        assert list(other.state_dict()) == names
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
        assert torch.equal(other(*inputs)[0], before)


def test_a_layout_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the layout has 4 blocks, the model has 5"):
        parallelize(RobertaForSpans(RobertaConfig(**SMALL)), make_layout([2], 2))


def test_another_architecture_is_refused(tmp_path):
    from transformers import BertConfig
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is a bert model"):
        load_config(TrainSettings(model_name_or_path=str(tmp_path)))
