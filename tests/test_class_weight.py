"""Class weights are those of F.cross_entropy, in all reductions, with ignored tokens and smoothing."""

import pytest
import torch
import torch.nn.functional as F

import tightrope
from helpers import BACKENDS, assert_within, class_indices, dense, rand, randn, top_k

F64 = torch.float64
ROWS, VOCAB, WIDTH = 23, 2051, 6
pytestmark = pytest.mark.usefixtures("small_tiles")
backends = pytest.mark.parametrize("backend", BACKENDS)
strategies = pytest.mark.parametrize("strategy", ["chunked", "streaming", "logits"])


def problem(dtype=F64):
    hidden, weight = randn(ROWS, WIDTH, dtype=dtype), randn(VOCAB, WIDTH, seed=1, dtype=dtype)
    target = class_indices((ROWS,), VOCAB, seed=2, ignored=0.3)
    class_weight = rand(VOCAB, seed=3, dtype=dtype)
    class_weight[target[0]] = 0.0  # a class that does not count
    return hidden.requires_grad_(), weight.requires_grad_(), target, class_weight


def ours(strategy, hidden, weight, target, **options):
    if strategy == "logits":
        return tightrope.reality_creativity_loss(hidden @ weight.t(), target, **options)
    options |= {"strategy": strategy, "workspace_mb": 0.2}
    return tightrope.linear_reality_creativity_loss(hidden, weight, target, **options)


def check(actual, exact, hidden, weight, rtol=1e-12):
    upstream = torch.ones_like(exact) if exact.dim() == 0 else rand(*exact.shape, seed=9, dtype=F64)
    got = torch.autograd.grad(actual, (hidden, weight), upstream.to(actual.dtype))
    want = torch.autograd.grad(exact, (hidden, weight), upstream)
    for name, a, b in zip(("loss", "input", "weight"), (actual, *got), (exact, *want)):
        assert_within(a, b, rtol, what=name)


@backends
@strategies
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_indices(strategy, reduction, smoothing, backend):
    """A mean that divides by the tokens, or smoothing that spreads evenly, is another loss."""
    hidden, weight, target, class_weight = problem()
    options = {"reduction": reduction, "label_smoothing": smoothing}
    loss = ours(strategy, hidden, weight, target, class_weight=class_weight, backend=backend, **options)
    exact = F.cross_entropy(hidden @ weight.t(), target, class_weight, **options)
    check(loss, exact, hidden, weight)


@strategies
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_distributions(kind, smoothing, strategy):
    """There the mean divides by the tokens, as in PyTorch."""
    hidden, weight, _, class_weight = problem()
    pairs = top_k((ROWS,), VOCAB, k=4, seed=5, dtype=F64)
    rows = dense(pairs, VOCAB)
    target = rows if kind == "dense" else pairs
    options = {"label_smoothing": smoothing}
    loss = ours(strategy, hidden, weight, target, class_weight=class_weight, **options)
    check(loss, F.cross_entropy(hidden @ weight.t(), rows, class_weight, **options), hidden, weight)


@strategies
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_only_the_cross_entropy_is_weighed(strategy, smoothing):
    """Entropy and z-loss keep the weight of the token; a shift and token weights go along."""
    hidden, weight, target, class_weight = problem()
    hidden, target = hidden.detach().view(1, ROWS, WIDTH).requires_grad_(), target.view(1, ROWS)
    row_weight = rand(1, ROWS, seed=8, dtype=F64)
    terms = {"balance": 0.3, "z_loss": 1e-2}
    loss = ours(
        strategy,
        hidden,
        weight,
        target,
        class_weight=class_weight,
        label_smoothing=smoothing,
        row_weight=row_weight,
        shift=1,
        **terms,
    )
    z, labels, token = (hidden @ weight.t())[0, :-1], target[0, 1:], row_weight[0, :-1]
    p = z.log_softmax(-1)
    smoothed = F.cross_entropy(z, labels, class_weight, label_smoothing=smoothing, reduction="none")
    rows = 0.7 * smoothed + 0.3 * (p.exp() * p).sum(-1) + 1e-2 * z.logsumexp(-1).square()
    counts = labels != -100
    divisor = (token * class_weight[labels.clamp_min(0)])[counts].sum()
    check(loss, (rows * token)[counts].sum() / divisor, hidden, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_modules(dtype):
    """Weights are a buffer of the module, and of any dtype."""
    hidden, weight, target, class_weight = problem()
    module = tightrope.LinearRealityCreativityLoss(class_weight=class_weight.float(), label_smoothing=0.1)
    assert "class_weight" in module.state_dict()
    narrow = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    loss = module(*narrow, target)
    z = narrow[0].double() @ narrow[1].double().t()
    exact = F.cross_entropy(z, target, class_weight.float().double(), label_smoothing=0.1)
    assert_within(loss, exact, 1e-5)


def test_all_ignored_and_all_weightless():
    """0, where F.cross_entropy gives NaN."""
    hidden, weight, target, class_weight = problem()
    for labels, of_class in ((torch.full_like(target, -100), class_weight), (target, class_weight * 0)):
        loss = tightrope.linear_reality_creativity_loss(hidden, weight, labels, class_weight=of_class)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, hidden)[0].any()


def test_no_dense_target_is_made():
    """With smoothing the target has a mass everywhere: a tile of it at a time, never N x V."""
    rows, vocab = 512, 20_000
    hidden, weight = randn(rows, 4).requires_grad_(), randn(vocab, 4, seed=1).requires_grad_()
    target, class_weight = class_indices((rows,), vocab), rand(vocab)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    with Watch():
        tightrope.linear_reality_creativity_loss(
            hidden, weight, target, class_weight=class_weight, label_smoothing=0.1, strategy="streaming"
        ).backward()
    assert largest < rows * vocab / 4
