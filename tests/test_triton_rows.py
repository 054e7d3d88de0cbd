"""row_stats and row_grad of the Triton backend in the interpreter, against the float64 reference."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; test_triton_interpreter.py runs it", allow_module_level=True)

import torch

from helpers import randn
from tightrope.arguments import TileArguments
from tightrope.backends import triton as backend
from tightrope.kernels import configs
from tightrope.statistics import empty_partial
from triton_bounds import OutOfBounds, checked_bounds
from triton_cases import (
    HOSTILE,
    KINDS,
    ODD_COLUMNS,
    OFFSET,
    SENTINELS,
    case,
    check_argmax,
    coefficients,
    judge,
    judge_sentinels,
    named_statistics,
    new_partial,
    rounding,
    truth,
    unwritten_parts,
    with_set,
)

# The interpreter's numpy warns where a GPU is silent: overflow, inf - inf.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.one_in(12)]
NAN = float("nan")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and segments in a small row."""
    monkeypatch.setattr(configs, "ROW_BLOCK", 64)
    monkeypatch.setattr(configs, "ROW_BLOCKS", 2)
    monkeypatch.setattr(configs, "GRAD_BLOCK", 64)
    monkeypatch.setattr(configs, "TOPK_BLOCK", 4)


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten(monkeypatch):
    unwritten_parts(monkeypatch, backend)


def check(problem):
    """Statistics and gradient of the logits, in place and into NaN, in bounds."""
    logits = problem.raw(problem.wide)
    stats, grad = truth(problem)
    rough_stats, rough_grad = truth(problem, torch.float32)
    partial, argmax = new_partial(problem)
    live = slice(None) if problem.active is None else problem.active.nonzero().squeeze(1)
    with checked_bounds() as counted:
        backend.row_stats(logits, partial, argmax, *problem.tail)
        norm, coef = coefficients(problem, partial)
        out = torch.full_like(logits, NAN)
        backend.row_grad(logits, out, norm, coef, *with_set(problem.tail))
        again = logits.clone()
        backend.row_grad(again, again, norm, coef, *with_set(problem.tail))
    assert counted["loads"] >= logits[live].numel()
    assert torch.equal(out, again), "in place differs"
    actual = named_statistics(problem, partial, argmax)
    for name, value in actual.items():
        exact = stats[name][live]
        if name == "argmax":
            assert torch.equal(value[live], exact)
            continue
        judge(value[live], exact, rough_stats[name][live], rounding(problem, exact), name)
    if grad.isfinite().all():
        judge(out[live], grad[live], rough_grad[live], rounding(problem, grad), "gradient")
    if problem.active is not None:
        assert (out[~problem.active] == 0).all()
        assert torch.isneginf(partial[0, ~problem.active]).all(), "a row that does not count was touched"
        assert (argmax[~problem.active] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOSTILE)
def test_hostile(kind, how):
    check(case(5, 301, 8, kind, how=how))


@pytest.mark.parametrize("kind", KINDS)
def test_finite_sentinels(kind):
    """Fails if a block of the lowest finite number overflows in a shift, a sum or a merge."""
    for how in SENTINELS:
        problem = case(5, 301, 8, kind, how=how)
        logits = problem.raw(torch.float32)
        partial, argmax = new_partial(problem)
        backend.row_stats(logits, partial, argmax, *problem.tail)
        out = torch.full_like(logits, NAN)
        backend.row_grad(logits, out, *coefficients(problem, partial), *with_set(problem.tail))
        judge_sentinels(problem, partial, argmax, out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (64, 2), (65, 3), (257, 7)])
