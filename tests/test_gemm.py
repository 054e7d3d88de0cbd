"""The products of the drivers, on each library that may run them on this machine."""

import pytest
import torch

from tightrope import backends
from tightrope.backends import ops
from tightrope.strategies import gemm

HAS_OWN = pytest.mark.skipif(backends.PANEL is None, reason="the CPU extension is not in use here")
LIBRARIES = [
    "default",
    pytest.param("own", marks=HAS_OWN),
    pytest.param(
        "onednn", marks=pytest.mark.skipif(not gemm.has_onednn(), reason="PyTorch has no oneDNN here")
    ),
]


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    monkeypatch.setattr(gemm, "_prefers_own", lambda: request.param == "own")
    monkeypatch.setattr(gemm, "_prefers_onednn", lambda: request.param == "onednn")


# Pieces of 40 elements: some end at the last row and some before it; and a row that is longer than a piece.
@pytest.mark.parametrize(("m", "k", "n"), [(23, 9, 7), (20, 1, 10), (3, 5, 64), (1, 70, 1), (40, 8, 1)])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", ["", "a", "b"])
@pytest.mark.parametrize("rows", ["m", "k", "n"])
@pytest.mark.parametrize("pack", [False, True])
def test_products(library, monkeypatch, m, k, n, accumulate, transposed, rows, pack):
    monkeypatch.setattr(gemm, "_PRODUCT", 40)
    make = torch.Generator().manual_seed(0)
    a = torch.randn(k, m, generator=make).t() if transposed == "a" else torch.randn(m, k, generator=make)
    b = torch.randn(n, k, generator=make).t() if transposed == "b" else torch.randn(k, n, generator=make)
    before = torch.randn(m, n, generator=make) if accumulate else torch.full((m, n), float("nan"))
    out = before.clone()
    want = a.double() @ b.double() + (before.double() if accumulate else 0)
    if pack:
        b = gemm.packed(b)
    assert gemm.multiply(a, b, out, rows=rows, accumulate=accumulate) is out
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 3), (4, 0, 3), (4, 3, 0)])
def test_products_of_nothing(library, m, k, n):
    out = gemm.multiply(torch.ones(m, k), torch.ones(k, n), torch.full((m, n), 7.0), rows="m")
    assert torch.equal(out, torch.zeros(m, n))


def test_a_scaled_product_and_narrower_operands(library):
    a, b = torch.randn(5, 3).bfloat16(), torch.randn(3, 4).bfloat16()
    out = gemm.multiply(a, b, torch.ones(5, 4), rows="k", accumulate=True, scale=torch.tensor(0.5))
    torch.testing.assert_close(out.double(), 1 + a.double() @ b.double() / 2, rtol=1e-6, atol=1e-6)


PRODUCTS = [pytest.param(ops, id="eager"), pytest.param(torch.ops.tightrope, id="cpu", marks=HAS_OWN)]


def of_panels(products, b):
    """b [k, n] as the products take it packed."""
    width = 48 if products is ops else backends.PANEL
    panels = torch.full((-(-b.shape[1] // width), b.shape[0], width), torch.nan)
    products.panels(b, panels)
    return panels


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Around a panel, a block of rows, and the depths at which sums are put down.
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("m", [1, 7, 16, 67, 131])
@pytest.mark.parametrize("k", [1, 255, 257, 513, 1281])
@pytest.mark.parametrize("n", [1, 16, 33, 48, 49, 145])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.one_in(4)
def test_own_products(products, m, k, n, add):
    """A tail that is left out or written past its end, sums that are put down twice, or a stride ignored."""
    wide_a, wide_b, wide = noise(k, m + 3, seed=1), noise(k, n + 3, seed=2), noise(m, n + 3, seed=3)
    for a in (wide_a[:, :m].t(), wide_a[:, :m].t().contiguous()):
        factors = [wide_b[:, :n], wide_b[:, :n].t().contiguous().t()]
        factors += [of_panels(products, b) for b in factors]
        exact = a.double() @ factors[0].double() + (wide[:, :n].double() if add else 0)
        size = a.double().norm(dim=1, keepdim=True) * factors[0].double().norm(dim=0) + 1
        for factor in factors:
            out = wide.clone()
            products.product(a, factor, out[:, :n], add)
            assert ((out[:, :n] - exact).abs() <= 1e-6 * size).all()
            assert torch.equal(out[:, n:], wide[:, n:])


@pytest.mark.parametrize("products", PRODUCTS)
def test_what_is_not_finite(products):
    """NaN or inf of a row in another row's products, or a NaN of what an output held before."""
    a, b = torch.randn(70, 32), torch.randn(32, 9)
    a[3, 5], a[66, 0], b[1, 4] = torch.nan, torch.inf, torch.nan
    out = torch.full((70, 9), torch.nan)
    products.product(a, b, out, False)
    exact = a.double() @ b.double()
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())


@HAS_OWN
@pytest.mark.parametrize("n", [96, 100])
def test_own_products_do_not_depend_on_threads_or_other_rows(n):
    """Sums that are cut where a thread's part ends, or in another way where there are many rows."""
    a, b = torch.randn(150, 600), torch.randn(600, n)
    made = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for factor in (b, gemm.packed(b)):
            out = torch.empty(150, n)
            torch.ops.tightrope.product(a, factor, out, False)
            part = torch.empty(11, n)
            torch.ops.tightrope.product(a[30:41], factor, part, False)
            assert torch.equal(part, out[30:41])
            made.append(out)
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[0], made[4])


@pytest.mark.skipif(not gemm.has_onednn(), reason="PyTorch has no oneDNN here")
@pytest.mark.parametrize("rows", ["m", "k", "n"])
def test_few_shapes_whatever_the_rows(monkeypatch, rows):
    """oneDNN keeps code and memory for each shape: a batch of another size in each step made it grow."""
    monkeypatch.setattr(gemm, "_prefers_own", lambda: False)
    monkeypatch.setattr(gemm, "_prefers_onednn", lambda: True)
    met = set()
    product = torch.ops.mkldnn._linear_pointwise

    class Watched:
        @staticmethod
        def _linear_pointwise(x, weight, *rest):
            met.add((*x.shape, *weight.shape))
            return product(x, weight, *rest)

    monkeypatch.setattr(torch.ops, "mkldnn", Watched)
    for count in range(1, 1200):
        size = {"m": 24, "k": 24, "n": 24, rows: count}
        a, b = torch.ones(size["m"], size["k"]), torch.ones(size["k"], size["n"])
        out = torch.full((size["m"], size["n"]), float("nan"))
        gemm.multiply(a, b, out, rows=rows)
        assert (out == size["k"]).all(), count
    assert len(met) <= 30
