"""The kernels of sampled gradients in the interpreter, against the plain primitives and in whole calls."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; test_triton_interpreter.py runs it", allow_module_level=True)

from dataclasses import replace

import torch

from helpers import randn
from sampled_cases import F64, NOISE, problem, relative, run, statistics_of
from tightrope.backends import ops, triton_drawn
from tightrope.backends import triton as backend
from tightrope.kernels import configs
from tightrope.strategies import plan, sampled
from tightrope.strategies.problem import LinearProblem
from triton_bounds import checked_bounds
from triton_cases import KINDS, case, coefficients, new_partial, unwritten_parts, with_set

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.one_in(2)]
NAN = float("nan")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a small chunk, and what is not written is NaN."""
    monkeypatch.setattr(configs, "SUMS_BLOCK", 64)
    monkeypatch.setattr(configs, "SUMS_ROWS", 4)
    unwritten_parts(monkeypatch, triton_drawn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, 1), (4, 64, 2), (7, 150, 2)])
def test_row_grad_sums(kind, rows, columns, rank):
    """Another gradient than row_grad's, sums without a block of rows, or with rows that are masked."""
    problem = case(rows, columns, 8, kind, softcap=5.0, masked_rows=rows > 1)
    logits = problem.raw(torch.float32)
    partial, argmax = new_partial(problem)
    backend.row_stats(logits, partial, argmax, *problem.tail)
    norm, coef = coefficients(problem, partial)
    exact = torch.full_like(logits, NAN)
    backend.row_grad(logits, exact, norm, coef, *with_set(problem.tail))
    if problem.active is not None:  # what a row that does not count holds is nobody's
        logits[~problem.active] = NAN
    along, scale = randn(rank, rows), torch.full((), 0.25, dtype=F64)
    whole = torch.full((rank + 1, columns + 5), NAN)
    sums = whole[:, 2 : 2 + columns]
    with checked_bounds():
        triton_drawn.row_grad_sums(logits, logits, norm, coef, along, scale, sums, *with_set(problem.tail))
    assert torch.equal(logits, exact)
    expected = torch.empty_like(sums)
    ops.column_sums(exact, along, 0.25, expected)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5 * (1 + expected.abs().max().item()))
    assert whole[:, :2].isnan().all() and whole[:, 2 + columns :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 40, 63])
@pytest.mark.parametrize("tile", [1, 20, 63])
def test_drawn(dtype, count, tile):
    """Another tile's memory, a column that was not drawn, or one that was and is left out of a product."""
    rows, columns, width, most = 37, 63, 19, 48
    wide = F64 if dtype == F64 else torch.float32
    grad = randn(rows * columns, dtype=wide)
    along, basis, factor = (
        randn(2, columns, dtype=wide),
        randn(2, rows, dtype=wide),
        randn(columns, dtype=wide),
    )
    index = torch.randperm(columns)
    given = torch.tensor(count)
    weight, hidden = randn(columns, width + 5).to(dtype)[:, :width], randn(rows, width).to(dtype)
    results = []
    for primitives in (ops, triton_drawn):
        to_hidden, to_weight = randn(rows, width, dtype=wide), randn(columns, width, dtype=wide)
        for first in range(0, columns, most):
            part = torch.full((most, 128), NAN, dtype=dtype)
            with checked_bounds():
                primitives.drawn_columns(grad, tile, index, given, factor, along, basis, first, part)
                primitives.drawn_by_head(part, weight, index, given, first, to_hidden)
                primitives.drawn_by_hidden(part, hidden, index, given, first, to_weight)
            drawn = max(min(count - first, most), 0)
            assert not part[:drawn, rows:].any(), "the padding is not zero"
            results.append(part[:drawn, :rows].to(wide))
        results += [to_hidden, to_weight]
    half = len(results) // 2
    tolerance = {torch.float32: 1e-5, F64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for plain, ours in zip(results[:half], results[half:]):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * 10)
    untouched = index[count:]
    assert torch.equal(results[-1][untouched], randn(columns, width, dtype=wide)[untouched])


@pytest.mark.parametrize(("layout", "dtype"), [("rows", F64), ("columns", torch.bfloat16)])
def test_whole_calls(layout, dtype, monkeypatch):
    """Kernels that are handed another tile, stride or count than they take."""
    monkeypatch.setattr(configs, "SUMS_BLOCK", 1024)
    monkeypatch.setattr(configs, "SUMS_ROWS", 32)
    monkeypatch.setattr(sampled, "reads", lambda device: False)
    monkeypatch.setattr(LinearProblem, "by_rows", layout == "rows")
    monkeypatch.setattr(plan, "CPU", replace(plan.CPU, tile=256, tile_logits=0, widest_tile=256))
    given = problem(backend="triton", dtype=dtype, rows=40, vocab=700)
    exact = run(given, backend="eager")
    torch.manual_seed(0)
    stats = statistics_of(given, gradient_noise=NOISE)
    torch.manual_seed(0)
    made = run(given, gradient_noise=NOISE)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(made.values(), run(given, gradient_noise=NOISE).values()))
    assert 0 < stats.sampled_share < 0.5
    for i, name in enumerate(("input", "weight")):
        error = relative(made[name].double(), exact[name].double())
        assert 0.5 * stats.sampled_noise[i] < error < 1.5 * NOISE
