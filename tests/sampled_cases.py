"""What the tests of sampled gradients share: problems that pay, and judging draws by the exact gradients.

In float64, so that what is not noise is 1e-12; over many draws, against the standard error of their mean.
"""

import math

import pytest
import torch

import tightrope
from helpers import Problem, class_indices, evaluate, function_of, rand, randn

F64 = torch.float64
N, V, D = 72, 2003, 24
# Two chunks of 40 rows or less, and the gradients made in the forward pass.
BUDGET = {"workspace_mb": 40 * V * 8 / 2**20}
SMALL = {**BUDGET, "strategy": "chunked"}
NOISE = 0.05


def problem(rows=N, vocab=V, dtype=F64, spread=3.0, seed=0, **options):
    """Peaked enough for sampling: some classes are frequent, and hidden states have something in common."""
    common = randn(D, seed=seed + 5)
    hidden = randn(rows, D, seed=seed) + common
    frequent = -torch.log1p(torch.arange(vocab, dtype=F64))
    weight = randn(vocab, D, seed=seed + 1) * spread / D**0.5
    weight = weight + frequent.unsqueeze(-1) * common / common.square().sum()
    leaves = {"input": hidden.to(dtype), "weight": weight.to(dtype)}
    target = torch.multinomial(torch.softmax(leaves["input"] @ leaves["weight"].t(), -1), 1).squeeze(-1)
    return Problem(leaves, target, {"balance": 0.1, "creativity": "collision", **SMALL, **options})


def run(given, **options):
    return evaluate(function_of(given), given, **options)


