"""poptorch_host refuses what PopTorch's compiled core refuses, in the same words.

The words were seen with PopTorch 3.4 and PopART 3.4, compiled without the Poplar SDK, for the same
input. So was that the inputs of ACCEPTED compile.
"""
from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

import poptorch_host as poptorch


class Model(torch.nn.Module):
    """Two linear layers, and a forward pass that is given as a function of the model."""

    def __init__(self, forward):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 3), torch.nn.Linear(3, 3)
        self.function = forward

    def forward(self, x, target=None):
        return self.function(self, x) if target is None else self.function(self, x, target)


def cross_entropy(self, x, target):
    out = self.first(x)
    return out, poptorch.identity_loss(functional.cross_entropy(out.float(), target), "none")


def linear(self, x):
    return self.first(x)


def staged(*ipus, ids="abc"):
    """A forward pass whose layers are on these IPUs."""
    def forward(self, x, target=None):
        for number, ipu in enumerate(ipus):
            poptorch.Block.start(ids[number], ipu_id=ipu)
            x = self.second(x) if number else self.first(x)
        return x if target is None else poptorch.identity_loss(
            functional.cross_entropy(x, target), "none")
    return forward


def outside_all_blocks(self, x):
    with poptorch.Block("one", ipu_id=0):
        x = self.first(x)
    return x * 2


def loss_that_is_not_returned(self, x, target):
    poptorch.identity_loss(self.first(x).sum(), "none")
    return self.first(x)


def two_losses(self, x, target):
    return (poptorch.identity_loss(self.first(x).sum(), "none"),
            poptorch.identity_loss(self.first(x).mean(), "none"))


def options(iterations=1, accumulation=1, replicas=1, popart=None, patterns=None, scaling=False,
            memory=None):
    opts = poptorch.Options().deviceIterations(iterations).replicationFactor(replicas)
    opts.Training.gradientAccumulation(accumulation)
    opts.useOfflineIpuTarget()
    for name, value in (popart or {}).items():
        opts._Popart.set(name, value)
    if patterns:
        opts._Popart.setPatterns(*patterns)
    if scaling:
        opts.Training.setAutomaticLossScaling(True)
    if memory:
        opts.setAvailableMemoryProportion(memory)
    return opts


def compile_for_training(forward, x=None, optimizer=None, half=False, rows=2, **settings):
    model = Model(forward).half() if half else Model(forward)
    x = torch.randn(rows, 6) if x is None else x
    target = torch.zeros(len(x), dtype=torch.int64)
    poptorch.trainingModel(model, options(**settings), optimizer and optimizer(model)).compile(
        x.half() if half else x, target)


def compile_for_inference(forward, x=None, half=False, rows=2, **settings):
    model = Model(forward).half() if half else Model(forward)
    executor = poptorch.inferenceModel(model, options(**settings))
    executor.compile(torch.randn(rows, 6) if x is None else x)


UNSUPPORTED = ("Unsupported ops found in compiled model: [aten::{}]. Not all operations are "
               "supported yet by Graphcore's PyTorch compiler.")
TO_CPU = "Illegal move to CPU (via `.to(\"cpu\")`) when using the dispatcher."
NO_VALUE = "Could not run 'aten::_local_scalar_dense' with arguments from the 'Meta' backend."

