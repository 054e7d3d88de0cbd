"""Second order through the public API with backend="triton" in the interpreter, against the dense loss."""

import math
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; test_triton_interpreter.py runs it", allow_module_level=True)

import torch

import tightrope
from helpers import STRATEGIES, assert_no_worse, assert_within, class_indices, plain, randn, top_k
from tightrope import backends, reference
from tightrope.backends import second
from triton_bounds import checked_bounds

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy warns where a GPU is silent
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own forward mode
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.one_in(12),
]
ROWS, VOCAB, WIDTH = 5, 75, 8
F32, F64 = torch.float32, torch.float64
TERMS = (
    dict(balance=0.3, softcap=4.0),
    dict(balance=0.6, reality="squared_error", creativity="collision", z_loss=0.01, logit_scale=-1.5),
    dict(balance=0.2, creativity="collision", label_smoothing=0.1, logit_l2=0.001),
)


@pytest.fixture(autouse=True)
def nothing_falls_back(monkeypatch):
    """Plain PyTorch in the place of a kernel would be right, and is no test of it."""

    def refuse(*_):
        raise AssertionError("plain PyTorch was asked for a primitive of second order")

    for name in ("row_tangent", "row_grad_tangent"):
        assert getattr(backends.BACKENDS["triton"], name) is not getattr(second, name)
        monkeypatch.setattr(second, name, refuse)


def leaves(dtype=F64):
    shapes = ((ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    return [randn(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def target_of(kind, dtype=F64):
    if kind == "dense":
        return torch.softmax(randn(ROWS, VOCAB, seed=9, dtype=dtype), -1)
    if kind == "topk":
        return top_k((ROWS,), VOCAB, k=4, seed=9, dtype=dtype)
    return class_indices((ROWS,), VOCAB, ignored=0.3)


def hvp(loss, values, directions):
    gradients = torch.autograd.grad(loss, values, create_graph=True)
    return [*(g.detach() for g in gradients), *torch.autograd.grad(gradients, values, directions)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["index", "dense", "topk"])
@pytest.mark.parametrize("terms", TERMS)
def test_a_hessian_vector_product(terms, kind, strategy):
    """A scalar, a target or an option that the drivers hand the kernels wrongly; a tile that is lost."""
    values, target = leaves(), target_of(kind)
    directions = [randn(*v.shape, seed=20 + i, dtype=F64) for i, v in enumerate(values)]
    hidden, weight, bias = values
    workspace = 1e-6 if strategy == "streaming" else None  # by tiles, and by chunks
    with checked_bounds():
        options = {"strategy": strategy, "workspace_mb": workspace, "backend": "triton", **terms}
        loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, bias, **options)
        actual = hvp(loss, values, directions)
    dense = reference.linear_reality_creativity_loss(hidden, weight, plain(target), bias, **terms)
    for one, expected in zip(actual, hvp(dense, values, directions)):
        assert_within(one, expected, 1e-12, 1e-14)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_float32(strategy):
    """A sum that loses digits in a kernel: beside plain PyTorch of float32, by the truth of float64."""
    target, directions = target_of("index"), [randn(*v.shape, seed=20 + i) for i, v in enumerate(leaves())]

    def product(function, dtype, **options):
        hidden, weight, bias = values = leaves(dtype)
        loss = function(hidden, weight, target, bias, balance=0.2, softcap=4.0, **options)
        return hvp(loss, values, [d.to(dtype) for d in directions])

    ours = product(tightrope.linear_reality_creativity_loss, F32, strategy=strategy, backend="triton")
    dense = reference.linear_reality_creativity_loss
    for one, exact, rough in zip(ours, product(dense, F64), product(dense, F32)):
        assert_no_worse(one, exact, rough, 1e-6 * (1 + exact.abs().max().item()))


@pytest.mark.parametrize("kind", ["min_p", "classes"])
def test_statistics_of_a_set(kind):
    """A side's sums or norms in another order than the drivers mean: forward mode, and over a backward."""
    values, target = leaves(), class_indices((ROWS,), VOCAB)
    directions = tuple(randn(*v.shape, seed=20 + i, dtype=F64) for i, v in enumerate(values))
    support = tightrope.MinP(0.3) if kind == "min_p" else tightrope.Classes(class_indices((ROWS, 6), VOCAB))
    values = tuple(v.detach() for v in values)

    def weighed(entropy, log_mass, rest, whole):
        return (entropy * torch.arange(1, ROWS + 1) + log_mass.square() + 0.5 * rest + whole).sum()

    def ours(hidden, weight, bias):
        stats = tightrope.linear_vocab_stats(
            *(hidden, weight, target), bias=bias, support=support, softcap=4.0, backend="triton"
        )
        sides = stats.support_entropy, stats.support_log_mass, stats.rest_log_mass
        return weighed(*sides, stats.entropy + stats.target_log_prob)

    def dense(hidden, weight, bias):
        log_p = reference.logits(hidden, weight, bias, softcap=4.0).log_softmax(-1)
        if kind == "min_p":
            inside = log_p >= log_p.amax(-1, keepdim=True) + math.log(0.3)
        else:
            inside = torch.zeros(ROWS, VOCAB, dtype=torch.bool).scatter(1, support.indices, True)
        log_mass, rest = (log_p.masked_fill(x, -torch.inf).logsumexp(-1) for x in (~inside, inside))
        log_r = torch.where(inside, log_p - log_mass[:, None], 0.0)
        entropy = -torch.where(inside, log_r.exp() * log_r, 0.0).sum(-1)
        whole = -(log_p.exp() * log_p).sum(-1) + log_p.gather(1, target[:, None])[:, 0]
        return weighed(entropy, log_mass, rest, whole)

    with checked_bounds():
        value, along = torch.func.jvp(ours, values, directions)
        _, second_order = torch.func.jvp(torch.func.grad(ours, (0, 1, 2)), values, directions)
    expected, along_dense = torch.func.jvp(dense, values, directions)
    assert_within(value, expected, 1e-12)
    assert_within(along, along_dense, 1e-12)
    _, exact = torch.func.jvp(torch.func.grad(dense, (0, 1, 2)), values, directions)
    for one, other in zip(second_order, exact):
        assert_within(one, other, 1e-12)


def test_logits_and_temperatures():
    """Tempered logits that a kernel overwrites before the driver has read them."""
    logits, temperature = randn(ROWS, VOCAB, dtype=F64), 1 + randn(ROWS, seed=1, dtype=F64).square()
    values, target = [logits.requires_grad_(), temperature.requires_grad_()], target_of("index")
    directions = [randn(*v.shape, seed=20 + i, dtype=F64) for i, v in enumerate(values)]
    products = []
    for function, options in (
        (tightrope.reality_creativity_loss, {"backend": "triton"}),
        (reference.reality_creativity_loss, {}),
    ):
        loss = function(logits, target, balance=0.2, temperature=temperature, softcap=4.0, **options)
        products.append(hvp(loss, values, directions))
    for one, expected in zip(*products):
        assert_within(one, expected, 1e-12, 1e-14)
