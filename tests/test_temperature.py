"""A temperature comes after the softcap, as samplers apply it; and what is not a temperature or a set.

What a number does is folded into scale and softcap; what a tensor does goes another way, so both are held
against plain float64 PyTorch here, and against each other.
"""

import math

import pytest
import torch

import tightrope
from helpers import BACKENDS, STRATEGIES, assert_within, class_indices, rand, randn
from tightrope import Classes, MinP

pytestmark = pytest.mark.one_in(2)

F64 = torch.float64
everywhere = pytest.mark.parametrize("backend", BACKENDS)
N, V, D = 11, 53, 6


def head(dtype=F64):
    tensors = randn(N, D, seed=1), randn(V, D, seed=2), randn(V, seed=3)
    return tuple((2 * t).to(dtype).requires_grad_() for t in tensors)


def dense(temperature, softcap=None, logit_scale=1.0):
    hidden, weight, bias = head()
    u = logit_scale * (hidden @ weight.t() + bias)
    z = u if softcap is None else softcap * torch.tanh(u / softcap)
    return z / temperature, (hidden, weight, bias)


@everywhere
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("form", ["number", "tensor of one", "one a token", "learned", "learned and shared"])
def test_after_the_softcap(form, softcap, strategy, backend):
    """logit_scale=1/T under a softcap is another model, whose importance ratios came out as 1e7."""
    numbers = 0.5 + rand(N, seed=4, dtype=F64)
    given = {
        "number": 0.7,
        "tensor of one": torch.tensor([0.7], dtype=F64),
        "one a token": numbers,
        "learned": numbers.requires_grad_(),
        "learned and shared": torch.tensor(0.7, dtype=F64, requires_grad=True),
    }[form]
    target = class_indices((N,), V, ignored=0.2, seed=5)
    flat = given.unsqueeze(-1) if form in ("one a token", "learned") else given
    if form == "tensor of one":
        flat = 0.7
    z, leaves = dense(flat, softcap, -1.3)
    exact = torch.nn.functional.cross_entropy(z, target)
    ours = tightrope.linear_reality_creativity_loss(
        *leaves[:2],
        target,
        leaves[2],
        temperature=given,
        softcap=softcap,
        logit_scale=-1.3,
        strategy=strategy,
        backend=backend,
    )
    if form.startswith("learned"):
        leaves = (*leaves, given)
    assert_within(ours, exact, 1e-12)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves)):
        assert_within(a, b, 1e-11)


def test_what_stands_at_an_ignored_token_is_not_looked_at():
    """A padded batch has a temperature of 0 where it has no token, which divided 0 by 0."""
    temperature = torch.full((N,), 0.7)
    target = class_indices((N,), V)
    target[3] = -100
    hidden, weight, _ = head(torch.float32)
    exact = tightrope.linear_reality_creativity_loss(hidden, weight, target, temperature=0.7)
    for value in (0.0, math.nan, -1.0):
        temperature[3] = value
        for skip in (True, False):
            leaf = temperature.clone().requires_grad_()
            loss = tightrope.linear_reality_creativity_loss(
                hidden, weight, target, temperature=leaf, skip_ignored=skip
            )
            assert_within(loss, exact, 1e-6)
            grads = torch.autograd.grad(loss, (hidden, weight, leaf))
            assert all(g.isfinite().all() for g in grads) and grads[2][3] == 0
        logits = hidden @ weight.t()
        loss = tightrope.reality_creativity_loss(logits, target, temperature=leaf)
        assert_within(loss, exact, 1e-6)
        assert torch.autograd.grad(loss, leaf)[0].isfinite().all()


