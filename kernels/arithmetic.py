"""The arithmetic of one vocabulary row, for every Triton kernel.

The functions and the order of the fields mirror csrc/row_math.h one to one; the mathematics, with the names
used here, is in docs/mathematics.md. Values are scalars, vectors of rows or tiles of elements: the functions
do not care. What a tile of logits needs in all kernels (its transform, its statistics, its gradient) is here
as well, so that the four kernels differ only in where logits come from and where results go.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# What a target is; a kernel is compiled for one of them.
NO_TARGET, INDEX, DENSE, TOPK = (tl.constexpr(kind) for kind in range(4))
# How the set of a row is told from the rest, where there is one.
NO_SET, THRESHOLD, LISTED = (tl.constexpr(kind) for kind in range(3))
# e^x is 0 in every supported type long before x reaches this; log-probabilities are clamped to it so that an
# impossible entry contributes 0 * finite = 0 and not 0 * -inf = NaN.
LOG_ZERO = tl.constexpr(-1e4)
# Logits may be as large as their dtype allows; what is summed of them is kept times this: see row_math.h.
SUM_SCALE = tl.constexpr(2.0**-32)
# Larger than any column; less it, the place of a NaN is negative.
NO_COLUMN = tl.constexpr(2**30)


class Partial(NamedTuple):
    """Statistics of part of a row, relative to ``origin(max)``; the order is that of `PARTIAL` tensors."""

    max: tl.tensor
    sum_exp: tl.tensor
    sum_exp_shift: tl.tensor
    sum_exp_square: tl.tensor
    target_shift: tl.tensor
    target_exp: tl.tensor
    target_mass: tl.tensor
    shift_sum: tl.tensor
    square_sum: tl.tensor
    count: tl.tensor
    logit_sum: tl.tensor


class Side(NamedTuple):
    """Statistics of a side of part of a row, its set or the rest; the order is that of `SIDES` tensors."""

    max: tl.tensor
    sum_exp: tl.tensor
    sum_exp_shift: tl.tensor


class Coefficients(NamedTuple):
    """The seven scalars of a row's gradient; the order is that of `coef` tensors."""

    prob: tl.tensor
    prob_log_prob: tl.tensor
    prob_square: tl.tensor
    target: tl.tensor
    target_prob: tl.tensor
    logit: tl.tensor
    constant: tl.tensor


FIELDS = tl.constexpr(len(Partial._fields))
SIDE_FIELDS = tl.constexpr(len(Side._fields))
COEFFICIENTS = tl.constexpr(len(Coefficients._fields))


@triton.jit
def origin(maximum):
    """The point that shifted sums refer to: the maximum, or 0 where no entry is possible (all -inf)."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def scaled_shift(z, start):
    """``(z - start) * SUM_SCALE``: finite for any two finite numbers."""
    return z * SUM_SCALE - start * SUM_SCALE


@triton.jit
def decay(shift, sum_exp):
    """(shift, e^shift) of sums whose origin moves by a shift that is not above 0."""
    # Clamped where e^shift is 0: with -inf, or a shift times a sum that overflows, 0 * inf is NaN.
    shift = tl.where(shift < LOG_ZERO, LOG_ZERO, shift)
    return shift, tl.where(sum_exp == 0, 0.0, tl.exp(shift))


@triton.jit
def larger(a, b):
    """The larger maximum. A NaN on either side must survive, which a plain maximum does not promise."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def rebase(part, maximum):
    """The same statistics relative to a maximum that is no smaller."""
    start, end = origin(part.max), origin(maximum)
    shift, scaled = start - end, scaled_shift(start, end)
    shift, scale = decay(shift, part.sum_exp)
    return Partial(
        maximum,
        scale * part.sum_exp,
        scale * (part.sum_exp_shift + shift * part.sum_exp),
        scale * scale * part.sum_exp_square,
        part.target_shift + scaled * part.target_mass,
        scale * part.target_exp,
        part.target_mass,
        part.shift_sum + scaled * part.count,
        part.square_sum,
        part.count,
        part.logit_sum,
    )


