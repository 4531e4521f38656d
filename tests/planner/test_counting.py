"""Counts of the annotated model are compared with closed forms and with a real backward pass."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import RobertaConfig

from ipu_options.ipu_kernels import IPU_KERNELS
from ipu_options.layout import make_layout
from planner.count import count_blocks, count_model, for_micro_batch, make_counter
from qa.model.parallelize import deparallelize, parallelize
from qa.model.roberta import RobertaForSpans

WIDTH, HEADS, LENGTH, VOCABULARY, LAYERS = 64, 4, 48, 500, 3


def small_config(**changes):
    shape = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
                 num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
                 max_position_embeddings=LENGTH + 2, type_vocab_size=1, hidden_dropout_prob=0.0,
                 attention_probs_dropout_prob=0.0)
    return RobertaConfig(**{**shape, **changes})


def real_rows(rows, windows):
    torch.manual_seed(0)
    return {
        "input_ids": torch.randint(0, VOCABULARY, (rows, LENGTH), dtype=torch.int32),
        "position_ids": torch.arange(2, LENGTH + 2, dtype=torch.int32).repeat(rows, 1),
        "window_ids": torch.ones(rows, LENGTH, dtype=torch.int32),
        "start_positions": torch.zeros(rows, windows, dtype=torch.int32),
        "end_positions": torch.ones(rows, windows, dtype=torch.int32),
        "loss_weights": torch.ones(rows, windows)}


def held_by_graph(loss, parameters):
    """Bytes of all distinct storages but the parameters' in the autograd graph of `loss`."""
    own = {p.untyped_storage()._cdata for p in parameters}
    storages, seen, todo = {}, set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in own:
                    storages[tensor.untyped_storage()._cdata] = tensor
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return RobertaForSpans(small_config(), IPU_KERNELS).train()


def counted_on_cpu(model, rows):
    modules = [model.roberta.embeddings, *model.roberta.encoder.layer, model.qa_outputs]
    kinds = ["embedding"] + ["layer"] * LAYERS + ["head"]
    return count_blocks(model, [(kind, kind, module) for kind, module in zip(kinds, modules)], rows)


def test_saved_bytes_are_what_a_real_backward_pass_holds(model):
    joined = LAYERS * 3 * WIDTH ** 2 * 4  # query, key and value weights, a view for PopART
    for rows in (1, 3):
        batch = real_rows(rows, windows=2)
        counted = counted_on_cpu(model, batch)
        held = held_by_graph(model(**batch), model.parameters())
        assert sum(block.saved_bytes for block in counted) == held - joined


def test_meta_device_counts_what_real_tensors_count(model):
    for rows, meta in zip((2, 3), count_model(small_config(), LENGTH, 1, "float32", 1)):
        real = counted_on_cpu(model, real_rows(rows, windows=1))
        assert [replace(block, name="", kind="") for block in real] == [
            replace(block, name="", kind="") for block in meta]


@pytest.mark.parametrize("width, heads, length, rows", [(64, 4, 48, 1), (96, 3, 32, 4),
                                                        (768, 12, 384, 2)])
def test_closed_forms(width, heads, length, rows):
    config = small_config(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width,
                          max_position_embeddings=514)
    embedding, *layers, head = make_counter(config, max_seq_length=length)(rows, 1)
    tokens = rows * length
    for layer in layers:
        assert layer.parameters == 12 * width ** 2 + 13 * width
        assert layer.forward_flops == 24 * tokens * width ** 2 + 4 * tokens * length * width
        assert layer.backward_flops == 2 * layer.forward_flops
        assert layer.output_bytes == 2 * tokens * width
    assert embedding.parameters == (VOCABULARY + 514 + 1 + 2) * width
    assert (head.parameters, head.forward_flops) == (2 * width + 2, 4 * tokens * width)


def test_flops_agree_with_torchs_own_counter(model):
    flop_counter = pytest.importorskip("torch.utils.flop_counter", reason="came after torch 2.0")
    batch = real_rows(2, windows=1)
    with flop_counter.FlopCounterMode(display=False) as mode:
        model(**batch).backward()
    counted = counted_on_cpu(model, batch)
    assert sum(
        block.forward_flops + block.backward_flops for block in counted) == mode.get_total_flops()


def test_any_micro_batch_follows_from_two_and_three_rows(model):
    pair = [counted_on_cpu(model, real_rows(rows, 1)) for rows in (2, 3)]
    assert for_micro_batch(*pair, 5) == counted_on_cpu(model, real_rows(5, 1))


def test_an_edited_layer_changes_the_counts_by_itself():
    plain = make_counter(small_config(), max_seq_length=LENGTH)(1, 1)
    wider = make_counter(small_config(intermediate_size=8 * WIDTH), max_seq_length=LENGTH)(1, 1)
    assert wider[1].parameters - plain[1].parameters == 8 * WIDTH ** 2 + 4 * WIDTH
    assert wider[1].forward_flops - plain[1].forward_flops == 16 * LENGTH * WIDTH ** 2


def test_a_serialised_embedding_is_counted_in_parts():
    count = make_counter(small_config(), max_seq_length=LENGTH)
    whole, parts = count(1, 1), count(1, 4)
    assert parts[0].parameters == whole[0].parameters
    # The parts are nearly equal: their numbers of rows differ, but by less than 2 x 4.
    assert VOCABULARY // 4 * WIDTH < parts[0].largest_parameter < (VOCABULARY // 4 + 8) * WIDTH
    assert parts[1:] == whole[1:]


def test_the_counts_do_not_depend_on_where_blocks_are(model):
    blocks = parallelize(model, make_layout([1, 2], LAYERS))
    named = [(block.name, "layer", block.module) for block in blocks]
    annotated = count_blocks(model, named, real_rows(1, 1))
    deparallelize(model)
    assert [b.saved_bytes for b in annotated] == [
        b.saved_bytes for b in counted_on_cpu(model, real_rows(1, 1))]
