"""The oracle against truths that share no code with it.

Every other test trusts ``tightrope.reference``. Here it is held against ``F.cross_entropy`` (itself
tested for a decade), ``torch.distributions``, closed forms, and the paper's squared error written
out by hand, all in float64.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from helpers import class_indices, dense, plain, rand, randn, top_k
from tightrope import reference

N, V = 11, 23
LOGITS = randn(N, V, seed=1, dtype=torch.float64) * 3
TARGET = class_indices((N,), V, seed=2, ignored=0.3)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_cross_entropy_of_class_indices(reduction, label_smoothing, ignore_index):
    target = TARGET.masked_fill(TARGET == -100, ignore_index)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    actual = reference.reality_creativity_loss(LOGITS, target, **options)
    assert_equal(actual, F.cross_entropy(LOGITS, target, **options))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_of_distributions(reduction, label_smoothing):
    target = torch.softmax(randn(N, V, seed=3, dtype=torch.float64), -1) * 1.5  # sums to 1.5
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    actual = reference.reality_creativity_loss(LOGITS, target, **options)
    assert_equal(actual, F.cross_entropy(LOGITS, target, **options))


def test_cross_entropy_gradient():
    logits = LOGITS.clone().requires_grad_()
    (actual,) = torch.autograd.grad(reference.reality_creativity_loss(logits, TARGET), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, TARGET), logits)
    assert_equal(actual, expected)


def test_linear_is_cross_entropy_of_f_linear():
    hidden, weight = randn(2, 5, 4, dtype=torch.float64), randn(V, 4, seed=1, dtype=torch.float64)
    bias = randn(V, seed=2, dtype=torch.float64)
    target = class_indices((2, 5), V, seed=3)
    expected = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), target.flatten())
    assert_equal(reference.linear_reality_creativity_loss(hidden, weight, target, bias), expected)


@pytest.mark.parametrize("offset", [0.0, -7.0, 1e4])
def test_statistics_of_uniform_rows(offset):
    z = torch.full((2, V), offset, dtype=torch.float64)
    stats = reference.row_stats(z, dense(torch.tensor([0, V - 1]), V))
    expected = {
        "lse": offset + math.log(V),
        "entropy": math.log(V),
        "collision": 1 / V,
        "target_logit": offset,
        "target_prob": 1 / V,
        "argmax": 0,
        "target_log_prob": -math.log(V),
        "mean_log_prob": -math.log(V),
        "logit_sum": V * offset,
        "logit_square_sum": V * offset**2,
    }
    assert set(expected) == set(stats._fields)
    for name, value in expected.items():
        actual = getattr(stats, name)
        torch.testing.assert_close(actual, torch.full_like(actual, value), rtol=1e-12, atol=1e-12, msg=name)


def test_statistics_of_distributions():
    distribution = torch.distributions.Categorical(logits=LOGITS)
    target = TARGET.clamp_min(0)
    stats = reference.row_stats(LOGITS, dense(target, V))
    assert_equal(stats.entropy, distribution.entropy())
    assert_equal(stats.target_log_prob, distribution.log_prob(target))
    assert_equal(stats.target_prob, distribution.probs.gather(-1, target[:, None])[:, 0])
    assert_equal(stats.collision, (distribution.probs**2).sum(-1))
    assert_equal(stats.lse, LOGITS.exp().sum(-1).log())
    assert_equal(stats.mean_log_prob, distribution.logits.mean(-1))
    assert torch.equal(stats.argmax, LOGITS.argmax(-1))


def test_a_certain_row_has_no_entropy():
    z = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=torch.float64, requires_grad=True)
    stats = reference.row_stats(z, dense(torch.tensor([0]), 3))
    assert stats.entropy.item() == 0
    assert stats.collision.item() == 1
    (gradient,) = torch.autograd.grad(stats.entropy.sum() + stats.target_log_prob.sum(), z)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def softmax_by_hand(row):
    exponentials = [math.exp(x) for x in row]
    return [x / sum(exponentials) for x in exponentials]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_squared_error_by_hand(label_smoothing):
    """1/2 |f(x) - b|^2 with f(x) = <exp(Ax), 1>^-1 exp(Ax): the paper's softmax regression."""
    b = [0.25, 0.0, 0.75]
    row = [0.5, -1.0, 2.0]
    smooth = [(1 - label_smoothing) * x + label_smoothing / 3 for x in b]
    expected = 0.5 * sum((p - x) ** 2 for p, x in zip(softmax_by_hand(row), smooth))
    actual = reference.reality_creativity_loss(
        torch.tensor([row], dtype=torch.float64),
        torch.tensor([b], dtype=torch.float64),
        reality="squared_error",
        label_smoothing=label_smoothing,
    )
    assert actual.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("creativity", ["entropy", "collision"])
