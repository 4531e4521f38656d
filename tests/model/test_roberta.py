"""The annotated model of each family is compared with transformers' own for question answering.

Logits, loss, gradients and saved files are the same, packed and unpacked.
"""
import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    RobertaConfig,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from ipu_options.host_kernels import HOST_KERNELS
from ipu_options.ipu_kernels import IPU_KERNELS
from ipu_options.layout import make_layout
from qa.families import first_position, row_kind
from qa.model.deberta import distance_rows
from qa.model.parallelize import (
    SerializedEmbedding,
    deparallelize,
    parallelize,
    set_weights,
    weights_of,
)
from qa.model.pretrained import load_config, load_model, save_model
from qa.model.roberta import RobertaForSpans, model_class
from qa.settings import TrainSettings
from runtime.errors import UsageError

# The weights are large enough that attention is far from uniform.
SMALL = dict(vocab_size=203, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
             intermediate_size=96, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1,
             bos_token_id=0, eos_token_id=2, hidden_dropout_prob=0.0,
             attention_probs_dropout_prob=0.0, initializer_range=0.2)
BERT = {**SMALL, "max_position_embeddings": 65, "pad_token_id": 0, "layer_norm_eps": 1e-12}
DEBERTA = {**BERT, "type_vocab_size": 0, "layer_norm_eps": 1e-7, "relative_attention": True,
           "position_biased_input": False, "pos_att_type": ["c2p", "p2c"],
           "num_attention_heads": 3, "intermediate_size": 37}
LENGTHS, QUESTIONS = (40, 17, 33), (7, 11, 1)  # tokens of a window, and of its first text
# Sizes that are odd on purpose. An ELECTRA has a projection if its embedding is narrower.
FAMILY = {
    "roberta": SMALL, "xlm-roberta": SMALL, "camembert": SMALL,
    "roberta with token types": {**SMALL, "type_vocab_size": 2},
    "bert": {**BERT, "type_vocab_size": 3, "num_attention_heads": 3, "intermediate_size": 37},
    "bert without token types": {**BERT, "type_vocab_size": 1, "hidden_act": "gelu_new"},
    "electra": {**BERT, "type_vocab_size": 2, "embedding_size": 20, "num_attention_heads": 6},
    "electra without projection": {**BERT, "type_vocab_size": 2, "embedding_size": 48},
    "distilbert": dict(vocab_size=203, dim=45, n_layers=3, n_heads=5, hidden_dim=71, dropout=0.0,
                       attention_dropout=0.0, qa_dropout=0.0, max_position_embeddings=67,
                       pad_token_id=0, initializer_range=0.2),
    "deberta": DEBERTA, "deberta with short reach": {
        **DEBERTA, "max_relative_positions": 19, "position_biased_input": True,
        "type_vocab_size": 2, "pos_att_type": "p2c|c2p"},
    "deberta-v2 as v3": {**DEBERTA, "share_att_key": True, "position_buckets": 12,
                         "norm_rel_ebd": "layer_norm"},
    "deberta-v2": DEBERTA}


@pytest.fixture(params=FAMILY)
def saved(request, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param.split()[0], **FAMILY[request.param])
    model = AutoModelForQuestionAnswering.from_config(config).eval()
    model.save_pretrained(tmp_path / "hf")
    return model, tmp_path / "hf"


def windows():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, SMALL["vocab_size"], (length, ), generator=generator)
        for length in LENGTHS]


def token_types(config):
    """Those of each window; [{}, ...] for a model that has a single one."""
    return [{"token_type_ids": (torch.arange(length) >= question).long().unsqueeze(0)}
            if row_kind(config).get("token_types") else {}
            for length, question in zip(LENGTHS, QUESTIONS)]


def one_window_a_row(config, length=48):
    first, shape = first_position(config), (len(LENGTHS), length)
    rows = {"input_ids": torch.full(shape, config.pad_token_id),
            "position_ids": torch.full(shape, max(first - 1, 0)), "window_ids": torch.zeros(shape)}
    rows.update((name, torch.zeros(shape)) for name in token_types(config)[0])
    for i, (window, types) in enumerate(zip(windows(), token_types(config))):
        real = slice(len(window))
        rows["input_ids"][i, real], rows["window_ids"][i, real] = window, 1
        rows["position_ids"][i, real] = torch.arange(first, len(window) + first)
        for name in types:
            rows[name][i, real] = types[name][0]
    return {name: tensor.int() for name, tensor in rows.items()}


