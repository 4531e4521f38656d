"""A float16 model on the host learns as one in exact float16 does, and better than in bfloat16."""
import copy

import pytest
import torch
from torch.nn import functional

import poptorch_host as poptorch
from tests.reference.half import Float16

STEPS, RATE, SCALING = 15, 0.3, 1024.0


class Encoder(torch.nn.Module):
    """An encoder layer over an embedding; its loss is float32."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(40, 32)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(32) for _ in range(2))
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.wide, self.narrow = torch.nn.Linear(32, 128), torch.nn.Linear(128, 32)
        self.head = torch.nn.Linear(32, 40)

    def forward(self, tokens, target):
        hidden = self.embedding(tokens)
        query, key, value = self.qkv(self.norms[0](hidden)).chunk(3, dim=-1)
        scores = torch.bmm(query, key.transpose(1, 2)) / 32 ** 0.5
        hidden = hidden + self.out(torch.bmm(torch.softmax(scores, dim=-1), value))
        hidden = hidden + self.narrow(functional.gelu(self.wide(self.norms[1](hidden))))
        loss = functional.cross_entropy(self.head(hidden).float().flatten(0, 1), target.flatten())
        return poptorch.identity_loss(loss, "none")


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (2, 4, 12), generator=generator) for _ in range(STEPS)]


def train_plainly(model, kind):
    """Losses, and weights in float32; the model runs in `kind` with copies of them."""
    masters = [p.detach().clone() for p in model.parameters()]
    model, losses = copy.deepcopy(model).to(kind), []
    for tokens, target in batches():
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters):
                p.copy_(master)
        with Float16():
            loss = model(tokens, target)
            gradients = torch.autograd.grad(loss * SCALING, list(model.parameters()))
        losses.append(loss.item())
        for master, gradient in zip(masters, gradients):
            master -= RATE * gradient.float() / SCALING
    return torch.tensor(losses), torch.cat([master.flatten() for master in masters])


def train_on_the_host(model):
    model = copy.deepcopy(model).half()
    optimizer = poptorch.optim.SGD(model.parameters(), lr=RATE, loss_scaling=SCALING)
    executor = poptorch.trainingModel(model, poptorch.Options(), optimizer)
    losses = torch.stack([executor(*batch) for batch in batches()])
    masters = optimizer.state_dict()["ipu_state"]
    return losses, torch.cat([
        masters[f"Master___{name}"].flatten() for name, _ in model.named_parameters()])


@pytest.fixture(scope="module")
def trained():
    """Losses and weights from the same float16 start: exactly, in bfloat16, on the host."""
    torch.manual_seed(0)
    model = Encoder().half().float()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    return start, train_plainly(model, torch.float16), train_plainly(
        model, torch.bfloat16), train_on_the_host(model)


def test_losses_and_weights_are_nearer_to_exact_float16_than_bfloat16s_are(trained):
    start, (losses, weights), (losses_bf16, weights_bf16), (losses_host, weights_host) = trained
    assert losses[-1] < losses[0]
    update = (weights - start).norm()
    assert (weights_host - weights).norm() < 0.01 * update
    assert 4 * (weights_host - weights).norm() < (weights_bf16 - weights).norm()
    assert 4 * (losses_host - losses).norm() < (losses_bf16 - losses).norm()


def test_the_reference_rounds_each_result_once_and_sums_in_float32():
    ones = torch.full((1, 4096), 1.0, dtype=torch.float16)
    small = torch.full((4096, 1), 1 / 2048, dtype=torch.float16)
    with Float16():
        assert (ones @ small).item() == 2.0
        third = torch.tensor(1.0, dtype=torch.float16).div_(3)
    assert third.item() == torch.tensor(1 / 3).half().item() and third.dtype == torch.float16


def test_multiplications_in_bfloat16_are_asked_for(monkeypatch, trained):
    """Where the processor or torch lacks them, they stay in float32."""
    _, (losses, _), (losses_bf16, _), _ = trained
    torch.manual_seed(0)
    model = Encoder().half().float()
    monkeypatch.setenv("POPTORCH_HOST_HALF", "bfloat16")
    losses_faster, _ = train_on_the_host(model)
    assert (losses_faster - losses).norm() < (losses_bf16 - losses).norm()
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setenv("POPTORCH_HOST_HALF", "float64")
    with pytest.raises(poptorch.Error, match="bfloat16 or float32, not 'float64'"):
        train_on_the_host(model)
