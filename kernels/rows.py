"""Statistics and gradients of logits that exist in memory: `row_stats`, `row_sides` and `row_grad`.

All are bound by memory: each logit is read once for the statistics and once for the gradient. A program
takes one segment of one row, in blocks; a segment's length is fixed, so how a row is cut, and thus its every
bit, does not depend on the other rows. `merge_parts` and `merge_sides` merge the segments in one fixed order,
without atomics; the streaming kernels use the former as well. Sparse targets of the statistics are gathered
from the row and not searched for in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    DENSE,
    FIELDS,
    INDEX,
    LOG_ZERO,
    NO_COLUMN,
    NO_SET,
    NO_TARGET,
    SIDE_FIELDS,
    SUM_SCALE,
    TOPK,
    Partial,
    Side,
    first_maximum,
    gradient,
    load_partial,
    load_side,
    merge,
    merge_side,
    origin,
    rebase,
    rebase_side,
    scaled_shift,
    side_of,
    store_partial,
    store_side,
    takes_argmax,
)
from .entries import in_set, load_logits, load_mass, load_own, load_own_coefficients

# Of integers, only sizes that a model fixes are worth compiling for.
VARYING = ("rows", "offset", "splits")


@triton.jit(do_not_specialize=VARYING)
def row_stats(
    logits,  # [rows, columns], row stride logits_stride
    parts,  # out [splits, 11, rows]
    best,  # out [splits, rows] int64: the argmax of each part, counted from the start of the vocabulary
    target,  # [rows] index, [rows, columns] dense, or [rows, K] indices; None
    target_prob,  # [rows, K] of a top-k target; else None
    bias,  # [columns] or None
    active,  # [rows] or None
    rows,
    columns,
    logits_stride,
    target_stride,  # row stride of target: K for a top-k target
    offset,  # of column 0 in the vocabulary
    logit_scale: "fp64",
    softcap: "fp64",
    TARGET: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOPK_BLOCK: tl.constexpr,
):
    """Statistics of one segment (BLOCKS blocks of BLOCK columns) of one row."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    rows = rows.to(tl.int64)
    DTYPE: tl.constexpr = parts.dtype.element_ty
    if active is not None:
        if tl.load(active + row) == 0:
            return
    logits += row * logits_stride
    first = tl.program_id(1) * BLOCK * BLOCKS
    last = tl.minimum(first + BLOCK * BLOCKS, columns)
    zero = tl.full((1,), 0.0, DTYPE)
    running = Partial(zero - float("inf"), zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    argmax = tl.full((1,), -1, tl.int64)
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = load_logits(logits, bias, column, inside, logit_scale, softcap, CAPPED, DTYPE)
        maximum = tl.max(z, 0)
        place = first_maximum(z, maximum, column, 0)
        d = z - origin(maximum)
        e = tl.exp(d)
        scaled = tl.where(inside, scaled_shift(z, origin(maximum)), 0.0)
        valued = tl.where(inside, z, 0.0)
        target_shift, target_exp, mass = zero, zero, zero
        if TARGET == DENSE:
            b = tl.load(target + row * target_stride + column, mask=inside, other=0.0).to(DTYPE)
            target_shift += tl.sum(tl.where(b == 0, 0.0, b * scaled), 0)
            target_exp += tl.sum(b * e, 0)
            mass += tl.sum(b, 0)
        block = Partial(
            zero + tl.where(place < 0, float("nan"), maximum),
            zero + tl.sum(e, 0),
            zero + tl.sum(e * tl.maximum(d, LOG_ZERO), 0),
            zero + tl.sum(e * e, 0),
            target_shift,
            target_exp,
            mass,
            zero + tl.sum(scaled, 0),
            zero + tl.sum(valued * valued, 0),
            zero + tl.sum(inside.to(DTYPE), 0),
            zero + tl.sum(valued * SUM_SCALE, 0),
        )
        place = tl.where(place < 0, place + NO_COLUMN, place).to(tl.int64)
        argmax = tl.where(takes_argmax(running.max, argmax, block.max), place + offset, argmax)
        running = merge(running, block)
    if TARGET == INDEX or TARGET == TOPK:
        top = tl.sum(origin(running.max), 0)
        target_shift, target_exp, mass = zero, zero, zero
        entries = 1
        if TARGET == TOPK:
            entries = target_stride
        for start in range(0, entries, TOPK_BLOCK):
            k = start + tl.arange(0, TOPK_BLOCK)
            at = row * entries + k
            column = tl.load(target + at, mask=k < entries, other=-1) - offset
            inside = (k < entries) & (column >= first) & (column < last)
            z = load_logits(logits, bias, column, inside, logit_scale, softcap, CAPPED, DTYPE)
            b = inside.to(DTYPE)
            if TARGET == TOPK:
                b = tl.load(target_prob + at, mask=inside, other=0.0).to(DTYPE)
            target_shift += tl.sum(tl.where(b == 0, 0.0, b * scaled_shift(z, top)), 0)
            target_exp += tl.sum(tl.where(b == 0, 0.0, b * tl.exp(z - top)), 0)
            mass += tl.sum(b, 0)
        running = Partial(
            running.max,
            running.sum_exp,
            running.sum_exp_shift,
            running.sum_exp_square,
            target_shift,
            target_exp,
            mass,
            running.shift_sum,
            running.square_sum,
            running.count,
            running.logit_sum,
        )
    one = row + tl.zeros((1,), tl.int64)
    everything = tl.full((1,), True, tl.int1)
    store_partial(parts + split * FIELDS * rows, one, rows, running, everything)
    tl.store(best + split * rows + one, argmax)


@triton.jit(do_not_specialize=VARYING)
def merge_parts(
    parts,  # [splits, 11, rows]
    best,  # [splits, rows]
    partial,  # in and out [11, rows]
    argmax,  # in and out [rows]
    active,  # [rows] or None: the parts of other rows were not written
    rows,
    splits,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merge the parts of each row, all at once, and then into what was known of the row before."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = rows.to(tl.int64)
    split = tl.arange(0, SPLITS)[:, None]
    wanted = row < rows
    if active is not None:
        wanted = wanted & (tl.load(active + row, mask=wanted, other=0) != 0)
    inside = (split < splits) & wanted[None, :]
    part = load_partial(parts, split.to(tl.int64) * FIELDS * rows + row[None, :], rows, inside)
    place = tl.load(best + split.to(tl.int64) * rows + row[None, :], mask=inside, other=0)
    nan = tl.max((part.max != part.max).to(tl.int32), 0) != 0
    maximum = tl.where(nan, float("nan"), tl.max(part.max, 0))
    # The first part that has the maximum, or a NaN, has the lowest index.
    winner = tl.where(nan[None, :], part.max != part.max, part.max == maximum[None, :])
    # -1 where every part is masked, as a part without a maximum cannot be.
    found = tl.min(tl.where(winner & inside, split, SPLITS), 0)
    place = tl.sum(tl.where(split == found[None, :], place, 0), 0)
    part = rebase(part, maximum[None, :])
    new = Partial(
        maximum,
        tl.sum(part.sum_exp, 0),
        tl.sum(part.sum_exp_shift, 0),
        tl.sum(part.sum_exp_square, 0),
        tl.sum(part.target_shift, 0),
        tl.sum(part.target_exp, 0),
        tl.sum(part.target_mass, 0),
        tl.sum(part.shift_sum, 0),
        tl.sum(part.square_sum, 0),
        tl.sum(part.count, 0),
        tl.sum(part.logit_sum, 0),
    )
    known = load_partial(partial, row, rows, wanted)
    known_best = tl.load(argmax + row, mask=wanted, other=0)
    better = takes_argmax(known.max, known_best, maximum)
    tl.store(argmax + row, tl.where(better, place, known_best), mask=wanted)
    store_partial(partial, row, rows, merge(known, new), wanted)


@triton.jit(do_not_specialize=VARYING)
def row_sides(
    logits,  # [rows, columns], row stride logits_stride
    parts,  # out [splits, 6, rows]
    members,  # [rows] thresholds, or [rows, columns] bool
    bias,  # as in row_stats
    active,
    rows,
    columns,
    logits_stride,
    members_stride,
    logit_scale: "fp64",
    softcap: "fp64",
    SET: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Statistics of the two sides of one segment (BLOCKS blocks of BLOCK columns) of one row."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    rows = rows.to(tl.int64)
    DTYPE: tl.constexpr = parts.dtype.element_ty
    if active is not None:
        if tl.load(active + row) == 0:
            return
    logits += row * logits_stride
    first = tl.program_id(1) * BLOCK * BLOCKS
    zero = tl.full((1,), 0.0, DTYPE)
    inside_set = Side(zero - float("inf"), zero, zero)
    rest = Side(zero - float("inf"), zero, zero)
    for start in range(first, tl.minimum(first + BLOCK * BLOCKS, columns), BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = load_logits(logits, bias, column, inside, logit_scale, softcap, CAPPED, DTYPE)
        chosen = in_set(z, members, row, column, inside, members_stride, SET)
        # Past the end of the row z is -inf, which adds nothing to either side.
        inside_set = merge_side(inside_set, side_of(z, chosen))
        rest = merge_side(rest, side_of(z, ~chosen))
    one = row + tl.zeros((1,), tl.int64)
    everything = tl.full((1,), True, tl.int1)
    parts += split * 2 * SIDE_FIELDS * rows
    store_side(parts, one, rows, inside_set, everything)
    store_side(parts + SIDE_FIELDS * rows, one, rows, rest, everything)


@triton.jit(do_not_specialize=VARYING)
def merge_sides(
    parts,  # [splits, 6, rows]
    sides,  # in and out [6, rows]
    active,  # as in merge_parts
    rows,
    splits,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """`merge_parts` of one side of each row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = rows.to(tl.int64)
    at = tl.program_id(1) * SIDE_FIELDS * rows
    split = tl.arange(0, SPLITS)[:, None]
    wanted = row < rows
    if active is not None:
        wanted = wanted & (tl.load(active + row, mask=wanted, other=0) != 0)
    inside = (split < splits) & wanted[None, :]
    part = load_side(parts + at, split.to(tl.int64) * 2 * SIDE_FIELDS * rows + row[None, :], rows, inside)
    nan = tl.max((part.max != part.max).to(tl.int32), 0) != 0
    maximum = tl.where(nan, float("nan"), tl.max(part.max, 0))
    part = rebase_side(part, maximum[None, :])
    new = Side(maximum, tl.sum(part.sum_exp, 0), tl.sum(part.sum_exp_shift, 0))
    known = load_side(sides + at, row, rows, wanted)
    store_side(sides + at, row, rows, merge_side(known, new), wanted)


@triton.jit
def gradient_of_row(
    logits,
    norm,
    coef,
    members,
    target,
    target_prob,
    bias,
    active,
    row,
    rows,
    first,
    column,
    inside,
    logits_stride,
    members_stride,
    target_stride,
    offset,
    logit_scale,
    softcap,
    SET: tl.constexpr,
    TARGET: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dloss/draw of one row at BLOCK columns from the first; arguments as for `row_grad`."""
    DTYPE: tl.constexpr = norm.dtype.element_ty
    z = load_logits(logits + row * logits_stride, bias, column, inside, logit_scale, softcap, CAPPED, DTYPE)
    chosen = None
    if SET != NO_SET:
        chosen = in_set(z, members, row, column, inside, members_stride, SET)
    c = load_own_coefficients(coef, row, rows, chosen)
    mass = None
    if TARGET != NO_TARGET:
        mass = load_mass(
            target, target_prob, row, first, column, inside, target_stride, offset, TARGET, BLOCK, DTYPE
        )
    maximum, log_sum = load_own(norm, 0, 2, row, rows, chosen), load_own(norm, 1, 2, row, rows, chosen)
    grad = gradient(z, maximum, log_sum, c, logit_scale, softcap, mass, CAPPED)
    # Zeros of what lies past the end of the row, too.
    if active is not None:
        inside = inside & (tl.load(active + row) != 0)
    return tl.where(inside, grad, 0.0)


@triton.jit(do_not_specialize=VARYING)
def row_grad(
    logits,  # [rows, columns], row stride logits_stride
    out,  # [rows, columns], row stride out_stride; may be the logits
    norm,  # [2, rows]: maximum and log of the sum of exponentials of the whole row; of its rest, and its set
    coef,  # [7, rows]; those of the rest, and of the set
    members,  # as in row_sides; None without a set
    target,  # as in row_stats
    target_prob,
    bias,
    active,  # rows that are not get zeros
    rows,
    columns,
    logits_stride,
    out_stride,
    members_stride,
    target_stride,
    offset,
    logit_scale: "fp64",
    softcap: "fp64",
    SET: tl.constexpr,
    TARGET: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dloss/draw of one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    inside = column < columns
    DTYPE: tl.constexpr = norm.dtype.element_ty
    if active is not None:
        if tl.load(active + row) == 0:
            tl.store(
                out + row * out_stride + column,
                tl.zeros((BLOCK,), DTYPE).to(out.dtype.element_ty),
                mask=inside,
            )
            return
    grad = gradient_of_row(
        logits,
        norm,
        coef,
        members,
        target,
        target_prob,
        bias,
        None,
        row,
        rows.to(tl.int64),
        first,
        column,
        inside,
        logits_stride,
        members_stride,
        target_stride,
        offset,
        logit_scale,
        softcap,
        SET,
        TARGET,
        CAPPED,
        BLOCK,
    )
    tl.store(out + row * out_stride + column, grad.to(out.dtype.element_ty), mask=inside)
