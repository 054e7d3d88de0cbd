"""A short training run follows eager PyTorch step by step.

A byte-level language model (embedding, two layers, head) learns the source of a module of the standard
library three times from one start: with ours in float32, with the plain formula in float32, and with
the plain formula in float64. A gradient that is off by a little bends the curve more with every step,
so after 30 steps small errors have grown large. The float64 run says which of the two float32 runs
strays: ours may be at most a few times as far from it as eager PyTorch is.
"""

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tightrope
from helpers import generator

STEPS, BATCH, CONTEXT, WIDTH, V = 30, 64, 4, 48, 256
TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()[:20000]))


def batches():
    starts = torch.randint(len(TEXT) - CONTEXT, (STEPS, BATCH), generator=generator(1))
    for start in starts:
        window = start[:, None] + torch.arange(CONTEXT + 1)
        target = TEXT[window[:, -1]].clone()
        target[::7] = -100
        yield TEXT[window[:, :-1]], target


def model(dtype):
    torch.manual_seed(0)
    body = torch.nn.Sequential(
        torch.nn.Embedding(V, WIDTH),
        torch.nn.Flatten(),
        torch.nn.Linear(CONTEXT * WIDTH, WIDTH),
        torch.nn.GELU(),
    )
    head = torch.nn.Linear(WIDTH, V)
    head.weight.data *= 4  # so that the squared error, whose gradient is p times a difference, learns too
    return body.to(dtype), head.to(dtype)


def eager(hidden, head, target, *, balance=0.0, reality="cross_entropy", creativity="entropy"):
    """The loss as a user would write it."""
    kept = target != -100
    log_p = torch.log_softmax(head(hidden)[kept], -1)
    p = log_p.exp()
    one_hot = F.one_hot(target[kept], V).to(p.dtype)
    real = -(one_hot * log_p).sum(-1)
    if reality == "squared_error":
        real = 0.5 * (p - one_hot).square().sum(-1)
    creative = (p * log_p).sum(-1) if creativity == "entropy" else p.square().sum(-1).log()
    return ((1 - balance) * real + balance * creative).mean()


def ours(hidden, head, target, **options):
    return tightrope.linear_reality_creativity_loss(
        hidden, head.weight, target, head.bias, workspace_mb=0.02, **options
    )


def curve(loss_of, dtype, optimizer, **options):
    body, head = model(dtype)
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = optimizer(parameters)
    losses = []
    for context, target in batches():
        optimizer.zero_grad()
        loss = loss_of(body(context), head, target, **options)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    final = torch.cat([p.detach().double().flatten() for p in parameters])
    return torch.tensor(losses, dtype=torch.float64), final


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
}
LOSSES = {
    "cross_entropy": {},
    "balanced": {"balance": 0.3},
    "squared_error": {"reality": "squared_error", "creativity": "collision", "balance": 0.2},
}


@pytest.mark.parametrize("strategy", ["chunked", "streaming", None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_curve(loss, optimizer, strategy):
    options, make = LOSSES[loss], OPTIMIZERS[optimizer]
    exact, exact_end = curve(eager, torch.float64, make, **options)
    usual, usual_end = curve(eager, torch.float32, make, **options)
    actual, actual_end = curve(ours, torch.float32, make, strategy=strategy, **options)
    assert actual[-1] < actual[0] - 0.01, "nothing was learned, so nothing was tested"
    # The running maximum, since two curves may cross by chance.
    allowed = 4 * (usual - exact).abs().cummax(0).values + 2e-6 * exact.abs().max()
    error = (actual - exact).abs()
    assert (error <= allowed).all(), f"step {(error > allowed).nonzero()[0].item()}: {error.max():.2e}"
    assert (actual_end - exact_end).norm() <= 4 * (usual_end - exact_end).norm() + 1e-6