def test_creativity_and_regularisers_by_hand(creativity):
    row, balance = [0.5, -1.0, 2.0], 0.3
    p = softmax_by_hand(row)
    lse = math.log(sum(math.exp(x) for x in row))
    creative = {
        "entropy": sum(x * math.log(x) for x in p),
        "collision": math.log(sum(x * x for x in p)),
    }[creativity]
    expected = (1 - balance) * -math.log(p[1]) + balance * creative
    expected += 0.1 * lse**2 + 0.05 / 2 * sum(x * x for x in row)
    actual = reference.reality_creativity_loss(
        torch.tensor([row], dtype=torch.float64),
        torch.tensor([1]),
        balance=balance,
        creativity=creativity,
        z_loss=0.1,
        logit_l2=0.05,
    )
    assert actual.item() == pytest.approx(expected, rel=1e-13)


def test_scale_and_softcap():
    expected = 5 * torch.tanh(0.7 * LOGITS / 5)
    assert_equal(reference.transform(LOGITS, logit_scale=0.7, softcap=5.0), expected)
    assert_equal(reference.transform(LOGITS, logit_scale=0.7), 0.7 * LOGITS)


def test_top_k_entries_add_up_and_ignored_ones_do_not_count():
    indices = torch.tensor([[1, 1, -100], [-100, -100, -100], [0, 2, 2]])
    probs = torch.tensor([[0.5, 0.25, 9.0], [9.0, 9.0, 9.0], [0.1, 0.2, 0.3]], dtype=torch.float64)
    b, valid = reference.dense_target((indices, probs), 3, dtype=torch.float64)
    expected = torch.tensor([[0, 0.75, 0], [0, 0, 0], [0.1, 0, 0.5]], dtype=torch.float64)
    assert_equal(b, expected)
    assert valid.tolist() == [True, False, True]


@pytest.mark.parametrize("kind", ["index", "dense", "top_k"])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_shift_scores_against_the_later_target(kind, shift):
    """The sum over a shifted sequence is that of the two slices a caller would make."""
    logits = randn(2, 5, V, seed=4, dtype=torch.float64)
    target = {
        "index": class_indices((2, 5), V, seed=5),
        "dense": rand(2, 5, V, seed=5, dtype=torch.float64),
        "top_k": plain(top_k((2, 5), V, seed=5, dtype=torch.float64)),
    }[kind]
    later = tuple(x[:, shift:] for x in target) if kind == "top_k" else target[:, shift:]
    options = {"reality": "squared_error", "balance": 0.4, "reduction": "none"}
    shifted = reference.reality_creativity_loss(logits, target, shift=shift, **options)
    sliced = reference.reality_creativity_loss(logits[:, : 5 - shift], later, **options)
    assert_equal(shifted[:, : 5 - shift], sliced)
    assert torch.equal(shifted[:, 5 - shift :], torch.zeros(2, shift, dtype=torch.float64))


def test_mean_divides_by_the_weight_of_rows_that_count():
    weight = rand(N, seed=6, dtype=torch.float64)
    losses = F.cross_entropy(LOGITS, TARGET, reduction="none")
    kept = (TARGET != -100).double()
    total = (losses * weight).sum()
    mean = reference.reality_creativity_loss(LOGITS, TARGET, row_weight=weight)
    assert_equal(mean, total / (weight * kept).sum())
    given = reference.reality_creativity_loss(LOGITS, TARGET, row_weight=weight, normalizer=3)
    assert_equal(given, total / 3)


def test_an_empty_mean_is_zero():
    target = torch.full((N,), -100)
    assert reference.reality_creativity_loss(LOGITS, target).item() == 0
    assert reference.reality_creativity_loss(LOGITS[:0], target[:0]).item() == 0


def test_balance_of_each_token():
    balance = rand(N, seed=7, dtype=torch.float64)
    options = {"reduction": "none"}
    mixed = reference.reality_creativity_loss(LOGITS, TARGET, balance=balance, **options)
    real = reference.reality_creativity_loss(LOGITS, TARGET, balance=0.0, **options)
    creative = reference.reality_creativity_loss(LOGITS, TARGET, balance=1.0, **options)
    assert_equal(mixed, (1 - balance) * real + balance * creative)
