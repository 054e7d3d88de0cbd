"""Every gradient in float64 against finite differences: terms, reductions, options, both strategies.

``torch.autograd.gradcheck`` needs no oracle, so an error shared by the library and the reference
shows here. Sizes are tiny, since each input element costs two calls; a few cases take a vocabulary
wider than a tile and a workspace of a few bytes, in fast mode (one random direction), so that
merging tiles and chunks is differentiated too.
"""

import itertools

import pytest
import torch

import tightrope
from helpers import BACKENDS, STRATEGIES, class_indices, rand, randn, top_k

pytestmark = [pytest.mark.one_in(3), pytest.mark.usefixtures("one_thread")]
N, V, D = 4, 7, 3
REALITY = ["cross_entropy", "squared_error"]
CREATIVITY = ["entropy", "collision"]
REDUCTIONS = ["none", "mean", "sum"]
everywhere = pytest.mark.parametrize(
    ("backend", "strategy"),
    [
        pytest.param(*backend.values, strategy, marks=backend.marks)
        for backend, strategy in itertools.product(BACKENDS, STRATEGIES)
    ],
)


def double(*shape, seed):
    return randn(*shape, seed=seed, dtype=torch.float64)


def tensors(lead=(N,), vocab=V):
    """Named leaves: hidden states, head, bias, and a balance and weight for each token."""
    return {
        "input": double(*lead, D, seed=1),
        "weight": double(vocab, D, seed=2),
        "bias": double(vocab, seed=3),
        "balance": 0.2 + 0.6 * rand(*lead, seed=4, dtype=torch.float64),
        "row_weight": 0.5 + rand(*lead, seed=5, dtype=torch.float64),
    }


def targets(lead=(N,), vocab=V):
    b = torch.softmax(double(*lead, vocab, seed=6), -1) * 1.2
    return {
        "index": class_indices(lead, vocab, seed=7, ignored=0.3),
        "dense": b,
        "top_k": top_k(lead, vocab, seed=8, dtype=torch.float64),
    }


def check(function, leaves, fast=False):
    """gradcheck of ``function(**leaves)`` with respect to every leaf."""
    names = list(leaves)
    values = [leaf.clone().requires_grad_() for leaf in leaves.values()]
    assert torch.autograd.gradcheck(
        lambda *args: function(**dict(zip(names, args))),
        values,
        eps=1e-6,
        # A direction has length 1: over a wide vocabulary one term of a gradient is small in it.
        atol=1e-6 if not fast else 1e-8,
        rtol=1e-5 if not fast else 1e-4,
        fast_mode=fast,
    )


def check_loss(names, target, *, leaves=None, fast=False, **options):
    leaves = {name: leaf for name, leaf in (leaves or tensors()).items() if name in names}
    function = tightrope.linear_reality_creativity_loss
    check(lambda **kw: function(target=target, **kw, **options), leaves, fast)


@everywhere
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("creativity", CREATIVITY)
@pytest.mark.parametrize("reality", REALITY)
def test_terms(reality, creativity, reduction, backend, strategy):
    """All terms at once, balance and weights per token, one bias: the whole form of the gradient."""
    check_loss(
        ["input", "weight", "bias", "balance", "row_weight"],
        targets()["index"],
        reality=reality,
        creativity=creativity,
        z_loss=0.1,
        logit_l2=0.05,
        reduction=reduction,
        backend=backend,
        strategy=strategy,
    )


SINGLE_TERMS = {
    "cross_entropy": {},
    "squared_error": {"reality": "squared_error"},
    "entropy": {"balance": 1.0},
    "collision": {"balance": 1.0, "creativity": "collision"},
    "z_loss": {"balance": 0.5, "z_loss": 1.0},
    "logit_l2": {"balance": 0.5, "logit_l2": 1.0},
}


