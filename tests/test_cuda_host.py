"""The CUDA row kernels, compiled by g++ and run on the CPU, against the float64 reference.

The kernels' sources are those that nvcc compiles; tests/simt/simt.h supplies the threads.
"""

import os
import subprocess
import sys
from itertools import cycle, pairwise, product
from pathlib import Path

import pytest
import torch

from row_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    HOSTILE,
    KINDS,
    ROWS,
    SENTINELS,
    TERMS,
    TRANSFORMS,
    VOCABULARIES,
    Case,
    all_bits,
    arithmetic,
    check_every_upstream,
    check_grad,
    check_loss_grad,
    check_sentinels,
    check_stats,
    fused,
    grads_for,
    placed,
    stats_of,
)
from simt_rows import Simt, compile, compiler, library, library_path
from tightrope.backends import ops
from tightrope.coefficients import row_coefficients
from tightrope.losses import RealityCreativity
from tightrope.statistics import StatGrads, empty_partial, summarise

pytestmark = [pytest.mark.one_in(4), pytest.mark.skipif(compiler() is None, reason="g++ is not on the path")]

# A device on which a row takes one block, and one on which it takes as many as it can.
ONE, MANY = Simt(sms=1, threads=128, clusters=False), Simt(sms=400, threads=128)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_gradient_at_every_size(dtype, kind):
    """All sizes, with transforms, alignments of rows, targets and outputs, and devices in turn."""
    rest = zip(cycle(TRANSFORMS), cycle(range(8)), cycle((0, 1, 5)), cycle((True, False, False)))
    for i, (vocab, (transform, lead, gap, in_place)) in enumerate(zip(VOCABULARIES, rest)):
        for device in (ONE, MANY) if vocab > 2000 else (ONE,):
            case = Case(dtype, vocab, kind, seed=i, gap=gap, lead=lead, **transform)
            summary = check_stats(case, device)
            check_grad(case, device, summary, in_place, gap, (lead + (i % 2)) % 8)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fused_kernel_at_every_size(dtype, kind):
    """One launch gives the statistics, and the gradient of every built-in loss."""
    rest = zip(cycle(TERMS), cycle(TRANSFORMS), cycle(range(8)), cycle((0, 1, 5)), cycle((True, False)))
    for i, (vocab, (terms, transform, lead, gap, in_place)) in enumerate(zip(VOCABULARIES, rest)):
        for device in (ONE, MANY) if vocab > 4000 else (ONE,):
            case = Case(dtype, vocab, kind, seed=i, gap=gap, lead=lead, **transform)
            check_loss_grad(case, device, in_place, **terms)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fused_kernel_with_every_upstream_gradient(dtype, kind):
    """A coefficient that lost a field which no built-in loss uses: lse, target_logit, logit_sum."""
    for i, (vocab, device) in enumerate(((9, ONE), (300, ONE), (4500, MANY))):
        check_every_upstream(Case(dtype, vocab, kind, seed=i, gap=1, lead=1), device)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("narrow", [BF16, F16], ids=str)
def test_gradients_narrower_than_the_logits(narrow, kind):
    """Rounded once, at any alignment of either; in one launch also at the front of the logits' own rows."""
    rest = zip(cycle(TERMS), cycle(TRANSFORMS), cycle(range(8)), cycle((0, 1, 5)), cycle((True, True, False)))
    for i, (vocab, (terms, transform, lead, gap, in_place)) in enumerate(zip(VOCABULARIES, rest)):
        for device in (ONE, MANY) if vocab > 4000 else (ONE,):
            case = Case(F32, vocab, kind, seed=i, gap=gap, lead=lead, **transform)
            summary = check_stats(case, device)
            check_grad(case, device, summary, False, gap, (lead + i) % 8, narrow)
            check_loss_grad(case, device, in_place, narrow, **terms)


@pytest.mark.parametrize("how", HOSTILE[1:])
def test_hostile_rows(how):
    """Peaks, offsets of 1e4, all negative, masked to -inf, constant, very large."""
    for dtype, kind, device in zip(cycle(DTYPES), KINDS * 2, cycle((ONE, MANY, ONE))):
        for vocab in (5, 4100):
            case = Case(dtype, vocab, kind, how, seed=vocab, gap=1, lead=1)
            summary = check_stats(case, device)
            check_grad(case, device, summary, in_place=False)
            if kind is not None:
                check_loss_grad(case, device, in_place=True, narrow=BF16 if dtype == F32 else None)


