"""One small model in several variants, each run on the device once, and in plain PyTorch.

The reference is Hugging Face's model in float32 on the processor, on each window by itself, and
torch.optim.AdamW. The optimizer's epsilon is 1, so that an update is nearly proportional to the
gradient. With the usual one, the first update of Adam is the sign of the gradient, which says
nothing where the gradient is 0 except for rounding.
"""
from dataclasses import fields
from types import SimpleNamespace

import torch
from transformers.activations import ACT2FN

from ipu_options import poptorch
from ipu_options.config import IPUConfig, inference_pipeline, training_pipeline
from ipu_options.options import training_options, watched_gradient
from qa.answers.inference import InferencePipeline
from qa.data.rows import InferenceRows, TrainingRows
from qa.families import row_kind
from qa.model.optimizer import make_optimizer
from qa.model.parallelize import parallelize, parameter_to_watch, weights_of
from qa.model.roberta import RobertaForSpans
from qa.run.progress import mean_loss
from qa.settings import TrainSettings
from tests.model.test_gradients import CONFIG, LENGTHS, plain_gradient, plain_model, windows_in
from tests.reference.synthetic_windows import SyntheticWindows

BASE = dict(
    layers_per_ipu=[1, 1], gradient_accumulation_steps=3, replication_factor=1,
    inference_device_iterations=2, micro_batch_size=2, eval_micro_batch_size=2, max_seq_length=64,
    max_windows_per_row=4, num_train_epochs=1, learning_rate=1.0, adam_epsilon=1.0, loss_scaling=1,
    precision="float32")
HALF = dict(precision="float16", loss_scaling=64)
# Together they have each switch of ipu_options/options.py on and off, and each choice.
VARIANTS = {
    "float32": {},
    "float32, packed, 2 replicas, RTS": dict(pack=True, replication_factor=2),
    "float32, 2 replicas, no RTS": dict(replication_factor=2, replicated_tensor_sharding=False),
    "float16": HALF,
    "float16, packed, 2 replicas, RTS": dict(HALF, pack=True, replication_factor=2),
    "float16, packed, 2 replicas, no RTS, state off chip": dict(
        HALF, pack=True, replication_factor=2, replicated_tensor_sharding=False,
        optimizer_state_offchip=True),
    "float16, half moment, embedding in 2 parts, no checkpoints": dict(
        HALF, enable_half_first_order_momentum=True, embedding_serialization_factor=2,
        recompute_checkpoint_every_layer=False, matmul_proportion=[0.2, 0.4],
        stochastic_rounding=False),
    "float32, 2 updates a call, sum of losses, float32 partials": dict(
        device_iterations=2, output_mode="sum", enable_half_partials=False),
    "float16, LAMB, automatic loss scaling, last losses": dict(
        HALF, optimizer="lamb", auto_loss_scaling=True, output_mode="final", learning_rate=0.01),
    "float32, embedding on IPU 1": dict(
        embedding_ipu=1, gradient_accumulation_steps=7, inference_device_iterations=4),
    "float16, other betas, default losses": dict(
        HALF, output_mode="default", adam_beta1=0.8, adam_beta2=0.99, weight_decay=0.0),
}
# Relative errors that are allowed. The GELU of an IPU is the tanh approximation (poptorch,
# ActivationOps.cpp), which differs from the exact one by up to 5e-4. float16 rounds to 5e-4, some
# dozen times in a row, and half partials round within each multiplication.
TOLERANCE = {"float32": 5e-3, "float16": 5e-2}


def settings_of(**changes):
    """Return (TrainSettings, IPUConfig) with the values of BASE and `changes`."""
    values, ours = {**BASE, **changes}, {f.name for f in fields(IPUConfig)}
    return (TrainSettings(**{name: value for name, value in values.items() if name not in ours}),
            IPUConfig(**{name: value for name, value in values.items() if name in ours}))


def initial_model(config=CONFIG):
    """Return a new model, always with the same weights."""
    torch.manual_seed(0)
    return RobertaForSpans(config)


def make_training(model_config=CONFIG, watch=True, **changes):
    """Return what train.py makes for BASE with `changes`, by the names that it has there.

    Unpacked, one row of the first call is empty.
    """
    settings, ipu_config = settings_of(**changes)
    pipeline = training_pipeline(ipu_config, model_config.num_hidden_layers, "pod4")
    return training_of(settings, pipeline, initial_model(model_config), watch)


def training_of(settings, pipeline, model, watch):
    """Return what `make_training` does, for the training pipeline of any settings and model."""
    config = pipeline.config
    size = (settings.micro_batch_size * config.gradient_accumulation_steps *
            config.replication_factor * config.device_iterations)
    windows = SyntheticWindows(LENGTHS if settings.pack else LENGTHS[:size - 1], seed=4)
    rows = TrainingRows.of_run(settings, config, row_kind(model.config), windows)
    parallelize(model.train(), pipeline.layout,
                recompute_checkpoint_every_layer=config.recompute_checkpoint_every_layer,
                embedding_serialization_factor=config.embedding_serialization_factor)
    if settings.precision == "float16":
        model.half()
    optimizer = make_optimizer(model, settings, config)
    options = training_options(config, settings, seed=1, watched=parameter_to_watch(model),
                               watch=watch)
    return SimpleNamespace(settings=settings, ipu_config=config, rows=rows, model=model,
                           optimizer=optimizer, options=options,
                           training_model=poptorch.trainingModel(model, options, optimizer))


