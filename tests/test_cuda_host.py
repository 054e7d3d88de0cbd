"""The CUDA row kernels, compiled by g++ and run on the CPU, against the float64 reference.

The kernels' sources are those that nvcc compiles; tests/simt/simt.h supplies the threads. Rows start at any
alignment inside buffers of NaN, outputs are NaN before a kernel writes them, and what is not theirs must be
NaN afterwards. The yardstick is the error of the same formula in plain PyTorch, in the kernel's arithmetic.
"""

import os
import subprocess
import sys
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from helpers import assert_no_worse, child_environment, class_indices, rand, randn, top_k

from simt_rows import DTYPES, Simt, compile, compiler, library
from tightrope import reference
from tightrope.backends import ops
from tightrope.coefficients import row_coefficients
from tightrope.losses import RealityCreativity
from tightrope.statistics import StatGrads, empty_partial, row_stats, summarise

pytestmark = pytest.mark.skipif(compiler() is None, reason="g++ is not on the path")

BF16, F16, F32, F64 = DTYPES
ROWS = 3
# Around a vector (2, 4, 8), a warp of vectors (256), a block's step, and past it: with 128 threads and four
# vectors each, a block of bfloat16 reaches 4096 entries at a time, a block of float32 2048.
VOCABULARIES = (1, 2, 3, 7, 8, 9, 15, 17, 33, 255, 257, 1023, 2049, 4095, 4097, 9001)
KINDS = (None, "index", "dense", "top_k")
TRANSFORMS = ({}, {"bias": True}, {"logit_scale": -1.5}, {"softcap": 4.0}, {"bias": True, "softcap": 30.0})
HOSTILE = ("plain", "peaked", "offset", "negative", "masked", "constant", "large")
# A device on which a row takes one block, and one on which it takes as many as it can.
ONE, MANY = Simt(sms=1, threads=128, clusters=False), Simt(sms=400, threads=128)


def arithmetic(dtype):
    return F64 if dtype == F64 else F32


def placed(values, gap=0, lead=0):
    """The same rows in a buffer of NaN: the first starts ``lead`` entries in, ``gap`` lie between two."""
    rows, cols = values.shape
    flat = torch.full((lead + rows * (cols + gap) + 16,), torch.nan, dtype=values.dtype)
    view = flat.as_strided((rows, cols), (cols + gap, 1), lead)
    view.copy_(values)
    return view, flat


