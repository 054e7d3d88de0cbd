"""Every second derivative in float64 against finite differences of the first: the table of test_gradcheck.

``torch.autograd.gradgradcheck`` differentiates the gradients, by the tensors and by the upstream gradient, so
what the chunked strategy makes again by streaming, the curvature by chunks of rows and by tiles, and what
PyTorch does between statistics and loss are all in it. Where the primitives differ both backends are asked.
"""

from dataclasses import replace

import pytest
import torch

import tightrope
from helpers import BACKENDS, STRATEGIES, class_indices, rand, randn
from test_gradcheck import (
    CREATIVITY,
    OPTIONS,
    REALITY,
    REDUCTIONS,
    SINGLE_TERMS,
    everything,
    floating_fields,
    targets,
    tensors,
)
from tightrope.strategies import plan

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.one_in(8),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own, of forward mode
]
N, V, D = 4, 7, 3
everywhere = pytest.mark.parametrize("strategy", STRATEGIES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Bytes for two tiles of logits: chunks of some rows, or tiles for all of them.
BY = {"chunks": None, "tiles": 1e-5}
every_way = pytest.mark.parametrize("by", BY)


def check(function, leaves, fast=False, **how):
    """gradgradcheck of ``function(**leaves)`` with respect to every leaf and the upstream gradient."""
    names = list(leaves)
    values = [leaf.clone().requires_grad_() for leaf in leaves.values()]
    assert torch.autograd.gradgradcheck(
        lambda *args: function(**dict(zip(names, args))),
        values,
        eps=1e-6,
        atol=1e-6 if not fast else 1e-8,
        rtol=1e-5 if not fast else 1e-4,
        fast_mode=fast,
        **how,
    )


def check_loss(names, target, *, leaves=None, fast=False, **options):
    leaves = {name: leaf for name, leaf in (leaves or tensors()).items() if name in names}
    check(lambda **kw: tightrope.linear_reality_creativity_loss(target=target, **kw, **options), leaves, fast)


@everywhere
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("creativity", CREATIVITY)
@pytest.mark.parametrize("reality", REALITY)
def test_terms(reality, creativity, reduction, strategy):
    """Any wrong term of the derivative of the form, among all of them at once."""
    check_loss(
        ["input", "weight", "bias", "balance", "row_weight"],
        targets()["index"],
        reality=reality,
        creativity=creativity,
        z_loss=0.1,
        logit_l2=0.05,
        reduction=reduction,
        strategy=strategy,
    )


@every_backend
@every_way
@pytest.mark.parametrize("term", SINGLE_TERMS)
def test_single_terms(term, by, backend):
    """Two wrong terms that cancel."""
    check_loss(
        ["input", "weight"], targets()["index"], backend=backend, workspace_mb=BY[by], **SINGLE_TERMS[term]
    )


@pytest.mark.parametrize("reality", REALITY)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, reality):
    """An option that the second derivative forgets: a slope of the softcap, a mask, a normaliser."""
    names = ["input", "weight", "bias", "row_weight"]
    if "balance" not in OPTIONS[option]:
        names.append("balance")
    check_loss(
        names,
        targets()["index"],
        reality=reality,
        creativity="collision" if reality == "squared_error" else "entropy",
        **OPTIONS[option],
    )


@every_backend
@every_way
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reality", REALITY)
@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_targets(kind, reality, label_smoothing, by, backend):
    """A kind of target that a primitive of second order reads wrongly."""
    check_loss(
        ["input", "weight", "bias", "balance"],
        targets()[kind],
        reality=reality,
        label_smoothing=label_smoothing,
        softcap=4.0,
        workspace_mb=BY[by],
        backend=backend,
    )


@every_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["index", "dense", "top_k"])
def test_class_weights(kind, label_smoothing, backend):
    """Weighted targets, which are made a tile at a time where they are smoothed."""
    check_loss(
        ["input", "weight", "balance"],
        targets()[kind],
        class_weight=0.5 + rand(V, seed=20, dtype=torch.float64),
        label_smoothing=label_smoothing,
        backend=backend,
    )


@everywhere
@pytest.mark.parametrize("kind", ["index", "dense", "top_k"])
def test_shift(kind, strategy):
    """Targets of another row than the statistics'."""
    check_loss(
        ["input", "weight", "balance", "row_weight"],
        targets((2, 3))[kind],
        leaves=tensors((2, 3)),
        shift=1,
        strategy=strategy,
    )


SUPPORTS = {
    "min_p": tightrope.MinP(0.3),
    "classes": tightrope.Classes(class_indices((N, 3), V, seed=21, ignored=0.3)),
    "empty and full": tightrope.Classes(
        torch.tensor([[-100] * V, list(range(V)), [0, 1] + [-100] * (V - 2), [2] * V])
    ),
}


