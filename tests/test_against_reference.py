"""Losses, statistics and every gradient against the float64 reference, on drawn problems.

Three bars. float64 inputs: 1e-12. Ordinary float32 data: 1e-6 for the loss and 1e-5 norm-wise for
each gradient; bfloat16 and float16 inputs are exact in float32, so their loss has the same bar, and a
gradient may add one rounding to its dtype, element by element. Hostile data (peaks, offsets of 1e4,
masked vocabulary ...): at most a few times the error that the same formula makes in plain float32
PyTorch, which is found by running the reference in float32.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tightrope
from helpers import (
    BACKENDS,
    EPS32,
    ROUNDING,
    STRATEGIES,
    Problem,
    assert_no_worse,
    assert_rounded_once,
    assert_within,
    deviation,
    evaluate,
    function_of,
    linear_problem,
    oracle,
    ours,
    plain,
    rand,
    top_k,
)
from strategies import as_distribution, hostile_linear, hostile_logits, problems
from tightrope import reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
few_threads = pytest.mark.usefixtures("one_thread")
several_tiles = pytest.mark.usefixtures("one_thread", "small_tiles")
everywhere = pytest.mark.parametrize("backend", BACKENDS)
both = pytest.mark.parametrize("strategy", STRATEGIES)


def check(problem, **options):
    """Judge loss and gradients by the bar of their dtype."""
    actual, exact = ours(problem, **options), oracle(problem)
    doubles = any(problem.leaves[n].dtype == F64 for n in ("input", "weight", "bias") if n in problem.leaves)
    assert actual["loss"].dtype == (F64 if doubles else F32)
    if not doubles:
        rough = oracle(problem, F32)
    # Where terms cancel, what is left is rounding of the terms: of logits, and of sums over them.
    logits = problem.raw_logits() * problem.options.get("logit_scale", 1.0)
    scale = 1 + (logits.abs().max().item() if logits.numel() else 0.0)
    sums = max(4, logits.shape[-1] ** 0.5)
    for name, value in actual.items():
        dtype = problem.leaves[name].dtype if name != "loss" else actual["loss"].dtype
        assert value.dtype == dtype, f"{name} is {value.dtype}"
        if doubles and dtype == F64:
            assert_within(value, exact[name], 1e-12, 1e-13 * scale, name)
        elif dtype in ROUNDING:
            slack = 1e-5 * deviation(exact[name], torch.zeros_like(exact[name])).norm().item()
            assert_rounded_once(value, exact[name], slack + 4 * EPS32, name)
        elif doubles:  # a float32 leaf beside float64 ones: one rounding
            assert_within(value, exact[name], EPS32, 1e-13 * scale, name)
        else:
            rtol, ulps = (1e-6, 4) if name == "loss" else (1e-5, sums)
            usual = deviation(rough[name], exact[name]).norm().item()
            assert_within(value, exact[name], rtol, 4 * usual + ulps * EPS32 * scale, name)


@several_tiles
@everywhere
@both
@given(problem=problems([F64]))
@settings(max_examples=60)
def test_float64(problem, backend, strategy):
    check(problem, backend=backend, strategy=strategy)


@few_threads
@everywhere
@both
@given(problem=problems([F32]))
@settings(max_examples=60)
def test_float32(problem, backend, strategy):
    check(problem, backend=backend, strategy=strategy)


@several_tiles
@everywhere
@both
@given(problem=problems([BF16, F16, F32, F64]))
@settings(max_examples=60)
def test_mixed_dtypes(problem, backend, strategy):
    check(problem, backend=backend, strategy=strategy)


@few_threads
@everywhere
@given(problem=problems([F64, F32, BF16, F16], linear=False))
@settings(max_examples=80)
def test_logits(problem, backend):
    check(problem, backend=backend)


TERMS = {
    "cross_entropy": {},
    "entropy": {"balance": 0.3},
    "squared_error": {"reality": "squared_error", "balance": 0.3, "creativity": "collision"},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_l2": 1e-4, "softcap": 10.0},
}


@everywhere
@both
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("term", TERMS)
def test_ordinary_size(term, dtype, backend, strategy):
    """The promised bars with no allowance, at a size with several tiles, chunks and threads."""
    options = dict(workspace_mb=0.5, **TERMS[term])
    problem = linear_problem(150, vocab=4099, width=64, dtype=dtype, ignored=0.1, **options)
    actual, exact = ours(problem, backend=backend, strategy=strategy), oracle(problem)
    assert_within(actual["loss"], exact["loss"], 1e-6, what="loss")
    for name in problem.leaves:
        if dtype == F32:
            assert_within(actual[name], exact[name], 1e-5, what=name)
        else:
            rms = exact[name].square().mean().sqrt().item()
            assert_rounded_once(actual[name], exact[name], 1e-5 * rms, name)


def check_hostile(how, problem, **options):
    actual, exact, rough = ours(problem, **options), oracle(problem), oracle(problem, F32)
    if "weight" in problem.leaves:
        # Rounding of a logit moves every quantity of its row: one ulp of the largest logit.
        logits = problem.raw_logits()
        size = logits[logits.isfinite()].abs().max().item()
    else:
        size = 1.0
    for name, value in actual.items():
        largest = exact[name][exact[name].isfinite()].abs().max().item() if value.numel() else 0.0
        reach = 1.0
        if "weight" in problem.leaves and name in ("input", "weight"):
            other = "weight" if name == "input" else "input"
            reach = problem.leaves[other].abs().max().item()
        floor = 4 * EPS32 * (largest + min(size, 1e5) * reach)
        assert_no_worse(value, exact[name], rough[name], floor, f"{how}: {name}")


HOSTILE_TERMS = st.sampled_from(
    [
        {},
        {"balance": 1.0},
        {"balance": 0.4},
        {"reality": "squared_error"},
        {"reality": "squared_error", "balance": 0.5, "creativity": "collision"},
        {"balance": 1.0, "creativity": "collision"},
    ]
)


@few_threads
@everywhere
@given(case=hostile_logits(), terms=HOSTILE_TERMS, spread=st.booleans())
@settings(max_examples=120)
def test_hostile_logits(case, terms, spread, backend):
    """The logits are given exactly, so no error of a GEMM hides one of the rows' arithmetic."""
    how, problem = case
    if spread:
        problem = as_distribution(problem, problem.leaves["input"].shape[-1], how == "masked")
    check_hostile(how, problem.but(reduction="none", **terms), backend=backend)


