"""The products of the drivers, on each library that may run them on this machine."""

import pytest
import torch

from tightrope.strategies import gemm

LIBRARIES = [
    "default",
    pytest.param(
        "onednn", marks=pytest.mark.skipif(not gemm.has_onednn(), reason="PyTorch has no oneDNN here")
    ),
]


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    monkeypatch.setattr(gemm, "_prefers_onednn", lambda: request.param == "onednn")


# Pieces of 40 elements: some end at the last row and some before it; and a row that is longer than a piece.
@pytest.mark.parametrize(("m", "k", "n"), [(23, 9, 7), (20, 1, 10), (3, 5, 64), (1, 70, 1), (40, 8, 1)])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", ["", "a", "b"])
@pytest.mark.parametrize("rows", ["m", "k", "n"])
def test_products(library, monkeypatch, m, k, n, accumulate, transposed, rows):
    monkeypatch.setattr(gemm, "_PRODUCT", 40)
    make = torch.Generator().manual_seed(0)
    a = torch.randn(k, m, generator=make).t() if transposed == "a" else torch.randn(m, k, generator=make)
    b = torch.randn(n, k, generator=make).t() if transposed == "b" else torch.randn(k, n, generator=make)
    before = torch.randn(m, n, generator=make) if accumulate else torch.full((m, n), float("nan"))
    out = before.clone()
    want = a.double() @ b.double() + (before.double() if accumulate else 0)
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


@pytest.mark.skipif(not gemm.has_onednn(), reason="PyTorch has no oneDNN here")
@pytest.mark.parametrize("rows", ["m", "k", "n"])
def test_few_shapes_whatever_the_rows(monkeypatch, rows):
    """oneDNN keeps code and memory for each shape: a batch of another size in each step made it grow."""
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
