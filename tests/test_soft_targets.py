"""Gradients of targets that require grad: of distributions, and of the probabilities of top-k targets."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

import tightrope
from helpers import BACKENDS, STRATEGIES, assert_within, class_indices, rand, randn
from tightrope import reference

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own, of forward mode
]
N, V, D, K = 5, 137, 4, 3  # of two small tiles
F64 = torch.float64
HIDDEN, HEAD, BIAS = (randn(*s, seed=i, dtype=F64) for i, s in enumerate([(N, D), (V, D), (V,)]))
INDICES = class_indices((N, K), V, seed=5)
INDICES[0, 1], INDICES[1, 2] = INDICES[0, 0], -100  # a repeated class, and an entry that is ignored
TERMS = {
    "cross_entropy": {"balance": 0.3},
    "squared_error": {"reality": "squared_error"},
    "smoothed": {"label_smoothing": 0.2, "balance": 0.3},
    "smoothed square": {"reality": "squared_error", "label_smoothing": 0.2},
    "weighed": {"class_weight": 0.5 + rand(V, seed=9, dtype=F64)},
    "weighed and smoothed": {"class_weight": 0.5 + rand(V, seed=9, dtype=F64), "label_smoothing": 0.2},
    "softcap": {"softcap": 2.0, "logit_scale": 1.5, "temperature": 0.5 + rand(N, seed=8, dtype=F64)},
}


def masses(kind):
    if kind == "dense":
        return rand(N, V, seed=3, dtype=F64)
    return rand(N, K, seed=4, dtype=F64)


def target_of(kind, given):
    if kind == "dense":
        return given
    return tightrope.TopKTarget(INDICES, given)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_finite_differences(kind, terms, backend, strategy, small_tiles):
    """A slope of a statistic that is wrong, or a mass that is not where it stands."""
    options = {"backend": backend, "strategy": strategy, "workspace_mb": 1e-3, **TERMS[terms]}

    def function(hidden, given):
        return tightrope.linear_reality_creativity_loss(hidden, HEAD, target_of(kind, given), BIAS, **options)

    leaves = HIDDEN.clone().requires_grad_(), masses(kind).requires_grad_()
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_of_logits_and_of_a_loss_of_ones_own(kind):
    """The other functions, each statistic of the target with an upstream gradient of its own."""

    def loss_fn(stats):
        return stats.target_logit.square() + stats.target_prob.sin() - 2 * stats.target_log_prob

    def functions(x, given):
        target = target_of(kind, given)
        stats = tightrope.linear_vocab_stats(HIDDEN, HEAD, target)
        return (
            tightrope.vocab_loss(x, target, loss_fn, reduction="none"),
            tightrope.linear_vocab_loss(HIDDEN, HEAD, target, loss_fn),
            stats.target_logit * stats.target_prob,
        )

    assert torch.autograd.gradcheck(
        functions,
        (randn(N, V, seed=6, dtype=F64).requires_grad_(), masses(kind).requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_shifted_sequences_and_ignored_tokens(kind):
    """A gradient that is written to the row of the hidden state, and not to the target's."""
    hidden = randn(2, 3, D, seed=7, dtype=F64)
    weight = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]], dtype=F64)
    given = rand(2, 3, V if kind == "dense" else K, seed=8, dtype=F64)
    indices = class_indices((2, 3, K), V, seed=9)
    for skip_ignored in (None, False):
        leaf = given.clone().requires_grad_()
        target = leaf if kind == "dense" else tightrope.TopKTarget(indices, leaf)
        loss = tightrope.linear_reality_creativity_loss(
            hidden, HEAD, target, shift=1, row_weight=weight, skip_ignored=skip_ignored
        )
        (actual,) = torch.autograd.grad(loss, leaf)
        other = given.clone().requires_grad_()
        dense = other if kind == "dense" else (indices, other)
        loss = reference.linear_reality_creativity_loss(hidden, HEAD, dense, shift=1, row_weight=weight)
        assert_within(actual, torch.autograd.grad(loss, other)[0], 1e-12)


def test_as_cross_entropy_gives_it():
    """PyTorch's own loss, in float32 and with a target of another dtype: the gradient has the target's."""
    logits, given = randn(N, V), torch.softmax(randn(N, V, seed=1), -1)
    for dtype in (torch.float32, torch.bfloat16):
        leaf = given.to(dtype).requires_grad_()
        (actual,) = torch.autograd.grad(tightrope.reality_creativity_loss(logits, leaf), leaf)
        wide = given.to(dtype).double().requires_grad_()
        (expected,) = torch.autograd.grad(F.cross_entropy(logits.double(), wide), wide)
        assert actual.dtype == dtype
        assert_within(actual, expected, 1e-6 if dtype == torch.float32 else 4e-3)


def test_only_the_target_is_learned():
    """No gradient of the head is made, and none is missing."""
    given = masses("dense").requires_grad_()
    loss = tightrope.linear_reality_creativity_loss(HIDDEN, HEAD, given)
    (gradient,) = torch.autograd.grad(loss, given)
    assert_within(gradient, -(HIDDEN @ HEAD.t()).log_softmax(-1) / N, 1e-12)


@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_in_torch_func(kind):
    """Of each of a batch: the rule for batches puts the gradient where the target was."""
    some = randn(4, N, D, seed=2, dtype=F64)
    given = torch.stack([masses(kind) + i for i in range(4)])

    def loss(given, hidden):
        return tightrope.linear_reality_creativity_loss(hidden, HEAD, target_of(kind, given), balance=0.2)

    actual = vmap(grad(loss))(given, some)
    for i in range(4):
        leaf = given[i].clone().requires_grad_()
        assert_within(actual[i], torch.autograd.grad(loss(leaf, some[i]), leaf)[0], 1e-12)


@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_a_second_derivative_by_a_target_is_refused(kind):
    """It would be lost in silence: of the target's gradient, of another by it, and in forward mode."""
    hidden, given = HIDDEN.clone().requires_grad_(), masses(kind).requires_grad_()

    def loss():
        return tightrope.linear_reality_creativity_loss(hidden, HEAD, target_of(kind, given), balance=0.2)

    of_hidden, of_given = torch.autograd.grad(loss(), (hidden, given), create_graph=True)
    for gradient, leaf in ((of_hidden, given), (of_given, given), (of_given, hidden)):
        with pytest.raises(RuntimeError, match=r"tightrope.*target"):
            torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(masses(kind), masses(kind))
        with pytest.raises(RuntimeError, match=r"tightrope.*target"):
            tightrope.linear_reality_creativity_loss(HIDDEN, HEAD, target_of(kind, dual))
    # By the hidden states alone it is as ever.
    (second,) = torch.autograd.grad(of_hidden.square().sum(), hidden)
    assert second.abs().sum() > 0
