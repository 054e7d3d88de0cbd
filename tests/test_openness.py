"""docs/mathematics.md on the best model of a balance, solved numerically: equations, floors and cliffs.

One context of a known distribution stands for a model that has learned all that there is. Its logits are
minimised in float64 with L-BFGS, through Tightrope's own losses.
"""

import math
import warnings

import pytest
import torch

import tightrope
from tightrope import Classes, MinP, losses
from tightrope.arguments import SetArguments

F64 = torch.float64


def truth(classes=12):
    """A distribution with an impossible class, the fourth."""
    p = torch.randn(classes, generator=torch.Generator().manual_seed(0), dtype=F64).mul(2).softmax(0)
    p[3] = 0
    return p / p.sum()


def best(p, balance, creativity, start=None, **options):
    """The model that minimises the loss against p."""
    z = (p.clamp_min(1e-9) if start is None else start).log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z], max_iter=4000, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = tightrope.reality_creativity_loss(
            z[None], p[None], balance=balance, creativity=creativity, **options
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return z.detach().softmax(0)


def test_entropy_has_a_floor_that_is_the_same_for_all():
    """The stationary point, and the mass that an impossible class has there."""
    p, b = truth(), 0.2
    q = best(p, b, "entropy", start=torch.full_like(p, 1 / 12))
    entropy = -(q * q.log()).sum()
    assert torch.allclose((1 - b) * p, q * ((1 - b) + b * (q.log() + entropy)), atol=1e-7)
    assert q[3].item() == pytest.approx(math.exp(-entropy - (1 - b) / b), rel=1e-4)


def noise_of_entropy(vocab, balance):
    """The mass beside a certain class at which the loss is least, by search; the others share it evenly."""
    eps = torch.logspace(-12, -1e-4, 400_000, dtype=F64)
    entropy = -(1 - eps) * torch.log1p(-eps) - eps * torch.log(eps / (vocab - 1))
    return eps[(-(1 - balance) * torch.log1p(-eps) - balance * entropy).argmin()].item()


@pytest.mark.parametrize(
    ("balance", "published"), [(0.03, 4.5e-10), (0.07, 0.044), (0.1, 0.245), (0.15, 0.479), (0.3, None)]
)
def test_the_noise_that_entropy_wants_where_the_answer_is_certain(balance, published):
    """eps of the page's equation is where the loss is least, and the page's figures are right."""
    vocab = 49152
    found = noise_of_entropy(vocab, balance)
    left = (1 - found) * math.log((vocab - 1) * (1 - found) / found)
    assert left == pytest.approx((1 - balance) / balance, rel=1e-3)
    assert published is None or found == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("vocab", [2000, 49152, 151936])
def test_the_cliff_of_entropy(vocab):
    """Noise beside a certain class: nothing well below 1 / (1 + ln V), a quarter a little beyond."""
    cliff = losses.cliff("entropy", vocab, SetArguments())
    assert cliff == pytest.approx(1 / (1 + math.log(vocab)))
    assert noise_of_entropy(vocab, 0.6 * cliff) < 0.01
    assert noise_of_entropy(vocab, 1.2 * cliff) > 0.2


def test_collision_keeps_what_is_impossible_impossible():
    """Below a third: no floor, the order of the classes, and a bound for small ones; at a half the floor."""
    p, b = truth(), 0.2
    q = best(p, b, "collision")
    square = q.square().sum()
    assert torch.allclose(q * (1 - 3 * b + 2 * b * q / square), (1 - b) * p, atol=1e-7)
    assert q[3] < 1e-6
    assert torch.equal(q.argsort(), p.argsort())
    assert (q[p > 0] / p[p > 0]).max() <= (1 - b) / (1 - 3 * b)
    assert best(p, 0.5, "collision", start=torch.full_like(p, 1 / 12))[3] > 0.01


def test_support_entropy_leaves_the_others_as_they_are():
    """Outside of the set the data's own distribution; inside the page's equation."""
    p, b = truth(), 0.2
    inside = p.argsort(descending=True)[:5]
    q = best(p, b, "support_entropy", support=Classes(inside[None]))
    outside = torch.ones(12, dtype=torch.bool)
    outside[inside] = False
    mass = q[inside].sum()
    r = q[inside] / mass
    entropy = -(r * r.log()).sum()
    assert torch.allclose(q[outside], p[outside], atol=1e-6)
    right = q[inside] * ((1 - b) + b / mass * (r.log() + entropy))
    assert torch.allclose((1 - b) * p[inside], right, atol=1e-6)


def gradient_at(z, balance, creativity, support=None):
    z = z.clone().requires_grad_()
    target = torch.zeros(1, dtype=torch.int64)
    loss = tightrope.reality_creativity_loss(
        z[None], target, balance=balance, creativity=creativity, support=support
    )
    return torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("x", [0.001, 0.02])
def test_the_cliff_of_min_p(x):
    """A class at the threshold beside a certain one: pushed out of the set below the cliff, in beyond it."""
    cliff = losses.cliff("support_entropy", 50, SetArguments(min_p=x))
    assert cliff == pytest.approx(1 / (1 + math.log(1 / x)))
    z = torch.full((50,), -60.0, dtype=F64)
    z[0], z[1] = 0.0, math.log(x) + 1e-9
    for factor, sign in ((0.9, 1), (1.25, -1)):
        # A positive gradient lowers its logit.
        assert gradient_at(z, factor * cliff, "support_entropy", MinP(x))[1].sign() == sign


@pytest.mark.parametrize(
    ("creativity", "balance", "support", "quiet"),
    [
        ("entropy", 0.1, None, 0.08),
        ("collision", 0.4, None, 0.3),
        ("support_entropy", 0.3, MinP(0.05), 0.25),
        ("support_entropy", 0.25, None, 0.2),
        ("support_entropy", 0.7, Classes(torch.tensor([[1, 2, 3, 4]])), 0.4),
    ],
)
@pytest.mark.parametrize("of_logits", [False, True], ids=["linear", "logits"])
def test_a_balance_beyond_the_cliff_warns_once(of_logits, creativity, balance, support, quiet, monkeypatch):
    """With the number and a remedy; not below it, not for each call, not for another reality."""
    monkeypatch.setattr(losses, "_warned", set())
    hidden, weight, target = torch.randn(1, 4), torch.randn(50257, 4), torch.tensor([3])

    def call(value, **more):
        options = {"balance": value, "creativity": creativity, "support": support, **more}
        if of_logits:
            return tightrope.reality_creativity_loss(hidden @ weight.t(), target, **options)
        return tightrope.linear_reality_creativity_loss(hidden, weight, target, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(quiet)
        call(torch.tensor([quiet]))
        call(balance, reality="squared_error")
    with pytest.warns(
        tightrope.BalanceWarning, match=rf"balance: got {balance:.4g} .*{creativity}"
    ) as caught:
        call(torch.tensor([balance]))
    assert len(caught) == 1 and caught[0].filename == __file__, "points at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(balance)