def statistics_of(given, **options):
    """What the call says of its sampling."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in given.leaves.items()}
    rest = {name: leaf for name, leaf in leaves.items() if name not in ("input", "weight")}
    options = {**given.options, **rest, **options, "return_stats": True}
    return function_of(given)(leaves["input"], leaves["weight"], given.target, **options)[1]


def relative(actual, exact):
    return ((actual - exact).norm() / exact.norm()).item()


def check(given, names=("input", "weight"), draws=60, noise=NOISE, call=run):
    """Mean over draws within 5 standard errors, norm-wise; each draw within the noise, root mean square."""
    exact = call(given)
    mean, square = ({name: torch.zeros_like(exact[name]) for name in names} for _ in range(2))
    torch.manual_seed(1)
    for _ in range(draws):
        made = call(given, gradient_noise=noise)
        for name in exact:
            if name not in names:
                assert relative(made[name], exact[name]) <= 1e-12 or torch.equal(made[name], exact[name]), (
                    name
                )
        for name in names:
            mean[name] += made[name] / draws
            square[name] += (made[name] - exact[name]).square() / draws
    for name in names:
        variance = square[name].sum()
        assert variance > 0, f"{name}: nothing was drawn"
        measured = variance.sqrt() / exact[name].norm()
        allowed = noise[name == "weight"] if isinstance(noise, tuple) else noise
        assert measured <= allowed, f"{name}: noise {measured:.4f}, allowed {allowed}"
        # |mean - exact|^2 is variance / draws, give or take: of as many numbers as there are it is near.
        error = (mean[name] - exact[name]).norm()
        assert error <= 2 * (variance / draws).sqrt(), f"{name}: bias"
    return exact, mean, square


def check_no_bias(given, draws=400):
    """Mean over draws within 5 standard errors of the exact gradients: in all, by kind of row, and by row."""
    exact = run(given)
    torch.manual_seed(1)
    made = [run(given, gradient_noise=NOISE) for _ in range(draws)]
    for name in ("input", "weight"):
        errors = torch.stack([m[name] - exact[name] for m in made])
        square, mean = errors.square().sum(-1).mean(0), errors.mean(0)
        assert mean.norm() <= 5 * (square.sum() / draws).sqrt()
        # What is dropped is missing along itself: groups of rows, from those that are drawn once in thousands
        # of times to those that are never noisy, each along what is exact. Not by their noise: those with
        # little are also those that happened not to be drawn.
        for rows in exact[name].norm(dim=-1).argsort().chunk(10):
            along = (errors[:, rows] * exact[name][rows]).sum((1, 2))
            # Of those that are drawn once in thousands of times: nothing, beside the noise.
            least = 1e-7 * exact[name].norm() ** 2
            assert along.mean().abs() <= 5 * along.std() / draws**0.5 + least
    # Single rows that are drawn now and then: what is not drawn is one value, the same each time. So is what
    # is exact nearly always, whose rare errors 400 draws may not show.
    values = torch.stack([m["weight"] for m in made])
    usual = values.mode(0).values
    left_out = (values == usual).all(-1).sum(0)
    sometimes = (left_out > draws // 20) & (left_out < draws - draws // 20)
    exact_mostly = (usual - exact["weight"]).norm(dim=-1) <= 1e-12 * exact["weight"].norm()
    sometimes &= ~exact_mostly
    assert sometimes.sum() > 20
    errors = values[:, sometimes] - exact["weight"][sometimes]
    assert (errors.mean(0).norm(dim=-1) <= 5 * (errors.square().sum(-1).mean(0) / draws).sqrt()).all()


def check_promise(given, noise, draws=60):
    """Noise as predicted, by a fifth, and no more than what is allowed."""
    _, _, square = check(given, noise=noise, draws=draws)
    predicted = torch.stack([statistics_of(given, gradient_noise=noise).sampled_noise for _ in range(10)])
    exact = run(given)
    for i, name in enumerate(("input", "weight")):
        measured = (square[name].sum().sqrt() / exact[name].norm()).item()
        assert predicted[:, i].mean().item() == pytest.approx(measured, rel=0.2)


def hostile(**options):
    """Problems where norms cancel, squares are lost, or classes are masked."""
    common = problem(**options)
    common.leaves["weight"] += 30 * randn(D, seed=11, dtype=F64)  # all but cancels in the gradient of input
    same = problem(**options)
    same.leaves["input"] = same.leaves["input"][:1].expand(N, D).clone()
    peaked = problem(**options, spread=30.0)
    offset = problem(**options)
    offset.leaves["bias"] = torch.full((V,), 1e4, dtype=F64)
    masked = problem(**options)
    masked.leaves["bias"] = torch.zeros(V, dtype=F64).masked_fill(rand(V, seed=6) < 0.3, -torch.inf)
    masked.leaves["bias"][masked.target] = 0.0
    sentinel = problem(**options)
    sentinel.leaves["bias"] = torch.zeros(V, dtype=F64).masked_fill(rand(V, seed=6) < 0.3, -1e300)
    sentinel.leaves["bias"][sentinel.target] = 0.0
    uneven = problem(**options, row_weight=10 ** (30 * rand(N, seed=3, dtype=F64) - 15))
    return common, same, peaked, offset, masked, sentinel, uneven


def check_bounds(given, draws=20):
    """Noise of some draws within what is allowed, and their mean near what is exact."""
    exact = run(given)
    errors = dict.fromkeys(("input", "weight"), 0.0)
    mean = {name: torch.zeros_like(exact[name]) for name in errors}
    torch.manual_seed(0)
    for _ in range(draws):
        made = run(given, gradient_noise=NOISE)
        for name in errors:
            errors[name] += (made[name] - exact[name]).square().sum().item() / draws
            mean[name] += made[name] / draws
    for name, square in errors.items():
        allowed = NOISE * exact[name].norm()
        assert math.sqrt(square) <= allowed + 1e-12 * exact[name].norm(), name
        least = 1e-7 * exact[name].norm()  # of what is drawn once in thousands of times
        assert (mean[name] - exact[name]).norm() <= 2 * math.sqrt(square / draws) + least


def check_a_row_that_is_not_finite(given, bad):
    """Row 3 is, and the gradients of the others are right."""
    given.leaves["input"][3, 2] = bad
    exact, made = run(given), run(given, gradient_noise=NOISE)
    assert made["loss"].isnan()
    others = torch.arange(N) != 3
    assert made["input"][others].isfinite().all()
    assert relative(made["input"][others], exact["input"][others]) <= NOISE
    assert made["input"][3].isnan().any()


TERMS = {
    "cross-entropy": {"balance": 0.0},
    "entropy": {"creativity": "entropy"},
    "squared error": {"reality": "squared_error"},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 8.0, "logit_scale": 1.5},
    "z-loss": {"z_loss": 0.01},
    "support": {"creativity": "support_entropy", "support": tightrope.MinP(0.05)},
    "classes": {
        "creativity": "support_entropy",
        "support": tightrope.Classes(class_indices((N, 5), V, seed=8)),
    },
    "sum": {"reduction": "sum"},
    "mean by a number": {"normalizer": 1e-30},
    "tiny": {"normalizer": 1e30},
    "per token": {"reduction": "none"},
    "streaming": {"strategy": "streaming"},
    "scale of classes": {"class_weight": 0.5 + rand(V, seed=9, dtype=F64)},
    "masked": {"skip_ignored": False},
    "shifted": {"shift": 1},
    "temperature": {"temperature": 0.5 + rand(N, seed=4, dtype=F64)},
}
