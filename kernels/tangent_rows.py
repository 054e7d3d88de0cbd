"""`rows` along a direction of the logits: `row_tangent` and `row_grad_tangent`, for second order.

Both are bound by memory: each reads logit and direction once, and the latter writes gradient and derivative,
over these where asked. A row is cut as in `rows`, by the vocabulary alone; the sums of its segments are added
up by `merge_sums` in one fixed order, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import DENSE, INDEX, NO_SET, NO_TARGET, TOPK, probability
from .entries import in_set, load_logits, load_mass, load_own, load_own_coefficients
from .rows import VARYING
from .tangent import (
    TANGENT_FIELDS,
    TangentSums,
    add_moved,
    add_moved_target,
    moving_gradient,
    transform_tangent,
)


@triton.jit
def _load_moving(
    logits,
    tangent,
    bias,
    column,
    inside,
    logit_scale,
    softcap,
    CAPPED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Logits of one row at some columns, -inf where masked, and their direction, 0 there."""
    z = load_logits(logits, bias, column, inside, logit_scale, softcap, CAPPED, DTYPE)
    raw = tl.load(tangent + column, mask=inside, other=0.0).to(DTYPE)
    return z, transform_tangent(raw, z, logit_scale, softcap, CAPPED)


@triton.jit
def _part(moved, chosen, set_side: tl.constexpr):
    """What moves of one side: all sums are linear in it, so an entry of the other is one that does not."""
    if chosen is not None:
        moved = tl.where(chosen == set_side, moved, 0.0)
    return moved


