"""The mean loss of a step and the figures of a run, against brute force."""
from __future__ import annotations

import json
import re
import shlex
import time
from collections import defaultdict
from types import SimpleNamespace

import numpy
import pytest
import torch

from ipu_options import poptorch
from ipu_options.config import OUTPUT_MODES, IPUConfig
from qa.data.rows import TrainingRows
from qa.run.checkpoint import Checkpoints, load_checkpoint
from qa.run.progress import Progress, describe_end, describe_rows, mean_loss
from qa.run.state import TrainingState
from qa.settings import TrainSettings
from tests.reference.synthetic_windows import SyntheticWindows


class Loss(torch.nn.Module):
    """A window's loss is the sum of its tokens."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, window_ids, loss_weights):
        slots = torch.arange(1, loss_weights.shape[1] + 1)
        tokens = input_ids[:, None] * (window_ids[:, None] == slots[:, None])
        loss = (tokens.sum(-1) * loss_weights).sum() + 0 * self.unused.sum()
        return poptorch.identity_loss(loss, reduction="none")


@pytest.mark.parametrize("mode", OUTPUT_MODES)
@pytest.mark.parametrize("count", [1, 5, 11, 23])
@pytest.mark.parametrize("updates", [1, 3])
def test_the_loss_of_a_step_is_the_mean_over_the_windows_of_what_is_returned(mode, count, updates):
    """An epoch is up to two updates of 12 rows (2 replicas, 3 micro-batches of 2 rows each)."""
    windows = SyntheticWindows(numpy.random.default_rng(count).integers(8, 30, count))
    rows = TrainingRows(windows, row_length=64, max_windows_per_row=1, pad_token_id=0,
                        micro_batch_size=2, micro_batches_per_update=6, updates_per_step=updates,
                        max_steps=2)
    config = IPUConfig(gradient_accumulation_steps=3, replication_factor=2,
                       device_iterations=updates, output_mode=mode)
    options = poptorch.Options()
    options.deviceIterations(updates)
    options.replicationFactor(2)
    options.Training.gradientAccumulation(3)
    options.outputMode(getattr(poptorch.OutputMode, mode.capitalize()))
    model = Loss()
    executor = poptorch.trainingModel(model, options,
                                      poptorch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(2):
        batch = rows.starting_at(step).first_batch()
        inputs = {name: batch[name] for name in ("input_ids", "window_ids", "loss_weights")}
        loss, windows = mean_loss(executor(**inputs), batch["loss_weights"], config)
        tokens = batch["input_ids"].sum(1).double()
        real = batch["loss_weights"][:, 0] > 0
        if mode == "sum":  # of updates that may have different numbers of windows
            expected = sum(part[which].mean() for part, which in zip(
                tokens.split(12), real.split(12))) / updates
            assert windows == real.sum()
        else:
            rows_returned = slice(-4, None) if mode in ("final", "default") else slice(None)
            expected = tokens[rows_returned][real[rows_returned]].mean()
            assert windows == real[rows_returned].sum()
        assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_figures_begin_with_the_first_batch_and_say_what_a_resumed_run_did(tmp_path, monkeypatch,
                                                                           capsys):
    """The clock advances by 100 s while the loader starts, then by 2 s a step; 8 windows a step."""
    clock, lines = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    windows = SyntheticWindows([20] * 40)
    rows = TrainingRows(windows, row_length=64, max_windows_per_row=1, pad_token_id=0,
                        micro_batch_size=2, micro_batches_per_update=4, epochs=2)
    settings = TrainSettings(output_dir=str(tmp_path), logging_steps=2)
    state = TrainingState(None, None, None, step=4)
    progress = Progress(rows, settings, state, SimpleNamespace(seconds=defaultdict(float)),
                        SimpleNamespace(add=lambda *where, **values: lines.append(values)))
    clock.now += 100
    with progress:
        for state.step in range(5, rows.total_steps + 1):
            progress.timer.seconds["step"] += 2
            clock.now += 2
            state.add_loss(1.0, 8)
            progress.update(1e-3)
    progress.write_summary()
    assert [line["windows_per_second"] for line in lines] == [4.0] * 4
    assert "training: steps 10, epoch 2, steps since resume 6, train loss 1," in (
        capsys.readouterr().out)
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert (results["steps"], results["steps_since_resume"], results["train_loss"]) == (10, 6, 1.0)


def test_logged_losses_are_means_over_windows_also_over_a_resume(tmp_path, monkeypatch):
    """Plain arithmetic over 10 steps, logged every 4; a run saves after 6, and another goes on."""
    losses, windows = [float(2 ** step) for step in range(10)], [8, 8, 8, 3, 8, 8, 8, 1, 8, 2]
    totals = numpy.cumsum([0, *numpy.multiply(losses, windows)])
    counts = numpy.cumsum([0, *windows])
    rows = TrainingRows(SyntheticWindows([20] * 40), row_length=64, max_windows_per_row=1,
                        pad_token_id=0, micro_batch_size=2, micro_batches_per_update=4, epochs=2)
    settings = TrainSettings(output_dir=str(tmp_path), logging_steps=4)
    executor = SimpleNamespace(copyWeightsToHostIfNeeded=lambda: None, rng_state=[1], options=(
        SimpleNamespace(replication_factor=1)), setOptimizer=lambda optimizer: None)
    monkeypatch.setattr("qa.run.state.set_optimizer_state", lambda *state: None)
    checkpoints, lines = Checkpoints(tmp_path, {}, lambda *model: None), []
    for first, last in ((0, 6), (6, 10)):
        state = TrainingState(None, SimpleNamespace(state_dict=dict), executor)
        if first:
            state.restore(load_checkpoint(tmp_path / "checkpoint-6"))
        progress = Progress(rows, settings, state, SimpleNamespace(seconds=defaultdict(float)),
                            SimpleNamespace(add=lambda *where, **values: lines.append(values)))
        with progress:
            for state.step in range(first + 1, last + 1):
                state.add_loss(losses[state.step - 1], windows[state.step - 1])
                progress.update(1e-3)
            # The bar itself takes 53 of a terminal's 80 columns.
            assert re.fullmatch(r"loss [\d.]{6,8}  \d+ windows/s", progress._bar.postfix)
        checkpoints.save(state)
    assert [line["loss"] for line in lines] == pytest.approx(
        [(totals[end] - totals[begin]) / (counts[end] - counts[begin])
         for begin, end in ((0, 4), (4, 8), (8, 10))], rel=1e-12)
    progress.write_summary()
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["train_loss"] == pytest.approx(totals[-1] / counts[-1], rel=1e-12)


@pytest.mark.parametrize("windows, flags, note", [
    (24, {}, ""), (24, {"max_seq_length": 256}, "\nnote: --pack fills the rows"),
    (2, {"max_seq_length": 512, "pack": True},
     "\nnote: --max_seq_length 90 is enough for all windows"),
    (24, {"logging_steps": 12}, "\nnote: --logging_steps 2 shows the loss before the end (for few "
                                "questions: --config small)")])
def test_a_run_says_which_flag_saves_tokens_or_shows_its_loss(windows, flags, note):
    settings = TrainSettings(**{"max_seq_length": 90, "logging_steps": 1, **flags})
    rows = TrainingRows(SyntheticWindows([90] * windows), row_length=settings.max_seq_length,
                        max_windows_per_row=settings.row_capacity(), pad_token_id=0,
                        micro_batch_size=1, micro_batches_per_update=2)
    config = IPUConfig(gradient_accumulation_steps=2, replication_factor=1, device_iterations=1)
    assert describe_rows(rows, 1, settings, config).partition(" epochs")[2] == note


def test_a_single_question_is_counted_in_the_singular():
    rows = TrainingRows(SyntheticWindows([20]), row_length=64, max_windows_per_row=1,
                        pad_token_id=0, micro_batch_size=1, micro_batches_per_update=2)
    config = IPUConfig(gradient_accumulation_steps=2, replication_factor=1, device_iterations=1)
    text = describe_rows(rows, 1, TrainSettings(), config)
    assert text.startswith("1 question, 1 window, 1.00 in a row") and (
        "run: 1 update an epoch; 1 step of 1 update, 1.00 epochs" in text)


@pytest.mark.parametrize("folder", ["output/demo", "my models/it's", "two\nlines", "$HOME;ls"])
def test_the_closing_command_is_one_for_a_shell(folder):
    text = describe_end(12.3, TrainSettings(output_dir=folder))
    command = shlex.split(text.split("ask it: ")[1])
    assert command == ["python", "infer.py", "--checkpoint", folder]