@everywhere
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masked_classes(strategy, backend):
    """A logit of -inf times its gradient of 0 was NaN in the gradient of the temperature."""
    temperature = (0.5 + rand(N, seed=4, dtype=F64)).requires_grad_()
    masked = torch.zeros(V, dtype=F64)
    masked[5:30] = -torch.inf
    target = class_indices((N,), 5)
    z, (hidden, weight, bias) = dense(temperature.unsqueeze(-1))
    exact = torch.nn.functional.cross_entropy(z + masked, target)
    ours = tightrope.linear_reality_creativity_loss(
        hidden, weight, target, bias + masked, temperature=temperature, strategy=strategy, backend=backend
    )
    leaves = (hidden, weight, temperature)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves)):
        assert_within(a, b, 1e-11)


def test_importance_ratios_of_a_capped_model():
    """On-policy tokens have a ratio of 1: the sampler's log-probabilities are these."""
    hidden, weight = randn(60, 64) * 2, randn(301, 64, seed=1)
    target, temperature, cap = class_indices((60,), 301), 0.7, 30.0
    z = cap * torch.tanh(hidden.double() @ weight.double().t() / cap) / temperature
    sampled = z.log_softmax(-1).gather(1, target.unsqueeze(-1)).squeeze(-1)
    stats = tightrope.linear_vocab_stats(hidden, weight, target, temperature=temperature, softcap=cap)
    assert ((stats.target_log_prob - sampled).exp() - 1).abs().max() < 1e-4


@pytest.mark.parametrize("second", ["row_weight", "balance"])
def test_beside_what_else_is_learned(second):
    """The gradient of one argument in the place of another's."""
    hidden, weight, bias = (t.detach() for t in head())
    temperature = 0.5 + rand(N, seed=4, dtype=F64)
    other = 0.2 + 0.6 * rand(N, seed=6, dtype=F64)
    target = class_indices((N,), V)
    for strategy in STRATEGIES:

        def function(t, x, strategy=strategy):
            options = {"temperature": t, second: x, "strategy": strategy}
            return tightrope.linear_reality_creativity_loss(hidden, weight, target, bias, **options)

        leaves = [temperature.clone().requires_grad_(), other.clone().requires_grad_()]
        assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7)


# What is refused, before any work.