TRAINING = [
    (staged(0, 1), dict(accumulation=2),
     "poptorch.Options().Training.gradientAccumulation must be greater than or equal to the number "
     "of pipeline stages (3) when using poptorch.PipelinedExecution. Please note that a model with "
     "2 pipeline stages in PopTorch will have an additional 1 stages when training."),
    (staged(1, 0), dict(accumulation=4, rows=4), "the number of pipeline stages (5)"),
    (lambda self, x, target: self.first(x), {}, "Couldn't find a loss in graph!"),
    (loss_that_is_not_returned, {}, "Couldn't find a loss in graph!"),
    (two_losses, {}, "Multiple independent losses found in graph. Graph must have one final loss. "
                     "Wrap final graph loss in poptorch.identity_loss."),
    (lambda self, x, target: poptorch.identity_loss(self.first(x), "none"), {},
     "Loss tensor, 'IdentityLoss:0', must be a scalar tensor"),
    (lambda self, x, target: poptorch.identity_loss(x, "avg"), {}, "Unsupported reduction type!"),
    (cross_entropy, dict(scaling=True),
     "[AutomaticLossScale transform] No tracked gradient tensors of type fp16 were found."),
    (cross_entropy, dict(optimizer=lambda model: poptorch.optim.AdamW(
        model.parameters(), loss_scaling=0.0)), "Loss scaling cannot be 0"),
    (cross_entropy, dict(optimizer=lambda model: poptorch.optim.AdamW(
        model.parameters(), accum_type=torch.bfloat16)),
     "Accumulation types must be either torch.float32 or torch.float16"),
    (cross_entropy, dict(optimizer=lambda model: torch.optim.Adadelta(model.parameters())),
     "Unsupported optimizer type. Types supported"),
    (cross_entropy, dict(optimizer=lambda model: poptorch.optim.AdamW(
        model.parameters(), amsgrad=True)),
     "Only non-amsgrad Adam/AdamW optimizers are supported."),
    (cross_entropy, dict(optimizer=lambda model: poptorch.optim.AdamW(
        model.parameters(), lr=torch.tensor(1e-3))), "Expected a number for lr but got 0.001"),
]
INFERENCE = [
    (staged(0, 1), {},
     "poptorch.Options().deviceIterations must be greater than or equal to the number of pipeline "
     "stages (2) when using PopTorch.PipelinedExecution."),
    (linear, dict(accumulation=2),
     "You must set poptorch.Options().Training.gradientAccumulation to 1 or leave it as its "
     "default value (1) when running a poptorch.inferenceModel(). Use "
     "poptorch.Options().deviceIterations to process a sufficient number of batches each run for "
     "pipelined execution instead."),
    (linear, dict(iterations=2, rows=3),
     "Invalid batch dimension: In the input torch.Size([3, 6])"),
    (linear, dict(replicas=128, rows=128),
     "Too many IPUs requested (128). Experiments that need more than 64 IPUs require distributed "
     "execution."),
    (staged(0, 1, ids="aa"), dict(iterations=2),
     "have the same pipeline stage 0, but different virtual graph ids [0 1]. All ops with the same "
     "pipeline stage must also have the same virtual graph id"),
    (staged(None), {}, "poptorch.AutoStage.SameAsIpu was selected but no IPU was specified for "
                       "block a"),
    (outside_all_blocks, {}, "No active Block, all the ops must belong to a Block"),
    (linear, dict(x=torch.ones(2, 6, dtype=torch.bfloat16)),
     "Unsupported tensor input type from pytorch: BFloat16"),
    (linear, dict(x=torch.ones(2, 6, dtype=torch.complex64)),
     "Unsupported tensor input type from pytorch: ComplexFloat"),
    (linear, dict(half=True), "mat1 and mat2 must have the same dtype"),
    (lambda self, x: torch.special.sinc(x), {}, UNSUPPORTED.format("sinc")),
    (lambda self, x: torch.erfinv(x), {}, UNSUPPORTED.format("erfinv")),
    (lambda self, x: torch.lgamma(x), {}, UNSUPPORTED.format("lgamma")),
    (lambda self, x: torch.unique(x), {},
     "Type inference failed for aten::_unique2 because the operator doesn't have an implementation "
     "for the Meta backend."),
    (lambda self, x: torch.nonzero(x), {},
     "Operations using aten::nonzero are unsupported because the output shape is determined by the "
     "tensor values. The IPU cannot support dynamic output shapes."),
    (lambda self, x: x[x > 0], {}, "aten.index.Tensor"),
    (lambda self, x: x * x.sum().item(), {}, NO_VALUE),
    (lambda self, x: x * 2 if x.sum() > 0 else x, {}, NO_VALUE),
    (lambda self, x: torch.tensor(x.tolist()), {}, TO_CPU),
    (lambda self, x: (str(x), x)[1], {}, TO_CPU),
    (lambda self, x: torch.from_numpy(x.numpy()), {},
     "can't convert ipu:0 device type tensor to numpy."),
    (linear, dict(popart={"nonsense": 1}), "Unknown uint64 option nonsense"),
    (linear, dict(popart={"autodiffSettings.nonsense": 0.5}),
     "Unknown floating point option autodiffSettings.nonsense"),
    (linear, dict(popart={"enableOutlining": 1}), "Unknown uint64 option enableOutlining"),
    (linear, dict(popart={"enableOutlining": "yes"}), "Unknown string option enableOutlining"),
    (linear, dict(popart={"enableOutlining": None}),
     "Unknown value type <class 'NoneType'> for option enableOutlining"),
    (linear, dict(popart={"subgraphCopyingStrategy": 99}),
     "Value for SubgraphCopyingStrategy out of range"),
    (linear, dict(popart={"accumulateOuterFragmentSettings.schedule": 99}),
     "Value for popart::AccumulateOuterFragmentSchedule out of range"),
    (linear, dict(patterns=({"Nonsense": True}, )), "Unknown pattern Nonsense."),
    (linear, dict(patterns=({}, 9)),
     "level > static_cast<std::uint64_t>(popart::PatternsLevel::All)"),
    (linear, dict(memory={"IPU0": 1.5}), "availableMemoryProportion must be in (0,1]"),
]


