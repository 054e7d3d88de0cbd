"""From upstream gradients of the statistics to the seven scalars that a row's gradient is made of.

Every loss of the statistics has a gradient of one form (docs/mathematics.md):

    dloss/dz_j = p_j (prob + prob_log_prob log p_j + prob_square p_j)
               + b_j (target + target_prob p_j) + logit z_j + constant

which is why the kernels know no loss. Where there is a set of classes, its entries have other scalars than
the rest, and probabilities within their side in the place of p.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .statistics import SUMMARY, StatGrads, has_set, named


class RowCoefficients(NamedTuple):
    """The seven scalars, [rows] each, in the order of `Coefficients` in csrc/row_math.h."""

    prob: Tensor  #: a
    prob_log_prob: Tensor  #: e
    prob_square: Tensor  #: q
    target: Tensor  #: t
    target_prob: Tensor  #: r
    logit: Tensor  #: rho
    constant: Tensor  #: s


def row_coefficients(summary: Tensor, grads: StatGrads, vocab_size: int) -> Tensor:
    """Coefficients [7, rows] from a summary [SUMMARY, rows] and the upstream gradients of its statistics.

    With SIDE_SUMMARY more rows of the summary, [14, rows]: those of the rest, and of the set.
    """
    s = named(summary)
    zero = torch.zeros_like(s["max"])
    prob, prob_log_prob, prob_square, target, target_prob, logit, constant = (zero,) * 7
    if grads.lse is not None:
        prob = prob + grads.lse
    if grads.entropy is not None:
        prob = prob - grads.entropy * s["entropy"]
        prob_log_prob = -grads.entropy
    if grads.collision is not None:
        prob = prob - 2 * grads.collision * s["collision"]
        prob_square = 2 * grads.collision
    if grads.target_prob is not None:
        prob = prob - grads.target_prob * s["target_prob"]
        target_prob = grads.target_prob
    if grads.target_logit is not None:
        target = target + grads.target_logit
    if grads.target_log_prob is not None:
        prob = prob - grads.target_log_prob * s["target_mass"]
        target = target + grads.target_log_prob
    if grads.mean_log_prob is not None:
        prob = prob - grads.mean_log_prob
        constant = constant + grads.mean_log_prob / vocab_size
    if grads.logit_sum is not None:
        constant = constant + grads.logit_sum
    if grads.logit_square_sum is not None:
        logit = 2 * grads.logit_square_sum
    whole = RowCoefficients(prob, prob_log_prob, prob_square, target, target_prob, logit, constant)
    if not has_set(summary):
        return torch.stack(whole)
    return torch.stack([*_of_side(whole, s, grads, "rest"), *_of_side(whole, s, grads, "set")])


def _of_side(whole: RowCoefficients, s: dict[str, Tensor], grads: StatGrads, side: str) -> RowCoefficients:
    """The coefficients of the entries of a side, for r_j = p_j / P, where P is the mass of that side."""
    own, across = (s["support_log_mass"], grads.support_log_mass), (s["rest_log_mass"], grads.rest_log_mass)
    if side == "rest":
        own, across = across, own
    log_mass, to_log_mass = own
    log_other, to_log_other = across
    mass = log_mass.exp()
    # The log mass of an empty side is -inf, whatever the logits; its upstream gradient may be anything.
    exists, other_exists = log_mass != -torch.inf, log_other != -torch.inf
    prob = mass * (whole.prob + whole.prob_log_prob * torch.where(exists, log_mass, 0.0))
    prob_log_prob = mass * whole.prob_log_prob
    # By an entry of this side, log P changes by r_j (1 - P), and the log mass of the other side by -r_j P.
    if to_log_mass is not None:
        prob = prob + torch.where(exists, to_log_mass * log_other.exp(), 0.0)
    if to_log_other is not None:
        prob = prob - torch.where(other_exists, to_log_other * mass, 0.0)
    if side == "set" and grads.support_entropy is not None:
        prob = prob - grads.support_entropy * s["support_entropy"]
        prob_log_prob = prob_log_prob - grads.support_entropy
    return whole._replace(
        prob=prob,
        prob_log_prob=prob_log_prob,
        prob_square=mass * mass * whole.prob_square,
        target_prob=mass * whole.target_prob,
    )


def coefficient_tangent(summary: Tensor, tangent: Tensor, grads: StatGrads) -> Tensor:
    """The derivative of `row_coefficients` along that of the summary, laid out as these; grads are fixed.

    Of whole rows only one coefficient has statistics in it.
    """
    s, d = named(summary), named(tangent)
    prob = zero = torch.zeros_like(s["max"])
    if grads.entropy is not None:
        prob = prob - grads.entropy * d["entropy"]
    if grads.collision is not None:
        prob = prob - 2 * grads.collision * d["collision"]
    if grads.target_prob is not None:
        prob = prob - grads.target_prob * d["target_prob"]
    moved = RowCoefficients(*(zero,) * 7)._replace(prob=prob)
    if not has_set(summary):
        return torch.stack(moved)
    whole = RowCoefficients(*row_coefficients(summary[: len(SUMMARY)], grads, 1))
    return torch.stack(
        [*_side_tangent(whole, moved, s, d, grads, "rest"), *_side_tangent(whole, moved, s, d, grads, "set")]
    )


def _side_tangent(
    whole: RowCoefficients,
    moved: RowCoefficients,
    s: dict[str, Tensor],
    d: dict[str, Tensor],
    grads: StatGrads,
    side: str,
) -> RowCoefficients:
    """The derivative of `_of_side`. s, d: the statistics and theirs; moved: that of `whole`."""
    own, across = ("support", "rest") if side == "set" else ("rest", "support")
    log_mass, to_log_mass = s[f"{own}_log_mass"], getattr(grads, f"{own}_log_mass")
    to_log_other = getattr(grads, f"{across}_log_mass")
    mass, other = log_mass.exp(), s[f"{across}_log_mass"].exp()
    mass_moved = mass * d[f"{own}_log_mass"]
    log_mass = log_mass.masked_fill(log_mass == -torch.inf, 0.0)
    prob = mass_moved * (whole.prob + whole.prob_log_prob * log_mass)
    prob = prob + mass * (moved.prob + whole.prob_log_prob * d[f"{own}_log_mass"])
    prob_log_prob = mass_moved * whole.prob_log_prob
    # Both masses rest where a side is empty.
    both = (mass != 0) & (other != 0)
    if to_log_mass is not None:
        prob = prob + torch.where(both, to_log_mass * other * d[f"{across}_log_mass"], 0.0)
    if to_log_other is not None:
        prob = prob - torch.where(both, to_log_other * mass_moved, 0.0)
    if side == "set" and grads.support_entropy is not None:
        prob = prob - grads.support_entropy * d["support_entropy"]
    return moved._replace(
        prob=prob,
        prob_log_prob=prob_log_prob,
        prob_square=2 * mass * mass_moved * whole.prob_square,
        target_prob=mass_moved * whole.target_prob,
    )


class RowUpstream(NamedTuple):
    """Upstream gradients of the statistics where they must be known before the statistics are, [rows] each.

    Each is a constant, or a small function of its statistic: ``g_lse = lse + lse_slope * lse(row)`` and
    ``g_collision = collision + collision_rate / collision(row)``. That covers the built-in losses. The order
    is that of `Upstream` in csrc/row_math.h.
    """

    lse: Tensor
    lse_slope: Tensor
    collision: Tensor
    collision_rate: Tensor
    entropy: Tensor
    target_logit: Tensor
    target_prob: Tensor
    target_log_prob: Tensor
    mean_log_prob: Tensor
    logit_sum: Tensor
    logit_square_sum: Tensor

    @classmethod
    def of(cls, rows: Tensor, **fields: Tensor | float) -> Tensor:
        """[UPSTREAM, rows] from some of the fields, the others 0; rows [rows] gives dtype and device."""
        zero = torch.zeros_like(rows)
        return torch.stack([zero + fields.get(name, 0.0) for name in cls._fields])

    def at(self, summary: Tensor) -> StatGrads:
        """The upstream gradients themselves, once the summary [SUMMARY, rows] is known."""
        s = named(summary)
        slope = torch.where(self.lse_slope == 0, 0.0, self.lse_slope * (s["max"] + s["log_sum"]))
        rate = torch.where(self.collision_rate == 0, 0.0, self.collision_rate / s["collision"])
        constant = {name: getattr(self, name) for name in self._fields if name in StatGrads._fields}
        return StatGrads(
            **{**constant, "lse": self.lse + slope, "collision": self.collision + rate},
        )