@triton.jit
def _no_sums(LANES: tl.constexpr, DTYPE: tl.constexpr):
    zero = tl.zeros((LANES,), DTYPE)
    return TangentSums(zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def _store_sums(parts, row, rows, sums, sparse, TARGET: tl.constexpr):
    """Write the sums of all lanes to [7, rows], those of a target from `sparse` where it is."""
    target, target_prob = sums.target, sums.target_prob
    if TARGET == INDEX or TARGET == TOPK:
        target, target_prob = sparse.target, sparse.target_prob
    sums = TangentSums(
        sums.prob, sums.prob_log_prob, sums.prob_square, target, target_prob, sums.constant, sums.logit
    )
    for field in tl.static_range(TANGENT_FIELDS):
        tl.store(parts + field * rows + row, tl.sum(sums[field], 0))


@triton.jit(do_not_specialize=VARYING)
def row_tangent(
    logits,  # [rows, columns], row stride logits_stride
    tangent,  # [rows, columns], row stride tangent_stride
    parts,  # out [splits, 7, rows]; with a set [splits, 14, rows]: of the rest, then of the set
    norm,  # as in row_grad
    members,
    target,  # as in row_stats
    target_prob,
    bias,
    active,
    rows,
    columns,
    logits_stride,
    tangent_stride,
    members_stride,
    target_stride,
    offset,
    logit_scale: "fp64",
    softcap: "fp64",
    SET: tl.constexpr,
    TARGET: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOPK_BLOCK: tl.constexpr,
):
    """Sums along a direction of one segment (BLOCKS blocks of BLOCK columns) of one row."""
    row = tl.program_id(0).to(tl.int64)
    rows = rows.to(tl.int64)
    DTYPE: tl.constexpr = parts.dtype.element_ty
    if active is not None:
        if tl.load(active + row) == 0:
            return
    logits += row * logits_stride
    tangent += row * tangent_stride
    first = tl.program_id(1) * BLOCK * BLOCKS
    last = tl.minimum(first + BLOCK * BLOCKS, columns)
    # Summed up across lanes once, at the end: nothing here refers to a maximum that may change.
    rest, of_set = _no_sums(BLOCK, DTYPE), _no_sums(BLOCK, DTYPE)
    sparse_rest, sparse_of_set = _no_sums(TOPK_BLOCK, DTYPE), _no_sums(TOPK_BLOCK, DTYPE)
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z, moved = _load_moving(logits, tangent, bias, column, inside, logit_scale, softcap, CAPPED, DTYPE)
        chosen = None
        if SET != NO_SET:
            chosen = in_set(z, members, row, column, inside, members_stride, SET)
        maximum, log_sum = load_own(norm, 0, 2, row, rows, chosen), load_own(norm, 1, 2, row, rows, chosen)
        p, log_p = probability(z, maximum, log_sum)
        rest = add_moved(rest, z, _part(moved, chosen, False), p, log_p)
        if SET != NO_SET:
            of_set = add_moved(of_set, z, _part(moved, chosen, True), p, log_p)
        if TARGET == DENSE:
            b = tl.load(target + row * target_stride + column, mask=inside, other=0.0).to(DTYPE)
            rest = add_moved_target(rest, b, _part(moved, chosen, False), p)
            if SET != NO_SET:
                of_set = add_moved_target(of_set, b, _part(moved, chosen, True), p)
    if TARGET == INDEX or TARGET == TOPK:
        entries = 1
        if TARGET == TOPK:
            entries = target_stride
        for start in range(0, entries, TOPK_BLOCK):
            k = start + tl.arange(0, TOPK_BLOCK)
            at = row * entries + k
            column = tl.load(target + at, mask=k < entries, other=-1) - offset
            inside = (k < entries) & (column >= first) & (column < last)
            b = inside.to(DTYPE)
            if TARGET == TOPK:
                b = tl.load(target_prob + at, mask=inside, other=0.0).to(DTYPE)
            z, moved = _load_moving(
                logits, tangent, bias, column, inside, logit_scale, softcap, CAPPED, DTYPE
            )
            chosen = None
            if SET != NO_SET:
                chosen = in_set(z, members, row, column, inside, members_stride, SET)
            maximum = load_own(norm, 0, 2, row, rows, chosen)
            p, _ = probability(z, maximum, load_own(norm, 1, 2, row, rows, chosen))
            sparse_rest = add_moved_target(sparse_rest, b, _part(moved, chosen, False), p)
            if SET != NO_SET:
                sparse_of_set = add_moved_target(sparse_of_set, b, _part(moved, chosen, True), p)
    SIDES: tl.constexpr = 1 if SET == NO_SET else 2
    parts += tl.program_id(1).to(tl.int64) * SIDES * TANGENT_FIELDS * rows
    _store_sums(parts, row, rows, rest, sparse_rest, TARGET)
    if SET != NO_SET:
        _store_sums(parts + TANGENT_FIELDS * rows, row, rows, of_set, sparse_of_set, TARGET)


@triton.jit(do_not_specialize=VARYING)
def merge_sums(
    parts,  # [splits, fields, rows]
    sums,  # in and out [fields, rows]
    active,  # [rows] or None: the parts of other rows were not written
    rows,
    splits,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Add the parts of one field of each row to what was known of it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = rows.to(tl.int64)
    wanted = row < rows
    if active is not None:
        wanted = wanted & (tl.load(active + row, mask=wanted, other=0) != 0)
    at = tl.program_id(1) * rows + row
    split = tl.arange(0, SPLITS)[:, None]
    place = split.to(tl.int64) * tl.num_programs(1) * rows + at[None, :]
    part = tl.load(parts + place, mask=(split < splits) & wanted[None, :], other=0.0)
    known = tl.load(sums + at, mask=wanted, other=0.0)
    tl.store(sums + at, known + tl.sum(part, 0), mask=wanted)


@triton.jit(do_not_specialize=VARYING)
def row_grad_tangent(
    logits,  # [rows, columns], row stride logits_stride
    tangent,  # [rows, columns], row stride tangent_stride
    out,  # [rows, columns], row stride out_stride; may be the logits; None: the gradient is not asked for
    out_tangent,  # [rows, columns], row stride out_tangent_stride; may be the tangent
    norm,  # as in row_grad
    norm_tangent,  # [1, rows]: the derivative of lse; with a set [2, rows]: of the rest's, and the set's
    coef,  # as in row_grad
    coef_tangent,  # its derivative
    members,
    target,
    target_prob,
    bias,
    active,
    rows,
    columns,
    logits_stride,
    tangent_stride,
    out_stride,
    out_tangent_stride,
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
    """dloss/draw of one block of one row, and its derivative."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    inside = column < columns
    DTYPE: tl.constexpr = norm.dtype.element_ty
    out_tangent += row * out_tangent_stride
    if out is not None:
        out += row * out_stride
    if active is not None:
        if tl.load(active + row) == 0:
            none = tl.zeros((BLOCK,), DTYPE)
            tl.store(out_tangent + column, none.to(out_tangent.dtype.element_ty), mask=inside)
            if out is not None:
                tl.store(out + column, none.to(out.dtype.element_ty), mask=inside)
            return
    logits += row * logits_stride
    tangent += row * tangent_stride
    z, moved = _load_moving(logits, tangent, bias, column, inside, logit_scale, softcap, CAPPED, DTYPE)
    chosen = None
    if SET != NO_SET:
        chosen = in_set(z, members, row, column, inside, members_stride, SET)
    mass = None
    if TARGET != NO_TARGET:
        mass = load_mass(
            target, target_prob, row, first, column, inside, target_stride, offset, TARGET, BLOCK, DTYPE
        )
    rows = rows.to(tl.int64)
    maximum, log_sum = load_own(norm, 0, 2, row, rows, chosen), load_own(norm, 1, 2, row, rows, chosen)
    grad, grad_tangent = moving_gradient(
        z,
        moved,
        maximum,
        log_sum,
        load_own(norm_tangent, 0, 1, row, rows, chosen),
        load_own_coefficients(coef, row, rows, chosen),
        load_own_coefficients(coef_tangent, row, rows, chosen),
        logit_scale,
        softcap,
        mass,
        CAPPED,
    )
    tl.store(out_tangent + column, grad_tangent.to(out_tangent.dtype.element_ty), mask=inside)
    if out is not None:
        tl.store(out + column, grad.to(out.dtype.element_ty), mask=inside)