@pytest.mark.parametrize("how", SENTINELS)
def test_finite_sentinels(how):
    """Fails if a thread, a warp or a block of the lowest finite number overflows as it merges."""
    for dtype, kind in product(DTYPES, KINDS):
        for vocab, device in ((9, ONE), (4100, ONE), (4100, MANY)):
            check_sentinels(Case(dtype, vocab, kind, how, seed=vocab, gap=1, lead=1), device)


@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
def test_tiles_merge_into_whole_rows(dtype):
    """Statistics of tiles, in turn, are those of the row; each tile's gradient is its part of the row's."""
    case = Case(dtype, 5000, "top_k", seed=1)
    partial, argmax = empty_partial(ROWS, case.wide, case.logits.device)
    out, _ = case.nan_out()
    edges = [0, 1, 1024, 4096, 5000]
    tiles = [slice(a, b) for a, b in pairwise(edges)]
    for part, device in zip(tiles, cycle((ONE, MANY))):
        device.row_stats(case.logits[:, part], partial, argmax, *case.tail(offset=(part.start,)))
    whole, best = stats_of(case, ONE.row_stats)
    summary = summarise(partial)
    torch.testing.assert_close(summary, whole, rtol=1e-5, atol=2e-2 if case.wide == F32 else 1e-10)
    assert torch.equal(argmax, best)
    coef = row_coefficients(summary, StatGrads(**grads_for(1, case.wide, True)), case.vocab)
    norm = summary[:2].contiguous()
    for part in tiles:
        ONE.row_grad(case.logits[:, part], out[:, part], norm, coef, *case.sided_tail(offset=part.start))
    entire, _ = case.nan_out()
    ONE.row_grad(case.logits, entire, norm, coef, *case.sided_tail())
    assert torch.equal(out, entire)


@pytest.mark.parametrize("device", [ONE, MANY], ids=["one block", "several blocks"])
def test_a_bad_row_stays_alone(device):
    """NaN and inf logits, a class out of range, and rows that do not count."""
    upstream = RealityCreativity(5000).upstream(torch.full((ROWS,), 0.3), torch.ones(ROWS))
    good = fused(Case(F32, 5000, "index"), device, upstream)
    for bad in (torch.nan, torch.inf, "class", "inactive"):
        case = Case(F32, 5000, "index")
        if bad == "class":
            case.index[1] = 5000
        elif bad == "inactive":
            case.active = torch.tensor([True, False, True])
            case.logits[1] = torch.nan
        else:
            case.logits[1, 4321] = bad
        out, partial, argmax = fused(case, device, upstream)
        for ours, theirs in zip((out, partial.t(), argmax), (good[0], good[1].t(), good[2])):
            assert torch.equal(ours[::2], theirs[::2])
        if bad == "inactive":
            assert (out[1] == 0).all()
            assert (partial[:, 1] == -7).all()
            assert argmax[1] == -7
            continue
        assert out[1].isnan().all()
        summary, best = stats_of(case, device.row_stats)
        assert summary[6, 1].isnan()  # target_log_prob, so the loss
        assert bad == "class" or best[1] == argmax[1] == 4321