def make_answering(model_config=CONFIG, **changes):
    """Return the InferencePipeline for BASE with `changes`."""
    settings, ipu_config = settings_of(**changes)
    pipeline = inference_pipeline(ipu_config, model_config.num_hidden_layers, "pod4")
    return InferencePipeline(initial_model(model_config), pipeline, settings)


def run(**changes):
    """Return what the device gives for BASE with `changes`: `make_training`'s names, and more.

    logits: (start, end) of each window before training. loss: the mean of the losses that one
    training call returns. update: the change of each weight by that call. watched: gradient of
    parameter_to_watch(), [micro-batches, hidden], without the loss scaling. compiled_with: all
    options.
    """
    made, answering = make_training(**changes), make_answering(**changes)
    logits = logits_of(answering, made.rows.windows)
    before = {name: tensor.float().clone() for name, tensor in weights_of(made.model).items()}
    batch = made.rows.first_batch()
    loss, _ = mean_loss(made.training_model(**batch), batch["loss_weights"], made.ipu_config)
    (watched,) = watched_gradient(made.options, made.training_model).values()
    made.training_model.detachFromDevice()  # frees the IPUs, and copies the weights
    update = {name: tensor.float() - before[name]
              for name, tensor in weights_of(made.model).items()}
    watched = watched.float().reshape(-1, CONFIG.hidden_size) / made.settings.loss_scaling
    compiled_with = {*answering.options.toDict(), *made.training_model.options.toDict()}
    return SimpleNamespace(**vars(made), logits=logits, loss=loss, update=update, watched=watched,
                           compiled_with=compiled_with)


def logits_of(answering, windows):
    """Return the (start, end) logits of each window from an InferencePipeline; frees the IPUs."""
    rows, found = InferenceRows(
        windows, row_length=answering.settings.max_seq_length, pad_token_id=1,
        max_windows_per_row=answering.settings.max_windows_per_row,
        rows_per_step=answering.rows_per_step), {}
    for first in range(0, len(rows), answering.rows_per_step):
        indices = range(first, first + answering.rows_per_step)
        starts, ends = answering.inference_model(**rows.__getitems__(indices))
        for place, index in enumerate(indices):
            for window, begin, count in rows.slices(index):
                found[window] = [logits[place, begin:begin + count].float().clone()
                                 for logits in (starts, ends)]
    answering.detach()
    return [found[window] for window in range(len(windows))]


def run_plainly(result):
    """Return loss, update, watched and logits of what the device has run, in plain PyTorch."""
    settings, config, rows = result.settings, result.ipu_config, result.rows
    windows, plain = rows.windows, plain_model(initial_model())
    logits = plain_logits(plain, windows, range(len(windows)))
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    groups = [{"params": [p for p in plain.parameters() if (p.dim() > 1) == matrices],
               "weight_decay": settings.weight_decay * matrices} for matrices in (True, False)]
    kind = {"adamw": torch.optim.AdamW, "lamb": FirstStepOfLamb}[settings.optimizer]
    optimizer = kind(groups, lr=settings.learning_rate, eps=settings.adam_epsilon,
                     betas=(settings.adam_beta1, settings.adam_beta2))
    losses, watched, size = [], [], rows.rows_per_step // config.device_iterations
    for first in range(0, rows.rows_per_step, size):
        chosen = returned = windows_in(rows, range(first, first + size), windows)
        if config.output_mode in ("final", "default"):  # of each replica's last micro-batch
            last = settings.micro_batch_size * config.replication_factor
            returned = windows_in(rows, range(first + size - last, first + size), windows)
        losses.append(sum(plain_losses(plain, windows, returned)) / len(returned))
        gradients = plain_gradient(plain, windows, chosen)
        watched.append(gradients[parameter_to_watch(plain)])
        for name, parameter in plain.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
    update = {name: tensor - before[name] for name, tensor in plain.state_dict().items()}
    return SimpleNamespace(loss=sum(losses) / len(losses), update=update, watched=watched[0],
                           logits=logits)


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


def plain_logits(plain, windows, chosen, activation="gelu"):
    """Return the (start, end) logits of Hugging Face's model on each window by itself.

    activation: of transformers, in place of the model's own.
    """
    found = []
    for layer in plain.eval().roberta.encoder.layer:
        layer.intermediate.intermediate_act_fn = ACT2FN[activation]
    with torch.no_grad():
        for window in chosen:
            out = plain(torch.from_numpy(windows.input_ids(window).astype("int64")).unsqueeze(0))
            found.append([out.start_logits[0], out.end_logits[0]])
    return found


def plain_losses(plain, windows, chosen):
    """Return the loss of Hugging Face's model on each of the chosen windows."""
    return [
        -(start.log_softmax(0)[int(windows.start_position[window])] +
          end.log_softmax(0)[int(windows.end_position[window])]).item() / 2
        for window, (start, end) in zip(chosen, plain_logits(plain, windows, chosen))]


def distance(found, expected):
    """Return the norm of the difference of two lists of tensors, relative to the second's norm."""
    found, expected = (torch.cat([tensor.detach().flatten() for tensor in tensors])
                       for tensors in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()
