"""Sampled gradients as a device makes them, where no value may be read: with plain PyTorch, on CPU tensors.

The kernels that take the place of the plain primitives are held against them in test_triton_drawn.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tightrope
from helpers import Problem, evaluate, function_of, rand, randn, top_k
from sampled_cases import (
    F64,
    NOISE,
    SMALL,
    TERMS,
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
from test_launches import Launches
from tightrope import backends
from tightrope.strategies import plan, sampled, sampling
from tightrope.strategies.problem import LinearProblem

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.compile
    pytest.mark.usefixtures("one_thread"),
]
BACKEND = "eager"
# What looks at a value, or gives a tensor whose size depends on one.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "_unique2")


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        assert name not in READS, f"{name} would wait for the device"
        if name == "index":  # a mask is an index of a size that depends on it
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "index by a mask"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def on_a_device(monkeypatch):
    """Logits as a GPU has them, in several tiles of which the last is narrower."""
    monkeypatch.setattr(sampled, "reads", lambda device: False)
    monkeypatch.setattr(LinearProblem, "by_rows", True)
    monkeypatch.setattr(plan, "CPU", replace(plan.CPU, tile=512, tile_logits=0, widest_tile=512))
    eager = replace(backends.BACKENDS[BACKEND], draws=True)
    monkeypatch.setitem(backends.BACKENDS, BACKEND, eager)


def given(**options):
    return problem(backend=BACKEND, **options)


def test_the_guard_sees_a_read():
    """A guard that sees nothing."""
    for look in (torch.Tensor.item, torch.Tensor.nonzero, bool, lambda x: x[x > 0]):
        with pytest.raises(AssertionError), NoReads():
            look(torch.ones(()) if look is not torch.Tensor.nonzero else torch.ones(3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "temperature": 0.5 + rand(N, seed=4, dtype=F64)},
        {"skip_ignored": False, "strategy": "streaming"},
        {"logit_l2": 0.01, "gradient_noise": (0.05, 0.0)},
    ],
)
def test_nothing_waits(options, monkeypatch):
    """A value that is looked at: on a GPU the host would wait for it, and a graph could not be captured."""

    def without_reads(method):
        def call(*args):
            with NoReads():
                return method(*args)

        return call

    for name in ("__init__", "multiply", "finish", "report"):
        monkeypatch.setattr(sampled.Sampler, name, without_reads(getattr(sampled.Sampler, name)))
    made = given(**{"gradient_noise": NOISE, **options})
    made.target[::7] = -100
    run(made)


def test_no_bias():
    """A column that is dropped where a pass ends, or divided by another probability than its own."""
    check_no_bias(given())


@pytest.mark.parametrize("noise", [0.02, (0.1, 0.02), (0.02, 0.1)])
def test_promised_noise(noise):
    """A prediction that is wrong, or noise above what is allowed."""
    check_promise(given(rows=40), noise)


def test_more_columns_than_a_pass_takes():
    """Columns beyond the first pass dropped, or a promise broken, where a quarter of them is not enough."""
    options = {"gradient_noise": 0.008}
    assert 0.25 < statistics_of(given(), **options).sampled_share < 0.5
    check_promise(given(rows=40), 0.008, draws=30)


@pytest.mark.filterwarnings("ignore::tightrope.BalanceWarning")
@pytest.mark.one_in(2)
@pytest.mark.parametrize("terms", TERMS)
def test_terms(terms):
    """A term, or what is done to rows and logits, that the sums over columns do not know of."""
    made = given(**TERMS[terms])
    made.target[::7] = -100
    check(made, draws=24)


@pytest.mark.parametrize("kind", ["dense", "top-k"])
def test_targets(kind):
    """A kind of target that the sampler takes for class indices."""
    targets = {
        "dense": torch.softmax(3 * randn(N, V, seed=3, dtype=F64), -1),
        "top-k": top_k((N,), V, seed=3, dtype=F64),
    }
    check(Problem(given().leaves, targets[kind], given().options), draws=24)


@pytest.mark.parametrize("exact", ["input", "weight"])
def test_zero_is_exact(exact):
    """The gradient whose noise is 0 made of some of the columns, or of what has overwritten the gradient."""
    noise = (0.0, NOISE) if exact == "input" else (NOISE, 0.0)
    check(given(), names=("weight" if exact == "input" else "input",), draws=20, noise=noise)


def test_other_gradients_are_exact():
    """Gradients of bias, balance, row_weight and temperature made of some of the columns."""
    made = given()
    made.leaves["bias"] = randn(V, seed=7, dtype=F64) / 4
    for seed, name in enumerate(("balance", "row_weight", "temperature")):
        made.leaves[name] = 0.25 + 0.5 * rand(N, seed=seed, dtype=F64)
    made.target[5:9] = -100
    del made.options["balance"]
    check(made, draws=24)


@pytest.mark.parametrize("which", range(7))
def test_hostile(which):
    """Noise above what is allowed where norms cancel, or a bias where squares are lost."""
    check_bounds(hostile(backend=BACKEND)[which])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite(bad):
    """NaN of one row in the gradients of others."""
    check_a_row_that_is_not_finite(given(), bad)


def test_ignored_rows_do_not_leak():
    """What stands in ignored rows in the scale, the row vectors, or the sums over columns."""
    made = given(skip_ignored=False)
    made.target[::5] = -100
    clean = check(made, draws=5)[0]
    made.leaves["input"][::5] = math.nan
    noisy = run(made, gradient_noise=NOISE)
    for name in ("input", "weight"):
        assert relative(noisy[name], clean[name]) <= 2 * NOISE
    assert statistics_of(made, gradient_noise=NOISE).sampled_share < 0.5


@pytest.mark.parametrize("how", ["flat", "ridge", "little noise"])
def test_in_full(how):
    """A draw of nearly all columns, or of columns that are all alike, that leaves noise."""
    made, options = given(), {"gradient_noise": NOISE}
    if how == "flat":
        targets = torch.full((N, V), 1 / V, dtype=F64) + randn(N, V, dtype=F64) / V
        leaves = {k: randn(*v.shape, dtype=F64) / 99 for k, v in made.leaves.items()}
        made = Problem(leaves, targets, {**SMALL, "backend": BACKEND})
    else:
        options |= {"ridge": {"logit_l2": 0.01}, "little noise": {"gradient_noise": 1e-6}}[how]
    exact, noisy = run(made, **{**options, "gradient_noise": 0.0}), run(made, **options)
    for name in exact:
        assert relative(noisy[name], exact[name]) <= 1e-12, name
    stats = statistics_of(made, **options)
    assert stats.sampled_share == 1
    assert not stats.sampled_noise.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """Sums of one rounding of the gradient and products of another: that is a bias."""
    made = given(dtype=dtype)
    exact = run(made)
    draws = 200
    mean = {name: torch.zeros_like(exact[name], dtype=F64) for name in ("input", "weight")}
    for _ in range(draws):
        noisy = run(made, gradient_noise=NOISE)
        for name in mean:
            assert noisy[name].dtype == dtype
            mean[name] += noisy[name].double() / draws
    for name, value in mean.items():
        # Beside what is left of the noise, of bfloat16 one rounding of each.
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        assert relative(value, exact[name].double()) <= 1.5 * NOISE / math.sqrt(draws) + rounding, name


def test_operands_of_bfloat16(monkeypatch):
    """Columns that are rounded before what lies along the rows is taken out of them, or sums that are not of
    what is multiplied, where a GEMM's operands are bfloat16."""
    monkeypatch.setattr(LinearProblem, "operand", torch.bfloat16)
    made = given(dtype=torch.bfloat16)
    exact = run(made)
    for name in ("input", "weight"):
        made_so = (run(made, gradient_noise=NOISE)[name] for _ in range(9))
        errors = [relative(noisy.float(), exact[name].float()) for noisy in made_so]
        assert 0.2 * NOISE < sum(errors) / 9 <= NOISE, name
    full = run(made, gradient_noise=1e-6)
    for name in ("input", "weight"):
        assert relative(full[name].float(), exact[name].float()) <= 2.0**-7, name