def hostile(how, vocab, dtype, seed=0):
    logits = randn(ROWS, vocab, seed=seed) * 2
    if how == "peaked":
        logits[::2] *= 20
    elif how == "offset":
        logits += torch.tensor([1e4, -1e4, 0.0]).unsqueeze(-1)
    elif how == "negative":
        logits = -logits.abs() - 50
    elif how == "masked":
        logits[:, rand(vocab, seed=seed + 1) < 0.5] = -torch.inf
        logits[:, vocab // 2] = 1.0
    elif how == "constant":
        logits = torch.full_like(logits, -3.0)
    elif how == "large":
        logits[:, ::2] *= 2e3 if dtype == F16 else 1e8
    return logits.to(dtype)


class Case:
    """Logits, a target and a transform, as kernels and reference take them."""

    def __init__(self, dtype, vocab, kind, how="plain", seed=0, gap=0, lead=0, **transform):
        self.dtype, self.vocab, self.wide = dtype, vocab, arithmetic(dtype)
        self.logits, self.buffer = placed(hostile(how, vocab, dtype, seed), gap, lead)
        self.bias = randn(vocab, seed=seed + 2, dtype=self.wide) if transform.pop("bias", None) else None
        self.scale, self.softcap = transform.get("logit_scale", 1.0), transform.get("softcap")
        index = (
            torch.full((ROWS,), vocab // 2) if how == "masked" else class_indices((ROWS,), vocab, seed=seed)
        )
        self.index = self.dense = self.topk_index = self.topk_prob = None
        if kind == "index":
            self.index = index
        elif kind == "dense":
            dense = torch.softmax(randn(ROWS, vocab, seed=seed + 3), -1).to(self.wide) * 1.5
            dense = dense.masked_fill(self.logits == -torch.inf, 0.0)
            self.dense = placed(dense, gap, lead)[0]
        elif kind == "top_k":
            pairs = top_k((ROWS,), vocab, k=5, seed=seed + 4, dtype=self.wide)
            if how == "masked":
                pairs.indices[:] = vocab // 2
            pairs.indices[:, 1] = pairs.indices[:, 0]
            pairs.indices[:, 2], pairs.probs[:, 2] = -1, 0.0
            self.topk_index, self.topk_prob = pairs.indices, pairs.probs
        self.target = (self.index, self.dense, self.topk_index, self.topk_prob)
        self.active = None

    def tail(self, dtype=None, offset=(0,)):
        """What follows the tensors of a kernel's own; in float64 for an oracle."""
        moved = [
            t if t is None or dtype is None or t.dtype == torch.int64 else t.to(dtype) for t in self.target
        ]
        bias = self.bias if self.bias is None or dtype is None else self.bias.to(dtype)
        return (*offset, *moved, bias, self.active, self.scale, self.softcap)

    def distribution(self):
        if self.topk_index is not None:
            pairs = (self.topk_index, self.topk_prob)
            return reference.dense_target(pairs, self.vocab, dtype=F64, ignore_index=-1)[0]
        target = self.dense if self.index is None else self.index
        return None if target is None else reference.dense_target(target, self.vocab, dtype=F64)[0]

    def z(self, raw):
        raw = raw if self.bias is None else raw + self.bias.double()
        return reference.transform(raw, logit_scale=self.scale, softcap=self.softcap)

    def nan_out(self, gap=0, lead=0):
        return placed(torch.full((ROWS, self.vocab), torch.nan, dtype=self.dtype), gap, lead)


def stats_of(case, kernel):
    partial, argmax = empty_partial(ROWS, case.wide, case.logits.device)
    kernel(case.logits, partial, argmax, *case.tail())
    return summarise(partial, target_must_occur=case.index is not None), argmax


def grads_for(seed, wide, with_target):
    fields = {name: randn(ROWS, seed=seed + i, dtype=wide) for i, name in enumerate(StatGrads._fields)}
    fields["logit_sum"] *= 1e-3
    fields["logit_square_sum"] *= 1e-4
    return {k: v for k, v in fields.items() if with_target or not k.startswith("target")}


def check_stats(case, device):
    summary, argmax = stats_of(case, device.row_stats)
    rough = row_stats(*stats_of(case, ops.row_stats))._asdict()
    z = case.z(case.logits.double())
    exact = reference.row_stats(z, case.distribution())._asdict()
    ours = row_stats(summary, argmax)._asdict()
    assert torch.equal(ours.pop("argmax"), exact.pop("argmax"))
    size = z.masked_fill(z == -torch.inf, 0.0).abs().max().item()
    floor = {F64: 1e-14, F32: 4e-7}[case.wide] * (1 + size)
    for name, value in exact.items():
        if value is not None:
            scale = {"logit_sum": case.vocab, "logit_square_sum": case.vocab * (1 + size)}.get(name, 1)
            assert_no_worse(ours[name], value, rough[name], floor * scale, name)
    return summary


def check_grad(case, device, summary, in_place, gap=0, lead=0):
    with_target = any(t is not None for t in case.target)
    grads = grads_for(7, case.wide, with_target)
    if torch.isinf(case.logits).any():  # their statistics are infinite, and so have no gradient
        for name in ("logit_sum", "logit_square_sum", "mean_log_prob"):
            grads.pop(name)
    coef = row_coefficients(summary, StatGrads(**grads), case.vocab)
    norm = summary[:2].contiguous()
    raw = case.logits.double().requires_grad_()
    exact_stats = reference.row_stats(case.z(raw), case.distribution())._asdict()
    total = sum((g.double() * exact_stats[name]).sum() for name, g in grads.items())
    (exact,) = torch.autograd.grad(total, raw)
    rough = torch.empty_like(case.logits, memory_format=torch.contiguous_format)
    ops.row_grad(case.logits, rough, norm, coef, *case.tail())
    out, buffer = (case.logits, case.buffer) if in_place else case.nan_out(gap, lead)
    device.row_grad(case.logits, out, norm, coef, *case.tail())
    floor = {F64: 1e-13, F32: 1e-6}[case.wide] * (1 + exact.abs().max().item())
    assert_no_worse(out, exact, rough, floor, "gradient")
    assert buffer.isnan().sum() == buffer.numel() - out.numel()  # nothing written outside, nothing left


def check_loss_grad(case, device, in_place, **terms):
    family = RealityCreativity(case.vocab, **terms)
    balance = rand(ROWS, seed=5, dtype=case.wide)
    weight = 1 + rand(ROWS, seed=6, dtype=case.wide)
    upstream = family.upstream(balance, weight)
    raw = case.logits.double().requires_grad_()
    z = case.z(raw)
    loss = reference.token_loss(z, case.distribution(), balance=balance.double(), **terms)
    (exact,) = torch.autograd.grad((weight.double() * loss).sum(), raw)
    rough = torch.empty_like(case.logits, memory_format=torch.contiguous_format)
    partial, argmax = torch.full((10, ROWS), torch.nan, dtype=case.wide), torch.full((ROWS,), -7)
    rough_partial, rough_argmax = partial.clone(), argmax.clone()
    ops.row_loss_grad(case.logits, rough, rough_partial, rough_argmax, upstream, *case.tail(offset=()))
    out, buffer = (case.logits, case.buffer) if in_place else case.nan_out(1, 3)
    device.row_loss_grad(case.logits, out, partial, argmax, upstream, *case.tail(offset=()))
    floor = {F64: 1e-13, F32: 1e-6}[case.wide] * (1 + exact.abs().max().item())
    assert_no_worse(out, exact, rough, floor, "gradient")
    assert buffer.isnan().sum() == buffer.numel() - out.numel()
    assert torch.equal(argmax, rough_argmax)
    size = 1 + z.detach().abs().max().item()
    for name, a, b in zip("m S0 S1 S2 bd be b d zz n".split(), partial, rough_partial):
        scale = case.vocab * size * (size if name == "zz" else 1)
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


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


TERMS = (
    {},
    {"reality": "squared_error"},
    {"creativity": "collision", "label_smoothing": 0.1, "z_loss": 1e-2},
    {"reality": "squared_error", "creativity": "collision", "logit_l2": 1e-3},
)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fused_kernel_at_every_size(dtype, kind):
    """One launch gives the statistics, and the gradient of every built-in loss."""
    rest = zip(cycle(TERMS), cycle(TRANSFORMS), cycle(range(8)), cycle((0, 1, 5)), cycle((True, False)))
    for i, (vocab, (terms, transform, lead, gap, in_place)) in enumerate(zip(VOCABULARIES, rest)):
        for device in (ONE, MANY) if vocab > 4000 else (ONE,):
            case = Case(dtype, vocab, kind, seed=i, gap=gap, lead=lead, **transform)
            check_loss_grad(case, device, in_place, **terms)


@pytest.mark.parametrize("how", HOSTILE[1:])
def test_hostile_rows(how):
    """Peaks, offsets of 1e4, all negative, masked to -inf, constant, very large."""
    for dtype, kind, device in zip(cycle(DTYPES), KINDS * 2, cycle((ONE, MANY, ONE))):
        for vocab in (5, 4100):
            case = Case(dtype, vocab, kind, how, seed=vocab, gap=1, lead=1)
            summary = check_stats(case, device)
            check_grad(case, device, summary, in_place=False)
            if kind is not None:
                check_loss_grad(case, device, in_place=True)


@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
def test_tiles_merge_into_whole_rows(dtype):
    """Statistics of tiles, in turn, are those of the row; each tile's gradient is its part of the row's."""
    case = Case(dtype, 5000, "top_k", seed=1)
    partial, argmax = empty_partial(ROWS, case.wide, case.logits.device)
    out, _ = case.nan_out()
    edges = [0, 1, 1024, 4096, 5000]
    tiles = [slice(a, b) for a, b in zip(edges, edges[1:])]
    for part, device in zip(tiles, cycle((ONE, MANY))):
        device.row_stats(case.logits[:, part], partial, argmax, *case.tail(offset=(part.start,)))
    whole, best = stats_of(case, ONE.row_stats)
    summary = summarise(partial)
    torch.testing.assert_close(summary, whole, rtol=1e-5, atol=2e-2 if case.wide == F32 else 1e-10)
    assert torch.equal(argmax, best)
    coef = row_coefficients(summary, StatGrads(**grads_for(1, case.wide, True)), case.vocab)
    norm = summary[:2].contiguous()
    for part in tiles:
        ONE.row_grad(case.logits[:, part], out[:, part], norm, coef, *case.tail(offset=(part.start,)))
    entire, _ = case.nan_out()
    ONE.row_grad(case.logits, entire, norm, coef, *case.tail())
    assert torch.equal(out, entire)


def fused(case, device, upstream):
    out, _ = case.nan_out()
    partial, argmax = torch.full((10, ROWS), -7.0, dtype=case.wide), torch.full((ROWS,), -7)
    device.row_loss_grad(case.logits, out, partial, argmax, upstream, *case.tail(offset=()))
    return out, partial, argmax


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


def all_bits(device, kind, dtype=BF16, vocab=4500):
    """Every output of the three kernels, as integers."""
    case = Case(dtype, vocab, kind, seed=3, lead=1)
    summary, argmax = stats_of(case, device.row_stats)
    coef = row_coefficients(summary.nan_to_num(), StatGrads(lse=torch.ones(ROWS)), vocab)
    apart, _ = case.nan_out()
    device.row_grad(case.logits, apart, summary[:2].contiguous(), coef, *case.tail())
    upstream = RealityCreativity(vocab).upstream(torch.full((ROWS,), 0.3), torch.ones(ROWS))
    outputs = [summary, apart, *fused(case, device, upstream), argmax]
    return [t.contiguous().view(torch.uint8) for t in outputs]


@pytest.mark.parametrize("kind", ["top_k", "dense"])
@pytest.mark.parametrize("sms", [1, 400])
def test_the_order_of_threads_changes_no_bit(kind, sms):
    first = all_bits(Simt(sms=sms, threads=128), kind)
    for seed in range(1, 5):
        again = all_bits(Simt(sms=sms, threads=128, seed=seed), kind)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


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
            device.row_grad(case.logits, case.logits, summary[:2].contiguous(), coef, *case.tail())
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
    script = f"import simt_rows; simt_rows.library().simt_diverge({how})"
    done = subprocess.run(
        [sys.executable, "-c", script], env=child_environment(), capture_output=True, text=True, timeout=120
    )
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
        device.row_grad(case.logits, case.nan_out()[0], summary[:2].contiguous(), coef, *case.tail())
        assert (device.last.read, device.last.written) == (ROWS * row, ROWS * row)
        fused(case, device, upstream)
        assert (device.last.read, device.last.written) == (ROWS * row, ROWS * row)
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