@pytest.mark.parametrize("compile_it, forward, settings, words", [
    *((compile_for_training, *case) for case in TRAINING),
    *((compile_for_inference, *case) for case in INFERENCE)])
def test_a_mistake_is_refused_in_the_words_of_poptorchs_compiler(compile_it, forward, settings,
                                                                 words):
    with pytest.raises(Exception) as refusal:
        compile_it(forward, **settings)
    assert words in str(refusal.value)


@pytest.mark.parametrize("call, words", [
    (lambda: poptorch.inferenceModel(Model(linear), options(3).outputMode(
        poptorch.OutputMode.EveryN, 2)).compile(torch.zeros(3, 6)),
     "Return period must be a factor of the number of batches per step"),
    (lambda: poptorch.inferenceModel(Model(linear), options().useIpuModel(True)).compile(
        torch.zeros(2, 6)),
     "ConnectionType.Never / poptorch.Options.useOfflineIpuTarget not supported for the IPU model"),
    (lambda: poptorch.inferenceModel(Model(staged(0, 2)), poptorch.Options().deviceIterations(
        3)).compile(torch.zeros(3, 6)), "autoRoundNumIPUs(True)"),
    (lambda: poptorch.inferenceModel(3), "Expected a torch.nn.Module or a callable"),
    (lambda: poptorch.inferenceModel(Model(linear), 3),
     "Invalid type: 'options' is of type <class 'int'> (Expected poptorch.Options)"),
    (lambda: options(2.0), "Unexpected type <class 'float'> for option device_iterations"),
    (lambda: options(memory={"0": 0.2}), "Invalid key: 0"),
    (lambda: options().outputMode(poptorch.OutputMode.EveryN),
     "EveryN anchor must have output_return_period set to valid positive integer")])
def test_so_is_a_mistake_in_a_call(call, words):
    with pytest.raises(Exception) as refusal:
        call()
    assert words in str(refusal.value)


ACCEPTED = [
    lambda self, x: x @ x.half().t(), lambda self, x: x + x.half(),
    lambda self, x: functional.linear(x.half(), self.first.weight),
    lambda self, x: functional.cross_entropy(x.half(), torch.softmax(x, -1)),
    lambda self, x: functional.scaled_dot_product_attention(x[None], x[None], x[None]),
    lambda self, x: torch.sort(x)[0], lambda self, x: functional.one_hot(x.argmax(1), 6),
    lambda self, x: torch.full_like(x, 2.0).fill_(1.0) + torch.ones(6),
    lambda self, x: {"a": x, "b": [3, None]}]


@pytest.mark.parametrize("forward", ACCEPTED)
def test_what_the_compiler_takes_is_not_refused(forward):
    compile_for_inference(forward)


def test_outputs_have_the_types_and_shapes_of_the_compiled_ones():
    """Seen for this model: micro-batches of float16 [2, 6], and outputs of these types."""
    def forward(self, x, target):
        out, loss = cross_entropy(self, x, target)
        return {"out": out, "more": [target.long(), out.argmax(-1), out.float()]}, loss

    model = Model(forward).half()
    opts = poptorch.Options().replicationFactor(2).outputMode(poptorch.OutputMode.All)
    opts.Training.gradientAccumulation(2)
    opts.anchorTensor("gradient", "Gradient___first.weight")
    executor = poptorch.trainingModel(model, opts)
    result, loss = executor(torch.randn(8, 6).half(), torch.zeros(8, dtype=torch.int64))
    types = [(t.dtype, tuple(t.shape)) for t in (
        result["out"], *result["more"], loss, executor.getAnchoredTensor("gradient"))]
    assert types == [(torch.float16, (8, 3)), (torch.int32, (8, )), (torch.int32, (8, )),
                     (torch.float32, (8, 3)), (torch.float32, (4, )), (torch.float16, (12, 6))]
    assert copy.deepcopy(model).first.weight.dtype == torch.float16
