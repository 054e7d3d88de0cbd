"""The row primitives of second order: plain PyTorch against autograd of the reference, C++ against these.

Kernels write into buffers of NaN, in both layouts, tile by tile, on hostile rows and with sets of classes,
and the yardstick of float32 is the error of the same formula in plain float32 PyTorch.
"""

import importlib.util

import pytest
import torch

from helpers import BACKENDS, assert_no_worse, assert_within, rand, randn
from row_cases import F32, F64, HOSTILE, KINDS, ROWS, SENTINELS, TRANSFORMS, Case, grads_for
from side_cases import give_set, tile_tail, tiles_of
from tightrope import backends, reference
from tightrope.backends import ops, second
from tightrope.coefficients import coefficient_tangent, row_coefficients
from tightrope.statistics import (
    OF_SUPPORT,
    StatGrads,
    empty_partial,
    empty_sides,
    empty_sums,
    norm_rows,
    norm_tangent_rows,
    row_stats,
    summarise,
    summarise_sides,
    summarise_tangent,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.one_in(4)]
SETS = (None, "threshold", "listed", "mixed", "every class", "nothing")


def summary_of(case):
    """The summary of whole rows, by plain PyTorch in float64."""
    partial, argmax = empty_partial(ROWS, F64, case.logits.device)
    logits = case.logits.double()
    ops.row_stats(logits, partial, argmax, *case.tail(F64))
    summary = summarise(partial)
    if case.threshold is None and case.classes is None:
        return summary
    sides = empty_sides(ROWS, F64, case.logits.device)
    ops.row_sides(logits, sides, *case.sided_tail(F64))
    return torch.cat([summary, summarise_sides(sides)])


def norm_of(summary, with_set):
    norm = norm_rows(summary)
    return (norm[1:] if with_set else norm).contiguous()


class Moving:
    """A case, a direction of its logits, and what kernels of second order are given of it."""

    def __init__(self, dtype, vocab, kind, how="plain", of_set=None, seed=0, **transform):
        self.case = case = Case(dtype, vocab, kind, how, seed=seed, **transform)
        if of_set is not None:
            give_set(case, of_set)
        self.with_set = of_set is not None
        self.direction = randn(ROWS, vocab, seed=seed + 50).to(dtype)
        self.summary = summary_of(case)
        wide = case.wide
        self.norm = norm_of(self.summary, self.with_set).to(wide)
        forms = 2 if self.with_set else 1
        self.coef = randn(7 * forms, ROWS, seed=seed + 60, dtype=wide)
        self.coef_tangent = randn(7 * forms, ROWS, seed=seed + 61, dtype=wide)
        self.norm_tangent = randn(forms, ROWS, seed=seed + 62, dtype=wide)
        if self.with_set:
            for coef in (self.coef, self.coef_tangent):  # terms without a probability know no sides
                coef[[10, 12, 13]] = coef[[3, 5, 6]]
        if how not in ("plain", "peaked", "negative", "constant"):
            for coef in (self.coef, self.coef_tangent):  # logits as good as infinite, in no sum
                coef[5::7] = 0.0

    def tail(self, start, stop, dtype=None):
        return tile_tail(self.case, start, stop, dtype)

    def sums(self, kernel, dtype=None, tiles=1, transposed=False):
        wide = dtype or self.case.wide
        sums = empty_sums(ROWS, self.with_set, wide, torch.device("cpu"))
        for start, stop in tiles_of(self.case, tiles):
            given = (self.laid(x, start, stop, dtype, transposed) for x in (self.case.logits, self.direction))
            kernel(*given, sums, self.norm.to(wide), *self.tail(start, stop, dtype))
        return sums

    def laid(self, x, start, stop, dtype=None, transposed=False):
        x = (x if dtype is None else x.to(dtype))[:, start:stop]
        return x.t().contiguous().t() if transposed else x

    def gradients(self, kernel, dtype=None, tiles=1, transposed=False, how="apart"):
        """(gradient, its derivative) of all tiles; how: "apart", "in place" or "derivative alone"."""
        wide = dtype or self.case.wide
        found = []
        scalars = (self.norm, self.norm_tangent, self.coef, self.coef_tangent)
        for start, stop in tiles_of(self.case, tiles):
            z, v = (
                self.laid(x, start, stop, dtype, transposed).clone()
                for x in (self.case.logits, self.direction)
            )
            outs = [torch.full_like(z, torch.nan), torch.full_like(v, torch.nan)]
            if how == "in place":
                outs = [z, v]
            elif how == "derivative alone":
                outs[0] = None
            kernel(z, v, *outs, *(x.to(wide) for x in scalars), *self.tail(start, stop, dtype))
            found.append(outs)
        return [None if parts[0] is None else torch.cat(parts, 1) for parts in zip(*found)]


