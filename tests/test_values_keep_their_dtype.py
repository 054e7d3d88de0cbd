"""A user's tensors reach a user's loss as they are, in each strategy, with and without ignored tokens."""

import pytest
import torch

import tightrope
from calls import own
from helpers import assert_within, class_indices, dense, randn
from tightrope import reference

pytestmark = pytest.mark.one_in(2)

ROWS, VOCAB, WIDTH = 40, 256, 8
FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGER = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
ways = pytest.mark.parametrize("way", ["chunked", "streaming", "logits"])
ignoring = pytest.mark.parametrize("ignored", [False, True], ids=["all count", "one ignored"])


def arguments(ignored=False):
    hidden, weight = randn(ROWS, WIDTH), randn(VOCAB, WIDTH, seed=1)
    target = class_indices((ROWS,), VOCAB)
    if ignored:
        target[3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), target


def loss_of(way, hidden, weight, target, loss_fn, **options):
    if way == "logits":
        return tightrope.vocab_loss(hidden @ weight.t(), target, loss_fn, **options)
    return tightrope.linear_vocab_loss(hidden, weight, target, loss_fn, strategy=way, **options)


def log_prob(hidden, weight, target):
    z = reference.logits(hidden.double(), weight.double())
    return z.log_softmax(-1).gather(-1, target.clamp_min(0)[:, None])[:, 0]


@ways
@ignoring
@pytest.mark.parametrize("dtype", [torch.bool, *INTEGER, *UNSIGNED, *FLOATING], ids=str)
def test_row_args(dtype, ignored, way):
    """A bool came as int64 where a token was ignored, so that ~mask was another number."""
    hidden, weight, target = arguments(ignored)
    given = (torch.arange(ROWS) % 3).to(dtype)
    seen = set()

    def loss_fn(stats, arg):
        seen.add(arg.dtype)
        gate = ~arg if arg.dtype == torch.bool else arg.float() + 1
        return -stats.target_log_prob * gate

    loss = loss_of(way, hidden, weight, target, loss_fn, row_args=(given,))
    assert seen == {dtype}
    gate = (~given if dtype == torch.bool else given.float() + 1).double()
    counts = target != -100
    exact = -(log_prob(hidden, weight, target) * gate)[counts].sum() / counts.sum()
    got, want = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, exact))
    for a, b in zip((loss, *got), (exact, *want)):
        assert_within(a, b, 1e-5)


@ways
@ignoring
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_a_learned_row_arg_gets_its_gradient_in_its_dtype(dtype, ignored, way):
    hidden, weight, target = arguments(ignored)
    gate = (torch.arange(ROWS) / 8).to(dtype).requires_grad_()
    loss = loss_of(way, hidden, weight, target, lambda s, g: -s.target_log_prob * g, row_args=(gate,))
    loss.backward()
    counts = target != -100
    exact = (-log_prob(hidden, weight, target) * counts / counts.sum()).detach()
    assert gate.grad.dtype == dtype
    assert_within(gate.grad, exact, {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5))


@ways
@ignoring
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, *FLOATING], ids=str)
def test_results(dtype, ignored, way):
    """A float64 advantage, or a result under autocast, raised in one strategy once a token was ignored."""
    hidden, weight, target = arguments(ignored)
    loss = loss_of(way, hidden, weight, target, lambda s: (-s.target_log_prob).to(dtype))
    assert loss.dtype == torch.float32
    counts = target != -100
    rows = (-log_prob(hidden, weight, target)).to(torch.float32).to(dtype).double()
    assert_within(loss, rows[counts].sum() / counts.sum(), 1e-2 if dtype == torch.bfloat16 else 2e-3)
    if dtype.is_floating_point:
        loss.backward()
        assert hidden.grad.isfinite().all() and hidden.grad.any()


@pytest.mark.parametrize("dtype", [*INTEGER, *UNSIGNED], ids=str)
@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_class_indices(dtype, strategy):
    """The widest class that the dtype holds; -100 where it has a sign, and what it wraps to in uint8, 156."""
    hidden, weight, target = arguments()
    largest = min(VOCAB - 1, torch.iinfo(dtype).max)
    target[1] = 156
    target = target.clamp_max(largest)
    target[0] = largest
    narrow = target.to(dtype)
    if dtype.is_signed:
        target[3] = -100
        narrow = target.to(dtype)
    loss = tightrope.linear_reality_creativity_loss(hidden, weight, narrow, strategy=strategy)
    counts = target != -100
    assert_within(loss, -log_prob(hidden, weight, target)[counts].mean(), 1e-5)


@pytest.mark.parametrize("dtype", [*INTEGER, *UNSIGNED], ids=str)
@pytest.mark.parametrize("reality", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_top_k_indices(dtype, reality, strategy):
    """-100 wraps to 156 in uint8: that class was dropped; and the squared error took int64 alone."""
    hidden, weight, _ = arguments()
    largest = min(156, torch.iinfo(dtype).max)
    indices = torch.tensor([[largest, 3, 3]]).expand(ROWS, 3).clone()
    probs = torch.tensor([[0.5, 0.3, 0.1]]).expand(ROWS, 3).clone()
    narrow = indices.clone().to(dtype)
    if dtype.is_signed:
        narrow[5] = -100
        narrow[6, 0] = -100
    target = tightrope.TopKTarget(narrow, probs)
    loss = tightrope.linear_reality_creativity_loss(
        hidden, weight, target, reality=reality, strategy=strategy
    )
    kept = narrow.long() != -100
    counts = kept.any(-1)
    b = torch.zeros(ROWS, VOCAB, dtype=torch.float64)
    b.scatter_add_(1, indices, probs.double() * kept)
    p = reference.logits(hidden.double(), weight.double()).log_softmax(-1)
    rows = -(b * p).sum(-1) if reality == "cross_entropy" else 0.5 * (p.exp() - b).square().sum(-1)
    exact = rows[counts].mean()
    got, want = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, exact))
    for a, e in zip((loss, *got), (exact, *want)):
        assert_within(a, e, 1e-5)


@ways
def test_no_target(way):
    """A loss that uses no target need not be given one; both strategies say so by None."""
    hidden, weight, _ = arguments()

    def sharp(stats):
        assert stats.target_log_prob is None and stats.target_logit is None and stats.target_prob is None
        return stats.entropy - stats.lse

    loss, stats = loss_of(way, hidden, weight, None, sharp, return_stats=True)
    assert stats.target_prob is None
    z = reference.logits(hidden.double(), weight.double())
    p = z.log_softmax(-1)
    exact = (-(p.exp() * p).sum(-1) - z.logsumexp(-1)).mean()
    got, want = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, exact))
    for a, e in zip((loss, *got), (exact, *want)):
        assert_within(a, e, 1e-5)


def test_both_strategies_agree_on_a_dense_target():
    """The control: nothing of the above is particular to class indices."""
    hidden, weight, target = arguments()
    rows = dense(target, VOCAB, torch.float32)
    losses = [loss_of(way, hidden, weight, rows, own) for way in ("chunked", "streaming", "logits")]
    for loss in losses[1:]:
        assert_within(loss, losses[0].double(), 1e-6)
