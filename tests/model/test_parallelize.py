"""What an annotated model makes of its blocks on an IPU.

The serialised embedding's parts stay apart and are unknown to a checkpoint; each stage has one
attention mask; and the last layer is not recomputed.
"""
from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RobertaConfig

import planner
from ipu_options import poptorch
from ipu_options.config import DeviceSettings, IPUConfig
from ipu_options.host_kernels import HOST_KERNELS
from ipu_options.ipu_kernels import IPU_KERNELS, Kernels
from ipu_options.layout import make_layout
from ipu_options.options import training_options
from qa.model.optimizer import make_optimizer, optimizer_state, set_optimizer_state
from qa.model.parallelize import parallelize, part_sizes, set_weights, weights_of
from qa.model.roberta import RobertaForSpans
from qa.settings import TrainSettings
from runtime.errors import UsageError

SIZES = json.loads(Path(planner.__path__[0], "models.json").read_text())
# Vocabularies and numbers of positions of the family's checkpoints, of the demo, and two in which
# equal parts would be as large as the position embedding.
EMBEDDINGS = sorted({(model["vocab_size"], model["max_position_embeddings"])
                     for model in SIZES.values()} | {(2000, 258), (1030, 514), (2066, 514)})


def tiny(vocabulary=60, positions=26, layers=2, kernels=IPU_KERNELS):
    return RobertaForSpans(RobertaConfig(
        vocab_size=vocabulary, max_position_embeddings=positions, hidden_size=8,
        num_hidden_layers=layers, num_attention_heads=2, intermediate_size=8), kernels).train()


class Gathers(TorchDispatchMode):
    """Records the key of each gather by which PopTorch groups them.

    A group has the same data type, axis and stage (poptorch/source/GNNOptimizations.cpp,
    groupGatherNodes: the number of blocks that have begun) and the same shapes of data and indices
    (dispatch). Besides embeddings, PopTorch's canonicalisation makes gathers of index_select and
    unbind (EmbeddingOps.cpp, AtenHandlers.gen.cpp, SliceOps.cpp); `others` are what else it does.
    """

    others = {"embedding_bag", "index", "take", "gather", "cross", "scatter", "scatter_add",
              "scatter_reduce", "index_add", "index_put"}

    def __init__(self):
        super().__init__()
        self.stage, self.keys = 0, []

    def begin(self, *unused):
        self.stage += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        assert name not in self.others
        if name == "embedding":
            self._add(args[0], 0, args[1].shape)
        elif name == "index_select":
            self._add(args[0], args[1], args[2].shape)
        elif name == "unbind":
            axis = args[1] if len(args) > 1 else 0
            for _ in range(args[0].shape[axis]):
                self._add(args[0], axis, (1,))
        return func(*args, **(kwargs or {}))

    def _add(self, data, axis, index_shape):
        self.keys.append((data.dtype, axis, self.stage, tuple(data.shape), tuple(index_shape)))


@pytest.mark.slow
@pytest.mark.parametrize("parts", range(2, 9))
@pytest.mark.parametrize("vocabulary, positions", EMBEDDINGS)
def test_poptorch_finds_no_gathers_to_merge(vocabulary, positions, parts):
    with torch.device("meta"):
        model = tiny(vocabulary, positions).half()
        row = torch.zeros(1, 24, dtype=torch.int32)
        label = row[:, :1]
    gathers = Gathers()
    for block in parallelize(model, make_layout([0, 1, 1], 2),
                             embedding_serialization_factor=parts):
        block.module.register_forward_pre_hook(gathers.begin)
    with torch.device("meta"), gathers:
        model(row, row, row, label, label, label.float())
    assert len(gathers.keys) == parts + 1  # the word embedding's parts and the position embedding
    assert [key for key, count in Counter(gathers.keys).items() if count > 1] == []


def test_the_rule_finds_equal_parts():
    gathers, ids = Gathers(), torch.zeros(1, 4, dtype=torch.int32)
    with gathers:
        for part in torch.zeros(6, 2).split(3):
            torch.nn.functional.embedding(ids, part)
    assert Counter(gathers.keys).most_common(1)[0][1] == 2


class Constants(TorchDispatchMode):
    """Records the stages of each constant, by what PopTorch knows equal ones by.

    It is the type, the shape and the value (popart_compiler, CompilerImpl.cpp, tensorConstant); a
    number in an operation has the type of the other operand and no dimensions.
    """

    def __init__(self):
        super().__init__()
        self.stage, self.stages = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mul", "add", "sub", "rsub", "div", "eq", "ne", "ge", "lt", "pow", "new_full"):
            shape = tuple(args[1]) if name == "new_full" else ()
            for number in args:
                if isinstance(number, (int, float)):
                    self.stages.setdefault((args[0].dtype, shape, number), set()).add(self.stage)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("layers_per_ipu", [[1, 1, 1, 1], [0, 2, 2, 0], [0, 1, 1, 1, 1, 0]])
def test_no_two_stages_have_a_constant_in_common(layers_per_ipu, precision):
    """PopART would copy it from IPU to IPU in each step, and stash it."""
    with torch.device("meta"):
        model = tiny(layers=4).to(precision).eval()
        row = torch.zeros(1, 24, dtype=torch.int32)
        label = row[:, :2]
    layout, constants = make_layout(layers_per_ipu, 4), Constants()
    stage_of = {name: i for i, (_, names) in enumerate(layout.stages()) for name in names}
    for block in parallelize(model, layout, embedding_serialization_factor=2):
        block.module.register_forward_pre_hook(
            lambda module, args, stage=stage_of[block.name]: setattr(constants, "stage", stage))
    with torch.device("meta"), constants:
        model(row, row, row, label, label, label.float())
    assert len(constants.stages) > 2 * sum(map(bool, layers_per_ipu))
    assert {key: stages for key, stages in constants.stages.items() if len(stages) > 1} == {}