def test_what_is_made_in_full_by_shapes():
    """A pilot of more than there is, or float16 operands, in which a column over its chance may overflow."""
    for vocab, sampled_share in ((1, 1), (100, 1), (255, 1)):
        stats = statistics_of(given(vocab=vocab), gradient_noise=NOISE)
        assert stats.sampled_share == sampled_share
    noise, needs = sampled.NoiseArguments(0.1, 0.1), sampled.Needs(True, True, False)
    place, eager = (torch.device("cuda"), torch.float16, torch.float32), backends.BACKENDS[BACKEND]
    assert not sampled.samples(noise, needs, *place, eager, V)
    place = torch.device("cuda"), torch.bfloat16, torch.float32
    assert sampled.samples(noise, needs, *place, eager, V)
    # Without kernels whose time is that of the drawn columns nothing would be gained.
    assert not sampled.samples(noise, needs, *place, replace(eager, draws=False), V)


def test_seed_repeats():
    """A draw from another generator than torch's."""
    made = given()
    torch.manual_seed(5)
    first, other = run(made, gradient_noise=NOISE), run(made, gradient_noise=NOISE)
    torch.manual_seed(5)
    again = run(made, gradient_noise=NOISE)
    for name in first:
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["weight"], other["weight"])


def test_second_backward():
    """A second backward that finds what the first one left."""
    made = given(strategy="streaming")
    exact = run(made)
    leaves = [made.leaves[name].clone().requires_grad_() for name in ("input", "weight")]
    loss = function_of(made)(*leaves, made.target, **made.options, gradient_noise=NOISE)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for name, one, other in zip(("input", "weight"), first, second):
        for grad in (one, other):
            assert relative(5 / 8 * grad, exact[name]) <= 2 * NOISE
        assert not torch.equal(one, other)