@every_backend
@every_way
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("support", SUPPORTS)
def test_statistics_of_a_set(support, softcap, by, backend):
    """The derivatives of masses that come from their ratio, and of a side that is empty."""
    chosen = {name: tensors()[name] for name in ("input", "weight", "bias")}
    factors = randn(12, N, seed=22, dtype=torch.float64)

    def function(**kw):
        stats = tightrope.linear_vocab_stats(
            target=targets()["index"],
            support=SUPPORTS[support],
            softcap=softcap,
            workspace_mb=BY[by],
            backend=backend,
            **kw,
        )
        fields = (torch.where(x.isfinite(), x, 0.0) for x in floating_fields(stats))
        return sum((f * x.square()).sum() for f, x in zip(factors, fields))

    check(function, chosen)


@everywhere
@pytest.mark.parametrize("creativity", ["entropy", "support_entropy"])
@pytest.mark.parametrize("transform", [{}, {"softcap": 2.0, "logit_scale": 0.7}])
def test_temperature_of_rows(transform, creativity, strategy):
    """A temperature that is learned curves the loss with everything else."""
    leaves = {**tensors(), "temperature": 0.5 + rand(N, seed=23, dtype=torch.float64)}
    check_loss(
        ["input", "weight", "bias", "balance", "temperature"],
        targets()["index"],
        leaves=leaves,
        creativity=creativity,
        logit_l2=0.1,
        z_loss=0.1,
        strategy=strategy,
        **transform,
    )


@everywhere
@pytest.mark.parametrize("kind", ["index", "dense", "top_k"])
@pytest.mark.parametrize("workspace_mb", [1e-3, 1.0])
def test_several_tiles_and_chunks(workspace_mb, kind, strategy, small_tiles):
    """Sums over tiles, and a head's derivative over several chunks, each in the right place."""
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
        workspace_mb=workspace_mb,
        strategy=strategy,
    )


@every_backend
def test_chunks_of_rows(backend, monkeypatch):
    """More than one chunk, each with its place in the gradients."""
    monkeypatch.setattr(plan, "CPU", replace(plan.CPU, max_chunk_rows=2, min_chunk_rows=1))
    lead = (7,)
    check_loss(
        ["input", "weight", "bias", "balance"],
        class_indices(lead, V, seed=24, ignored=0.3),
        leaves=tensors(lead),
        backend=backend,
    )


@every_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("reality", REALITY)
@pytest.mark.parametrize("kind", ["index", "dense", "top_k"])
def test_logits_function(kind, reality, reduction, backend):
    """The same forms where the logits are given."""
    leaves = tensors()
    chosen = {"x": randn(N, V, seed=9, dtype=torch.float64)}
    chosen |= {n: leaves[n] for n in ("balance", "row_weight")}
    chosen["temperature"] = 0.5 + rand(N, seed=25, dtype=torch.float64)
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


@every_backend
@pytest.mark.parametrize("kind", ["index", "dense", "top_k", None])
def test_statistics(kind, backend):
    """Every floating statistic with an upstream gradient of its own, which has a gradient too."""
    target = kind and targets()[kind]
    leaves = {name: leaf for name, leaf in tensors().items() if name in ("input", "weight", "bias")}
    check(
        lambda **kw: floating_fields(tightrope.linear_vocab_stats(target=target, backend=backend, **kw)),
        leaves,
    )


@everywhere
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_user_loss(reduction, strategy):
    """A user's loss of every statistic and of two tensors of the rows, curved in each."""
    leaves = tensors()
    chosen = {name: leaves[name] for name in ("input", "weight", "bias", "row_weight")}
    chosen["gamma"] = 1.5 + rand(N, seed=11, dtype=torch.float64)
    chosen["advantage"] = randn(N, seed=12, dtype=torch.float64)

    def function(gamma, advantage, **kw):
        return tightrope.linear_vocab_loss(
            target=targets()["index"],
            loss_fn=everything,
            row_args=(gamma, advantage),
            reduction=reduction,
            strategy=strategy,
            **kw,
        )

    check(function, chosen)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("creativity", [*CREATIVITY, "support_entropy"])
def test_in_forward_mode(linear, creativity):
    """A tangent of a value or of a gradient that forward mode loses, and batches of either."""
    leaves = tensors()
    options = {"creativity": creativity, "reality": "squared_error", "softcap": 3.0, "z_loss": 0.1}
    chosen = {n: leaves[n] for n in ("input", "weight", "bias", "balance", "row_weight")}
    if not linear:
        chosen = {"logits": randn(N, V, seed=9, dtype=torch.float64), "balance": leaves["balance"]}
    chosen["temperature"] = 0.5 + rand(N, seed=25, dtype=torch.float64)
    names, target = list(chosen), targets()["index"]

    def function(*args):
        named = dict(zip(names, args))
        of = tightrope.linear_reality_creativity_loss if linear else tightrope.reality_creativity_loss
        return of(target=target, **named, **options)

    values = [x.clone().requires_grad_() for x in chosen.values()]
    how = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(
        function, values, check_forward_ad=True, check_batched_forward_grad=True, **how
    )
    assert torch.autograd.gradgradcheck(function, values, check_fwd_over_rev=True, **how)
