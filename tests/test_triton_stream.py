"""stream_stats and stream_grad of the Triton backend in the interpreter, against the float64 reference."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; test_triton_interpreter.py runs it", allow_module_level=True)

from dataclasses import replace

import torch
import triton
from triton.runtime import interpreter

from helpers import EPS32, assert_rounded_once, randn
from tightrope.backends import triton as backend
from tightrope.kernels import configs
from triton_bounds import checked_bounds
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
)

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.one_in(12)]
NAN = float("nan")


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten(monkeypatch):
    unwritten_parts(monkeypatch, backend)


def configure(monkeypatch, **changes):
    """Another configuration of the interpreter's kernels."""
    small = configs.ARCHITECTURES["interpreter"]
    usual = replace(small.single, **changes)
    other = replace(usual, descriptors=False)
    changed = replace(small, half=usual, single=usual, half_unaligned=other, single_unaligned=other)
    monkeypatch.setattr(backend, "architecture", lambda: changed)


def check(problem):
    stats, grad = truth(problem)
    rough_stats, rough_grad = truth(problem, torch.float32)
    partial, argmax = new_partial(problem)
    live = slice(None) if problem.active is None else problem.active.nonzero().squeeze(1)
    hidden, weight = problem.hidden, problem.weight
    with checked_bounds() as counted:
        backend.stream_stats(hidden, weight, partial, argmax, *problem.tail)
        norm, coef = coefficients(problem, partial)
        out = torch.full((hidden.shape[0], weight.shape[0]), NAN, dtype=hidden.dtype)
        backend.stream_grad(hidden, weight, out, norm, coef, *problem.tail)
    assert counted["loads"] > hidden.numel()
    for name, value in named_statistics(problem, partial, argmax).items():
        exact = stats[name][live]
        if name == "argmax":
            assert torch.equal(value[live], exact)
            continue
        judge(value[live], exact, rough_stats[name][live], rounding(problem, exact), name)
    if grad.isfinite().all():
        scale = rounding(problem, grad)
        if hidden.dtype == torch.float32:
            judge(out[live], grad[live], rough_grad[live], scale, "gradient")
        else:
            assert_rounded_once(out[live], grad[live], 64 * EPS32 * scale, "gradient")
    if problem.active is not None:
        assert (out[~problem.active] == 0).all()
        assert torch.isneginf(partial[0, ~problem.active]).all(), "a row that does not count was touched"
        assert (argmax[~problem.active] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOSTILE)
def test_hostile(kind, how):
    check(case(5, 171, 21, kind, how=how))


@pytest.mark.parametrize("kind", KINDS)
def test_finite_sentinels(kind):
    """Fails if a block of the lowest finite number overflows in a shift, a sum or a merge."""
    for how in SENTINELS:
        problem = case(5, 171, 21, kind, how=how)
        hidden, weight = problem.hidden, problem.weight
        partial, argmax = new_partial(problem)
        backend.stream_stats(hidden, weight, partial, argmax, *problem.tail)
        out = torch.full((5, 171), NAN)
        backend.stream_grad(hidden, weight, out, *coefficients(problem, partial), *problem.tail)
        judge_sentinels(problem, partial, argmax, out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 1), (33, 31, 32), (2, 65, 33), (31, 97, 64)])
def test_tails_softcap_and_masked_rows(kind, rows, columns, width):
    check(case(rows, columns, width, kind, softcap=5.0, masked_rows=True, seed=columns))
    check(case(rows, columns, width, kind, bias=False, logit_scale=1.0, seed=columns))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    check(case(9, 70, 24, kind, dtype=dtype, softcap=5.0))


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("descriptors", [False, True])
def test_pieces_and_descriptors(monkeypatch, pieces, descriptors):
    """Widths that a descriptor can have, and one that it cannot, which goes by pointers."""
    configure(monkeypatch, pieces=pieces, descriptors=descriptors)
    for width in (24, 21):
        check(case(34, 100, width, "index", softcap=5.0))
        check(case(3, 100, width, "topk"))
    for width, can in ((24, True), (21, False)):
        used = backend._operands("stream_stats", 1, torch.zeros(2, width), torch.zeros(3, width))[0]
        assert used.descriptors == (descriptors and can)