@several_tiles
@everywhere
@both
@given(case=hostile_linear(), terms=HOSTILE_TERMS, workspace_mb=st.sampled_from([None, 1e-3]))
@settings(max_examples=60)
def test_hostile_linear(case, terms, workspace_mb, backend, strategy):
    how, problem = case
    reduction = "sum" if strategy == "chunked" else "none"
    problem = problem.but(reduction=reduction, workspace_mb=workspace_mb, **terms)
    check_hostile(how, problem, backend=backend, strategy=strategy)


@several_tiles
@everywhere
@both
@given(
    case=hostile_logits(among=("peaked", "offset", "negative", "constant"), largest=1100),
    terms=HOSTILE_TERMS,
)
@settings(max_examples=40)
def test_hostile_through_an_identity(case, terms, backend, strategy):
    """The head is the identity, so logits and gradients pass the GEMMs exactly: no allowance for them."""
    how, problem = case
    logits = problem.leaves["input"]
    linear = Problem({"input": logits, "weight": torch.eye(logits.shape[1])}, problem.target, terms)
    options = {"reduction": "sum" if strategy == "chunked" else "none"}
    actual = ours(linear, backend=backend, strategy=strategy, **options)
    exact, rough = (oracle(problem.but(**terms, **options), dtype) for dtype in (F64, F32))
    for name in ("loss", "input"):
        floor = 4 * EPS32 * max(1.0, exact[name].abs().max().item())
        assert_no_worse(actual[name], exact[name], rough[name], floor, f"{how}: {name}")


# Those of a set have their own tests.
FIELDS = [name for name in reference.ReferenceStats._fields if name != "argmax"]