def test_the_first_of_equal_maxima_wins():
    for dtype, vocab, first in product([BF16, F32], [9, 300, 9000], [0, 1, 7]):
        for last, device, lead in zip((first, vocab - 1, vocab // 2), (ONE, MANY, ONE), (0, 3, 5)):
            values = torch.zeros(ROWS, vocab, dtype=dtype)
            values[:, first] = values[:, last] = 1.0
            logits, _ = placed(values, lead=lead)
            partial, argmax = empty_partial(ROWS, F32, logits.device)
            device.row_stats(logits, partial, argmax, 0, *(None,) * 6, 1.0, None)
            assert argmax.tolist() == [min(first, last)] * ROWS
            for value in (torch.nan, -torch.inf):
                all_equal, _ = placed(torch.full((ROWS, vocab), value, dtype=dtype), lead=lead)
                partial, argmax = empty_partial(ROWS, F32, logits.device)
                device.row_stats(all_equal, partial, argmax, 0, *(None,) * 6, 1.0, None)
                assert argmax.tolist() == [0] * ROWS


@pytest.mark.parametrize("kind", ["top_k", "dense"])
@pytest.mark.parametrize("sms", [1, 400])
def test_the_order_of_threads_changes_no_bit(kind, sms):
    first = all_bits(Simt(sms=sms, threads=128), kind)
    for seed in range(1, 5):
        again = all_bits(Simt(sms=sms, threads=128, seed=seed), kind)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("blocks", [1, 4])
def test_no_logit_is_read_after_a_write_into_its_row(blocks):
    """Whatever the order of threads and blocks, in place gives the bits that another place gets."""
    upstream = RealityCreativity(4500).upstream(torch.full((ROWS,), 0.3), torch.ones(ROWS))
    for seed in range(5):
        shared = 64_000 if blocks == 1 else 16_384
        device = Simt(shared_per_sm=shared, shared_per_block=shared - 1024, threads=128, seed=seed)
        case = Case(F32, 4500, "top_k", lead=1, gap=3)
        partial, argmax = empty_partial(ROWS, F32, case.logits.device)
        tail = (partial, argmax, upstream, *case.tail(offset=()))
        apart, _ = case.nan_out(dtype=BF16)
        device.row_loss_grad(case.logits, apart, *tail)
        assert device.last.runs == blocks
        front, _ = case.front(BF16)
        device.row_loss_grad(case.logits, front, *tail)
        assert torch.equal(front, apart)


@pytest.mark.parametrize(("kernel", "barriers"), [("row_stats", 1), ("row_grad", 2), ("row_loss_grad", 3)])
def test_a_missing_barrier_shows(kernel, barriers):
    """Without any one of a kernel's barriers, some order of the threads gives other bits."""

    def bits(**options):
        case = Case(F32, 3000, "top_k", seed=2)
        case.topk_index += torch.arange(5) * 500  # owned by other threads than those that stage them
        case.topk_index %= 3000
        device = Simt(sms=1, threads=256, clusters=False, **options)
        if kernel == "row_stats":
            return stats_of(case, device.row_stats)[0]
        if kernel == "row_grad":
            summary, _ = stats_of(case, ops.row_stats)
            coef = row_coefficients(summary, StatGrads(target_log_prob=torch.ones(ROWS)), 3000)
            device.row_grad(case.logits, case.logits, summary[:2].contiguous(), coef, *case.sided_tail())
            return case.logits.clone()
        upstream = RealityCreativity(3000).upstream(torch.full((ROWS,), 0.3), torch.ones(ROWS))
        return fused(case, device, upstream)[0]

    right = bits()
    for number in range(barriers):
        orders = [bits(skip_barrier=number, seed=seed) for seed in range(6)]
        assert not all(torch.equal(right, x) for x in orders), f"barrier {number} of {kernel} is not missed"
    assert torch.equal(right, bits(skip_barrier=barriers)), (
        "the kernel has more barriers than this test knows"
    )


@pytest.mark.parametrize("how", [0, 1, 2])
def test_a_divergent_barrier_aborts(how):
    """A thread that ends early, one that waits elsewhere, a lane that is missing from a shuffle."""
    script = f"import ctypes; ctypes.CDLL({str(library_path())!r}).simt_diverge({how})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode < 0
    assert "simt: divergent" in done.stderr
    assert "rows_host.cpp" in done.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_moved_for_each_logit(dtype):
    """What docs/cuda.md says: counted by the kernels' own loads and stores."""
    vocab, size = 9000, dtype.itemsize
    row = vocab * size
    upstream = torch.ones(11, ROWS, dtype=arithmetic(dtype))
    for device in (ONE, MANY):
        case = Case(dtype, vocab, None)
        summary, _ = stats_of(case, device.row_stats)
        assert (device.last.read, device.last.written) == (ROWS * row, 0)
        coef = row_coefficients(summary, StatGrads(), vocab)
        device.row_grad(case.logits, case.nan_out()[0], summary[:2].contiguous(), coef, *case.sided_tail())
        assert (device.last.read, device.last.written) == (ROWS * row, ROWS * row)
        fused(case, device, upstream)
        assert (device.last.read, device.last.written) == (ROWS * row, ROWS * row)
        if dtype == F32:
            half, _ = case.nan_out(dtype=BF16)
            device.row_grad(case.logits, half, summary[:2].contiguous(), coef, *case.sided_tail())
            assert (device.last.read, device.last.written) == (ROWS * row, ROWS * row // 2)
            partial, argmax = empty_partial(ROWS, F32, half.device)
            device.row_loss_grad(case.logits, half, partial, argmax, upstream, *case.tail(offset=()))
            assert (device.last.read, device.last.written) == (ROWS * row, ROWS * row // 2)
    small = Simt(sms=1, threads=128, clusters=False, shared_per_sm=16_384, shared_per_block=15_360)
    case = Case(dtype, vocab, None)
    fits = row <= 15_360
    fused(case, small, upstream)
    again = row - small.last.kept * 16 if not fits else 0
    assert small.last.kept > 0
    assert (small.last.read, small.last.written) == (ROWS * (row + again), ROWS * row)


DEVICES = {  # shared memory of an SM and of a block, multiprocessors, clusters
    "sm_80": Simt(sms=108, shared_per_sm=167_936, shared_per_block=166_912, clusters=False),
    "sm_90": Simt(sms=132, shared_per_sm=233_472, shared_per_block=232_448, clusters=True),
    "sm_120": Simt(sms=170, shared_per_sm=102_400, shared_per_block=101_376, clusters=True),
}


@pytest.mark.parametrize("name", DEVICES)
def test_the_fused_kernels_plan(name):
    """Two blocks an SM wherever the row fits so; never more shared memory than a block can have."""
    device = DEVICES[name]
    for dtype, vocab, rows in product(DTYPES, (1, 1000, 32_000, 50_257, 151_936, 262_144), (1, 64, 4096)):
        plan = device.plan_loss(dtype, rows, vocab, sparse=1)
        vectors = -(-vocab // plan.runs) * dtype.itemsize // 16
        assert plan.runs in ((1, 2, 4, 8) if device.clusters else (1,))
        assert plan.shared <= device.shared_per_block
        whole = plan.kept >= vectors - 1
        if 2 * (plan.shared + 1024) > device.shared_per_sm:
            assert plan.runs == (8 if device.clusters else 1)  # nothing smaller would have done
            assert not whole or plan.shared * 2 > device.shared_per_sm - 2048
        else:
            assert whole
        if name == "sm_90" and (dtype.itemsize, vocab) in ((2, 151_936), (4, 151_936), (2, 262_144)):
            assert whole, "a row of this size is read once"


@pytest.mark.parametrize("name", DEVICES)
def test_when_the_kernels_are_fused(name):
    """Rows that are kept, and enough of them: few are cut into more blocks by the separate kernels."""
    device = DEVICES[name]
    longest = {"sm_80": 41_000, "sm_90": 460_000, "sm_120": 200_000}[name]
    fuses = {
        (rows, vocab): bool(device.plan_loss(F32, rows, vocab, sparse=1).fuses)
        for rows, vocab in product(
            (1, 4, 11, 71, 72, 128, 4096), (1000, 32_000, longest, longest + 4000, 600_000)
        )
    }
    for (rows, vocab), fused_ in fuses.items():
        if vocab > longest:
            assert not fused_, "a row is read again"
        elif rows == 4096 or vocab == 1000:
            assert fused_, "nothing speaks for two kernels"
        elif rows == 1:
            assert not fused_, "a row would have one block, or a cluster, instead of a whole device"
    if name == "sm_80":  # one block a row: two thirds of 108 processors
        assert not fuses[71, 32_000]
        assert fuses[72, 32_000]
    if name == "sm_90":  # eight: 88 of 132
        assert not fuses[4, 460_000]
        assert fuses[11, 460_000]
    assert not device.plan_loss(F32, 4096, longest, sparse=2048).fuses  # their staging takes the room


def test_under_sanitizers(tmp_path):
    """Buffers of exact size, every kernel and type, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    flags = ["-O1", "-g1", "-DSANITIZE", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    try:
        program = compile(tmp_path / "rows", *flags)
    except subprocess.CalledProcessError:
        pytest.skip("this compiler does not link the sanitizers")
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels ran" in done.stdout
    planted = subprocess.run(
        [program, "overrun"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert planted.returncode != 0
    assert "heap-buffer-overflow" in planted.stderr


def test_the_library_is_what_nvcc_compiles():
    """The host build includes the launchers of csrc/cuda, and no copy of a kernel stands under tests."""
    text = (Path(__file__).parent / "simt" / "rows_host.cpp").read_text()
    assert '#include "../../csrc/cuda/launch.cuh"' in text
    assert "__global__" not in text
    assert library() is not None