def all_windows_in_one_row(config):
    first = first_position(config)
    rows = {"input_ids": windows(), "position_ids": [torch.arange(n) + first for n in LENGTHS],
            "window_ids": [torch.full((n, ), i + 1) for i, n in enumerate(LENGTHS)]}
    for name in token_types(config)[0]:
        rows[name] = [types[name][0] for types in token_types(config)]
    return {name: torch.cat(tensors).int().unsqueeze(0) for name, tensors in rows.items()}


def reference_logits(model):
    outputs = [model(window.unsqueeze(0), **types)
               for window, types in zip(windows(), token_types(model.config))]
    return torch.stack([
        torch.cat([output.start_logits[0] for output in outputs]),
        torch.cat([output.end_logits[0] for output in outputs])])


def real_tokens(logits, window_ids):
    return torch.stack([part[window_ids > 0] for part in logits])


def checkpoint(folder):
    settings = TrainSettings(model_name_or_path=str(folder), max_seq_length=64)
    return settings, load_config(settings)


def load(model, folder, kernels=None):
    return model_class(model.config).from_pretrained(folder, kernels)


@pytest.fixture(params=[HOST_KERNELS, IPU_KERNELS], ids=["host kernels", "PopTorch's operations"])
def kernels(request):
    return request.param


@pytest.mark.parametrize("rows", [one_window_a_row, all_windows_in_one_row])
def test_logits_equal_transformers_packed_and_unpacked(saved, rows, kernels):
    reference, folder = saved
    model = load(reference, folder, kernels).eval()
    parallelize(model, make_layout([1, 1, 1], 3), embedding_serialization_factor=4)
    row = rows(model.config)
    window_ids = row["window_ids"]
    with torch.no_grad():
        ours = real_tokens(model(**row), window_ids)
        assert ours.std() > 0.1
        assert torch.allclose(ours, reference_logits(reference), atol=1e-5, rtol=0)
        # transformers' model gives the same with padding and an attention mask, too.
        if rows is one_window_a_row:
            types = {name: row[name].long() for name in token_types(model.config)[0]}
            out = reference(row["input_ids"].long(), attention_mask=(window_ids > 0).long(),
                            **types)
            assert torch.allclose(ours, real_tokens((out.start_logits, out.end_logits), window_ids),
                                  atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [one_window_a_row, all_windows_in_one_row])
def test_loss_and_gradients_equal_the_mean_of_transformers_losses(saved, rows, kernels):
    reference, folder = saved
    reference.train()
    starts, ends = (3, 0, 12), (5, 0, 30)
    losses = [
        reference(window.unsqueeze(0), start_positions=torch.tensor([s]),
                  end_positions=torch.tensor([e]), **types).loss
        for window, s, e, types in zip(windows(), starts, ends, token_types(reference.config))]
    (sum(losses) / len(losses)).backward()

    model = load(reference, folder, kernels).train()
    parallelize(model, make_layout([1, 1, 1], 3))
    packed = rows is all_windows_in_one_row
    begin = [0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]] if packed else [0, 0, 0]
    shape = (1, 4) if packed else (3, 1)  # the packed row has a fourth slot, which stays empty
    start_positions, end_positions, weights = (torch.zeros(4 if packed else 3) for _ in range(3))
    for i in range(3):
        start_positions[i], end_positions[i], weights[i] = (
            begin[i] + starts[i], begin[i] + ends[i], 1 / 3)
    loss = model(**rows(model.config), start_positions=start_positions.int().view(shape),
                 end_positions=end_positions.int().view(shape), loss_weights=weights.view(shape))
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
    inputs = one_window_a_row(plain.config)
    with torch.no_grad():
        before = plain(**inputs)[0]
        parallelize(other, make_layout([0, 2, 1], 3), embedding_serialization_factor=3)
        assert isinstance(other.roberta.embeddings.word_embeddings, SerializedEmbedding)
        set_weights(other, weights_of(plain))
        assert torch.equal(other(**inputs)[0], before)
        parallelize(other, make_layout([3], 3), embedding_serialization_factor=2)
        assert torch.equal(other(**inputs)[0], before)
        deparallelize(other)
        assert list(other.state_dict()) == names
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
        assert torch.equal(other(**inputs)[0], before)


