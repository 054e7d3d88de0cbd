"""The arithmetic of second order: what a direction of a row's logits does to its sums and its gradient.

As `arithmetic`, which it adds to: it mirrors csrc/row_math.h, and stands apart so that what first order
compiles from is small. The statistics of whole rows are known by then, so probabilities are normalised, the
sums of disjoint parts simply add up, and nothing is rebased.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import (
    logit_gradient,
    prob_gradient,
    probability,
    scalar,
    softcap_slope,
    target_gradient,
    to_raw_gradient,
)


class TangentSums(NamedTuple):
    """Sums of entries that move, one in each lane; the order is that of `sums` tensors."""

    prob: tl.tensor
    prob_log_prob: tl.tensor
    prob_square: tl.tensor
    target: tl.tensor
    target_prob: tl.tensor
    constant: tl.tensor
    logit: tl.tensor


TANGENT_FIELDS = tl.constexpr(len(TangentSums._fields))


@triton.jit
def add_moved(sums, z, moved, p, log_p):
    """The sums with entries added, but for target mass."""
    weighed = p * moved
    finite = tl.where(z == float("-inf"), 0.0, z)  # an impossible entry does not move
    return TangentSums(
        sums.prob + weighed,
        sums.prob_log_prob + weighed * log_p,
        sums.prob_square + weighed * p,
        sums.target,
        sums.target_prob,
        sums.constant + moved,
        sums.logit + finite * moved,
    )


@triton.jit
def add_moved_target(sums, b, moved, p):
    """The sums with target masses added."""
    weighed = tl.where(b == 0, 0.0, b * moved)
    return TangentSums(
        sums.prob,
        sums.prob_log_prob,
        sums.prob_square,
        sums.target + weighed,
        sums.target_prob + weighed * p,
        sums.constant,
        sums.logit,
    )


@triton.jit
def prob_gradient_tangent(p, log_p, delta, c, d):
    """The derivative of `prob_gradient`: delta is that of log p, d of the coefficients."""
    form = c.prob + c.prob_log_prob * log_p + c.prob_square * p
    changed = d.prob + d.prob_log_prob * log_p + d.prob_square * p
    return p * (delta * (form + c.prob_log_prob + c.prob_square * p) + changed)


@triton.jit
def target_gradient_tangent(b, p, delta, c, d):
    """The derivative of `target_gradient`."""
    return b * (d.target + p * (d.target_prob + c.target_prob * delta))


@triton.jit
def logit_gradient_tangent(z, moved, c, d):
    """The derivative of `logit_gradient`, of a logit that moves so."""
    return logit_gradient(z, d) + c.logit * moved


@triton.jit
def transform_tangent(raw_tangent, z, logit_scale, softcap, CAPPED: tl.constexpr):
    """The direction of logits z, from that of raw values; 0 where a logit is impossible."""
    moved = raw_tangent * scalar(logit_scale, z.dtype)
    if CAPPED:
        moved *= softcap_slope(z, 1.0 / scalar(softcap, z.dtype))
    return tl.where(z == float("-inf"), 0.0, moved)


@triton.jit
def to_raw_gradient_tangent(grad, grad_tangent, z, moved, logit_scale, softcap, CAPPED: tl.constexpr):
    """The derivative of `to_raw_gradient`, of dloss/dz and its derivative."""
    if CAPPED:
        inverse = 1.0 / scalar(softcap, z.dtype)
        bend = (z * inverse) * (moved * inverse)
        grad_tangent = grad_tangent * softcap_slope(z, inverse) - 2.0 * bend * grad
    return grad_tangent * scalar(logit_scale, z.dtype)


@triton.jit
def moving_gradient(
    z, moved, maximum, log_sum, norm_tangent, c, d, logit_scale, softcap, mass, CAPPED: tl.constexpr
):
    """dloss/draw of a block of logits that move so, as `gradient` has it, and its derivative."""
    p, log_p = probability(z, maximum, log_sum)
    delta = moved - norm_tangent
    grad = prob_gradient(p, log_p, c) + logit_gradient(z, c)
    grad_tangent = prob_gradient_tangent(p, log_p, delta, c, d) + logit_gradient_tangent(z, moved, c, d)
    if mass is not None:
        grad += target_gradient(mass, p, c)
        grad_tangent += target_gradient_tangent(mass, p, delta, c, d)
    return to_raw_gradient(grad, z, logit_scale, softcap, CAPPED), to_raw_gradient_tangent(
        grad, grad_tangent, z, moved, logit_scale, softcap, CAPPED
    )