def test_compile():
    """A graph break, or a draw that the compiler keeps for the next step."""
    made = given(gradient_noise=NOISE)

    def call(input, weight, target, **options):
        return tightrope.linear_reality_creativity_loss(input, weight, target, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    exact, first, second = run(made, gradient_noise=0.0), evaluate(compiled, made), evaluate(compiled, made)
    for name in ("input", "weight"):
        assert relative(first[name], exact[name]) <= 2 * NOISE
        assert not torch.equal(first[name], second[name])


def test_own_loss():
    """A function of the public API that draws on the host."""
    made = given()

    def call(input, weight, target, **options):
        options = {key: value for key, value in options.items() if key not in ("balance", "creativity")}
        return tightrope.linear_vocab_loss(
            input, weight, target, lambda s: -0.9 * s.target_log_prob - 0.1 * s.entropy, **options
        )

    call.__module__ = "tightrope"
    check(made, draws=24, call=lambda given, **options: evaluate(call, given, **options))


def test_thresholds_agree():
    """A fixed number of steps that ends above the root, on columns of any spread."""
    for seed, power in enumerate((0.5, 1, 4, 20)):
        r = rand(5000, seed=seed, dtype=F64) ** power * 10.0 ** (seed - 2)
        exact = sampling.threshold(r)
        assert sampling.threshold_in_steps(r).item() == pytest.approx(exact, rel=1e-6)
    heavy = torch.logspace(-9, 9, 5000, dtype=F64)
    assert sampling.threshold_in_steps(heavy).item() == pytest.approx(sampling.threshold(heavy), rel=1e-6)
    assert sampling.threshold_in_steps(torch.zeros(3, dtype=F64)) > 0
    for bad in (math.nan, math.inf):
        assert sampling.threshold_in_steps(torch.tensor([1.0, bad], dtype=F64)).isnan()


def test_what_a_chunk_takes(monkeypatch):
    """A gradient of a chunk copied whole, columns gathered at once, or more kernels than docs say."""
    found, multiply = [], sampled.Sampler.multiply
    # The plain primitives take more than kernels do: what is looked at is what stands around them.
    quiet = replace(
        backends.BACKENDS[BACKEND],
        drawn_columns=lambda *args: args[-1].zero_(),
        drawn_by_head=lambda *_: None,
        drawn_by_hidden=lambda *_: None,
        row_grad_sums=lambda *args: args[6].zero_(),
    )
    monkeypatch.setitem(backends.BACKENDS, BACKEND, quiet)

    def counted(*args):
        with Launches() as seen:
            out = multiply(*args)
        found.append(seen)
        return out

    monkeypatch.setattr(sampled.Sampler, "multiply", counted)
    run(given(rows=40), gradient_noise=NOISE)
    (seen,) = found
    # A quarter of the columns, of rows that are padded.
    assert max(math.prod(shape) for shape in seen.shapes) <= 512 * 128
    assert sum(name != "scalar_tensor" for name in seen.names) <= 325