@pytest.mark.parametrize("rows, parts, other", [
    (50265, 2, 514), (50265, 8, 514), (1030, 2, 514), (2066, 4, 514), (10, 4, 9), (37, 8, 100)])
def test_parts_are_nearly_equal_and_all_different(rows, parts, other):
    sizes = part_sizes(rows, parts, other)
    assert sum(sizes) == rows and len({*sizes, other}) == parts + 1 and min(sizes) > 0
    assert max(sizes) - min(sizes) < 4 * parts


def test_too_many_parts_are_refused():
    with pytest.raises(UsageError, match="--embedding_serialization_factor 4.*use fewer"):
        part_sizes(9, 4, 100)


def train(factors, steps):
    """Train for steps[i] steps with the embedding in factors[i] parts, one after the other.

    Where the number of parts changes, weights and optimizer go through what a checkpoint holds.
    Returns the weights and the optimizer's state.
    """
    # With a smaller epsilon, Adam would blow up the rounding errors of gradients that are 0.
    settings = TrainSettings(precision="float32", loss_scaling=1.0, learning_rate=0.01,
                             adam_epsilon=1e-3)
    config = IPUConfig(layers_per_ipu=[1], gradient_accumulation_steps=2, replication_factor=1)
    torch.manual_seed(0)
    batches = torch.randint(0, 60, (sum(steps), 4, 12), dtype=torch.int32)
    saved = None
    for factor, count in zip(factors, steps):
        torch.manual_seed(1)
        model = RobertaForSpans(RobertaConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=14, type_vocab_size=1,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
        if saved:
            set_weights(model, saved[0])
        parallelize(model, make_layout([1], 1), embedding_serialization_factor=factor)
        optimizer = make_optimizer(model, settings, config)
        options = training_options(config, DeviceSettings(), seed=1)
        training_model = poptorch.trainingModel(model, options, optimizer)
        ones, label = torch.ones(4, 12, dtype=torch.int32), torch.full((4, 1), 3).int()
        arguments = (ones, ones, label, label, torch.ones(4, 1))
        training_model.compile(ones, *arguments)
        if saved:
            set_optimizer_state(optimizer, training_model.model, saved[1])
            training_model.setOptimizer(optimizer)
        for batch in batches[:count]:
            training_model(batch, *arguments)
        batches = batches[count:]
        saved = ({name: tensor.clone() for name, tensor in weights_of(model).items()},
                 optimizer_state(optimizer))
    return saved


@pytest.mark.parametrize("factors, steps", [([3], [6]), ([3, 2], [3, 3]), ([1, 4], [3, 3]),
                                            ([2, 1], [3, 3])])
def test_training_goes_on_with_another_number_of_parts(factors, steps):
    """The results differ by rounding: the host's fused AdamW rounds the ends of a tensor anew."""
    weights, state = train([1], [6])
    other_weights, other_state = train(factors, steps)
    for one, other in ((weights, other_weights), (state["ipu_state"], other_state["ipu_state"]),
                       (state["ipu_param"], other_state["ipu_param"])):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-5)


def test_what_a_checkpoint_holds_does_not_change_with_the_number_of_parts():
    weights, state = train([3], [2])
    for factor in (1, 2, 4):
        other_weights, other_state = train([3, factor], [2, 0])
        for one, other in ((weights, other_weights), (state["ipu_state"], other_state["ipu_state"]),
                           (state["ipu_param"], other_state["ipu_param"])):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layers_per_ipu", [[4], [0, 2, 2], [1, 1, 1, 1], [0, 3, 1]])
@pytest.mark.parametrize("kernels", [HOST_KERNELS, IPU_KERNELS], ids=["host", "ipu"])
def test_a_mask_is_made_once_in_each_stage_and_used_there(layers_per_ipu, kernels):
    current, made, used = [None], [], []

    def window_mask(window_ids, dtype, stage):
        made.append((current[0], kernels.window_mask(window_ids, dtype, stage)))
        return made[-1][1]

    def attention(qkv, heads, mask, *rest):
        used.append((current[0], mask))
        return kernels.attention(qkv, heads, mask, *rest)

    model = tiny(layers=4, kernels=Kernels(attention, kernels.dropout, window_mask)).eval()
    for block in parallelize(model, make_layout(layers_per_ipu, 4)):
        block.module.register_forward_pre_hook(
            lambda module, args, ipu=block.ipu: current.__setitem__(0, ipu))
    row = torch.ones(1, 24, dtype=torch.int32)
    for _ in range(2):
        made.clear()
        used.clear()
        model(row, row, row)
        holds_layers = [ipu for ipu, count in enumerate(layers_per_ipu) if count]
        assert [ipu for ipu, _ in made] == holds_layers
        assert len(used) == 4 and all(mask is dict(made)[ipu] for ipu, mask in used)


@pytest.mark.parametrize("checkpoints", [True, False])
def test_every_layer_but_the_last_is_a_recomputation_checkpoint(checkpoints, monkeypatch):
    kept = []
    monkeypatch.setattr(poptorch, "recomputationCheckpoint",
                        lambda output: kept.append(output) or output)
    model, outputs = tiny(layers=4).eval(), []
    parallelize(model, make_layout([0, 2, 2], 4), recompute_checkpoint_every_layer=checkpoints)
    for layer in model.roberta.encoder.layer:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    row = torch.ones(1, 24, dtype=torch.int32)
    model(row, row, row)
    expected = outputs[:3] if checkpoints else []
    assert len(kept) == len(expected) and all(a is b for a, b in zip(kept, expected))
