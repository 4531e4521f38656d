"""Detect losses, gradients and weights that are not finite, explain them, and skip the step."""
from __future__ import annotations

import math
from typing import Iterable, List, Optional, Tuple

import torch
from tqdm import tqdm

from ipu_options import poptorch
from ipu_options.options import scales_loss_itself, watched_gradient
from qa.model.parallelize import weights_of
from qa.model.pretrained import all_finite
from qa.run.checkpoint import Checkpoints
from qa.run.state import TrainingState
from qa.settings import LARGEST_RATE, TrainSettings
from runtime import processes
from runtime.errors import RunError

# Above this the scaled loss itself, which begins near ln(384) = 6, overflows in float16.
_LARGEST_SCALING = 8192.0


class NonfiniteGuard:
    """Checks the numbers of every training step, and acts as --on_nonfinite says."""

    def __init__(self, settings: TrainSettings, checkpoints: Checkpoints, state: TrainingState,
                 options: "poptorch.Options"):
        self.settings, self.checkpoints = settings, checkpoints
        self.state, self.options = state, options
        self._skipped_step: Optional[int] = None  # the last one
        self._checkpoint_step: Optional[int] = None  # of the checkpoint that was gone back to

    def check_or_go_back(self, loss: float, learning_rate: float, look_at_weights: bool) -> bool:
        """Return whether the loss, the watched gradient and the weights after a step are finite.

        look_at_weights: whether to read the weights, a transfer from the device. With
        --on_nonfinite skip, weights and optimizer are reset to the last checkpoint. Raises RunError
        with stop, without a checkpoint, or if it is not just one bad batch.
        """
        settings, state = self.settings, self.state
        # With synthetic data the loss is memory that PopTorch has never written
        # (PoplarExecutable.cpp, run), and PopART crashes where weights or states are read, because
        # their host buffers do not exist (popart, devicex.cpp, getD2hWeightData).
        if settings.synthetic_data:
            return False
        tensors = watched_gradient(self.options, state.executor)
        if look_at_weights:
            tensors.update(weights_of(state.model))
        # Each process sees its own gradients.
        bad_tensor = next(filter(None, processes.share(find_nonfinite(tensors.items()))), None)
        if bad_tensor is None and math.isfinite(loss):
            return True
        why = explain_nonfinite(step=state.step, loss=loss, earlier_losses=state.losses,
                                learning_rate=learning_rate,
                                loss_scaling=None if scales_loss_itself(self.options)
                                else settings.loss_scaling,
                                precision=settings.precision, bad_tensor=bad_tensor)
        self.checkpoints.note("nonfinite", state.step, why=why)
        if settings.on_nonfinite == "stop" or self._skipped_step == state.step - 1:
            raise RunError(why)
        checkpoint = self.checkpoints.newest_of_run()
        if checkpoint.step == self._checkpoint_step:
            raise RunError(
                f"{why}; it is not one bad batch, for the run had already gone back to the weights "
                f"of step {checkpoint.step} and come to this again")
        state.go_back(checkpoint)
        self._skipped_step, self._checkpoint_step = state.step, checkpoint.step
        tqdm.write(f"warning: {why}; going on from the weights of step {checkpoint.step}")
        return False


def find_nonfinite(tensors: Iterable[Tuple[str, torch.Tensor]]) -> Optional[str]:
    """Return the name of the first of (name, tensor) pairs with an infinity or a NaN, or None."""
    return next((name for name, tensor in tensors
                 if tensor.is_floating_point() and not all_finite(tensor)), None)


def explain_nonfinite(*, step: int, loss: float, earlier_losses: List[float], learning_rate: float,
                      loss_scaling: Optional[float], precision: str,
                      bad_tensor: Optional[str] = None) -> str:
    """Return a line on a loss, gradient or weight that is not finite: overflow, or divergence?

    The losses before it rise in a run that diverges, whereas an overflow happens while they are
    steady. Beyond 65,504 a float16 number becomes NaN on an IPU (options.py, nanOverflowMode).

    loss_scaling: None if the device adjusts it. bad_tensor: of `find_nonfinite`, a gradient
    ("Gradient___" and the name of a parameter) or a weight; required if the loss is finite.
    """
    sound_forward = math.isfinite(loss)
    bad_gradient = sound_forward and bad_tensor.startswith("Gradient___")
    what = f"the loss is {loss}"
    if bad_gradient:
        what = (f"the gradient of {bad_tensor[len('Gradient___'):]} is not finite "
                f"(the loss was {loss:.4g})")
    elif sound_forward:
        what = f"{bad_tensor} is not finite after the update (the loss was {loss:.4g})"
    automatic = loss_scaling is None
    facts = (f"step {step}: {what}, with learning rate {learning_rate:.3g}, "
             f"{'automatic ' * automatic}loss scaling{'' if automatic else f' {loss_scaling:g}'}, "
             f"{precision}")
    if learning_rate > LARGEST_RATE:
        return (f"{facts}: such a learning rate destroys the model; fine-tuning takes 1e-05 to "
                "0.0001, try --learning_rate 3e-05")
    smaller_rate = f"try --learning_rate {learning_rate / 3:.2g} or a larger --warmup_ratio"
    if _rising(earlier_losses):
        lowest, last = min(earlier_losses), earlier_losses[-1]
        return (f"{facts}: the run diverged, its loss had risen from {lowest:.3g} to {last:.3g}; "
                f"{smaller_rate}")
    # Loss scaling can make the gradients overflow in any precision.
    if precision != "float16" and not (bad_gradient and not automatic and loss_scaling > 1):
        return (f"{facts}: one update was too large, the losses before it were steady; "
                f"{smaller_rate}, and look at this step's data")
    overflow = f"{facts}: {precision} overflowed, the losses before it were steady; try "
    if automatic:
        return overflow + "--auto_loss_scaling false, or --precision float32"
    if loss_scaling <= 1:
        return overflow + "--precision float32"
    overflow += f"--loss_scaling {max(1.0, min(loss_scaling / 8, _LARGEST_SCALING)):g}"
    if not sound_forward:
        overflow += (", or --precision float32 if the same step stops again: "
                     "then the forward pass overflowed, not the gradients")
    return overflow


def _rising(losses: List[float]) -> bool:
    """Return whether the mean of the last eighth exceeds 1.5 times the lowest of any as long."""
    width = max(1, len(losses) // 8)
    means = [
        sum(losses[first:first + width]) / width for first in range(len(losses) - width + 1)]
    return bool(means) and means[-1] > 1.5 * min(means)
