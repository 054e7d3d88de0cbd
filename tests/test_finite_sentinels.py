"""Masks of finite numbers: every finite logit is a number, up to the largest of its dtype.

A vocabulary is often masked with ``torch.finfo(dtype).min`` or -1e9, not with -inf. A row then has whole
tiles whose maximum is a sentinel, differences and sums that overflow, and losses that are huge and finite.
Where the float64 truth can be held in the dtype of the arithmetic it must be met, elsewhere its infinity; a
NaN is right nowhere.
"""

from itertools import cycle, pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tightrope
from helpers import (
    BACKENDS,
    ROUNDING,
    SMALLEST,
    STRATEGIES,
    Problem,
    assert_representable,
    evaluate,
    oracle,
    ours,
    plain,
    present,
    rand,
    randn,
)
from tightrope import reference, statistics
from tightrope.backends import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROWS = 4
LARGEST = torch.finfo(torch.float32).max
# How the vocabulary is masked: all but a few classes; the same and the target among the masked; by -inf as
# well; with the largest number on one class; every class.
PATTERNS = ("allowed", "target", "infinite too", "both signs", "everything")
KINDS = ("index", "dense", "top_k")
TERMS = (
    {},
    {"balance": 0.3, "label_smoothing": 0.1},
    {"reality": "squared_error", "creativity": "collision", "balance": 0.6, "label_smoothing": 0.2},
    {"z_loss": 1e-3, "creativity": "collision", "balance": 0.5},
    {"logit_scale": -0.5, "balance": 0.5, "label_smoothing": 0.1},
    {"softcap": 30.0, "balance": 0.25, "logit_l2": 1e-3},
    {"logit_l2": 1e-3},
)


def sentinels(dtype):
    """Those of people's code, as far as the dtype holds them as finite numbers."""
    lowest = torch.finfo(dtype).min
    return [lowest, *(s for s in (-1e30, -1e9, -65504.0) if s > lowest)]


