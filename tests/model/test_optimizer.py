"""What PopTorch is told about the optimizer."""
import pytest
import torch

from ipu_options.config import IPUConfig
from qa.model.optimizer import make_optimizer
from qa.settings import TrainSettings


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_only_what_the_run_changes_is_a_variable_on_the_device(kind):
    optimizer = make_optimizer(torch.nn.Linear(3, 2), TrainSettings(optimizer=kind), IPUConfig())
    marked = optimizer.variable_attrs
    assert not marked.isConstant("lr")  # the schedule changes it in every step
    assert all(map(marked.isConstant, ("betas", "eps", "weight_decay")))