@pytest.mark.parametrize("of_set", SETS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_pytorch_is_the_derivative_of_the_reference(kind, transform, of_set):
    """A wrong formula: both derivatives, of every statistic, against autograd of the dense ones."""
    moving = Moving(F64, 17, kind, of_set=of_set, **transform)
    case, summary = moving.case, moving.summary
    inside = None
    if moving.with_set:
        where = case.classes if case.threshold is None else None
        z = case.z(case.logits)
        if where is None:
            inside = z >= case.threshold.unsqueeze(-1)
        else:
            known = where.masked_fill((where < 0) | (where >= case.vocab), -100)
            inside = reference.members(z, known)
    names = [n for n in StatGrads._fields if moving.with_set or n not in OF_SUPPORT]
    names = [n for n in names if kind is not None or not n.startswith("target")]

    def statistics(raw):
        z = case.z(raw)
        stats = reference.row_stats(z, case.distribution())._asdict()
        if moving.with_set:
            stats |= zip(OF_SUPPORT, reference.set_stats(z, inside))
        return [stats[name] for name in names]

    grads = grads_for(7, F64, kind is not None)
    grads |= {name: randn(ROWS, seed=30 + i, dtype=F64) for i, name in enumerate(OF_SUPPORT)}
    grads = StatGrads(**{name: grads[name] for name in names})
    raw, along = case.logits.clone().requires_grad_(), moving.direction
    given = [getattr(grads, name).clone().requires_grad_() for name in names]
    total = sum((g * torch.where(s.isfinite(), s, 0.0)).sum() for g, s in zip(given, statistics(raw)))
    (gradient,) = torch.autograd.grad(total, raw, create_graph=True)
    expected, *exact = torch.autograd.grad(gradient, (raw, *given), along)
    sums = moving.sums(second.row_tangent)
    tangent = summarise_tangent(sums, summary, case.vocab)
    ours = row_stats(tangent, None)._asdict()
    for name, value in zip(names, exact):
        assert_within(ours[name], value, 1e-12, 1e-13, name)
    moving.coef = row_coefficients(summary, grads, case.vocab)
    moving.coef_tangent = coefficient_tangent(summary, tangent, grads)
    moving.norm_tangent = norm_tangent_rows(tangent)
    one, other = moving.gradients(second.row_grad_tangent)
    assert_within(one, gradient, 1e-12)
    assert_within(other, expected, 1e-12, 1e-13)


def check(moving, backend, tiles=1, transposed=False, how="apart"):
    """Both kernels of a backend against plain PyTorch in float64."""
    device, case = backends.BACKENDS[backend], moving.case
    floor = {F64: 1e-13, F32: 2e-6}[case.wide]
    exact = moving.sums(second.row_tangent, F64)
    rough = moving.sums(second.row_tangent)
    for one, true, usual in zip(moving.sums(device.row_tangent, None, tiles, transposed), exact, rough):
        assert_no_worse(one, true, usual, floor * (1 + true.abs().max().item()), "sums")
    true = moving.gradients(second.row_grad_tangent, F64)
    usual = moving.gradients(second.row_grad_tangent)
    ours = moving.gradients(device.row_grad_tangent, None, tiles, transposed, how)
    for name, a, b, c in zip(("gradient", "derivative"), ours, true, usual):
        if a is not None:
            assert_no_worse(a, b, c, floor * (1 + b.abs().max().item()), name)


layouts = pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])


@layouts
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 7, 17, 257, 1025, 2049])
def test_every_target_and_size(vocab, kind, backend, transposed):
    """A tail of a vector or of a block, and a target at a block's edge; float32 and float64."""
    for dtype, how in ((F32, "apart"), (F64, "in place"), (F32, "derivative alone")):
        moving = Moving(dtype, vocab, kind, bias=True, softcap=8.0, seed=vocab)
        check(moving, backend, 1 if vocab < 9 else 3, transposed, how)


@layouts
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_set", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_set(kind, of_set, backend, transposed):
    """An entry that counts on the wrong side, or on both; a target inside of the set."""
    for transform in TRANSFORMS:
        check(Moving(F32, 130, kind, of_set=of_set, **transform), backend, 3, transposed)
    check(Moving(F64, 130, kind, of_set=of_set), backend, 1, transposed)


def check_hostile(moving, backend, transposed=False):
    """As `check`, of hostile rows: finite where float64 is, and no worse than plain PyTorch."""
    exact = moving.sums(second.row_tangent, F64)
    keep = exact.abs() < 1e30  # sums of z moved may be as large as the logits
    device = backends.BACKENDS[backend]
    rough = moving.sums(second.row_tangent)
    ours = moving.sums(device.row_tangent, None, 3, transposed)
    for name, x in (("plain", rough), ("kernel", ours)):
        assert x[keep].isfinite().all(), name
    for row in range(len(exact)):
        at = keep[row]
        if not at.any():
            continue
        size = exact[row][at].abs().max().item()
        assert_no_worse(ours[row][at], exact[row][at], rough[row][at], 2e-6 * (1 + size), "sums")
    true = moving.gradients(second.row_grad_tangent, F64)
    usual = moving.gradients(second.row_grad_tangent)
    ours = moving.gradients(device.row_grad_tangent, None, 3, transposed)
    for name, a, b, c in zip(("gradient", "derivative"), ours, true, usual):
        assert a.isfinite().all()
        assert_no_worse(a, b, c, 4e-6 * (1 + b.abs().max().item()), name)