@triton.jit
def merge(a, b):
    """Merge the statistics of two disjoint parts of one row. Associative, so a row may be cut anywhere."""
    maximum = larger(a.max, b.max)
    a = rebase(a, maximum)
    b = rebase(b, maximum)
    return Partial(
        maximum,
        a.sum_exp + b.sum_exp,
        a.sum_exp_shift + b.sum_exp_shift,
        a.sum_exp_square + b.sum_exp_square,
        a.target_shift + b.target_shift,
        a.target_exp + b.target_exp,
        a.target_mass + b.target_mass,
        a.shift_sum + b.shift_sum,
        a.square_sum + b.square_sum,
        a.count + b.count,
        a.logit_sum + b.logit_sum,
    )


@triton.jit
def side_of(z, members):
    """Statistics of the entries of a vector of logits that are members."""
    # To the sums an entry of the other side is one that cannot occur.
    z = tl.where(members, z, float("-inf"))
    maximum = tl.where(tl.max((z != z).to(tl.int32), 0) != 0, float("nan"), tl.max(z, 0))
    d = z - origin(maximum)
    e = tl.exp(d)
    return Side(maximum, tl.sum(e, 0), tl.sum(e * tl.maximum(d, LOG_ZERO), 0))


@triton.jit
def rebase_side(side, maximum):
    """`rebase` of a side."""
    shift, scale = decay(origin(side.max) - origin(maximum), side.sum_exp)
    return Side(maximum, scale * side.sum_exp, scale * (side.sum_exp_shift + shift * side.sum_exp))


@triton.jit
def merge_side(a, b):
    """`merge` of what two disjoint parts of a row hold of one side."""
    maximum = larger(a.max, b.max)
    a = rebase_side(a, maximum)
    b = rebase_side(b, maximum)
    return Side(maximum, a.sum_exp + b.sum_exp, a.sum_exp_shift + b.sum_exp_shift)


@triton.jit
def takes_argmax(maximum, best, new_maximum):
    """Whether a later part has the larger maximum: NaN counts as largest, the earlier one wins a tie."""
    return (best < 0) | (new_maximum > maximum) | ((new_maximum != new_maximum) & (maximum == maximum))


@triton.jit
def first_maximum(z, maximum, column, axis: tl.constexpr):
    """The column of the first maximum of a tile along an axis; of the first NaN, less NO_COLUMN, if any."""
    # A NaN is not less than the maximum, which on a GPU is that of the other entries.
    place = tl.where(z < maximum, NO_COLUMN, column)
    return tl.min(tl.where(z != z, column - NO_COLUMN, place), axis)


@triton.jit
def prob_gradient(p, log_p, c):
    """dloss/dz_j of an entry that carries no target mass, but for `logit` and `constant`."""
    return p * (c.prob + c.prob_log_prob * log_p + c.prob_square * p)


@triton.jit
def target_gradient(b, p, c):
    """What target mass b at an entry of probability p adds."""
    return b * (c.target + c.target_prob * p)


@triton.jit
def logit_gradient(z, c):
    """What the terms in the logits themselves add."""
    # Skipped when absent, not multiplied by zero: a masked entry has z = -inf.
    return tl.where(c.logit == 0, 0.0, c.logit * z) + c.constant


@triton.jit
def softcap_slope(z, inverse_cap):
    """dz/du of the softcap z = cap tanh(u / cap), from z."""
    t = z * inverse_cap
    return 1.0 - t * t


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A host number, handed over in double precision, in the dtype of the arithmetic."""
    return tl.full((1,), value, dtype)


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a few ulp, also near 0, from exp alone; the language has none of its own."""
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315))))
    near += x * square * square * square * square * (62.0 / 2835 - square * (1382.0 / 155925))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    # Where the series and the cancellation of 1 - e are both below the rounding of the dtype.
    LIMIT: tl.constexpr = 1e-4 if x.dtype == tl.float64 else 0.04
    return tl.where(square < LIMIT, near, tl.where(x < 0, -far, far))


@triton.jit
def transform(raw, bias, logit_scale, softcap, CAPPED: tl.constexpr):
    """``z = softcap tanh(logit_scale (raw + bias) / softcap)``; bias may be None."""
    z = raw
    if bias is not None:
        z += bias
    z *= scalar(logit_scale, raw.dtype)
    if CAPPED:
        cap = scalar(softcap, raw.dtype)
        z = cap * tanh(z * (1.0 / cap))
    return z