def test_tails_softcap_and_masked_rows(kind, columns, rows):
    check(case(rows, columns, 8, kind, softcap=5.0, masked_rows=True, seed=columns))
    check(case(rows, columns, 8, kind, bias=False, logit_scale=1.0, seed=columns))


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind):
    problem = case(3, 301, 8, kind, dtype=torch.float64, softcap=3.0)
    stats, grad = truth(problem)
    partial, argmax = new_partial(problem)
    logits = problem.raw()
    backend.row_stats(logits, partial, argmax, *problem.tail)
    for name, value in named_statistics(problem, partial, argmax).items():
        torch.testing.assert_close(value, stats[name], rtol=1e-12, atol=1e-12)
    out = torch.full_like(logits, NAN)
    backend.row_grad(logits, out, *coefficients(problem, partial), *with_set(problem.tail))
    torch.testing.assert_close(out, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_and_a_narrower_output(dtype):
    problem = case(4, 300, 8, "index")
    logits = problem.raw(torch.float32).to(dtype)
    results = []
    for given in (logits, logits.float()):
        partial, argmax = new_partial(problem)
        backend.row_stats(given, partial, argmax, *problem.tail)
        out = torch.full_like(logits, NAN)
        backend.row_grad(given, out, *coefficients(problem, partial), *with_set(problem.tail))
        results.append((partial, argmax, out))
    for half, single in zip(*results):
        assert torch.equal(half, single)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dense_targets_of_another_dtype(dtype):
    problem = case(3, 100, 8, "dense")
    dense = problem.tail[2].to(dtype)
    results = []
    for given in (dense, dense.float()):
        partial, argmax = new_partial(problem)
        backend.row_stats(
            problem.raw(torch.float32), partial, argmax, *problem.tail[:2], given, *problem.tail[3:]
        )
        results.append(partial)
    assert torch.equal(*results)


def test_tiles_merge_into_what_is_known():
    problem = case(4, 300, 8, "index", how="peaked")
    logits = problem.raw(torch.float32)
    whole, whole_best = new_partial(problem)
    backend.row_stats(logits, whole, whole_best, *problem.tail)
    parts, best = new_partial(problem)
    with checked_bounds():
        for start, stop in ((0, 70), (70, 71), (71, 300)):
            tail = list(problem.tail)
            tail[0], tail[5] = OFFSET + start, tail[5][start:stop]
            backend.row_stats(logits[:, start:stop], parts, best, *tail)
    assert torch.equal(best, whole_best)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_neither_on_the_batch_nor_on_the_run(kind):
    problem = case(6, 301, 8, kind, softcap=4.0)

    def run(rows):
        tail = [
            None if t is None else t[rows] if i in (1, 2, 3, 4) else t for i, t in enumerate(problem.tail)
        ]
        logits = problem.raw(torch.float32)[rows]
        partial, argmax = (t[..., rows].contiguous() for t in new_partial(problem))
        backend.row_stats(logits, partial, argmax, *tail)
        norm, coef = (t[:, rows].contiguous() for t in parameters)
        out = torch.full_like(logits, NAN)
        backend.row_grad(logits, out, norm, coef, *with_set(tail))
        return partial, argmax, out

    parameters = randn(2, 6), randn(7, 6, seed=1)
    everyone = slice(None)
    first, second, alone = run(everyone), run(everyone), run(torch.tensor([4]))
    for whole, repeated, single in zip(first, second, alone):
        assert torch.equal(whole, repeated)
        row = whole[4:5] if whole is first[2] else whole[..., 4:5]
        assert torch.equal(row, single)


def test_a_nan_stays_in_its_row():
    problem = case(4, 200, 8, "index")
    logits = problem.raw(torch.float32)
    clean, clean_best = new_partial(problem)
    backend.row_stats(logits, clean, clean_best, *problem.tail)
    logits[2, 150] = NAN
    partial, argmax = new_partial(problem)
    backend.row_stats(logits, partial, argmax, *problem.tail)
    assert partial[1, 2].isnan()
    assert argmax[2] == 150 + OFFSET
    others = [0, 1, 3]
    assert torch.equal(partial[:, others], clean[:, others])


@pytest.mark.parametrize("odd", ODD_COLUMNS)
def test_argmax_is_that_of_torch(odd):
    def stats(problem, start, stop, partial, argmax, tail):
        logits = problem.raw(torch.float32)[:, start:stop]
        backend.row_stats(logits, partial, argmax, *tail)

    check_argmax(stats, odd)


@pytest.mark.parametrize(("dtype", "units"), [(torch.float32, 3), (torch.float64, 30)])
def test_softcap_is_exact_near_zero_too(dtype, units):
    """A lost term of the series, or 1 - e^-2x where it cancels. Of a row of one logit the maximum is that."""
    u = torch.cat([torch.logspace(-6, 1, 60, dtype=dtype), torch.linspace(0.005, 0.3, 60, dtype=dtype)])
    u = torch.cat([u, -u]).unsqueeze(1)
    partial, argmax = empty_partial(len(u), dtype, u.device)
    backend.row_stats(u, partial, argmax, 0, *TileArguments(softcap=1.0).flat())
    exact = u[:, 0].double().tanh()
    worst = ((partial[0].double() - exact) / exact).abs().max().item()
    assert worst < units * torch.finfo(dtype).eps / 2


def test_a_class_out_of_range_makes_its_row_nan():
    problem = case(3, 100, 8, "index")
    index = problem.tail[1].clone()
    index[1] = 2**33 + OFFSET
    partial, argmax = new_partial(problem)
    with checked_bounds():
        backend.row_stats(problem.raw(torch.float32), partial, argmax, OFFSET, index, *problem.tail[2:])
    stats = named_statistics(problem, partial, argmax)
    assert stats["target_log_prob"].isnan().tolist() == [False, True, False]


def test_the_checker_sees_what_is_out_of_bounds():
    logits = torch.zeros(2, 120)[:, :100]
    with checked_bounds(), pytest.raises(Exception, match="lie in no argument") as caught:
        backend.rows.row_grad[(2, 2)](
            *(logits, logits, torch.zeros(2, 2), torch.zeros(7, 2), None, None, None, None, None),
            *(2, 110, 120, 120, 0, 0, 0, 1.0, 0.0),
            SET=0,
            TARGET=0,
            CAPPED=False,
            BLOCK=64,
        )
    assert OutOfBounds.__name__ in repr(caught.value)
