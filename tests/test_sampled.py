"""Sampled gradients: no bias, no more noise than was asked for, and exact where they are not noisy.

The exact gradients are those of the same call without noise, which other tests hold against the reference. In
float64, so that what is not noise is 1e-12; over many draws, against the standard error of their mean.
"""

import math

import pytest
import torch

import tightrope
from helpers import (
    BACKENDS,
    Problem,
    class_indices,
    evaluate,
    rand,
    randn,
    top_k,
)
from sampled_cases import (
    BUDGET,
    NOISE,
    SMALL,
    TERMS,
    D,
    N,
    V,
    check,
    check_a_row_that_is_not_finite,
    check_bounds,
    check_no_bias,
    check_promise,
    hostile,
    problem,
    relative,
    run,
    statistics_of,
)
from tightrope.strategies import sampling

F64 = torch.float64
pytestmark = [
    pytest.mark.one_in(2),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.compile
]
everywhere = pytest.mark.parametrize("backend", BACKENDS)


@everywhere
def test_no_bias(backend):
    """A column that is dropped, or divided by another probability than it was drawn with."""
    check_no_bias(problem(backend=backend))


@everywhere
@pytest.mark.parametrize("noise", [0.02, 0.1, (0.1, 0.02), (0.02, 0.1)])
def test_promised_noise(noise, backend):
    """A prediction that is wrong, or noise above what is allowed."""
    check_promise(problem(backend=backend, rows=40), noise)  # one chunk: its noise is the call's


@everywhere
@pytest.mark.parametrize("exact", ["input", "weight"])
def test_zero_is_exact(exact, backend):
    """The gradient whose noise is 0 made of some of the columns."""
    noise = (0.0, NOISE) if exact == "input" else (NOISE, 0.0)
    noisy = "weight" if exact == "input" else "input"
    check(problem(backend=backend), names=(noisy,), draws=20, noise=noise)
    assert statistics_of(problem(), gradient_noise=noise).sampled_noise[int(exact == "weight")] == 0


@pytest.mark.filterwarnings("ignore::tightrope.BalanceWarning")
@everywhere
@pytest.mark.parametrize("terms", TERMS)
def test_terms(terms, backend):
    """A term, or what is done to rows and logits, that the sums over columns do not know of."""
    given = problem(backend=backend, **TERMS[terms])
    given.target[::7] = -100
    check(given, draws=24)


@everywhere
@pytest.mark.parametrize("kind", ["dense", "top-k", "int32"])
def test_targets(kind, backend):
    """A kind of target that the sampler takes for class indices."""
    given = problem(backend=backend)
    targets = {
        "dense": torch.softmax(3 * randn(N, V, seed=3, dtype=F64), -1),
        "top-k": top_k((N,), V, seed=3, dtype=F64),
        "int32": given.target.int(),
    }
    check(Problem(given.leaves, targets[kind], given.options), draws=24)


@everywhere
def test_other_gradients_are_exact(backend):
    """Gradients of bias, balance, row_weight and temperature made of some of the columns."""
    given = problem(backend=backend)
    given.leaves["bias"] = randn(V, seed=7, dtype=F64) / 4
    for seed, name in enumerate(("balance", "row_weight", "temperature")):
        given.leaves[name] = 0.25 + 0.5 * rand(N, seed=seed, dtype=F64)
    given.target[5:9] = -100
    del given.options["balance"]
    check(given, draws=24)


def own(stats):
    return -0.9 * stats.target_log_prob - 0.1 * stats.entropy


def own_loss(given, **options):
    options = {**BUDGET, "backend": given.options["backend"], **options}

    def call(input, weight, target, **rest):
        return tightrope.linear_vocab_loss(input, weight, target, own, **rest)

    call.__module__ = "tightrope"
    return evaluate(call, Problem(given.leaves, given.target), **options)


def of_statistics(given, **options):
    options = {**BUDGET, "backend": given.options["backend"], **options}

    def call(input, weight, target, **rest):
        return own(tightrope.linear_vocab_stats(input, weight, target, **rest))

    return evaluate(call, Problem(given.leaves, given.target), **options)


@everywhere
@pytest.mark.parametrize("call", [own_loss, of_statistics])
def test_own_losses_and_statistics(call, backend):
    """A function of the public API that takes the option and does nothing with it."""
    check(problem(backend=backend), draws=24, call=call)


def test_own_loss_streams():
    """A streaming backward of a user's loss that is exact."""
    check(problem(backend=None), draws=24, call=lambda *a, **k: own_loss(*a, strategy="streaming", **k))