def test_a_layout_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the layout has 4 blocks, the model has 5"):
        parallelize(RobertaForSpans(RobertaConfig(**SMALL)), make_layout([2], 2))


@pytest.mark.parametrize("kind, reason", [
    ("albert", "layers share one set of weights.*a bert or an electra model works"),
    ("mpnet", "share one bias by the distance between tokens.*roberta"),
    ("gpt2", "it is a decoder.*roberta"), ("llama", "it is a decoder.*roberta"),
    ("t5", "it is a decoder.*roberta"), ("longformer", "has the families roberta, .*deberta-v2$")])
def test_another_architecture_is_refused_with_the_reason(tmp_path, kind, reason):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"^.* {tmp_path} is of the type {kind}: .*{reason}"
                       ) as error:
        load_config(TrainSettings(model_name_or_path=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_decoder_of_a_known_family_is_refused(tmp_path):
    AutoConfig.for_model("bert", is_decoder=True).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is of the type bert: it is a decoder"):
        load_config(TrainSettings(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("kind, most", [("roberta", 510), ("bert", 512), ("distilbert", 512)])
def test_the_longest_row_is_the_models(tmp_path, kind, most):
    """RoBERTa's checkpoints have 514 positions for 512 tokens with padding_idx 1, or 510 of 512."""
    AutoConfig.for_model(kind, max_position_embeddings=512).save_pretrained(tmp_path)
    for length in (most, most + 1):
        settings = TrainSettings(model_name_or_path=str(tmp_path), max_seq_length=length)
        if length == most:
            assert load_config(settings).model_type == kind
        else:
            with pytest.raises(UsageError, match=f"has positions for {most} tokens"):
                load_config(settings)


@pytest.mark.parametrize("kind, name, value", [("distilbert", "hidden_dim", 0),
                                               ("distilbert", "qa_dropout", 2),
                                               ("electra", "embedding_size", "wide"),
                                               ("bert", "type_vocab_size", 0),
                                               ("bert", "hidden_size", "abc"),
                                               ("roberta", "num_attention_heads", 0),
                                               ("roberta", "num_hidden_layers", -1),
                                               ("roberta", "pad_token_id", None),
                                               ("roberta", "vocab_size", True),
                                               ("roberta", "max_position_embeddings", 1e9)])
def test_impossible_sizes_are_refused_by_the_familys_own_names(tmp_path, kind, name, value):
    values = AutoConfig.for_model(kind).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**values, name: value}))
    with pytest.raises(UsageError, match=f"^--model_name_or_path .*: {name} is "):
        load_config(TrainSettings(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("name, value", [
    ("conv_kernel_size", 3), ("relative_attention", False), ("pos_att_type", ["c2p"]),
    ("talking_head", True), ("embedding_size", 20), ("attention_head_size", 8),
    ("position_buckets", 200)])
def test_a_deberta_with_what_is_not_built_is_refused_by_its_name(tmp_path, name, value):
    kind = "deberta" if name == "talking_head" else "deberta-v2"
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": kind, **DEBERTA, name: value}))
    with pytest.raises(UsageError, match=f"^--model_name_or_path .*: {name} is .* it should be "):
        checkpoint(tmp_path)


@pytest.mark.parametrize("buckets, most", [(256, 512), (32, 128), (12, 65), (-1, 512), (-1, 24)])
def test_distances_have_the_rows_that_transformers_gives_them(buckets, most):
    length, reach = 512, buckets if buckets > 0 else most
    distances = torch.arange(-length, length)
    expected = distances if buckets < 0 else make_log_bucket_position(distances, buckets, most)
    assert distance_rows(length, reach, buckets, most) == (
        expected.long() + reach).clamp(0, 2 * reach - 1).tolist()


@pytest.mark.parametrize("kind", ["distilbert", "bert", "deberta"])
def test_dropout_is_where_transformers_has_it(kind):
    """DistilBERT has none after the attention's output layer, and one before the head.

    DeBERTa has one more in each layer, of the embeddings of distances.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**FAMILY[kind], "qa_dropout": 0.5})
    calls = []

    def dropout(tensor, p, training):
        calls.append(p)
        return tensor

    model = model_class(config)(config, IPU_KERNELS._replace(dropout=dropout))
    model(**one_window_a_row(config))
    # The attention has dropout of its own.
    expected = {"distilbert": [0.0] * 4 + [0.5], "bert": [0.0] * 7,
                "deberta": [0.0] * 10}
    assert calls == expected[kind]
