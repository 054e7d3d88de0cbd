"""Cases for the CUDA row kernels, and how their results are judged.

A case is taken by the kernels on the CPU (tests/test_cuda_host.py) and on a GPU (tests/gpu). The truth is
the float64 reference; the yardstick is the error of the same formula in plain PyTorch, in the kernel's
arithmetic. Rows start at any alignment inside buffers of NaN, outputs are NaN before a kernel writes them,
and what is not theirs must be NaN afterwards. ``device`` has the kernels of ``tightrope.backends.ops``.
"""

import torch

from helpers import (
    ROUNDING,
    SMALLEST,
    assert_no_worse,
    assert_representable,
    assert_within,
    class_indices,
    rand,
    randn,
    top_k,
)
from tightrope import reference
from tightrope.backends import ops
from tightrope.coefficients import RowUpstream, row_coefficients
from tightrope.losses import RealityCreativity
from tightrope.statistics import OF_SUPPORT, StatGrads, empty_partial, row_stats, summarise

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BF16, F16, F32, F64 = DTYPES
ROWS = 3
# Around a vector (2, 4, 8), a warp of vectors (256), a block's step, and past it: with 128 threads and four
# vectors each, a block of bfloat16 reaches 4096 entries at a time, a block of float32 2048.
VOCABULARIES = (1, 2, 3, 7, 8, 9, 15, 17, 33, 255, 257, 1023, 2049, 4095, 4097, 9001)
KINDS = (None, "index", "dense", "top_k")
TRANSFORMS = ({}, {"bias": True}, {"logit_scale": -1.5}, {"softcap": 4.0}, {"bias": True, "softcap": 30.0})
HOSTILE = ("plain", "peaked", "offset", "negative", "masked", "constant", "large")

