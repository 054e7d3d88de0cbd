"""Cases of two-sided rows for the CUDA row kernels, judged as those of row_cases.py are.

The truth is plain PyTorch in float64 (`tightrope.backends.ops`), whose yardstick is the same in the
kernel's arithmetic. A set is such that rounding moves no entry to the other side.
"""

from itertools import pairwise

import torch

from helpers import ROUNDING, SMALLEST, assert_no_worse, assert_representable, rand, randn
from row_cases import F32, F64, ROWS, SENTINELS, Case
from tightrope.backends import ops
from tightrope.statistics import empty_sides, summarise_sides
from tightrope.targets import NO_CLASS

# threshold: in a gap between two logits; ties: at a logit, which takes exact ones; mixed: all of one row,
# nothing of another. listed: with repeats, classes that are ignored and one past the end; none: no column.
SETS = ("threshold", "listed", "mixed", "every class", "none", "nothing")
EXACT_SETS = ("ties", *SETS)


def listed_classes(vocab, seed=0, offset=0):
    """[ROWS, 9] ascending: repeats, neighbours, padding; the last row has none that counts."""
    classes = (rand(ROWS, 9, seed=seed) * vocab).long().clamp_(max=vocab - 1)
    classes[:, 1] = classes[:, 0]
    classes[:, 2] = (classes[:, 0] + 1).clamp_(max=vocab - 1)
    classes += offset
    classes[:, 3] = offset + vocab  # past the end
    classes[:, 4:6] = NO_CLASS
    classes[-1] = NO_CLASS
    return classes.sort(-1).values


def give_set(case, kind, seed=0, offset=0):
    """A set for the rows of a case."""
    case.threshold = case.classes = None
    if kind == "listed":
        case.classes = listed_classes(case.vocab, seed, offset)
    elif kind == "every class":
        case.classes = torch.arange(offset, offset + case.vocab).expand(ROWS, -1).contiguous()
    elif kind == "none":
        case.classes = torch.empty(ROWS, 0, dtype=torch.int64)
    elif kind == "nothing":
        case.threshold = torch.full((ROWS,), torch.inf, dtype=case.wide)
    else:
        z = case.z(case.logits.double()).sort(-1, descending=True).values
        if kind == "ties":
            threshold = z[:, min(case.vocab - 1, 2)]
        else:
            some = z[:, : min(case.vocab, 16)]
            gaps = (some[:, :-1] - some[:, 1:]).nan_to_num(posinf=-1.0)
            # Alone in its row, a logit is above what lies far below it.
            at = gaps.argmax(-1, keepdim=True) if some.shape[1] > 1 else None
            threshold = (
                some[:, 0] - 1 if at is None else (some / 2 + some.roll(-1, -1) / 2).gather(-1, at)[:, 0]
            )
        case.threshold = threshold.to(case.wide).contiguous()
        if kind == "mixed":
            case.threshold[0], case.threshold[-1] = -torch.inf, torch.inf
    return case


