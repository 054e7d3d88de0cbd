"""The row primitives of second order, in plain PyTorch: the directional derivatives of the first two.

With a direction of the raw logits, ``row_tangent`` gives the sums that the statistics' derivatives are made
of, and ``row_grad_tangent`` the derivative of the gradient beside the gradient itself. The statistics of
whole rows are known by then, so probabilities are normalised, sums of disjoint parts of the vocabulary simply
add up, and nothing is rebased.

Shapes as in ``ops.py``; tangent [R, T] is the direction of raw logits [R, T] and laid out as they are; sums
[7, R] (`RowSums`), or with a set [14, R], are added to: those of the rest, then those of the set, each of
probabilities within its side. norm_tangent [1, R] is the derivative of lse, or [2, R] of the sides' lse;
coef_tangent is laid out as coef. out [R, T] or None is written dloss/draw, as by ``row_grad``, and
out_tangent [R, T] its derivative; they may be the logits and the tangent. An impossible entry (a logit of
-inf) does not move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import SideArguments, Signature, TileArguments, Transform
from ..coefficients import RowCoefficients
from ..statistics import RowSums
from .ops import _fake, _sparse_target, define, in_set, to_logits, to_raw_gradient


def to_logits_tangent(tangent: Tensor, z: Tensor, transform: Transform) -> Tensor:
    """The direction of logits z [R, T], from that of raw values; 0 where a logit is impossible."""
    moved = tangent.to(z.dtype)
    if transform.logit_scale != 1.0:
        moved = moved * transform.logit_scale
    if transform.softcap is not None:
        moved = moved * (1.0 - (z / transform.softcap).square())
    return moved.masked_fill(z == -torch.inf, 0.0)


def to_raw_gradient_tangent(
    grad: Tensor, grad_tangent: Tensor, z: Tensor, z_tangent: Tensor, transform: Transform
) -> Tensor:
    """The derivative of `to_raw_gradient`, of dloss/dz and its derivative; in place of the latter."""
    if transform.softcap is not None:
        bend = (z / transform.softcap) * (z_tangent / transform.softcap)
        grad_tangent *= 1.0 - (z / transform.softcap).square()
        grad_tangent -= 2.0 * bend * grad
    if transform.logit_scale != 1.0:
        grad_tangent *= transform.logit_scale
    return grad_tangent


def _of_entries(values: Tensor, members: Tensor | None) -> Tensor:
    """Scalars of rows [k, R], or [2 k, R] of the rest and of the set, as each entry's [k, R, 1 or T]."""
    if members is None:
        return values.unsqueeze(-1)
    rest, inside = values.view(2, -1, values.shape[-1], 1)
    return torch.where(members, inside, rest)


def _at(values: Tensor, columns: Tensor) -> Tensor:
    return values if values.shape[-1] == 1 else values.gather(-1, columns)


def row_tangent(logits, tangent, sums, norm, offset, threshold, classes, *arguments) -> None:
    """Add what a tile contributes to sums; see the top of this file."""
    tile = TileArguments(*arguments)
    z = to_logits(logits, tile.bias, tile)
    moved = to_logits_tangent(tangent, z, tile)
    members = None if len(norm) == 2 else in_set(z, offset, SideArguments(threshold, classes))
    top, log_sum = _of_entries(norm, members)
    log_p = (z - top) - log_sum
    p = log_p.exp()

    def total(values: Tensor, inside: Tensor | None = members) -> Tensor:
        """Sums of the rest and of the set, or of all [1, R]."""
        if inside is None:
            return values.sum(-1).unsqueeze(0)
        return torch.stack(
            [values.masked_fill(inside, 0.0).sum(-1), values.masked_fill(~inside, 0.0).sum(-1)]
        )

    weighed = p * moved
    prob = total(weighed)
    to_target = to_target_prob = torch.zeros_like(prob)
    sparse = _sparse_target(z, offset, tile)
    if tile.dense is not None:
        to_target = total((tile.dense * moved).masked_fill(tile.dense == 0, 0.0))
        to_target_prob = total(tile.dense * weighed)
    elif sparse is not None and z.shape[-1]:
        columns, b = sparse
        inside = None if members is None else members.gather(-1, columns)
        to_target = total((b * moved.gather(-1, columns)).masked_fill(b == 0, 0.0), inside)
        to_target_prob = total(b * weighed.gather(-1, columns), inside)
    part = RowSums(
        prob=prob,
        prob_log_prob=total(weighed * log_p.masked_fill(p == 0, 0.0)),
        prob_square=total(weighed * p),
        target=to_target,
        target_prob=to_target_prob,
        constant=total(moved),
        logit=total(moved * z.masked_fill(z == -torch.inf, 0.0)),
    )
    added = torch.stack(part, 1).flatten(0, 1)
    sums += added if tile.active is None else added.masked_fill(~tile.active, 0.0)