@triton.jit
def probability(z, maximum, log_sum):
    """(p, log p) of logits, the latter no lower than `LOG_ZERO`."""
    log_p = (z - maximum) - log_sum
    return tl.exp(log_p), tl.where(log_p < LOG_ZERO, LOG_ZERO, log_p)


@triton.jit
def to_raw_gradient(grad, z, logit_scale, softcap, CAPPED: tl.constexpr):
    """dloss/dz of logits z to dloss/draw."""
    if CAPPED:
        grad *= softcap_slope(z, 1.0 / scalar(softcap, z.dtype))
    return grad * scalar(logit_scale, z.dtype)


@triton.jit
def gradient(z, maximum, log_sum, c, logit_scale, softcap, mass, CAPPED: tl.constexpr):
    """dloss/draw of a tile of logits z that carries target mass (None: none)."""
    p, log_p = probability(z, maximum, log_sum)
    grad = prob_gradient(p, log_p, c)
    if mass is not None:
        grad += target_gradient(mass, p, c)
    grad += logit_gradient(z, c)
    return to_raw_gradient(grad, z, logit_scale, softcap, CAPPED)


@triton.jit
def load_coefficients(coef, at, rows, mask):
    """The coefficients [7, rows] of some rows; 64-bit `at`."""
    return Coefficients(
        tl.load(coef + at, mask=mask, other=0.0),
        tl.load(coef + rows + at, mask=mask, other=0.0),
        tl.load(coef + 2 * rows + at, mask=mask, other=0.0),
        tl.load(coef + 3 * rows + at, mask=mask, other=0.0),
        tl.load(coef + 4 * rows + at, mask=mask, other=0.0),
        tl.load(coef + 5 * rows + at, mask=mask, other=0.0),
        tl.load(coef + 6 * rows + at, mask=mask, other=0.0),
    )


@triton.jit
def choose_coefficients(members, a, b):
    """The coefficients of each entry: a where it is a member, else b."""
    return Coefficients(
        tl.where(members, a.prob, b.prob),
        tl.where(members, a.prob_log_prob, b.prob_log_prob),
        tl.where(members, a.prob_square, b.prob_square),
        tl.where(members, a.target, b.target),
        tl.where(members, a.target_prob, b.target_prob),
        tl.where(members, a.logit, b.logit),
        tl.where(members, a.constant, b.constant),
    )


@triton.jit
def load_side(side, at, rows, mask):
    """Statistics [3, rows] of a side of some parts; what is masked reads as the statistics of nothing."""
    return Side(
        tl.load(side + at, mask=mask, other=float("-inf")),
        tl.load(side + rows + at, mask=mask, other=0.0),
        tl.load(side + 2 * rows + at, mask=mask, other=0.0),
    )


@triton.jit
def store_side(side, at, rows, value, mask):
    """The inverse of `load_side`."""
    for field in tl.static_range(SIDE_FIELDS):
        tl.store(side + field * rows + at, value[field], mask=mask)


@triton.jit
def load_partial(partial, at, rows, mask):
    """Statistics [PARTIAL, rows] of some parts; what is masked reads as the statistics of nothing."""
    return Partial(
        tl.load(partial + at, mask=mask, other=float("-inf")),
        tl.load(partial + rows + at, mask=mask, other=0.0),
        tl.load(partial + 2 * rows + at, mask=mask, other=0.0),
        tl.load(partial + 3 * rows + at, mask=mask, other=0.0),
        tl.load(partial + 4 * rows + at, mask=mask, other=0.0),
        tl.load(partial + 5 * rows + at, mask=mask, other=0.0),
        tl.load(partial + 6 * rows + at, mask=mask, other=0.0),
        tl.load(partial + 7 * rows + at, mask=mask, other=0.0),
        tl.load(partial + 8 * rows + at, mask=mask, other=0.0),
        tl.load(partial + 9 * rows + at, mask=mask, other=0.0),
        tl.load(partial + 10 * rows + at, mask=mask, other=0.0),
    )


@triton.jit
def store_partial(partial, at, rows, part, mask):
    """The inverse of `load_partial`."""
    for field in tl.static_range(FIELDS):
        tl.store(partial + field * rows + at, part[field], mask=mask)