# Masks of the lowest finite number but for two classes: alone, beside -inf, beside the largest number.
SENTINELS = ("lowest", "lowest and -inf", "lowest and largest")


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
    elif how in SENTINELS:
        # Of float64 no more than the truth can sum.
        lowest = -1e300 if dtype == F64 else torch.finfo(dtype).min
        logits = logits.double()
        usual = logits[:, vocab // 2].clone()
        logits[:, : vocab - 1] = lowest
        if how == "lowest and -inf":
            logits[:, 1::2] = logits[:, : vocab // 2] = -torch.inf
        logits[:, vocab // 2] = usual
        if how == "lowest and largest":
            logits[:, -1] = -lowest
    return logits.to(dtype)


class Case:
    """Logits, a target and a transform, as kernels and reference take them."""

    def __init__(self, dtype, vocab, kind, how="plain", seed=0, gap=0, lead=0, **transform):
        self.dtype, self.vocab, self.wide = dtype, vocab, arithmetic(dtype)
        self.logits, self.buffer = placed(hostile(how, vocab, dtype, seed), gap, lead)
        self.bias = randn(vocab, seed=seed + 2, dtype=self.wide) if transform.pop("bias", None) else None
        self.scale, self.softcap = transform.get("logit_scale", 1.0), transform.get("softcap")
        possible = how not in ("masked", "lowest and -inf")
        index = class_indices((ROWS,), vocab, seed=seed) if possible else torch.full((ROWS,), vocab // 2)
        self.index = self.dense = self.topk_index = self.topk_prob = None
        if kind == "index":
            self.index = index
        elif kind == "dense":
            dense = torch.softmax(randn(ROWS, vocab, seed=seed + 3), -1).to(self.wide) * 1.5
            dense = dense.masked_fill(self.logits == -torch.inf, 0.0)
            self.dense = placed(dense, gap, lead)[0]
        elif kind == "top_k":
            pairs = top_k((ROWS,), vocab, k=5, seed=seed + 4, dtype=self.wide)
            if not possible:
                pairs.indices[:] = vocab // 2
            pairs.indices[:, 1] = pairs.indices[:, 0]
            pairs.indices[:, 2], pairs.probs[:, 2] = -1, 0.0
            self.topk_index, self.topk_prob = pairs.indices, pairs.probs
        self.target = (self.index, self.dense, self.topk_index, self.topk_prob)
        self.active = None
        self.threshold = self.classes = None  # a set, by `give_set` of side_cases.py

    def tail(self, dtype=None, offset=(0,)):
        """What follows the tensors of a kernel's own; in float64 for an oracle."""
        moved = [
            t if t is None or dtype is None or t.dtype == torch.int64 else t.to(dtype) for t in self.target
        ]
        bias = self.bias if self.bias is None or dtype is None else self.bias.to(dtype)
        return (*offset, *moved, bias, self.active, self.scale, self.softcap)

    def sided_tail(self, dtype=None, offset=0):
        """The same for a kernel that takes a set."""
        threshold = self.threshold if self.threshold is None or dtype is None else self.threshold.to(dtype)
        return self.tail(dtype, (offset, threshold, self.classes))

    def distribution(self):
        if self.topk_index is not None:
            pairs = (self.topk_index, self.topk_prob)
            return reference.dense_target(pairs, self.vocab, dtype=F64, ignore_index=-1)[0]
        target = self.dense if self.index is None else self.index
        return None if target is None else reference.dense_target(target, self.vocab, dtype=F64)[0]

    def z(self, raw):
        raw = raw if self.bias is None else raw + self.bias.double()
        return reference.transform(raw, logit_scale=self.scale, softcap=self.softcap)

    def nan_out(self, gap=0, lead=0, dtype=None):
        return placed(torch.full((ROWS, self.vocab), torch.nan, dtype=dtype or self.dtype), gap, lead)

    def front(self, dtype):
        """An output in the memory of the logits, narrower than they are: at the front of each row."""
        times = self.dtype.itemsize // dtype.itemsize
        strides = (self.logits.stride(0) * times, 1)
        memory = self.buffer.view(dtype)
        return memory.as_strided((ROWS, self.vocab), strides, self.logits.storage_offset() * times), memory


def stats_of(case, kernel):
    partial, argmax = empty_partial(ROWS, case.wide, case.logits.device)
    kernel(case.logits, partial, argmax, *case.tail())
    return summarise(partial, target_must_occur=case.index is not None), argmax


def grads_for(seed, wide, with_target):
    names = [name for name in StatGrads._fields if name not in OF_SUPPORT]  # those of whole rows
    fields = {name: randn(ROWS, seed=seed + i, dtype=wide) for i, name in enumerate(names)}
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


def check_grad(case, device, summary, in_place, gap=0, lead=0, narrow=None):
    """narrow: the dtype of the output, where it is not that of the logits."""
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
    rough = torch.empty(ROWS, case.vocab, dtype=narrow or case.dtype)
    ops.row_grad(case.logits, rough, norm, coef, *case.sided_tail())
    out, buffer = (case.logits, case.buffer) if in_place else case.nan_out(gap, lead, narrow)
    device.row_grad(case.logits, out, norm, coef, *case.sided_tail())
    floor = {F64: 1e-13, F32: 1e-6}[case.wide] * (1 + exact.abs().max().item())
    assert_no_worse(out, exact, rough, floor, "gradient")
    assert buffer.isnan().sum() == buffer.numel() - out.numel()  # nothing written outside, nothing left


def check_loss_grad(case, device, in_place, narrow=None, **terms):
    """narrow: as for check_grad; in place that is the front of each row."""
    family = RealityCreativity(case.vocab, **terms)
    balance = rand(ROWS, seed=5, dtype=case.wide)
    weight = 1 + rand(ROWS, seed=6, dtype=case.wide)
    upstream = family.upstream(balance, weight)
    raw = case.logits.double().requires_grad_()
    z = case.z(raw)
    loss = reference.token_loss(z, case.distribution(), balance=balance.double(), **terms)
    (exact,) = torch.autograd.grad((weight.double() * loss).sum(), raw)
    rough = torch.empty(ROWS, case.vocab, dtype=narrow or case.dtype)
    partial, argmax = torch.full((11, ROWS), torch.nan, dtype=case.wide), torch.full((ROWS,), -7)
    rough_partial, rough_argmax = partial.clone(), argmax.clone()
    ops.row_loss_grad(case.logits, rough, rough_partial, rough_argmax, upstream, *case.tail(offset=()))
    if in_place:
        out, buffer = (case.logits, case.buffer) if narrow is None else case.front(narrow)
    else:
        out, buffer = case.nan_out(1, 3, narrow)
    before = buffer.clone()
    device.row_loss_grad(case.logits, out, partial, argmax, upstream, *case.tail(offset=()))
    floor = {F64: 1e-13, F32: 1e-6}[case.wide] * (1 + exact.abs().max().item())
    assert_no_worse(out, exact, rough, floor, "gradient")
    before.as_strided(out.shape, out.stride(), out.storage_offset()).copy_(out)
    assert torch.equal(before.view(torch.uint8), buffer.view(torch.uint8))  # nothing written outside
    assert torch.equal(argmax, rough_argmax)
    size = 1 + z.detach().abs().max().item()
    for name, a, b in zip(["m", "S0", "S1", "S2", "bd", "be", "b", "d", "zz", "n"], partial, rough_partial):
        scale = case.vocab * size * (size if name == "zz" else 1)
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


def check_every_upstream(case, device):
    """The fused gradient for an upstream gradient of every field, also of those no built-in loss has."""
    grads = grads_for(9, case.wide, True)
    slope, rate = (0.1 * randn(ROWS, seed=30 + i, dtype=case.wide) for i in range(2))
    upstream = RowUpstream.of(slope, lse_slope=slope, collision_rate=rate, **grads)
    raw = case.logits.double().requires_grad_()
    stats = reference.row_stats(case.z(raw), case.distribution())._asdict()
    total = sum((g.double() * stats[name]).sum() for name, g in grads.items())
    total = total + (slope.double() * stats["lse"].square() / 2).sum()
    total = total + (rate.double() * stats["collision"].log()).sum()
    (exact,) = torch.autograd.grad(total, raw)
    rough, _ = case.nan_out()
    partial, argmax = torch.full((11, ROWS), torch.nan, dtype=case.wide), torch.full((ROWS,), -7)
    ops.row_loss_grad(case.logits, rough, partial, argmax, upstream, *case.tail(offset=()))
    out, *_ = fused(case, device, upstream)
    floor = {F64: 1e-13, F32: 1e-6}[case.wide] * (1 + exact.abs().max().item())
    assert_no_worse(out, exact, rough, floor, "gradient")
    assert_within(rough, exact, 1e-12 if case.dtype == F64 else 1e-2, what="gradient in plain PyTorch")


def check_sentinels(case, device):
    """Statistics and gradients beside masks: what the arithmetic can hold, else its infinity; no NaN."""
    rtol, floor = (1e-11, 1e-10) if case.wide == F64 else (1e-5, 1e-4)
    raw = case.logits.double().requires_grad_()
    exact = reference.row_stats(case.z(raw), case.distribution())._asdict()
    summary, argmax = stats_of(case, device.row_stats)
    actual = row_stats(summary, argmax)._asdict()
    assert torch.equal(actual.pop("argmax"), exact.pop("argmax"))
    exact = {name: value for name, value in exact.items() if value is not None}
    z = case.z(raw).detach().nan_to_num(neginf=0.0)
    # What is relative to the largest logit, and the sum of logits of both signs, have its rounding.
    rounding = {"target_logit": rtol * z.amax(-1).clamp_min(0), "logit_sum": rtol * z.abs().sum(-1)}
    for name, value in exact.items():
        assert_representable(actual[name], value, rtol, floor + rounding.get(name, 0.0), name)
    grads = {n: g for n, g in grads_for(7, case.wide, True).items() if n in exact}
    if case.logits.isinf().any():
        grads = {
            n: g for n, g in grads.items() if n not in ("logit_sum", "logit_square_sum", "mean_log_prob")
        }
    (truth,) = torch.autograd.grad(sum((g.double() * exact[n]).sum() for n, g in grads.items()), raw)
    coef = row_coefficients(summary, StatGrads(**grads), case.vocab)
    out, _ = case.nan_out()
    device.row_grad(case.logits, out, summary[:2].contiguous(), coef, *case.sided_tail())
    narrow = ROUNDING.get(case.dtype, 0.0) + SMALLEST.get(case.dtype, 0.0)
    assert_representable(out, truth, rtol + narrow, floor, "row_grad")
    if case.distribution() is None:
        return
    balance, ones = torch.full((ROWS,), 0.3, dtype=case.wide), torch.ones(ROWS, dtype=case.wide)
    for terms in TERMS:
        family = RealityCreativity(case.vocab, **terms)
        loss = reference.token_loss(case.z(raw), case.distribution(), balance=0.3, **terms)
        (truth,) = torch.autograd.grad(loss.sum(), raw)
        out, *_ = fused(case, device, family.upstream(balance, ones))
        assert_representable(out, truth, rtol + narrow, floor, f"row_loss_grad, {terms}")


TERMS = (
    {},
    {"reality": "squared_error"},
    {"creativity": "collision", "label_smoothing": 0.1, "z_loss": 1e-2},
    {"reality": "squared_error", "creativity": "collision", "logit_l2": 1e-3},
)


def fused(case, device, upstream):
    """Gradient, partial and argmax of row_loss_grad."""
    out, _ = case.nan_out()
    partial, argmax = torch.full((11, ROWS), -7.0, dtype=case.wide), torch.full((ROWS,), -7)
    device.row_loss_grad(case.logits, out, partial, argmax, upstream, *case.tail(offset=()))
    return out, partial, argmax


def all_bits(device, kind, dtype=BF16, vocab=4500):
    """Every output of the three kernels, as bytes."""
    case = Case(dtype, vocab, kind, seed=3, lead=1)
    summary, argmax = stats_of(case, device.row_stats)
    coef = row_coefficients(summary.nan_to_num(), StatGrads(lse=torch.ones(ROWS)), vocab)
    apart, _ = case.nan_out()
    device.row_grad(case.logits, apart, summary[:2].contiguous(), coef, *case.sided_tail())
    upstream = RealityCreativity(vocab).upstream(torch.full((ROWS,), 0.3), torch.ones(ROWS))
    outputs = [summary, apart, *fused(case, device, upstream), argmax]
    return [t.contiguous().view(torch.uint8) for t in outputs]