def test_bfloat16_operands_in_the_kernel(monkeypatch):
    """The kernel itself on bfloat16, with the interpreter's product of bit patterns put right."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype != interpreter.tl.bfloat16:
            return operand
        bits = operand.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest),
    )
    problem = case(9, 70, 24, "index", dtype=torch.bfloat16)
    results = []
    for interpreted in (True, False):  # False: as on a GPU, operands are not converted
        monkeypatch.setattr(backend, "INTERPRETED", interpreted)
        monkeypatch.setattr(backend, "architecture", lambda: configs.ARCHITECTURES["interpreter"])
        partial, argmax = new_partial(problem)
        backend.stream_stats(problem.hidden, problem.weight, partial, argmax, *problem.tail)
        results.append((partial, argmax))
    for converted, direct in zip(*results):
        assert torch.equal(converted, direct)


def test_strided_operands():
    problem = case(5, 70, 24, "dense")
    expected, _ = new_partial(problem)
    backend.stream_stats(problem.hidden, problem.weight, expected, _, *problem.tail)
    wide = torch.full((5, 40), NAN)
    wide[:, 3:27] = problem.hidden
    dense = torch.full((5, 90), NAN)
    dense[:, :70] = problem.tail[2]
    tail = (*problem.tail[:2], dense[:, :70], *problem.tail[3:])
    for weight in (problem.weight, problem.weight.t().contiguous().t()):
        partial, argmax = new_partial(problem)
        with checked_bounds():
            backend.stream_stats(wide[:, 3:27], weight, partial, argmax, *tail)
        assert torch.equal(partial, expected)


def test_tiles_merge_into_what_is_known():
    problem = case(4, 150, 16, "topk", how="peaked")
    whole, whole_best = new_partial(problem)
    backend.stream_stats(problem.hidden, problem.weight, whole, whole_best, *problem.tail)
    parts, best = new_partial(problem)
    with checked_bounds():
        for start, stop in ((0, 70), (70, 71), (71, 150)):
            tail = list(problem.tail)
            tail[0], tail[5] = OFFSET + start, tail[5][start:stop]
            backend.stream_stats(problem.hidden, problem.weight[start:stop], parts, best, *tail)
    assert torch.equal(best, whole_best)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_neither_on_the_batch_nor_on_the_run(kind, monkeypatch):
    problem = case(37, 150, 24, kind, softcap=4.0)
    norm, coef = randn(2, 37), randn(7, 37, seed=1)

    def run(rows):
        tail = [
            None if t is None else t[rows] if i in (1, 2, 3, 4) else t for i, t in enumerate(problem.tail)
        ]
        hidden = problem.hidden[rows]
        partial, argmax = (t[..., rows].contiguous() for t in new_partial(problem))
        backend.stream_stats(hidden, problem.weight, partial, argmax, *tail)
        out = torch.full((hidden.shape[0], 150), NAN)
        given = (t[:, rows].contiguous() for t in (norm, coef))
        backend.stream_grad(hidden, problem.weight, out, *given, *tail)
        return partial, argmax, out.t()

    chosen = torch.tensor([35, 4])
    first, second, few = run(slice(None)), run(slice(None)), run(chosen)
    for whole, repeated, part in zip(first, second, few):
        assert torch.equal(whole, repeated)
        assert torch.equal(whole[..., chosen], part)
    # Nor on how many rows' parts are held at a time.
    monkeypatch.setattr(backend, "_PARTS_BYTES", 1)
    for whole, cut in zip(first, run(slice(None))):
        assert torch.equal(whole, cut)


def test_a_nan_stays_in_its_row():
    problem = case(4, 100, 16, "index")
    clean, clean_best = new_partial(problem)
    backend.stream_stats(problem.hidden, problem.weight, clean, clean_best, *problem.tail)
    problem.hidden[2, 3] = NAN
    partial, argmax = new_partial(problem)
    backend.stream_stats(problem.hidden, problem.weight, partial, argmax, *problem.tail)
    assert partial[1, 2].isnan()
    others = [0, 1, 3]
    assert torch.equal(partial[:, others], clean[:, others])
    norm, coef = coefficients(problem, partial)
    out = torch.zeros(4, 100)
    backend.stream_grad(problem.hidden, problem.weight, out, norm, coef, *problem.tail)
    assert out[2].isnan().all()
    assert out[others].isfinite().all()


@pytest.mark.parametrize("odd", ODD_COLUMNS)
def test_argmax_is_that_of_torch(odd):
    def stats(problem, start, stop, partial, argmax, tail):
        backend.stream_stats(problem.hidden, problem.weight[start:stop], partial, argmax, *tail)

    check_argmax(stats, odd)


def test_autotuning_keeps_the_fastest_and_changes_no_bit(monkeypatch):
    """With a stand-in for the clock; every candidate runs, on outputs that are not reset between."""
    configure(monkeypatch, stages=2)
    problem = case(9, 100, 24, "index")
    parameters = randn(2, 9), randn(7, 9, seed=1)

    def run():
        partial, argmax = new_partial(problem)
        out = torch.full((9, 100), NAN)
        for half in (slice(0, 50), slice(50, 100)):  # the second merges into the first
            tail = list(problem.tail)
            tail[0], tail[5] = OFFSET + half.start, tail[5][half]
            backend.stream_stats(problem.hidden, problem.weight[half], partial, argmax, *tail)
        backend.stream_grad(problem.hidden, problem.weight, out, *parameters, *problem.tail)
        return partial, argmax, out

    plain = run()
    timed = []

    def milliseconds(launch):
        for _ in range(2):
            launch()
        timed.append(launch)
        if len(timed) % 3 == 1:
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        return 5.0 if len(timed) != 5 else 1.0

    candidates = configs.neighbours(backend.architecture().single)
    assert len(set(candidates)) == len(candidates) > 5
    same = [replace(c, stages=0, group=0) for c in candidates]
    assert same == same[:1] * len(same), "a candidate may change the order of sums"
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "_chosen", {})
    monkeypatch.setattr(backend, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setenv("TIGHTROPE_AUTOTUNE", "1")
    capturing = True
    run()
    assert not timed, "timed while a graph was captured"
    capturing = False
    for _ in range(2):
        for tuned, expected in zip(run(), plain):
            assert torch.equal(tuned, expected)
    # stream_stats on 50 columns, and stream_grad on 100, once each.
    assert len(timed) == 2 * len(candidates)
    assert list(backend._chosen.values()) == [candidates[4], candidates[0]]


@pytest.mark.parametrize("wrong", [100, 2**33, -5])
def test_a_class_out_of_range_makes_its_row_nan(wrong):
    problem = case(3, 100, 8, "index")
    index = problem.tail[1].clone()
    index[1] = wrong + OFFSET
    tail = (OFFSET, index, *problem.tail[2:])
    partial, argmax = new_partial(problem)
    with checked_bounds():
        backend.stream_stats(problem.hidden, problem.weight, partial, argmax, *tail)
        out = torch.full((3, 100), NAN)
        backend.stream_grad(problem.hidden, problem.weight, out, randn(2, 3), randn(7, 3), *tail)
    stats = named_statistics(problem, partial, argmax)
    assert stats["target_log_prob"].isnan().tolist() == [False, True, False]
