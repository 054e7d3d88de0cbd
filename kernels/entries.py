"""What kernels of logits in memory read of a row: its entries, the scalars of their side, and target mass."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    COEFFICIENTS,
    DENSE,
    INDEX,
    THRESHOLD,
    TOPK,
    choose_coefficients,
    load_coefficients,
    transform,
)


@triton.jit
def load_logits(logits, bias, columns, mask, logit_scale, softcap, CAPPED: tl.constexpr, DTYPE: tl.constexpr):
    """Logits of one row at some columns, -inf where masked; and the mask once more."""
    raw = tl.load(logits + columns, mask=mask, other=0.0).to(DTYPE)
    if bias is not None:
        bias = tl.load(bias + columns, mask=mask, other=0.0).to(DTYPE)
    return tl.where(mask, transform(raw, bias, logit_scale, softcap, CAPPED), float("-inf"))


@triton.jit
def in_set(z, members, row, column, mask, members_stride, SET: tl.constexpr):
    """Which entries of one row are in its set: those of at least members[row], or those marked in members."""
    if SET == THRESHOLD:
        return z >= tl.load(members + row)
    else:
        return tl.load(members + row * members_stride + column, mask=mask, other=0) != 0


@triton.jit
def load_own(values, field: tl.constexpr, fields: tl.constexpr, row, rows, chosen):
    """One of the fields [fields, rows] of a row; of a set they follow, and chosen entries have those."""
    value = tl.load(values + field * rows + row)
    if chosen is not None:
        value = tl.where(chosen, tl.load(values + (fields + field) * rows + row), value)
    return value


@triton.jit
def load_own_coefficients(coef, row, rows, chosen):
    """The coefficients of a row, [7, rows]; of a set they follow, and chosen entries have those."""
    c = load_coefficients(coef, row, rows, row < rows)
    if chosen is not None:
        of_set = load_coefficients(coef + COEFFICIENTS * rows, row, rows, row < rows)
        c = choose_coefficients(chosen, of_set, c)
    return c


@triton.jit
def load_mass(
    target,
    target_prob,
    row,
    first,
    column,
    inside,
    target_stride,
    offset,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The target mass of one row at some columns, BLOCK of them from the first; there is a target."""
    mass = tl.zeros((BLOCK,), DTYPE)
    if TARGET == INDEX:
        mass = (column == tl.load(target + row) - offset).to(DTYPE)
    if TARGET == DENSE:
        mass = tl.load(target + row * target_stride + column, mask=inside, other=0.0).to(DTYPE)
    if TARGET == TOPK:
        start = offset + first
        for k in range(0, target_stride):
            index = tl.load(target + row * target_stride + k)
            if (index >= start) & (index < start + BLOCK):
                mass += tl.where(
                    column == index - offset, tl.load(target_prob + row * target_stride + k), 0.0
                )
    return mass
