"""The row primitives of each backend that serves a CPU, in both layouts that they take.

Sweeps of [512, 16384] float32 logits with class targets. `columns` is the layout of the drivers (the logits
GEMM is made transposed), `rows` that of logits which exist already.
"""

import pytest
import torch

from tightrope import backends
from tightrope.statistics import empty_partial

BACKENDS = [name for name in ("cpu", "eager") if backends.BACKENDS[name].serves(torch.device("cpu"))]
LAYOUTS = ("rows", "columns")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return backends.BACKENDS[request.param]


@pytest.fixture(params=LAYOUTS)
def laid_out(request, logits):
    return logits if request.param == "rows" else logits.t().contiguous().t()


def _tail(target):
    return (target, None, None, None, None, None, 1.0, None)


def test_row_stats(benchmark, backend, laid_out, target):
    benchmark.group = "row_stats"
    partial, argmax = empty_partial(len(target), torch.float32, target.device)
    benchmark(backend.row_stats, laid_out, partial, argmax, 0, *_tail(target))
    assert torch.equal(argmax, laid_out.argmax(-1))


def test_row_grad(benchmark, backend, laid_out, target):
    """Of cross-entropy, into a tensor of its own, so that every round sees the same logits."""
    benchmark.group = "row_grad"
    top = laid_out.amax(-1)
    norm = torch.stack([top, (laid_out - top[:, None]).exp().sum(-1).log()])
    coef = torch.zeros(7, len(target))
    coef[0], coef[3] = 1.0, -1.0
    out = torch.empty_like(laid_out)
    benchmark(backend.row_grad, laid_out, out, norm, coef, 0, None, None, *_tail(target))
    assert out.sum(-1).abs().max() < 1e-3  # a softmax less its target