WRONG = [
    ({"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a finite number above 0"),
    ({"temperature": -1}, ValueError, "temperature: got -1"),
    ({"temperature": math.nan}, ValueError, "temperature: got nan"),
    ({"temperature": math.inf}, ValueError, "temperature: got inf"),
    ({"temperature": 1e-60}, ValueError, "temperature: got 1e-60"),
    ({"temperature": 1e-45}, ValueError, "by which logit_scale"),
    ({"temperature": "hot"}, TypeError, "temperature: got str"),
    ({"temperature": torch.ones(N + 1)}, ValueError, r"temperature: got shape \[12\]"),
    ({"temperature": torch.ones(N, dtype=torch.int64)}, TypeError, "temperature: got dtype int64"),
    ({"temperature": torch.zeros(N)}, ValueError, "temperature: got values from 0 to 0"),
    ({"temperature": torch.full((N,), math.nan)}, ValueError, "temperature: got values from nan"),
    ({"temperature": torch.full((N,), math.inf)}, ValueError, "temperature: got values from inf"),
    (
        {"support": MinP(0.0)},
        ValueError,
        "support.x: got 0.0, expected a finite number above 0",
    ),
    ({"support": MinP(1.5)}, ValueError, "support.x: got 1.5"),
    ({"support": MinP(math.nan)}, ValueError, "support.x: got nan"),
    ({"support": MinP("0.1")}, TypeError, "support.x: got str"),
    ({"support": 0.1}, TypeError, "support: got float, expected tightrope.MinP"),
    ({"support": torch.zeros(N, 2)}, TypeError, "support: got Tensor, expected tightrope.MinP"),
    ({"support": Classes([1, 2])}, TypeError, "support.indices: got list"),
    ({"support": Classes(torch.zeros(N, 2))}, TypeError, "support.indices: got dtype float32"),
    ({"support": Classes(torch.zeros(N, 2, dtype=torch.bool))}, TypeError, "support.indices: got dtype bool"),
    (
        {"support": Classes(torch.zeros(N, dtype=torch.int64))},
        ValueError,
        r"support.indices: got shape \[11\]",
    ),
    ({"support": Classes(torch.zeros(N + 1, 2).long())}, ValueError, r"support.indices: got shape \[12, 2\]"),
    ({"support": Classes(torch.zeros(N, 0).long())}, ValueError, r"support.indices: got shape \[11, 0\]"),
    ({"support": Classes(torch.full((N, 2), V))}, IndexError, f"support.indices: got class {V}"),
    ({"support": Classes(torch.full((N, 2), -1))}, IndexError, "support.indices: got class -1"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
@pytest.mark.parametrize("function", ["loss", "own", "stats", "logits", "own of logits", "stats of logits"])
def test_errors_name_the_argument(function, options, error, message):
    """What came and what was expected, from every function alike."""
    hidden, weight, _ = (t.detach().float() for t in head())
    target = class_indices((N,), V)
    calls = {
        "loss": lambda: tightrope.linear_reality_creativity_loss(hidden, weight, target, **options),
        "own": lambda: tightrope.linear_vocab_loss(hidden, weight, target, lambda s: s.lse, **options),
        "stats": lambda: tightrope.linear_vocab_stats(hidden, weight, target, **options),
        "logits": lambda: tightrope.reality_creativity_loss(hidden @ weight.t(), target, **options),
        "own of logits": lambda: tightrope.vocab_loss(
            hidden @ weight.t(), target, lambda s: s.lse, **options
        ),
        "stats of logits": lambda: tightrope.vocab_stats(hidden @ weight.t(), target, **options),
    }
    with pytest.raises(error, match=message):
        calls[function]()


def test_modules_refuse_at_construction():
    for options in ({"temperature": 0.0}, {"support": MinP(2.0)}, {"support": 0.1}):
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            tightrope.LinearRealityCreativityLoss(**options)
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            tightrope.RealityCreativityLoss(**options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_statistic_of_a_set_without_one(strategy):
    """A user's loss that asks for what is None ended in PyTorch's words, deep inside."""
    hidden, weight, _ = head()
    with pytest.raises(ValueError, match=r"loss_fn: .*support_entropy.* support="):
        tightrope.linear_vocab_loss(hidden, weight, None, lambda s: -s.support_entropy, strategy=strategy)
    with pytest.raises(ValueError, match=r"loss_fn: .*target_log_prob.*target_\*"):
        tightrope.linear_vocab_loss(hidden, weight, None, lambda s: -s.target_log_prob, strategy=strategy)


def test_sets_in_any_integer_dtype():
    """-100 in uint8 is class 156; it must be widened before it is compared."""
    hidden, weight = randn(N, D), randn(200, D, seed=1)
    wide = torch.randint(100, (N, 4), generator=torch.Generator().manual_seed(0))
    wide[:, 1] = wide[:, 0]
    exact = tightrope.linear_vocab_stats(hidden, weight, support=Classes(wide))
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16):
        stats = tightrope.linear_vocab_stats(hidden, weight, support=Classes(wide.to(dtype)))
        assert torch.equal(stats.support_log_mass, exact.support_log_mass)
    padded = Classes(torch.full((N, 1), 156, dtype=torch.uint8))
    assert tightrope.linear_vocab_stats(hidden, weight, support=padded).support_log_mass.isfinite().all()


def test_an_ignore_index_of_ones_own():
    hidden, weight = randn(N, D), randn(V, D, seed=1)
    indices = torch.tensor([[1, 2, 7]]).expand(N, 3)
    with_seven = tightrope.linear_vocab_stats(hidden, weight, support=Classes(indices))
    without = tightrope.linear_vocab_stats(hidden, weight, support=Classes(indices), ignore_index=7)
    assert (without.support_log_mass < with_seven.support_log_mass).all()