def statistics(problem, module, **options):
    """Every field, as tensors with a graph, and the leaves."""
    options = {**problem.options, **options}
    if module is tightrope:
        dtype, target = None, problem.target
        function = tightrope.linear_vocab_stats
    else:
        dtype, target = F64, plain(problem.target)
        transform = {k: options[k] for k in ("logit_scale", "softcap") if k in options}
        place = {k: options[k] for k in ("ignore_index", "shift") if k in options}

        def function(input, weight, target, bias=None, **_):
            z = reference.logits(input, weight, bias, **transform)
            b, valid = reference.dense_target(target, z.shape[-1], dtype=F64, **place)
            stats = reference.row_stats(z, b)._asdict()
            empty = {name: -1 if name == "argmax" else 0.0 for name in stats}
            return tightrope.RowStats(
                **{n: torch.where(valid, x, empty[n]).to(x.dtype) for n, x in stats.items()}
            )

    leaves = {
        name: leaf.detach().to(dtype or leaf.dtype).requires_grad_()
        for name, leaf in problem.leaves.items()
        if name in ("input", "weight", "bias")
    }
    return function(target=target, **leaves, **options), leaves


def keep(problem, *names):
    return {name: problem.options[name] for name in names if name in problem.options}


@several_tiles
@everywhere
@given(problem=problems([F64, F32]), field=st.sampled_from(FIELDS))
@settings(max_examples=80)
def test_statistics(problem, field, backend):
    """Values of all fields, and the gradient of one with a different upstream in every row."""
    options = keep(problem, "ignore_index", "logit_scale", "softcap", "shift", "workspace_mb", "skip_ignored")
    problem.options = options
    actual, leaves = statistics(problem, tightrope, backend=backend)
    exact, exact_leaves = statistics(problem, reference)
    doubles = any(leaf.dtype == F64 for leaf in leaves.values())
    rtol = 1e-12 if doubles else 1e-5
    scale = 1 + exact.logit_square_sum.max().sqrt().item() if exact.lse.numel() else 1.0
    for name in FIELDS:
        value = getattr(actual, name)
        assert value.dtype == (F64 if doubles else F32)
        assert_within(value, getattr(exact, name), rtol, rtol * scale, name)
    upstream = (torch.arange(exact.lse.numel(), dtype=F64) % 5 + 1).reshape(exact.lse.shape)
    grads = torch.autograd.grad(getattr(actual, field), list(leaves.values()), upstream.to(actual.lse.dtype))
    expected = torch.autograd.grad(
        getattr(exact, field), list(exact_leaves.values()), upstream, materialize_grads=True
    )
    for name, value, truth in zip(leaves, grads, expected):
        tolerance = rtol if leaves[name].dtype == value.dtype == F64 else 1e-5
        if name == "input":
            # A product that adds V equal terms one after the other is off by up to V units of roundoff.
            tolerance = max(tolerance, leaves["weight"].shape[0] * torch.finfo(value.dtype).eps / 2)
        assert_within(value, truth, tolerance, tolerance, f"{field} by {name}")