def test_report_of_an_own_loss():
    """A share that no one fills in."""
    given = problem()
    leaves = [given.leaves[name].clone().requires_grad_() for name in ("input", "weight")]
    options = {"gradient_noise": NOISE, "return_stats": True, **SMALL}
    _, stats = tightrope.linear_vocab_loss(*leaves, given.target, own, **options)
    assert 0 < stats.sampled_share < 0.5
    assert (stats.sampled_noise > 0).all()


def test_report():
    """A report where there is none to give, or none where there is."""
    given = problem()
    stats = statistics_of(given, gradient_noise=NOISE)
    assert stats.sampled_share.shape == () and stats.sampled_noise.shape == (2,)
    assert 0 < stats.sampled_share < 0.5
    assert (stats.sampled_noise > 0).all() and (stats.sampled_noise < NOISE).all()
    assert stats.lse.shape == (N,)
    for options in ({}, {"gradient_noise": NOISE, "strategy": "streaming"}):
        stats = statistics_of(given, **options)
        assert stats.sampled_share is None and stats.sampled_noise is None


@everywhere
@pytest.mark.parametrize("needs", [("input",), ("weight",)])
def test_one_wanted(needs, backend):
    """A frozen head, or frozen hidden states, that breaks the draw or is given a gradient."""
    given = problem(backend=backend)

    def call(given, **options):
        leaves = {name: leaf.clone().requires_grad_(name in needs) for name, leaf in given.leaves.items()}
        options = {**given.options, **options}
        tightrope.linear_reality_creativity_loss(*leaves.values(), given.target, **options).backward()
        assert all((leaf.grad is None) == (name not in needs) for name, leaf in leaves.items())
        return {name: leaves[name].grad for name in needs}

    check(given, names=needs, draws=24, call=call)


IN_FULL = {
    "flat": (0.01, {}),
    "ridge": (3.0, {"logit_l2": 0.01}),
    "little noise": (3.0, {"gradient_noise": 1e-6}),
}


@everywhere
@pytest.mark.parametrize("how", IN_FULL)
def test_in_full(how, backend):
    """A draw of nearly all columns, or of columns that are all alike, in place of the products in full."""
    spread, options = IN_FULL[how]
    given = problem(spread=spread, backend=backend)
    if how == "flat":
        given = Problem({k: randn(*v.shape, dtype=F64) / 99 for k, v in given.leaves.items()}, given.target)
        targets = torch.full((N, V), 1 / V, dtype=F64) + randn(N, V, dtype=F64) / V
        given = Problem(given.leaves, targets, {**SMALL, "backend": backend})
    options = {"gradient_noise": NOISE, **options}
    exact, made = run(given, **{**options, "gradient_noise": 0.0}), run(given, **options)
    for name in exact:
        assert relative(made[name], exact[name]) <= 1e-12, name
    stats = statistics_of(given, **options)
    assert stats.sampled_share == 1
    assert not stats.sampled_noise.any()


def test_small_vocabulary():
    """A vocabulary smaller than the pilot."""
    for vocab in (1, 2, 100, 257):
        given = problem(vocab=vocab, backend=None)
        exact, made = run(given), run(given, gradient_noise=NOISE)
        for name in ("input", "weight"):
            assert (made[name] - exact[name]).norm() <= NOISE * exact[name].norm() + 1e-12


@everywhere
@pytest.mark.parametrize("rows", [0, 1, 2, 33])
def test_few_rows(rows, backend):
    """A chunk of fewer rows than the row vectors of its part of low rank, or of none."""
    given = problem(rows=max(rows, 1), backend=backend, label_smoothing=0.1)
    given = Problem(
        {**given.leaves, "input": given.leaves["input"][:rows]}, given.target[:rows], given.options
    )
    exact = run(given, reduction="sum")
    errors = dict.fromkeys(("input", "weight"), 0.0)
    torch.manual_seed(0)
    for _ in range(20):
        made = run(given, reduction="sum", gradient_noise=NOISE)
        for name in errors:
            errors[name] += (made[name] - exact[name]).square().sum().item() / 20
    for name, square in errors.items():
        assert math.sqrt(square) <= NOISE * exact[name].norm() + 1e-12


def test_all_ignored():
    """Gradients that are not zero, or not written, without a row that counts."""
    given = problem(backend=None)
    for skip in (None, False):
        given.target[:] = -100
        made = run(given, gradient_noise=NOISE, skip_ignored=skip)
        assert not any(made[name].any() for name in made)


@everywhere
def test_hostile(backend):
    """Noise above what is allowed where norms cancel, or a bias where squares are lost."""
    for given in hostile(backend=backend):
        check_bounds(given)


