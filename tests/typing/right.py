"""Code of users that must pass a type checker. `make lint` checks it; nothing runs it."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import tightrope
from tightrope import RowStats, TopKTarget

hidden, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
logits = hidden @ weight.T
target = torch.tensor([0, 1, 2])
soft = torch.softmax(torch.randn(3, 5), -1)
topk = TopKTarget(torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.rand(3, 2))
balance = torch.nn.Parameter(torch.tensor(0.1))


# The loss alone, or the pair, as return_stats says.
def losses(return_stats: bool) -> None:
    loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, balance=0.1)
    assert_type(loss, Tensor)
    loss.backward()
    assert_type(
        tightrope.linear_reality_creativity_loss(hidden, weight, target, return_stats=True),
        tuple[Tensor, RowStats],
    )
    assert_type(
        tightrope.linear_reality_creativity_loss(hidden, weight, target, return_stats=return_stats),
        Tensor | tuple[Tensor, RowStats],
    )
    assert_type(tightrope.reality_creativity_loss(logits, target, return_stats=False), Tensor)
    assert_type(tightrope.reality_creativity_loss(logits, target, return_stats=True), tuple[Tensor, RowStats])


# Every form of an argument.
def forms() -> None:
    for form in (target, soft, topk):
        tightrope.linear_reality_creativity_loss(
            hidden, weight, form, bias, balance=balance, row_weight=torch.ones(3), normalizer=torch.tensor(3)
        ).backward()
    tightrope.linear_reality_creativity_loss(
        hidden,
        weight,
        target,
        reality="squared_error",
        creativity="collision",
        reduction="none",
        softcap=30,
        logit_scale=2,
        z_loss=1e-4,
        logit_l2=0,
        label_smoothing=0.1,
        ignore_index=-1,
        shift=0,
        skip_ignored=False,
        workspace_mb=64,
        backend="eager",
        strategy="streaming",
    ).sum().backward()


def statistics() -> None:
    stats = tightrope.linear_vocab_stats(hidden, weight, target, bias, shift=1)
    assert_type(stats, RowStats)
    assert_type(stats.entropy, Tensor)
    lse, entropy, *_ = stats
    assert_type(lse, Tensor)
    assert_type(entropy, Tensor)


def of_ones_own() -> None:
    def loss_fn(stats: RowStats, weight: Tensor) -> Tensor:
        return weight * stats.lse

    loss = tightrope.linear_vocab_loss(hidden, weight, target, loss_fn, row_args=[torch.ones(3)])
    assert_type(loss, Tensor)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = tightrope.LinearRealityCreativityLoss(balance=0.1, shift=1, reduction="sum")
        self.logits_loss = tightrope.RealityCreativityLoss(balance=balance, label_smoothing=0.1)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        assert_type(self.loss(hidden, weight, target), Tensor)
        pair = tightrope.RealityCreativityLoss(return_stats=True)(logits, target)
        assert_type(pair, tuple[Tensor, RowStats])
        return self.loss(hidden, weight, target, bias, balance=0.2) + self.logits_loss(logits, target)
