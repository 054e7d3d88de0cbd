"""What a caller weighs and counts with: weights of zero mask, numbers of any kind are numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tightrope
from calls import CALLS, every_loss
from helpers import BACKENDS, assert_within, class_indices, present, rand, randn, top_k, upstream_of
from tightrope import reference

pytestmark = pytest.mark.one_in(3)

ROWS, VOCAB, WIDTH = 40, 301, 8
backends = pytest.mark.parametrize("backend", BACKENDS)
skipping = pytest.mark.parametrize("skip_ignored", [None, False])
strategies = pytest.mark.parametrize("strategy", ["chunked", "streaming", "logits"])


def leaves():
    return randn(ROWS, WIDTH).requires_grad_(), randn(VOCAB, WIDTH, seed=1).requires_grad_()


def loss_of(strategy, hidden, weight, target, bias=None, skip_ignored=None, **options):
    if strategy == "logits":
        logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
        return tightrope.reality_creativity_loss(logits, target, **options)
    options |= {"strategy": strategy, "skip_ignored": skip_ignored, "workspace_mb": 0.02}
    return tightrope.linear_reality_creativity_loss(hidden, weight, target, bias, **options)


def rows_of(hidden, weight, target):
    """The loss of each row that every function of calls.py gives, in float64 by the reference."""
    head = hidden.double(), weight.double()
    return reference.linear_reality_creativity_loss(*head, target, balance=0.1, reduction="none")


def poisoned(kind):
    """(hidden states, target, mask): the rows of weight 0 hold what must not be looked at."""
    hidden, mask = randn(ROWS, WIDTH), torch.ones(ROWS)
    mask[[3, 17, 39]] = 0.0
    dropped = mask == 0
    if kind == "hidden":
        hidden[dropped] = torch.nan
        return hidden, class_indices((ROWS,), VOCAB), mask
    if kind == "class":
        target = class_indices((ROWS,), VOCAB)
        target[dropped] = torch.tensor([VOCAB, -1, 2**40])
        return hidden, target, mask
    if kind == "top_k":
        pairs = top_k((ROWS,), VOCAB)
        pairs.indices[dropped], pairs.probs[dropped] = 2**40, torch.nan
        return hidden, pairs, mask
    target = torch.softmax(randn(ROWS, VOCAB, seed=2), -1)
    target[dropped] = {"dense nan": torch.nan, "dense inf": torch.inf, "dense": -1.0}[kind]
    return hidden, target, mask


KINDS = ["hidden", "class", "top_k", "dense nan", "dense inf", "dense"]


@backends
@skipping
@strategies
@pytest.mark.parametrize("reality", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_zero_ignores(kind, reduction, reality, strategy, skip_ignored, backend, one_thread):
    """0 times NaN is NaN: the row went through all GEMMs and poisoned the head's gradient.

    The others' loss and gradients are those of float64: a factor lost with the rows left out would show.
    """
    if kind == "hidden" and strategy == "logits":
        pytest.skip("there it is plain PyTorch's product that NaN goes through")
    hidden, target, mask = poisoned(kind)
    weight, keep = leaves()[1], mask.bool()
    part = tuple(t[keep] for t in target) if kind == "top_k" else target[keep]
    options = {"balance": 0.2, "reality": reality, "reduction": reduction, "label_smoothing": 0.1}

    more = {"row_weight": mask, "skip_ignored": skip_ignored, "backend": backend}
    given = hidden.clone().requires_grad_()
    loss = loss_of(strategy, given, weight, target, **options, **more)
    upstream = upstream_of(loss)
    to_hidden, to_weight = torch.autograd.grad(loss, (given, weight), upstream)
    exact = [t.detach().double().requires_grad_() for t in (hidden[keep], weight)]
    exact_loss = reference.linear_reality_creativity_loss(*exact, part, **options)
    if reduction == "none":
        assert not loss[~keep].any()
        loss, upstream = loss[keep], upstream[keep]
    exact_hidden, exact_weight = torch.autograd.grad(exact_loss, exact, upstream.double())
    assert not to_hidden[~keep].any()
    for name, a, b in (
        ("loss", loss, exact_loss),
        ("input", to_hidden[keep], exact_hidden),
        ("weight", to_weight, exact_weight),
    ):
        assert_within(a, b, 1e-5, what=name)


@every_loss
def test_statistics_of_a_row_of_weight_zero(call):
    """Exactly as an ignored row: zeros, and -1 as argmax."""
    function, own = CALLS[call]
    hidden, weight = leaves()
    mask = torch.ones(ROWS)
    mask[5] = 0
    _, stats = function(
        hidden, weight, class_indices((ROWS,), VOCAB), row_weight=mask, return_stats=True, **own
    )
    for name, value in present(stats).items():
        assert value[5] == (-1 if name == "argmax" else 0), name
        assert name == "argmax" or value[4] != 0


@every_loss
def test_a_learned_weight_that_is_zero_gets_its_gradient(call):
    """It is the loss of its row, as of any row: only a weight that nobody learns may skip it."""
    function, own = CALLS[call]
    hidden, weight = leaves()
    given = torch.ones(ROWS).index_fill_(0, torch.tensor([2]), 0.0).requires_grad_()
    target = class_indices((ROWS,), VOCAB)
    loss = function(hidden, weight, target, row_weight=given, reduction="sum", **own)
    (0.625 * loss).backward()
    assert_within(given.grad, 0.625 * rows_of(hidden, weight, target), 1e-5)


def test_a_shift_and_weights():
    """The weight stands where the prediction is made; the target one further is not looked at."""
    hidden, target = randn(2, 6, WIDTH), class_indices((2, 6), VOCAB)
    teacher = F.one_hot(target, VOCAB).float()
    pairs = tightrope.TopKTarget(target[..., None].clone(), torch.ones(2, 6, 1))
    mask = torch.ones(2, 6)
    mask[0, 2] = mask[1, 4] = 0
    poison = {(0, 3), (1, 5), (0, 0), (1, 0)}  # what no weighing position predicts
    for place in poison:
        teacher[place] = torch.nan
        pairs.indices[place] = 10**6
    labels = target.clone()
    labels[0, 3] = labels[1, 5] = -100
    weight = leaves()[1]
    expected = tightrope.linear_reality_creativity_loss(hidden, weight, labels, shift=1)
    for given in (teacher, pairs):
        for strategy in ("chunked", "streaming"):
            loss = tightrope.linear_reality_creativity_loss(
                hidden, weight, given, shift=1, row_weight=mask, strategy=strategy
            )
            assert_within(loss, expected.double(), 1e-6)


def test_all_weights_zero():
    hidden, weight = leaves()
    for reduction in ("none", "mean", "sum"):
        loss = tightrope.linear_reality_creativity_loss(
            hidden, weight, class_indices((ROWS,), VOCAB), row_weight=torch.zeros(ROWS), reduction=reduction
        )
        assert not loss.any()
        assert not torch.autograd.grad(loss.sum(), weight)[0].any()


def test_rows_of_weight_zero_are_not_computed():
    """No cost: they are gathered out before the first product."""
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight = leaves()
    mask = (torch.arange(ROWS) < 10).float()
    counts = []
    for row_weight in (None, mask):
        with FlopCounterMode(display=False) as counter:
            tightrope.linear_reality_creativity_loss(
                hidden, weight, class_indices((ROWS,), VOCAB), row_weight=row_weight
            ).backward()
        counts.append(counter.get_total_flops())
    assert counts[1] * ROWS == counts[0] * 10 > 0


@every_loss
def test_weights_of_both_signs(call):
    """Advantages: their sum is nearly nothing, and the loss was -1789332 where -0.013 is right.

    A gradient that lost the weight of its row, or took another's, would show.
    """
    function, own = CALLS[call]
    hidden, weight = leaves()
    target, advantage = class_indices((ROWS,), VOCAB), randn(ROWS, seed=6)
    advantage -= advantage.mean()
    with pytest.raises(ValueError, match=r"row_weight.*one sign.*normalizer="):
        function(hidden, weight, target, row_weight=advantage, **own)
    loss = function(hidden, weight, target, row_weight=advantage, normalizer=ROWS, **own)
    exact = (advantage * rows_of(hidden, weight, target)).sum() / ROWS
    assert_within(loss, exact, 1e-4)
    grads, truths = (torch.autograd.grad(0.625 * x, (hidden, weight)) for x in (loss, exact))
    for gradient, truth in zip(grads, truths):
        assert_within(gradient, truth, 1e-5)
    for reduction in ("none", "sum"):
        function(hidden, weight, target, row_weight=advantage, reduction=reduction, **own)
    # Of one sign, and of the tokens that count: no error, and a mean by the weights, not by the tokens.
    one_sign = -rand(ROWS)
    loss = function(hidden, weight, target, row_weight=one_sign, **own)
    assert_within(loss, (one_sign * rows_of(hidden, weight, target)).sum() / one_sign.sum(), 1e-6)
    function(hidden, weight, target.masked_fill(advantage < 0, -100), row_weight=advantage, **own)


FORMS = {
    "int": int,
    "float": float,
    "numpy int64": np.int64,
    "numpy int32": np.int32,
    "numpy float64": np.float64,
    "numpy float32": np.float32,
    "numpy float16": np.float16,
    "0-dimensional": torch.tensor,
    "one element": lambda x: torch.tensor([x]),
    "one element, float": lambda x: torch.tensor([[float(x)]]),
    "0-dimensional, int32": lambda x: torch.tensor(int(x), dtype=torch.int32),
}


@every_loss
@pytest.mark.parametrize("form", FORMS)
def test_normalizers_of_any_form(form, call):
    """Trainer counts items as an int, a float, a tensor, and a tensor of one element under DataParallel."""
    function, own = CALLS[call]
    hidden, weight = leaves()
    target = class_indices((ROWS,), VOCAB)
    loss = function(hidden, weight, target, normalizer=FORMS[form](16), **own)
    assert_within(loss, rows_of(hidden, weight, target).sum() / 16, 1e-6)
    zero = function(hidden, weight, target, normalizer=FORMS[form](0), **own)
    assert zero.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(zero, (hidden, weight)))
    with pytest.raises(ValueError, match=r"normalizer.*-5.*at least 0"):
        function(hidden, weight, target, normalizer=FORMS[form](-5), **own)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["float", "numpy float32", "0-dimensional", "one element"])
def test_normalizers_that_are_no_numbers(form, bad):
    hidden, weight = leaves()
    with pytest.raises(ValueError, match=r"normalizer.*finite"):
        tightrope.linear_reality_creativity_loss(
            hidden, weight, class_indices((ROWS,), VOCAB), normalizer=FORMS[form](bad)
        )


@pytest.mark.parametrize("form", ["numpy float32", "numpy float64", "0-dimensional", "one element"])
def test_numeric_options_of_any_form(form):
    """Each was a TypeError, where PyTorch takes them."""
    hidden, weight = leaves()
    target, make = class_indices((ROWS,), VOCAB), FORMS[form]
    options = {
        "balance": 0.25,
        "label_smoothing": 0.125,
        "logit_scale": 0.5,
        "softcap": 8.0,
        "z_loss": 0.5,
        "logit_l2": 0.25,
        "workspace_mb": 1.0,
    }
    counts = {"ignore_index": int(target[0]), "shift": 0}
    expected = tightrope.linear_reality_creativity_loss(hidden, weight, target, **options, **counts)
    whole = {"one element": lambda x: torch.tensor([x]), "0-dimensional": torch.tensor}.get(form, np.int64)
    loss = tightrope.linear_reality_creativity_loss(
        hidden,
        weight,
        target,
        **{name: make(value) for name, value in options.items()},
        **{name: whole(value) for name, value in counts.items()},
    )
    assert torch.equal(loss, expected)
    module = tightrope.LinearRealityCreativityLoss(logit_scale=make(0.5), balance=make(0.25))
    assert module(hidden, weight, target).isfinite()


def test_float64_takes_what_float32_cannot():
    hidden, weight = randn(3, 4, dtype=torch.float64) * 1e-40, randn(7, 4, dtype=torch.float64)
    loss = tightrope.linear_reality_creativity_loss(hidden, weight, torch.tensor([0, 1, 2]), logit_scale=1e40)
    exact = F.cross_entropy((hidden @ weight.t()) * 1e40, torch.tensor([0, 1, 2]))
    assert_within(loss, exact, 1e-12)