def tiles_of(case, count):
    """Spans of the vocabulary: the whole, or several of which one is a single entry."""
    return list(
        pairwise([0, case.vocab] if count == 1 or case.vocab < 4 else [0, 1, case.vocab // 3, case.vocab])
    )


def tile_tail(case, start, stop, dtype=None, offset=0):
    """What follows a kernel's own tensors for columns start:stop of a case, the first at ``offset``."""
    at, threshold, classes, index, dense, topk_index, topk_prob, bias, *rest = case.sided_tail(dtype, offset)
    dense = None if dense is None else dense[:, start:stop]
    bias = None if bias is None else bias[start:stop].clone()
    return (at + start, threshold, classes, index, dense, topk_index, topk_prob, bias, *rest)


def sides_of(case, kernel, wide=None, tiles=1, offset=0, before=None):
    """Sides of a case's rows, by tiles; wide: in that dtype, for the oracle."""
    logits = case.logits if wide is None else case.logits.to(wide)
    sides = empty_sides(ROWS, wide or case.wide, logits.device) if before is None else before.clone()
    for start, stop in tiles_of(case, tiles):
        kernel(logits[:, start:stop], sides, *tile_tail(case, start, stop, wide, offset))
    return sides


def check_sides(case, device, tiles=1, offset=0):
    """row_sides against the oracle; gives the norms [4, rows] of the oracle, in the kernel's arithmetic."""
    exact = sides_of(case, ops.row_sides, F64, offset=offset)
    rough = sides_of(case, ops.row_sides, offset=offset)
    ours = sides_of(case, device.row_sides, tiles=tiles, offset=offset)
    size = case.z(case.logits.double()).nan_to_num(neginf=0.0).abs().max().item()
    floor = {F64: 1e-14, F32: 4e-7}[case.wide] * (1 + size)
    for i, name in enumerate(("set max", "set sum", "set shift", "rest max", "rest sum", "rest shift")):
        scale = 1 if i % 3 == 0 else max(1.0, exact[i].abs().max().item())
        assert_no_worse(ours[i], exact[i], rough[i], floor * scale, name)
    for a, b, c in zip(*map(summarise_sides, (ours, exact, rough))):
        assert_no_worse(a, b, c, floor * 20, "summary")
    return summarise_sides(exact)[:4].to(case.wide)


def sided_coefficients(case, how="plain"):
    """[14, rows], each of its own; none for logits that are infinite or as good as that."""
    coef = randn(14, ROWS, seed=11, dtype=case.wide)
    coef[5::7] *= 0.0 if how in ("masked", "large", *SENTINELS) else 1e-3
    return coef


def check_sided_grad(
    case, device, norm, how="plain", in_place=False, gap=0, lead=0, narrow=None, tiles=1, offset=0
):
    """row_grad with a set against the oracle, entry by entry; narrow: as for `check_grad` of row_cases."""
    coef = sided_coefficients(case, how)
    exact = torch.empty(ROWS, case.vocab, dtype=F64)
    ops.row_grad(case.logits.double(), exact, norm.double(), coef.double(), *case.sided_tail(F64, offset))
    rough = torch.empty(ROWS, case.vocab, dtype=narrow or case.dtype)
    ops.row_grad(case.logits, rough, norm, coef, *case.sided_tail(offset=offset))
    out, buffer = (case.logits, case.buffer) if in_place else case.nan_out(gap, lead, narrow)
    for start, stop in tiles_of(case, tiles):
        tail = tile_tail(case, start, stop, offset=offset)
        device.row_grad(case.logits[:, start:stop], out[:, start:stop], norm, coef, *tail)
    floor = {F64: 1e-13, F32: 1e-6}[case.wide] * (1 + exact.abs().max().item())
    assert_no_worse(out, exact, rough, floor, "gradient")
    assert buffer.isnan().sum() == buffer.numel() - out.numel()  # nothing written outside, nothing left


def check_sided_sentinels(case, device):
    """Beside masks of finite numbers: what the arithmetic can hold, and no NaN."""
    rtol, floor = (1e-11, 1e-10) if case.wide == F64 else (1e-5, 1e-4)
    exact, ours = sides_of(case, ops.row_sides, F64), sides_of(case, device.row_sides, tiles=3)
    assert not ours.isnan().any()
    assert_representable(ours, exact, rtol, floor, "row_sides")
    norm, coef = summarise_sides(exact)[:4], sided_coefficients(case, "lowest")
    truth, (out, _) = torch.empty(ROWS, case.vocab, dtype=F64), case.nan_out()
    ops.row_grad(case.logits.double(), truth, norm, coef.double(), *case.sided_tail(F64))
    device.row_grad(case.logits, out, norm.to(case.wide).contiguous(), coef, *case.sided_tail())
    assert not out.isnan().any()
    narrow = ROUNDING.get(case.dtype, 0.0) + SMALLEST.get(case.dtype, 0.0)
    assert_representable(out, truth, rtol + narrow, floor, "row_grad")


def sided_bits(device, kind, dtype, vocab):
    """Every output of the two kernels for rows with a set of that kind, as bytes."""
    case = give_set(Case(dtype, vocab, "top_k", seed=3, lead=1), kind)
    sides = sides_of(case, device.row_sides)
    out, _ = case.nan_out()
    norm = summarise_sides(sides)[:4].contiguous()
    device.row_grad(case.logits, out, norm, sided_coefficients(case), *case.sided_tail())
    return [t.contiguous().view(torch.uint8) for t in (sides, out)]