@several_tiles
@everywhere
@given(problem=problems([F64, F32]))
@settings(max_examples=40)
def test_argmax(problem, backend):
    """Index of a largest logit; -1 for ignored tokens."""
    problem.options = keep(problem, "ignore_index", "logit_scale", "softcap", "shift")
    stats, _ = statistics(problem, tightrope, backend=backend)
    exact, _ = statistics(problem, reference)
    assert stats.argmax.dtype == torch.int64
    assert torch.equal(stats.argmax == -1, exact.argmax == -1)
    z = reference.transform(problem.raw_logits(), **keep(problem, "logit_scale", "softcap"))
    chosen = z.gather(-1, stats.argmax.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    best = z.max(-1).values
    assert ((chosen >= best - 1e-5 * best.abs() - 1e-5) | (stats.argmax == -1)).all()


@few_threads
@everywhere
@given(case=hostile_logits(), field=st.sampled_from(FIELDS))
@settings(max_examples=60)
def test_hostile_statistics(case, field, backend):
    """Through a head that is the identity, so that the logits are exact, on float64 upcast truth."""
    how, problem = case
    logits = problem.leaves["input"][:, :64]
    vocab = logits.shape[1]
    target = problem.target.clamp_max(vocab - 1)
    if how in ("masked", "huge"):
        return  # 0 * inf in the product with the identity
    head = torch.eye(vocab)
    stats = tightrope.linear_vocab_stats(logits, head, target, backend=backend)
    b = reference.dense_target(target, vocab, dtype=F64)[0]
    exact = getattr(reference.row_stats(logits.double(), b), field)
    rough = getattr(reference.row_stats(logits, b.float()), field)
    floor = 4 * EPS32 * exact.abs().max().item() + 4e-38
    assert_no_worse(getattr(stats, field), exact, rough, floor, f"{how}: {field}")


def user_loss(stats, gamma):
    return gamma * stats.entropy - stats.target_log_prob + 0.1 * stats.collision.log() * gamma**2


def through_reference(input, weight, target, bias=None, gamma=None, **options):
    terms = {k: options.pop(k) for k in ("row_weight", "reduction", "normalizer") if k in options}
    place = {k: options.pop(k) for k in ("ignore_index", "shift") if k in options}
    z = reference.logits(input, weight, bias, **options)
    b, valid = reference.dense_target(target, z.shape[-1], dtype=z.dtype, **place)
    loss = user_loss(reference.row_stats(z, b), gamma)
    return reference.reduce(loss, valid, **terms)


through_reference.__module__ = reference.__name__


def check_user_loss(problem, **options):
    names = ("ignore_index", "logit_scale", "softcap", "shift", "reduction", "normalizer")
    run = keep(problem, "workspace_mb", "skip_ignored")
    problem.options = keep(problem, *names)
    problem.leaves.pop("balance", None)
    tokens = problem.leaves["input"].shape[:-1]
    problem.leaves["gamma"] = rand(*tokens, seed=99, dtype=F64)

    def function(*args, gamma, **options):
        return tightrope.linear_vocab_loss(*args, loss_fn=user_loss, row_args=(gamma,), **options)

    actual = evaluate(function, problem, **options, **run)
    exact = evaluate(through_reference, problem, F64)
    for name, value in actual.items():
        rtol = 1e-12 if value.dtype == F64 else 1e-6
        assert_within(value, exact[name], rtol, rtol, name)


@several_tiles
@everywhere
@both
@given(problem=problems([F64]))
@settings(max_examples=40)
def test_user_loss(problem, backend, strategy):
    check_user_loss(problem, backend=backend, strategy=strategy)


@several_tiles
@everywhere
@both
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_user_loss_of_weighed_rows(reduction, backend, strategy):
    """The weight of another row: few of the problems drawn have weights that differ within a chunk."""
    problem = linear_problem(70, vocab=300, dtype=F64, ignored=0.3, reduction=reduction, workspace_mb=0.1)
    problem.leaves["row_weight"] = rand(70, seed=6, dtype=F64)
    check_user_loss(problem, backend=backend, strategy=strategy)


@several_tiles
@everywhere
@both
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 255, 257, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_every_tail(vocab, rows, backend, strategy):
    """Peaked rows at every alignment of the vocabulary: a tail that leaks takes visible mass."""
    problem = linear_problem(rows, vocab=vocab, width=5, dtype=F64, spread=20.0, balance=0.3)
    problem.leaves["bias"] -= 100  # an unmasked tail of zeros would win every maximum
    for target, options in (
        (problem.target, {}),
        (problem.target, {"softcap": 5.0}),
        (top_k((rows,), vocab, dtype=F64), {}),
    ):
        drawn = Problem(problem.leaves, target, {**problem.options, **options})
        check(drawn, backend=backend, strategy=strategy)


@everywhere
@both
def test_no_width(backend, strategy):
    """D = 0: the logits are the bias."""
    leaves = {"input": torch.zeros(3, 0, dtype=F64), "weight": torch.zeros(1030, 0, dtype=F64)}
    for extra in ({}, {"bias": rand(1030, dtype=F64)}):
        for dtype in (F64, F32):
            problem = Problem({**leaves, **extra}, torch.tensor([0, 1029, -100]), {"balance": 0.5})
            problem.leaves = {name: leaf.to(dtype) for name, leaf in problem.leaves.items()}
            check(problem, backend=backend, strategy=strategy)


def test_function_of_a_problem():
    assert function_of(linear_problem(2)) is tightrope.linear_reality_creativity_loss