def row_grad_tangent(
    logits,
    tangent,
    out,
    out_tangent,
    norm,
    norm_tangent,
    coef,
    coef_tangent,
    offset,
    threshold,
    classes,
    *arguments,
) -> None:
    """Write dloss/dlogits of a tile and its derivative; see the top of this file."""
    tile = TileArguments(*arguments)
    z = to_logits(logits, tile.bias, tile)
    moved = to_logits_tangent(tangent, z, tile)
    members = None if len(norm) == 2 else in_set(z, offset, SideArguments(threshold, classes))
    top, log_sum = _of_entries(norm, members)
    c, cd = (RowCoefficients(*_of_entries(x, members)) for x in (coef, coef_tangent))
    log_p = (z - top) - log_sum
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0, 0.0)
    delta = moved - _of_entries(norm_tangent, members)[0]  # of log p
    form = c.prob + c.prob_log_prob * log_p + c.prob_square * p
    grad = p * form
    changed = cd.prob + cd.prob_log_prob * log_p + cd.prob_square * p
    grad_tangent = p * (delta * (form + c.prob_log_prob + c.prob_square * p) + changed)
    sparse = _sparse_target(z, offset, tile)
    if tile.dense is not None:
        grad += tile.dense * (c.target + c.target_prob * p)
        grad_tangent += tile.dense * (cd.target + p * (cd.target_prob + c.target_prob * delta))
    elif sparse is not None and z.shape[-1]:
        columns, b = sparse
        p_at, delta_at = p.gather(-1, columns), delta.gather(-1, columns)
        t, r, t_moved, r_moved = (
            _at(x, columns) for x in (c.target, c.target_prob, cd.target, cd.target_prob)
        )
        grad.scatter_add_(-1, columns, b * (t + r * p_at))
        grad_tangent.scatter_add_(-1, columns, b * (t_moved + p_at * (r_moved + r * delta_at)))
    # Skipped when absent, not multiplied by zero: a masked entry has z = -inf.
    grad += torch.where(c.logit == 0, 0.0, c.logit * z) + c.constant
    grad_tangent += torch.where(cd.logit == 0, 0.0, cd.logit * z) + c.logit * moved + cd.constant
    grad_tangent = to_raw_gradient_tangent(grad, grad_tangent, z, moved, tile)
    grad = to_raw_gradient(grad, z, tile)
    for value, place in ((grad, out), (grad_tangent, out_tangent)):
        if place is None:
            continue
        if tile.active is not None:
            value.masked_fill_(~tile.active.unsqueeze(-1), 0.0)
        place.copy_(value)


_GIVEN = ("Tensor logits", "Tensor tangent")
define(
    "row_tangent",
    Signature(*_GIVEN, "Tensor(a!) sums", "Tensor norm", "int offset", SideArguments, TileArguments),
    "()",
    row_tangent,
    _fake,
)
define(
    "row_grad_tangent",
    Signature(
        *_GIVEN,
        "Tensor(a!)? out",
        "Tensor(b!) out_tangent",
        "Tensor norm",
        "Tensor norm_tangent",
        "Tensor coef",
        "Tensor coef_tangent",
        "int offset",
        SideArguments,
        TileArguments,
    ),
    "()",
    row_grad_tangent,
    _fake,
)
