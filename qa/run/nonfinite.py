"""Numbers gone wrong: finding a loss, gradient or weight that is not finite, explaining it, and
going on without the step.
"""
from __future__ import annotations

import math
from typing import Dict, Iterable, List, Optional, Tuple

import torch
from tqdm import tqdm

from ipu_options.errors import RunError
from qa.model.parallelize import set_weights
from qa.run.checkpoint import Checkpoints, Training
from qa.settings import TrainSettings


class NonfiniteGuard:
    """Looks at the numbers of every training step, and acts as --on_nonfinite says where one is not
    finite.
    """

    def __init__(self, settings: TrainSettings, checkpoints: Checkpoints, training: Training):
        self.settings, self.checkpoints, self.training = settings, checkpoints, training
        self._passed_over: Optional[int] = None  # the last step that was passed over

    def passes(self, step: int, loss: float, learning_rate: float, earlier_losses: List[float],
               *tensors: Dict[str, torch.Tensor],
               ) -> bool:
        """Whether the loss and all `tensors`, gradients and weights by name, are finite.

        Where they are not and --on_nonfinite is skip, the run is put back to its last checkpoint.
        Raises RunError where it is stop, where there is no checkpoint, and for the second step in a
        row, since two are not one bad batch.
        """
        settings = self.settings
        bad_tensor = find_nonfinite(item for group in tensors for item in group.items())
        if bad_tensor is None and math.isfinite(loss):
            return True
        why = explain_nonfinite(step=step, loss=loss, earlier_losses=earlier_losses,
                                learning_rate=learning_rate, loss_scaling=settings.loss_scaling,
                                precision=settings.precision, bad_tensor=bad_tensor)
        if settings.on_nonfinite == "stop" or self._passed_over == step - 1:
            raise RunError(why)
        back = self.checkpoints.go_back(self.training, set_weights)
        self._passed_over = step
        tqdm.write(f"warning: {why}; going on from the weights of step {back.step}")
        return False


def find_nonfinite(tensors: Iterable[Tuple[str, torch.Tensor]]) -> Optional[str]:
    """The name of the first floating-point tensor of (name, tensor) pairs with an infinity or a NaN
    in it, or None.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return None


def explain_nonfinite(*, step: int, loss: float, earlier_losses: List[float], learning_rate: float,
                      loss_scaling: float, precision: str, bad_tensor: Optional[str] = None) -> str:
    """One line on numbers gone wrong in `step`: whether they overflowed or the run diverged, and
    what to try.

    The device has updated the weights by the time the host sees the loss: one that is not finite
    has spoilt them all, and its cause is in this step's forward pass or in the step before. What
    tells overflow from divergence is therefore the finite losses before it, in order: a run that
    diverges shows it there, while an overflow (float16 ends at 65,504) strikes a run whose losses
    were steady.  bad_tensor: the gradient ("Gradient___" and a parameter) or the weight that
    `find_nonfinite` found, which a finite loss needs: then the forward pass was sound, and the
    gradients or their update were not.
    """
    sound_forward = math.isfinite(loss)
    bad_gradient = sound_forward and bad_tensor.startswith("Gradient___")
    what = f"the loss is {loss}"
    if bad_gradient:
        what = f"the gradient of {bad_tensor[len('Gradient___'):]} is not finite (the loss was {loss:.4g})"
    elif sound_forward:
        what = f"{bad_tensor} is not finite after the update (the loss was {loss:.4g})"
    facts = f"step {step}: {what}, with learning rate {learning_rate:.3g}, loss scaling {loss_scaling:g}, {precision}"
    smaller_rate = f"try --learning_rate {learning_rate / 3:.2g} or a larger --warmup_ratio"
    if _rising(earlier_losses):
        lowest, last = min(earlier_losses), earlier_losses[-1]
        return f"{facts}: the run diverged, its loss had risen from {lowest:.3g} to {last:.3g}; {smaller_rate}"
    if precision != "float16" and not (bad_gradient and loss_scaling
                                       > 1):  # scaling may be too much for any precision
        return f"{facts}: one update was too large, the losses before it were steady; {smaller_rate}, and look at this step's data"
    overflow = f"{facts}: {precision} overflowed, the losses before it were steady; try "
    if loss_scaling <= 1:
        return overflow + "--precision float32"
    overflow += f"--loss_scaling {max(1.0, loss_scaling / 8):g}"
    if not sound_forward:
        overflow += ", or --precision float32 if the same step stops again: then the forward pass overflowed, not the gradients"
    return overflow


def _rising(losses: List[float]) -> bool:
    """Whether the last eighth of `losses` has a mean half as high again as the lowest mean of as
    many in a row.
    """
    width = max(1, len(losses) // 8)
    means = [sum(losses[i:i + width]) / width for i in range(len(losses) - width + 1)]
    return bool(means) and means[-1] > 1.5 * min(means)
