"""A user's loss that mixes rows gave another number in each strategy, in silence; now it is an error."""

import pytest
import torch

import tightrope
from helpers import class_indices, randn
from tightrope.strategies import own

ROWS, VOCAB, WIDTH = 60, 301, 8
ways = pytest.mark.parametrize("way", ["chunked", "streaming", "none", "logits"])


@pytest.fixture(autouse=True)
def _nothing_was_looked_at(monkeypatch):
    monkeypatch.setattr(own, "_checked", set())


def call(way, loss_fn, **options):
    hidden, weight = randn(ROWS, WIDTH).requires_grad_(), randn(VOCAB, WIDTH, seed=1)
    target = class_indices((ROWS,), VOCAB, ignored=0.2)
    if way == "logits":
        return tightrope.vocab_loss(hidden @ weight.t(), target, loss_fn, **options)
    if way == "none":
        return tightrope.linear_vocab_loss(hidden, weight, target, loss_fn, reduction="none", **options)
    return tightrope.linear_vocab_loss(hidden, weight, target, loss_fn, strategy=way, **options)


MIXING = {
    "one ratio for all rows": lambda s: s.target_log_prob.mean().exp() * torch.ones_like(s.lse),
    "less the mean": lambda s: s.entropy - s.entropy.mean(),
    "over the largest": lambda s: s.target_log_prob / s.target_log_prob.abs().max(),
    "sums so far": lambda s: s.entropy.cumsum(0),
    "backwards": lambda s: s.lse.flip(0),
    "the row before": lambda s: s.lse.roll(1),
    "a softmax over rows": lambda s: s.lse.softmax(0) * s.target_log_prob,
}


@ways
@pytest.mark.parametrize("how", MIXING)
def test_mixing_is_refused(how, way):
    with pytest.raises(ValueError, match=r"loss_fn.*half.*linear_vocab_stats"):
        call(way, MIXING[how])


@ways
def test_what_belongs_to_rows_goes_into_row_args(way):
    """A captured tensor of all rows fitted one strategy only."""
    advantage = torch.ones(ROWS)
    with pytest.raises(ValueError, match=r"row_args|size of tensor") as caught:
        call(way, lambda s: s.lse * advantage[: max(len(s.lse), 31)])
    assert "row_args" in str(caught.value)
    call(way, lambda s, a: s.lse * a, row_args=(advantage,))


ROW_BY_ROW = {
    "focal": lambda s: (1 - s.target_log_prob.exp()).square() * -s.target_log_prob,
    "infinite": lambda s: s.lse / 0.0,
    "not a number": lambda s: s.lse * torch.nan,
    "narrow": lambda s: s.lse.bfloat16(),
    "a count": lambda s: (s.argmax > 3).long(),
    "random": lambda s: s.lse * torch.rand_like(s.lse),
    "detached": lambda s: s.lse.detach().exp() * s.target_log_prob,
}


@ways
@pytest.mark.parametrize("how", ROW_BY_ROW)
def test_what_takes_rows_one_by_one_is_served(how, way):
    call(way, ROW_BY_ROW[how])


def test_once_for_each_function(monkeypatch):
    """Three calls more the first time, none after; the next lambda of the same line counts as the same."""
    calls = []

    def make():
        return lambda s: calls.append(len(s.lse)) or s.lse

    def count():
        before = len(calls)
        call("streaming", make())
        return len(calls) - before

    assert count() == 3
    assert count() == 1
    monkeypatch.setenv("TIGHTROPE_DEBUG", "1")
    assert count() == 3
