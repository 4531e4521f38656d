"""One small model in several variants, each run on the device once, and in plain PyTorch.

The reference is Hugging Face's model in float32 on the processor, on each window by itself, and
torch.optim.AdamW. The optimizer's epsilon is 1, so that an update is nearly proportional to the
gradient. With the usual one, the first update of Adam is the sign of the gradient, which says
nothing where the gradient is 0 except for rounding.
"""
from dataclasses import dataclass, fields
from typing import Dict, List, Tuple

import torch
from transformers.activations import ACT2FN

from ipu_options import poptorch
from ipu_options.config import IPUConfig, inference_pipeline, training_pipeline
from ipu_options.options import mean_loss, training_options, watched_gradient
from qa.answers.inference import InferencePipeline
from qa.data.rows import InferenceRows, TrainingRows
from qa.model.optimizer import make_optimizer
from qa.model.parallelize import LAST_GRADIENT, parallelize, weights_of
from qa.model.roberta import RobertaForSpans
from qa.settings import TrainSettings
from tests.model.test_gradients import CONFIG, LENGTHS, plain_gradient, plain_model, windows_in
from tests.reference.synthetic_windows import SyntheticWindows

BASE = dict(
    layers_per_ipu=[1, 1], gradient_accumulation_steps=3, replication_factor=1,
    inference_device_iterations=2, micro_batch_size=2, eval_micro_batch_size=2, max_seq_length=64,
    max_windows_per_row=4, num_train_epochs=1, learning_rate=1.0, adam_epsilon=1.0, loss_scaling=1,
    precision="float32")
HALF = dict(precision="float16", loss_scaling=64)
# Together they have each option of ipu_options/options.py on and off, and each choice.
VARIANTS = {
    "float32": {},
    "float32, packed, 2 replicas, RTS": dict(pack=True, replication_factor=2),
    "float32, 2 replicas, no RTS": dict(replication_factor=2, replicated_tensor_sharding=False),
    "float16": HALF,
    "float16, packed, 2 replicas, RTS": dict(HALF, pack=True, replication_factor=2),
    "float16, packed, 2 replicas, no RTS, state off chip": dict(
        HALF, pack=True, replication_factor=2, replicated_tensor_sharding=False,
        optimizer_state_offchip=True),
    "float16, half first moment, embedding in 2 parts, no checkpoints": dict(
        HALF, enable_half_first_order_momentum=True, embedding_serialization_factor=2,
        recompute_checkpoint_every_layer=False, matmul_proportion=[0.2, 0.4],
        stochastic_rounding=False),
    "float32, 2 updates a call, sum of losses, float32 partials": dict(
        device_iterations=2, output_mode="sum", enable_half_partials=False),
    "float16, LAMB, automatic loss scaling, last losses": dict(
        HALF, optimizer="lamb", auto_loss_scaling=True, output_mode="final", learning_rate=0.01),
    "float16, other betas, default losses": dict(
        HALF, output_mode="default", adam_beta1=0.8, adam_beta2=0.99, weight_decay=0.0),
}
# Relative errors that are allowed. The GELU of an IPU is the tanh approximation (poptorch,
# ActivationOps.cpp), which differs from the exact one by up to 5e-4. float16 rounds to 5e-4, some
# dozen times in a row, and half partials round within each multiplication.
TOLERANCE = {"float32": 5e-3, "float16": 5e-2}