@everywhere
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite(bad, backend):
    """NaN of one row in the gradients of others."""
    check_a_row_that_is_not_finite(problem(backend=backend), bad)


@everywhere
def test_ignored_rows_do_not_leak(backend):
    """What stands in ignored rows among the sums over columns."""
    given = problem(backend=backend, skip_ignored=False)
    given.target[::5] = -100
    clean = check(given, draws=5)[0]
    given.leaves["input"][::5] = math.nan
    torch.manual_seed(0)
    made = run(given, gradient_noise=NOISE)
    for name in ("input", "weight"):
        assert relative(made[name], clean[name]) <= 2 * NOISE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """A gradient in another dtype than its tensor, or sampling on top of one that was rounded."""
    given = problem(dtype=dtype)
    exact = run(given)
    torch.manual_seed(0)
    for _ in range(5):
        made = run(given, gradient_noise=NOISE)
        for name in ("input", "weight"):
            assert made[name].dtype == dtype
            assert relative(made[name].double(), exact[name].double()) <= 1.2 * NOISE
            assert not torch.equal(made[name], exact[name])


def test_seed_repeats():
    """A generator that is not torch's, or is read in another order the next time."""
    given = problem()
    torch.manual_seed(5)
    first = [run(given, gradient_noise=NOISE) for _ in range(2)]
    torch.manual_seed(5)
    again = [run(given, gradient_noise=NOISE) for _ in range(2)]
    for one, other in zip(first, again):
        for name in one:
            assert torch.equal(one[name], other[name])
    assert not torch.equal(first[0]["weight"], first[1]["weight"])


def test_exact_calls_leave_the_generator_alone():
    """A draw that no one asked for shifts everybody's random numbers."""
    given = problem()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run(given, gradient_noise=0.0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_retain_graph(strategy):
    """A second backward that finds what the first one left."""
    given = problem(strategy=strategy)
    exact = run(given)
    leaves = [given.leaves[name].clone().requires_grad_() for name in ("input", "weight")]
    options = {**given.options, "gradient_noise": NOISE}
    loss = tightrope.linear_reality_creativity_loss(*leaves, given.target, **options)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves)
    for name, one, other in zip(("input", "weight"), first, second):
        scale = exact["loss"].new_tensor(1.0)
        assert relative(one, exact[name] * scale / upstream(exact)) <= 2 * NOISE
        assert relative(other, 3 * exact[name] * scale / upstream(exact)) <= 2 * NOISE


def upstream(exact):
    """What `evaluate` hands back to a loss that is one number."""
    return 5 / 8


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_compile(strategy, backend):
    """A graph break, gradients in full, or a draw that the compiler keeps for the next step."""
    given = problem(strategy=strategy)
    exact = run(given)

    def call(input, weight, target, **options):
        return tightrope.linear_reality_creativity_loss(input, weight, target, **options)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    noisy = Problem(given.leaves, given.target, {**given.options, "gradient_noise": NOISE})
    first, second = evaluate(compiled, noisy), evaluate(compiled, noisy)
    assert relative(first["loss"], exact["loss"]) <= 1e-12
    for name in ("input", "weight"):
        assert relative(first[name], exact[name]) <= 2 * NOISE
        assert not torch.equal(first[name], exact[name])
        assert not torch.equal(first[name], second[name])