@everywhere
@pytest.mark.parametrize("term", SINGLE_TERMS)
def test_single_terms(term, backend, strategy):
    """Each term alone, so that two wrong terms cannot cancel."""
    check_loss(
        ["input", "weight"],
        targets()["index"],
        backend=backend,
        strategy=strategy,
        **SINGLE_TERMS[term],
    )


OPTIONS = {
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.6},
    "scale_and_softcap": {"logit_scale": 1.7, "softcap": 3.0, "logit_l2": 0.1},
    "label_smoothing": {"label_smoothing": 0.2},
    "all_smoothed": {"label_smoothing": 1.0},
    "float_balance": {"balance": 0.3},
    "normalizer": {"normalizer": 2.5},
    "tensor_normalizer": {"normalizer": torch.tensor(2.5)},
    "one_row_chunks": {"workspace_mb": 1e-5},
    "masked_not_skipped": {"skip_ignored": False},
    "skipped": {"skip_ignored": True},
}


@everywhere
@pytest.mark.parametrize("reality", REALITY)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, reality, backend, strategy):
    names = ["input", "weight", "bias", "row_weight"]
    if "balance" not in OPTIONS[option]:
        names.append("balance")
    check_loss(
        names,
        targets()["index"],
        reality=reality,
        creativity="collision" if reality == "squared_error" else "entropy",
        backend=backend,
        strategy=strategy,
        **OPTIONS[option],
    )


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reality", REALITY)
@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_targets(kind, reality, label_smoothing, reduction, backend, strategy):
    check_loss(
        ["input", "weight", "bias", "balance"],
        targets()[kind],
        reality=reality,
        label_smoothing=label_smoothing,
        reduction=reduction,
        softcap=4.0,
        backend=backend,
        strategy=strategy,
    )


@everywhere
@pytest.mark.parametrize("kind", ["index", "dense", "top_k"])
def test_shift(kind, backend, strategy):
    check_loss(
        ["input", "weight", "balance", "row_weight"],
        targets((2, 3))[kind],
        leaves=tensors((2, 3)),
        shift=1,
        backend=backend,
        strategy=strategy,
    )