@dataclass
class Seen:
    """What the device gave for a variant. Tensors are float32; gradients are without the scaling.

    options: of PopTorch, by name, for training and inference. loss: the mean of the losses that one
    training call returned. update: the change of each weight by that call. watched: gradient of
    LAST_GRADIENT, [micro-batches, ...]. logits: (start, end) of each window before training.
    """

    settings: TrainSettings
    ipu_config: IPUConfig
    rows: TrainingRows
    options: Dict[str, object]
    loss: float
    update: Dict[str, torch.Tensor]
    watched: torch.Tensor
    logits: List[Tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Plain:
    """The same of plain PyTorch."""

    loss: float
    update: Dict[str, torch.Tensor]
    watched: torch.Tensor
    logits: List[Tuple[torch.Tensor, torch.Tensor]]


def settings_of(**changes):
    """Return (TrainSettings, IPUConfig) with the values of BASE and `changes`."""
    values = {**BASE, **changes}
    ours = {f.name for f in fields(IPUConfig)}
    return (TrainSettings(**{name: value for name, value in values.items() if name not in ours}),
            IPUConfig(**{name: value for name, value in values.items() if name in ours}))


def initial_model():
    """Return a new model, always with the same weights."""
    torch.manual_seed(0)
    return RobertaForSpans(CONFIG)


def make_training(settings, config, layout, windows, model=None, watch=True):
    """Return (rows, model, optimizer, options, training model), made as train.py makes them."""
    rows = TrainingRows.of_run(settings, config, (model or initial_model()).config, windows)
    model = (model or initial_model()).train()
    parallelize(model, layout,
                recompute_checkpoint_every_layer=config.recompute_checkpoint_every_layer,
                embedding_serialization_factor=config.embedding_serialization_factor)
    if settings.precision == "float16":
        model.half()
    optimizer = make_optimizer(model, settings, config)
    options = training_options(config, settings, seed=1, watched=LAST_GRADIENT, watch=watch)
    return rows, model, optimizer, options, poptorch.trainingModel(model, options, optimizer)


def windows_for(settings, config):
    """Return windows of which the first call has an empty row, or if packed several rows."""
    rows = (settings.micro_batch_size * config.gradient_accumulation_steps *
            config.replication_factor * config.device_iterations)
    lengths = LENGTHS if settings.pack else LENGTHS[:rows - 1]
    return SyntheticWindows(lengths, seed=4)


def run(variant):
    """Return what the device gives for VARIANTS[variant]."""
    settings, ipu_config = settings_of(**VARIANTS[variant])
    pipeline = training_pipeline(ipu_config, CONFIG.num_hidden_layers, "pod4")
    windows = windows_for(settings, pipeline.config)
    answering = InferencePipeline(
        initial_model(), inference_pipeline(ipu_config, CONFIG.num_hidden_layers, "pod4"), settings)
    logits = logits_of(answering, windows, settings)

    rows, model, _, options, training_model = make_training(
        settings, pipeline.config, pipeline.layout, windows)
    before = {name: tensor.detach().float().clone() for name, tensor in weights_of(model).items()}
    loss = mean_loss(training_model(**rows.first_batch()), pipeline.config)
    (watched,) = watched_gradient(options, training_model).values()
    training_model.detachFromDevice()  # frees the IPUs, and copies the weights
    update = {name: tensor.detach().float() - before[name]
              for name, tensor in weights_of(model).items()}
    set_options = {**answering.options.toDict(), **training_model.options.toDict()}
    watched = watched.float().reshape(-1, CONFIG.hidden_size) / settings.loss_scaling
    return Seen(settings, pipeline.config, rows, set_options, loss, update, watched, logits)


def logits_of(answering, windows, settings):
    """Return the (start, end) logits of each window from an InferencePipeline."""
    rows = InferenceRows(windows, row_length=settings.max_seq_length,
                         max_windows_per_row=settings.row_capacity(), pad_token_id=1,
                         rows_per_step=answering.rows_per_step)
    found = {}
    for first in range(0, len(rows), answering.rows_per_step):
        indices = range(first, first + answering.rows_per_step)
        starts, ends = answering.inference_model(**rows.__getitems__(indices))
        for place, index in enumerate(indices):
            for window, begin, count in rows.slices(index):
                found[window] = tuple(logits[place, begin:begin + count].float().clone()
                                      for logits in (starts, ends))
    answering.detach()
    return [found[window] for window in range(len(windows))]


def run_plainly(seen):
    """Return what plain PyTorch gives for what the device has run."""
    settings, config, rows = seen.settings, seen.ipu_config, seen.rows
    windows, plain, initial = rows.windows, plain_model(initial_model()), initial_model()
    groups = [{"params": [p for p in plain.parameters() if (p.dim() > 1) == matrices],
               "weight_decay": settings.weight_decay * matrices} for matrices in (True, False)]
    kind = {"adamw": torch.optim.AdamW, "lamb": FirstStepOfLamb}[settings.optimizer]
    optimizer = kind(groups, lr=settings.learning_rate, eps=settings.adam_epsilon,
                     betas=(settings.adam_beta1, settings.adam_beta2))
    losses, watched, size = [], [], rows.rows_per_step // config.device_iterations
    for first in range(0, rows.rows_per_step, size):
        chosen = windows_in(rows, range(first, first + size), windows)
        returned, weight = chosen, 1 / len(chosen)
        if config.output_mode in ("final", "default"):  # of each replica's last micro-batch
            last = settings.micro_batch_size * config.replication_factor
            returned = windows_in(rows, range(first + size - last, first + size), windows)
            weight *= size / last
        losses.append(weight * sum(plain_losses(plain, windows, returned)))
        gradients = plain_gradient(plain, windows, chosen)
        watched.append(gradients[LAST_GRADIENT])
        for name, parameter in plain.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
    before = initial.state_dict()
    update = {name: tensor - before[name] for name, tensor in plain.state_dict().items()}
    return Plain(sum(losses) / len(losses), update, watched[0],
                 plain_logits(initial, windows, range(len(windows))))


class FirstStepOfLamb(torch.optim.Optimizer):
    """The first step of LAMB (You et al. 2020), after whose bias correction m = g and v = g^2.

    Where a weight or its change is 0, PopART does not scale (popart, popx/op/adamvarupdatex.cpp).
    """

    def __init__(self, groups, lr, eps, betas):
        super().__init__(groups, dict(lr=lr, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                change = (weight.grad / (weight.grad.abs() + group["eps"]) +
                          group["weight_decay"] * weight)
                trust = weight.norm() / change.norm() if weight.norm() * change.norm() else 1.0
                weight -= group["lr"] * trust * change


def tanh_logits(windows):
    """Return what `plain_logits` does for the initial model with the tanh approximation of GELU."""
    model = initial_model()
    for layer in model.roberta.encoder.layer:
        layer.intermediate.intermediate_act_fn = ACT2FN["gelu_pytorch_tanh"]
    return plain_logits(model, windows, range(len(windows)))


def plain_logits(model, windows, chosen):
    """Return the (start, end) logits of Hugging Face's model on each window by itself.

    model: one with the same weights.
    """
    plain, found = plain_model(model).eval(), []
    for mine, its in zip(model.roberta.encoder.layer, plain.roberta.encoder.layer):
        its.intermediate.intermediate_act_fn = mine.intermediate.intermediate_act_fn
    with torch.no_grad():
        for window in chosen:
            out = plain(torch.from_numpy(windows.input_ids(window).astype("int64")).unsqueeze(0))
            found.append((out.start_logits[0], out.end_logits[0]))
    return found


def plain_losses(model, windows, chosen):
    """Return the loss of Hugging Face's model on each of the chosen windows."""
    return [
        -(start.log_softmax(0)[int(windows.start_position[window])] +
          end.log_softmax(0)[int(windows.end_position[window])]).item() / 2
        for window, (start, end) in zip(chosen, plain_logits(model, windows, chosen))]


def distance(found, expected):
    """Return the norm of the difference of two lists of tensors, relative to the second's norm."""
    found, expected = (torch.cat([tensor.detach().flatten() for tensor in tensors])
                       for tensors in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()