def test_threshold():
    """A tau that is not the root: sum over r < tau of r (tau - r) = 1."""
    for seed, power in enumerate((0.5, 1, 4, 20)):
        r = rand(500, seed=seed, dtype=F64) ** power * 10.0 ** (seed - 2)
        tau = sampling.threshold(r)
        below = r[r < tau]
        assert (below * (tau - below)).sum().item() == pytest.approx(1.0, rel=1e-9)
    assert sampling.threshold(torch.zeros(3, dtype=F64)) > 0
    assert math.isnan(sampling.threshold(torch.tensor([1.0, math.nan], dtype=F64)))
    assert math.isnan(sampling.threshold(torch.tensor([1.0, math.inf], dtype=F64)))


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_column_sums(layout, dtype, backend):
    """A kernel that takes the wrong stride, leaves out a tail, or reads what it should write."""
    column_sums = tightrope.backends.resolve(backend, torch.device("cpu")).column_sums
    for rows, width, ranks in ((1, 1, 1), (5, 17, 2), (33, 1030, 1), (40, 129, 2), (0, 3, 1), (16, 64, 2)):
        grad = randn(rows, width, dtype=dtype)
        if layout == "columns":
            grad = grad.t().contiguous().t()
        elif layout == "strided":
            grad = torch.full((rows, width + 9), math.nan, dtype=dtype)[:, 4 : 4 + width].copy_(grad)
        along = randn(ranks, rows, seed=1, dtype=dtype)
        whole = torch.full((ranks + 1, width + 7), math.nan, dtype=dtype)
        column_sums(grad, along, 0.25, whole[:, 3 : 3 + width])
        scaled = grad.double() * 0.25
        exact = torch.cat([along.double() @ scaled, scaled.square().sum(0, keepdim=True)])
        tolerance = 1e-12 if dtype == F64 else 1e-5
        assert (whole[:, 3 : 3 + width] - exact).abs().max() <= tolerance * (1 + exact.abs().max())
        assert whole[:, :3].isnan().all() and whole[:, 3 + width :].isnan().all()


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_row_grad_sums(layout, dtype, backend):
    """Sums of a gradient without its targets, before it is masked, or of lanes past the last row."""
    primitives = tightrope.backends.resolve(backend, torch.device("cpu"))
    for rows, width in ((1, 1), (5, 17), (33, 70), (48, 129)):
        logits = randn(rows, width, dtype=dtype)
        if layout == "columns":
            logits = logits.t().contiguous().t()
        norm = torch.stack([logits.amax(-1), torch.ones(rows, dtype=dtype)])
        coef = randn(7, rows, seed=2, dtype=dtype)
        index = class_indices((rows,), width)
        index[0] = width - 1
        rest = (0, None, None, index, None, None, None, None, torch.arange(rows) % 3 < 2, 0.7, 5.0)
        exact, out = torch.empty_like(logits), torch.full_like(logits, math.nan)
        primitives.row_grad(logits, exact, norm, coef, *rest)
        along = randn(2, rows, seed=1, dtype=dtype)
        sums = torch.full((3, width + 2), math.nan, dtype=dtype)
        primitives.row_grad_sums(logits, out, norm, coef, along, 0.25, sums[:, 1:-1], *rest)
        assert torch.equal(out, exact)
        scaled = exact.double() * 0.25
        expected = torch.cat([along.double() @ scaled, scaled.square().sum(0, keepdim=True)])
        tolerance = 1e-12 if dtype == F64 else 1e-5
        assert (sums[:, 1:-1] - expected).abs().max() <= tolerance * (1 + expected.abs().max())
        assert sums[:, 0].isnan().all() and sums[:, -1].isnan().all()


ERRORS = [
    (-0.1, ValueError, "-0.1"),
    (1.0, ValueError, "below 1"),
    (math.nan, ValueError, "nan"),
    (math.inf, ValueError, "inf"),
    ("0.1", TypeError, "str"),
    (True, TypeError, "bool"),
    (None, TypeError, "NoneType"),
    ((0.1,), ValueError, "1 numbers"),
    ((0.1, 0.1, 0.1), ValueError, "3 numbers"),
    ((0.1, -0.1), ValueError, "-0.1"),
    (torch.tensor([0.1, 0.2]), TypeError, "shape"),
]


@pytest.mark.parametrize(("value", "error", "said"), ERRORS)
def test_errors(value, error, said):
    """A value that is taken for another, in any of the functions and the module."""
    given = problem(rows=3)
    first = (*given.leaves.values(), given.target)
    calls = [
        lambda: tightrope.linear_reality_creativity_loss(*first, gradient_noise=value),
        lambda: tightrope.linear_vocab_loss(*first, own, gradient_noise=value),
        lambda: tightrope.linear_vocab_stats(*first, gradient_noise=value),
        lambda: tightrope.LinearRealityCreativityLoss(gradient_noise=value),
        lambda: tightrope.LMHead(D, V, gradient_noise=value),
    ]
    for call in calls:
        with pytest.raises(error, match="gradient_noise") as caught:
            call()
        assert said in str(caught.value)


def test_modules():
    """A module that drops the option."""
    given = problem()
    loss = tightrope.LinearRealityCreativityLoss(gradient_noise=(0.05, 0), return_stats=True, **given.options)
    leaves = [leaf.clone().requires_grad_() for leaf in given.leaves.values()]
    stats = loss(*leaves, given.target)[1]
    assert stats.sampled_noise[0] > 0 and stats.sampled_noise[1] == 0
    head = tightrope.LMHead(D, V, dtype=F64, gradient_noise=0.05, **SMALL)
    stats = head(leaves[0], given.target, return_stats=True)[1]
    assert stats.sampled_share is not None


def test_without_a_gradient():
    """A draw in a call that has nothing to draw for."""
    given = problem()
    state = torch.get_rng_state()
    with torch.no_grad():
        tightrope.linear_reality_creativity_loss(*given.leaves.values(), given.target, gradient_noise=0.1)
    assert torch.equal(state, torch.get_rng_state())