def mask(vocab, sentinel, pattern, dtype):
    """A vocabulary of sentinels but for four classes [V], in tiles and blocks most of which have none."""
    values = torch.full((vocab,), sentinel, dtype=dtype)
    classes = torch.tensor([vocab // 2, vocab // 2 + 1, vocab - 3, vocab // 2 + 5])
    if pattern == "infinite too":
        values[1::2] = -torch.inf
        values[: vocab // 3] = -torch.inf  # whole tiles
    if pattern != "everything":
        values[classes] = randn(4, seed=1, dtype=dtype)
    if pattern == "both signs":
        values[classes[3]] = -values[0]
    return values, classes


def make_target(kind, values, classes, pattern):
    """A target of ROWS rows, on classes that are not at -inf; of masked ones too, if the pattern says so."""
    vocab, hit = values.shape[0], classes[torch.arange(ROWS) % 3]
    if pattern in ("target", "both signs"):
        hit = hit.clone()
        hit[1::2] = 0
    if kind == "index":
        return hit
    if kind == "top_k":
        others = classes[:2].expand(ROWS, 2)
        probs = torch.tensor([0.5, 0.25, 0.125]).expand(ROWS, 3)
        return tightrope.TopKTarget(torch.cat([hit[:, None], others], 1), probs.clone())
    dense = torch.softmax(randn(ROWS, vocab, seed=3), -1) * 1.5
    dense[:, values.isinf()] = 0.0
    if pattern == "allowed":
        dense[:, values == values.min()] = 0.0
    return dense


def cases(dtype, vocab):
    """(mask, target, terms) of every pattern, sentinel and kind of target; the terms in turn."""
    terms = cycle(TERMS)
    for pattern, sentinel, kind in product(PATTERNS, sentinels(dtype), KINDS):
        values, classes = mask(vocab, sentinel, pattern, dtype)
        yield (
            f"{pattern}, {sentinel}, {kind}",
            values,
            make_target(kind, values, classes, pattern),
            next(terms),
        )


def truth_holds(terms, values) -> bool:
    """Not where float64 itself sums numbers past its largest."""
    huge = values.double()[values.isfinite()].abs().max() > 1e300
    return not (huge and "label_smoothing" in terms)


def judge(actual, exact, dtype, what, summed):
    """The loss in the dtype of the arithmetic, gradients in theirs. summed: a product of matrices follows."""
    for name in exact:
        # A loss is made of statistics, and between masks of both signs these are up to twice the largest.
        largest = torch.finfo(actual[name].dtype).max / (4 if name == "loss" and "both" in what else 1)
        narrow = 1.01 * ROUNDING.get(actual[name].dtype, 0.0)
        rtol = narrow + (1e-11 if dtype == torch.float64 else 1e-5)
        size = exact[name].abs().nan_to_num(posinf=0).max().item() if summed else 0.0
        floor = (1 + size) * (1e-11 if dtype == torch.float64 else 2e-5) + SMALLEST.get(
            actual[name].dtype, 0.0
        )
        assert_representable(actual[name], exact[name], rtol, floor, f"{what}: {name}", largest)


def head(bias, dtype=torch.float32):
    """Weights [V, 8]; of masked classes 0, for beside a sentinel a product is no more than its rounding."""
    return randn(bias.shape[0], 8, seed=2, dtype=dtype).masked_fill(bias.abs()[:, None] > 1e4, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_logits(backend, dtype):
    """Fails if a block of sentinels, alone or among others, spoils a row's loss or its logits' gradient."""
    for what, values, target, terms in cases(dtype, 2100):
        logits = values.where(values.abs() > 1e4, values + randn(ROWS, 2100, seed=5, dtype=dtype))
        problem = Problem({"input": logits}, target, {**terms, "reduction": "none"})
        if truth_holds(terms, values):
            judge(ours(problem, backend=backend), oracle(problem), dtype, f"{what}, {terms}", summed=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masking_bias(backend, strategy, dtype, small_tiles):
    """Fails if a masking bias, tile by tile, spoils the loss or a gradient of either strategy."""
    for number, (what, bias, target, terms) in enumerate(cases(dtype, 600)):
        if "logit_l2" in terms and "softcap" not in terms and bias.abs().max() > 1e10:
            terms = {}  # the gradient of the hidden states then sums numbers past the largest
        leaves = {
            "input": randn(ROWS, 8, seed=1, dtype=dtype),
            "weight": head(bias, dtype),
            "bias": bias,
        }
        problem = Problem(leaves, target, {**terms, "reduction": ("none", "sum", "mean")[number % 3]})
        if truth_holds(terms, bias):
            actual = ours(problem, backend=backend, strategy=strategy)
            judge(actual, oracle(problem), dtype, f"{what}, {terms}", summed=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_statistic(backend, kind, small_tiles):
    """Fails if any public statistic, or the gradient of them all, is NaN or wrong beside sentinels."""
    for pattern, sentinel in product(PATTERNS, sentinels(torch.float32)):
        bias, classes = mask(600, sentinel, pattern, torch.float32)
        target = make_target(kind, bias, classes, pattern)
        leaves = (randn(ROWS, 8, seed=1), head(bias), bias)
        results = {}
        for name in ("ours", "exact"):
            dtype = torch.float32 if name == "ours" else torch.float64
            hidden, weight, shift = (t.to(dtype).requires_grad_() for t in leaves)
            if name == "ours":
                stats = tightrope.linear_vocab_stats(hidden, weight, target, shift, backend=backend)
            else:
                b = reference.dense_target(plain(target), 600, dtype=dtype)[0]
                stats = reference.row_stats(reference.logits(hidden, weight, shift), b)
            fields = {k: v for k, v in present(stats).items() if k not in ("argmax", "logit_square_sum")}
            total = sum((i + 1) * v.sum() for i, v in enumerate(fields.values()))
            results[name] = present(stats) | {"gradient": torch.autograd.grad(total, shift)[0]}
        z = reference.logits(*(t.double() for t in leaves)).masked_fill(bias.isinf(), 0.0)
        # Sums of logits of both signs, and what is relative to the largest, have its rounding.
        rounding = {"logit_sum": 1e-6 * z.abs().sum(-1), "target_logit": 1e-6 * z.amax(-1).clamp_min(0)}
        assert torch.equal(results["ours"].pop("argmax"), results["exact"].pop("argmax"))
        for name, exact in results["exact"].items():
            floor = 1e-4 + rounding.get(name, 0.0)
            what = f"{pattern}, {sentinel}: {name}"
            assert_representable(results["ours"][name], exact, 1e-5, floor, what)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_up_to_its_largest(backend, small_tiles):
    """Fails if float64 is not as safe as float32: its truth needs a wider exponent than PyTorch has."""
    lowest = torch.finfo(torch.float64).min
    if np.finfo(np.longdouble).maxexp <= np.finfo(np.float64).maxexp:
        pytest.skip("long double has the exponents of double here")
    for pattern in PATTERNS:
        values, classes = mask(600, lowest, pattern, torch.float64)
        target = make_target("dense", values, classes, pattern).double()
        hidden, weight = torch.zeros(ROWS, 1).double(), torch.zeros(600, 1).double()
        stats = tightrope.linear_vocab_stats(hidden, weight, target, values, backend=backend)
        wide, b = (t.numpy().astype(np.longdouble) for t in (values.expand(ROWS, -1), target))
        log_p = wide - wide.max(-1, keepdims=True)
        log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
        exact = {
            "target_log_prob": np.where(b == 0, 0, b * np.where(b == 0, 0, log_p)).sum(-1),
            "mean_log_prob": log_p.mean(-1),
            "collision": np.exp(2 * log_p).sum(-1),
            "target_prob": (b * np.exp(log_p)).sum(-1),
        }
        for name, value in exact.items():
            with np.errstate(over="ignore"):
                double = torch.from_numpy(value.astype(np.float64))
            assert_representable(getattr(stats, name), double, 1e-11, 1e-11, f"{pattern}: {name}")


def parts_of(z, target, cuts):
    """Partial statistics of pieces of rows of logits."""
    for start, stop in pairwise(cuts):
        partial, argmax = statistics.empty_partial(z.shape[0], z.dtype, z.device)
        dense = target[:, start:stop]
        ops.row_stats(
            z[:, start:stop], partial, argmax, start, None, dense, None, None, None, None, 1.0, None
        )
        yield partial


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_merge_is_associative(dtype):
    """Fails if parts of sentinels, of -inf or of nothing do not merge in every order to the same."""
    for pattern, sentinel in product(PATTERNS, (torch.finfo(dtype).min, -1e9)):
        values, classes = mask(96, sentinel, pattern, dtype)
        target = make_target("dense", values, classes, pattern).to(dtype)
        parts = list(parts_of(values.expand(ROWS, -1).contiguous(), target, range(0, 97, 16)))
        parts.append(statistics.empty_partial(ROWS, dtype, values.device)[0])
        forwards, backwards = parts[0], parts[-1]
        for left, right in zip(parts[1:], parts[-2::-1]):
            forwards, backwards = statistics.merge(forwards, left), statistics.merge(right, backwards)
        (whole,) = parts_of(values.expand(ROWS, -1).contiguous(), target, (0, 96))
        for merged in (forwards, backwards):
            torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)
            assert not merged.isnan().any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rows_keep_their_bits(backend, strategy, small_tiles):
    """Fails if a row whose logits are masked changes a row beside it."""
    hidden, weight = randn(40, 8, seed=1), randn(600, 8, seed=2)
    hidden[:, 7], weight[:, 7] = 0.0, torch.finfo(torch.float32).min
    weight[300:303, 7] = 0.0
    target = 300 + torch.arange(40) % 3
    options = {"balance": 0.3, "label_smoothing": 0.1, "reduction": "none"}
    run = {"backend": backend, "strategy": strategy}
    usual = ours(Problem({"input": hidden, "weight": weight}, target, options), **run)
    hidden[5, 7] = 1.0
    problem = Problem({"input": hidden, "weight": weight}, target, options)
    masked, exact = ours(problem, **run), oracle(problem)
    others = torch.arange(40) != 5
    for name in ("loss", "input"):
        # The last weight of every class is huge, and so are the gradients of the last hidden state.
        assert torch.equal(masked[name][others], usual[name][others])
    assert_representable(masked["loss"], exact["loss"], 1e-5, 1e-5)
    assert_representable(masked["weight"], exact["weight"], 1e-5, 1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_is_that_of_pytorch(backend, strategy):
    """Fails at a vocabulary of real size if the loss or its gradients are not those of float64 PyTorch."""
    vocab, classes = 32000, torch.tensor([319, 350, 315, 360])
    bias = torch.full((vocab,), torch.finfo(torch.float32).min)
    bias[classes] = 0.0
    target = classes[torch.arange(16) % 4]
    target[3] = 20000  # masked: a loss of 3.4e38 / 16
    leaves = {"input": randn(16, 8, seed=1), "weight": randn(vocab, 8, seed=2), "bias": bias}
    for smoothing in (0.0, 0.1):

        def pytorch(hidden, weight, target, bias, label_smoothing=smoothing):
            z = hidden @ weight.t() + bias
            return F.cross_entropy(z, target, label_smoothing=label_smoothing)

        problem = Problem(leaves, target, {"label_smoothing": smoothing})
        exact = evaluate(pytorch, Problem(leaves, target), torch.float64)
        judge(
            ours(problem, backend=backend, strategy=strategy),
            exact,
            torch.float32,
            f"smoothing {smoothing}",
            summed=True,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_masks_of_logits(backend):
    """Fails if logits that were filled outside their top 50 lose their loss."""
    logits = randn(64, 32000, seed=1)
    keep = logits.topk(50, -1)
    masked = torch.full_like(logits, torch.finfo(logits.dtype).min).scatter(-1, keep.indices, keep.values)
    problem = Problem({"input": masked}, keep.indices[:, 7], {"balance": 0.2})
    judge(ours(problem, backend=backend), oracle(problem), torch.float32, "top 50", summed=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_z_loss_whose_square_overflows(backend):
    """Fails if lse^2 is formed before its weight, which brings it back into range."""
    logits = rand(ROWS, 300, seed=1) + 1e20
    problem = Problem({"input": logits}, torch.arange(ROWS), {"z_loss": 1e-4, "reduction": "none"})
    actual, exact = ours(problem, backend=backend), oracle(problem)
    assert exact["loss"].max() < LARGEST
    judge(actual, exact, torch.float32, "z_loss", summed=False)