@everywhere
@pytest.mark.parametrize("kind", ["index", "dense", "top_k"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_tiles_and_chunks(reduction, kind, backend, strategy, small_tiles):
    vocab = 1025
    check_loss(
        ["input", "weight", "bias", "balance", "row_weight"],
        targets(vocab=vocab)[kind],
        leaves=tensors(vocab=vocab),
        fast=True,
        reality="squared_error" if kind == "dense" else "cross_entropy",
        label_smoothing=0.1,
        z_loss=0.01,
        logit_l2=1e-3,
        softcap=5.0,
        reduction=reduction,
        workspace_mb=1e-3,
        backend=backend,
        strategy=strategy,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("reality", REALITY)
@pytest.mark.parametrize("kind", ["index", "dense", "top_k"])
def test_logits_function(kind, reality, reduction, backend):
    leaves = tensors()
    chosen = {"x": double(N, V, seed=9)} | {n: leaves[n] for n in ("balance", "row_weight")}
    check(
        lambda x, **kw: tightrope.reality_creativity_loss(
            x,
            targets()[kind],
            reality=reality,
            creativity="collision",
            label_smoothing=0.1,
            logit_scale=0.8,
            softcap=3.0,
            z_loss=0.1,
            logit_l2=0.05,
            reduction=reduction,
            backend=backend,
            **kw,
        ),
        chosen,
    )


def floating_fields(stats):
    return tuple(x for x in stats if x is not None and x.is_floating_point())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["index", "dense", "top_k", None])
@pytest.mark.parametrize("transform", [{}, {"softcap": 2.0, "logit_scale": 0.7}])
def test_statistics(transform, kind, backend):
    """Every floating statistic is an output of its own, so each gets its own upstream gradient."""
    target = kind and targets()[kind]
    leaves = {name: leaf for name, leaf in tensors().items() if name in ("input", "weight", "bias")}

    def function(**kw):
        stats = tightrope.linear_vocab_stats(target=target, backend=backend, **kw, **transform)
        return floating_fields(stats)

    assert len(function(**leaves)) == (6 if kind is None else 9)
    check(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_over_tiles_with_shift(backend, small_tiles):
    lead, vocab = (2, 3), 1025
    leaves = tensors(lead, vocab)
    chosen = {name: leaves[name] for name in ("input", "weight", "bias")}
    target = targets(lead, vocab)["index"]

    def function(**kw):
        options = {"shift": 1, "workspace_mb": 1e-3, "backend": backend}
        stats = tightrope.linear_vocab_stats(target=target, **kw, **options)
        scale = {"logit_sum": 1e-2, "logit_square_sum": 1e-3}
        return tuple(
            scale.get(name, 1) * x
            for name, x in zip(stats._fields, stats)
            if x is not None and name != "argmax"
        )

    check(function, chosen, fast=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_of_many_statistics(backend):
    """All upstream gradients at once, different in every row and field."""
    leaves = tensors()
    chosen = {name: leaves[name] for name in ("input", "weight", "bias")}
    factors = double(9, N, seed=10)

    def function(**kw):
        stats = tightrope.linear_vocab_stats(target=targets()["index"], backend=backend, **kw)
        return sum((f * x).sum() for f, x in zip(factors, floating_fields(stats)))

    check(function, chosen)


def focal(stats, gamma=2.0):
    """Any differentiable function of the statistics is a loss; this one is the design's example."""
    ce = stats.lse - stats.target_logit
    return (1 - (-ce).exp()) ** gamma * ce


def everything(stats, gamma, advantage):
    """A loss that uses each floating field and two tensors of the rows."""
    mixed = focal(stats, gamma) + advantage * stats.entropy - stats.collision.log()
    mixed = mixed + 0.3 * stats.target_prob.square() - 0.2 * stats.target_log_prob * gamma
    return mixed + 0.1 * stats.mean_log_prob + 0.05 * stats.logit_sum * stats.logit_square_sum


@everywhere
@pytest.mark.parametrize("workspace_mb", [None, 1e-5])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_user_loss(reduction, workspace_mb, backend, strategy):
    leaves = tensors()
    chosen = {name: leaves[name] for name in ("input", "weight", "bias", "row_weight")}
    chosen["gamma"] = 1.5 + rand(N, seed=11, dtype=torch.float64)
    chosen["advantage"] = double(N, seed=12)

    def function(gamma, advantage, **kw):
        return tightrope.linear_vocab_loss(
            target=targets()["index"],
            loss_fn=everything,
            row_args=(gamma, advantage),
            reduction=reduction,
            workspace_mb=workspace_mb,
            backend=backend,
            strategy=strategy,
            **kw,
        )

    check(function, chosen)


@everywhere
@pytest.mark.parametrize("kind", ["index", "dense", "top_k"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_user_loss_over_shifted_tokens(reduction, kind, backend, strategy):
    lead = (2, 3)
    chosen = {name: tensors(lead)[name] for name in ("input", "weight")}
    chosen["gamma"] = 1.5 + rand(2, 1, seed=13, dtype=torch.float64)  # broadcasts to the tokens

    def loss_fn(stats, gamma):
        return stats.entropy * gamma - stats.target_log_prob

    def function(gamma, **kw):
        return tightrope.linear_vocab_loss(
            target=targets(lead)[kind],
            loss_fn=loss_fn,
            row_args=(gamma,),
            softcap=3.0,
            shift=1,
            normalizer=3.0,
            reduction=reduction,
            backend=backend,
            strategy=strategy,
            **kw,
        )

    check(function, chosen)


@everywhere
def test_focal_with_defaults(backend, strategy):
    chosen = {name: tensors()[name] for name in ("input", "weight", "bias")}
    options = {"backend": backend, "strategy": strategy}

    def function(**kw):
        return tightrope.linear_vocab_loss(target=targets()["index"], loss_fn=focal, **kw, **options)

    check(function, chosen)