@layouts
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_set", [None, "threshold", "listed"])
@pytest.mark.parametrize("how", [*HOSTILE, *SENTINELS])
def test_hostile_rows(how, of_set, backend, transposed):
    """Peaked rows, offsets of 1e4, impossible entries, numbers near the largest: no NaN, no worse."""
    for kind in ("index", "dense"):
        check_hostile(Moving(F32, 259, kind, how, of_set), backend, transposed)


@layouts
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits(dtype, backend, transposed):
    """Logits that are given in half precision: float32 within, one rounding out."""
    check(Moving(dtype, 300, "index", logit_scale=0.5), backend, 3, transposed)


@layouts
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_count(backend, transposed):
    """They are not read (here they are NaN), keep their sums and get zeros."""
    moving = Moving(F32, 40, "index")
    case, device = moving.case, backends.BACKENDS[backend]
    case.active = torch.tensor([True, False, True])
    case.logits[1] = moving.direction[1] = torch.nan
    sums = moving.sums(device.row_tangent, transposed=transposed)
    assert not sums[:, 1].any()
    assert sums[0, ::2].all()
    for out in moving.gradients(device.row_grad_tangent, transposed=transposed):
        assert not out[1].any()
        assert out[::2].isfinite().all()


@layouts
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_lanes(backend, transposed):
    """Groups of rows, of which the last is not full, against the same rows one by one: the same bits."""
    rows, vocab, device = 37, 70, backends.BACKENDS[backend]
    z, v = (randn(rows, vocab, seed=i) for i in range(2))
    norm = torch.stack([z.amax(-1), (z - z.amax(-1, keepdim=True)).exp().sum(-1).log()])
    scalars = randn(15, rows, seed=2).split([1, 7, 7])
    threshold, active = rand(rows, seed=3), torch.arange(rows) % 5 != 2
    index = (rand(rows, seed=4) * vocab).long()
    for with_set in (False, True):
        forms = 2 if with_set else 1
        sums = torch.zeros(7 * forms, rows)
        outs = torch.full_like(z, torch.nan), torch.full_like(z, torch.nan)
        if transposed:
            z, v, *outs = (x.t().contiguous().t() for x in (z, v, *outs))

        def tail(part, with_set=with_set):
            given = threshold[part].contiguous() if with_set else None
            return (0, given, None, index[part], None, None, None, None, active[part], 1.0, 5.0)

        def of(x, part, forms=forms):
            return x[:, part].repeat(forms, 1).contiguous()

        whole = slice(0, rows)
        device.row_tangent(z, v, sums, of(norm, whole), *tail(whole))
        device.row_grad_tangent(z, v, *outs, *(of(x, whole) for x in (norm, *scalars)), *tail(whole))
        for i in range(rows):
            one, part = torch.zeros(7 * forms, 1), slice(i, i + 1)
            apart = [torch.full((1, vocab), torch.nan) for _ in range(2)]
            row, direction = z[part].contiguous(), v[part].contiguous()
            device.row_tangent(row, direction, one, of(norm, part), *tail(part))
            device.row_grad_tangent(
                row, direction, *apart, *(of(x, part) for x in (norm, *scalars)), *tail(part)
            )
            torch.testing.assert_close(sums[:, part], one, rtol=1e-5, atol=1e-5)
            for out, alone in zip(outs, apart):
                torch.testing.assert_close(out[part], alone, rtol=1e-6, atol=1e-7)


def test_what_a_kernel_is_given_is_checked():
    """Memory of another shape, type or layout would be read as what it is not."""
    if not any(row["available"] for row in backends.describe() if row["backend"] == "cpu"):
        pytest.skip("the extension is not built")
    z, sums, norm = randn(4, 9), torch.zeros(7, 4), torch.zeros(2, 4)
    tail = (0, None, None, None, None, None, None, None, None, 1.0, None)
    operator = torch.ops.tightrope.row_tangent
    for wrong in (randn(4, 8), randn(4, 9, dtype=F64), randn(4, 18)[:, ::2]):
        with pytest.raises((ValueError, TypeError)):
            operator(z, wrong, sums, norm, *tail)
    with pytest.raises(ValueError, match="sums"):
        operator(z, z, torch.zeros(14, 4), norm, *tail)
    operator = torch.ops.tightrope.row_grad_tangent
    with pytest.raises(ValueError, match="norm_tangent"):
        operator(z, z, None, z.clone(), norm, torch.zeros(2, 4), torch.zeros(7, 4), torch.zeros(7, 4), *tail)


def test_every_backend_has_primitives_of_its_own():
    """A field of the table that lands in another's place, or a GPU that is left to plain PyTorch."""
    table = backends.BACKENDS
    assert table["cuda"].fuses is backends._cuda_fuses
    kernels = ["cpu", *(("cuda", "triton") if importlib.util.find_spec("triton") else ())]
    for name in ("row_tangent", "row_grad_tangent"):
        assert getattr(table["eager"], name) is getattr(second, name)
        for backend in kernels:
            assert getattr(table[backend], name) not in (getattr(second, name), backends._cuda_fuses)
