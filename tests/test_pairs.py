"""Logits of bfloat16 tensors as they are: what the products in pairs give, and where they are taken."""

import pytest
import torch

import tightrope
from helpers import (
    ROUNDING,
    Problem,
    assert_rounded_once,
    assert_within,
    class_indices,
    deviation,
    evaluate,
    function_of,
    oracle,
    paired,
    randn,
)
from tightrope import backends
from tightrope.backends import ops

pytestmark = pytest.mark.one_in(3)

BF16 = torch.bfloat16
CPU = torch.device("cpu")
PRODUCTS = [
    pytest.param(ops.pair_product, id="eager"),
    pytest.param(
        torch.ops.tightrope.pair_product,
        id="cpu",
        marks=pytest.mark.skipif(
            backends.BACKENDS["cpu"].pair_product is None, reason="this CPU has no products of pairs"
        ),
    ),
]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("cols", [1, 17, 32, 100])
@pytest.mark.parametrize("inner", [2, 30, 64, 578])
def test_product(inner, cols, rows, product):
    """A tail that is left out, a row that is read past its end, or a result that is rounded to bfloat16."""
    wide = torch.full((rows, inner + 3), torch.nan, dtype=BF16)
    a, b = wide[:, :inner].copy_(randn(rows, inner)), randn(cols, inner, seed=1, dtype=BF16)
    out = torch.full((rows, cols), torch.nan)
    product(a, paired(b), out, False)
    exact = a.double() @ b.double().t()
    size = a.double().norm(dim=1, keepdim=True) * b.double().norm(dim=1)
    assert ((out - exact).abs() <= 4e-7 * size + 1e-30).all()


def packed(b):
    """b [k, n] as what is rounded is multiplied with it."""
    pairs, expected = (
        torch.full((-(-len(b) // 32) * 16, b.shape[1], 2), torch.nan, dtype=BF16) for _ in range(2)
    )
    ops.pairs(b, expected)
    torch.ops.tightrope.pairs(b, pairs)
    assert torch.equal(pairs, expected)
    return pairs


# Around a block of rows, what is rounded at a time, and the depth to which it is filled up.
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 15, 63, 65, 130])
@pytest.mark.parametrize("cols", [1, 17, 100])
@pytest.mark.parametrize("inner", [1, 31, 33, 256, 301, 578])
@pytest.mark.parametrize("add", [False, True])
def test_rounded_product(add, inner, cols, rows, product):
    """A tail that is left out or filled with what was there, sums that start anew, or a stride ignored."""
    wide, wide_b = randn(inner, rows + 3), randn(inner, cols + 3, seed=1, dtype=BF16)
    b = wide_b[:, :cols]
    for a in (wide[:, :rows].t(), wide[:, :rows].t().contiguous()):
        out = randn(rows, cols + 2, seed=2)
        before = out.clone()
        product(a, packed(b), out[:, :cols], add)
        exact = a.to(BF16).double() @ b.double() + (before[:, :cols].double() if add else 0)
        size = a.double().norm(dim=1, keepdim=True) * b.double().norm(dim=0) + 1
        assert ((out[:, :cols] - exact).abs() <= 4e-7 * size).all()
        assert torch.equal(out[:, cols:], before[:, cols:])


@pytest.mark.parametrize("product", PRODUCTS)
def test_nothing_to_sum(product):
    """What stood in memory given for a product over no entries."""
    out = torch.full((3, 5), torch.nan)
    product(torch.empty(3, 0), packed(torch.empty(0, 5, dtype=BF16)), out, False)
    assert torch.equal(out, torch.zeros(3, 5))


@pytest.mark.parametrize("product", PRODUCTS)
def test_what_is_not_finite(product):
    """NaN or inf of a row in another row's products."""
    a, b = randn(70, 32, dtype=BF16), randn(9, 32, seed=1, dtype=BF16)
    a[3, 5], a[66, 0], b[4, 1] = torch.nan, torch.inf, torch.nan
    out = torch.empty(70, 9)
    product(a, paired(b), out, False)
    exact = a.double() @ b.double().t()
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())


@pytest.mark.skipif(backends.BACKENDS["cpu"].pair_product is None, reason="this CPU has no products of pairs")
@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_medium_precision(strategy, own_loss):
    """Gradients that are rounded unasked, or not where they may be, or by more than an entry of G is."""
    rows, vocab, width = 70, 1500, 24
    leaves = {"input": randn(rows, width, dtype=BF16), "weight": randn(vocab, width, seed=1, dtype=BF16)}
    target = class_indices((rows,), vocab, ignored=0.3)

    def gradients(precision):
        given = [leaf.clone().requires_grad_() for leaf in leaves.values()]
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            options = {"strategy": strategy, "workspace_mb": 0.5}
            if own_loss:
                loss = tightrope.linear_vocab_loss(
                    *given, target, loss_fn=lambda stats: -stats.target_log_prob, **options
                )
            else:
                loss = tightrope.linear_reality_creativity_loss(*given, target, **options)
            return torch.autograd.grad(loss, given)
        finally:
            torch.set_float32_matmul_precision(before)

    h, w = (leaf.double() for leaf in leaves.values())
    logits = (h @ w.t()).requires_grad_()
    g = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), logits)[0]
    for made, usual, exact, sizes in zip(
        gradients("medium"),
        gradients("highest"),
        (g @ w, g.t() @ h),
        (g.abs() @ w.abs(), g.t().abs() @ h.abs()),
    ):
        assert_rounded_once(usual, exact, 1e-5 * exact.square().mean().sqrt().item())
        assert not torch.equal(made, usual)
        assert (deviation(made, exact) <= 1.01 * ROUNDING[BF16] * (sizes + exact.abs()) + 1e-12).all()


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
@pytest.mark.parametrize("width", [24, 25])
@pytest.mark.parametrize("layout", ["contiguous", "rows apart", "transposed"])
def test_loss(layout, width, strategy):
    """An odd width or a head that lies otherwise taken for pairs; temperatures or ignored rows left out."""
    rows, vocab = 40, 1500
    weight = (randn(vocab, width, seed=1) * 3 / width**0.5).to(BF16)
    if layout == "rows apart":
        weight = torch.cat([weight, weight], 1)[:, :width]
    elif layout == "transposed":
        weight = weight.t().contiguous().t()
    leaves = {"input": randn(rows, width, dtype=BF16), "weight": weight, "temperature": randn(rows).abs() + 1}
    target = class_indices((rows,), vocab, ignored=0.3)
    given = Problem(leaves, target, {"balance": 0.05, "strategy": strategy, "workspace_mb": 0.5})
    exact, made = oracle(given), evaluate(function_of(given), given)
    assert_within(made["loss"], exact["loss"], 1e-6)
    for name, bound in (("input", 4e-3), ("weight", 4e-3), ("temperature", 1e-5)):
        assert_within(made[name], exact[name], bound, what=name)
    with torch.no_grad():
        stats = tightrope.linear_vocab_stats(leaves["input"], weight, target)
    z = leaves["input"].double() @ weight.double().t()
    kept = target >= 0
    assert_within(stats.lse[kept], z.logsumexp(-1)[kept], 1e-6)
