"""Which columns of a gradient are multiplied: the mathematics of sampled gradients, on vectors of V numbers.

A chunk's gradient G [n, V] is ``basis^T along + E``, where along is the part of each column that lies in the
span of one or two fixed row vectors. Column j of E is taken with probability ``pi_j = min(1, r_j / tau)`` and
divided by it, so products with it have no bias, whatever r and tau are. What they have is variance, which is
known before anything is drawn: with ``s_j = |E_j| |W_j|``

    E |error of dh|^2 = sum_j s_j^2 (1 / pi_j - 1) = sum over s_j < tau of s_j (tau - s_j),  for r = s

so tau is solved for the noise that is allowed (docs/sampled-gradients.md). That is a share of the norms of
the products, which nobody knows yet. Some columns, the pilot, are therefore multiplied first: the heaviest
ones, and some of the others at random. They estimate the norms without bias, and are exact in the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Of so many columns one is among the heaviest of the pilot, and one, on average, among its random ones.
PILOT_SHARE = 128
# At least so many of each: from fewer a norm is not known to a tenth.
PILOT_LEAST = 64
# What is aimed at, of the noise that is allowed: the norms are estimates.
_AIM = 0.95
# Of an estimated square, over the noise in it: below this its error is that of the noise.
_LEAST_SIGNAL = 10.0
# What rounding leaves of |E_j|^2 = |G_j|^2 - |along_j|^2, over |G_j|^2 and in units of its dtype: no column
# that has something to it may be taken for empty.
_FLOOR = 32.0


@dataclass(frozen=True)
class Columns:
    """What is known of each column of the gradient times a scale, [V] each, float64."""

    size: Tensor  # |G_j|
    residual: Tensor  # |E_j|, a little more than it is where rounding hides it
    head: Tensor  # |W_j|

    @classmethod
    def of(cls, along: Tensor, square: Tensor, head: Tensor) -> Columns:
        """From along [r, V] and ``|G_j|^2`` [V], both of the scaled gradient."""
        floor = _FLOOR * torch.finfo(square.dtype).eps
        square, along = square.double(), along.double()
        rest = torch.maximum(square - along.square().sum(0), floor * square)
        return cls(square.sqrt(), rest.sqrt(), head.double())


@dataclass(frozen=True)
class Pilot:
    """Columns that are multiplied before the others are drawn."""

    index: Tensor  # [m] int64
    chance: Tensor  # [m] float64: with which each was taken; 1 of the heaviest

    @classmethod
    def draw(cls, importance: Tensor) -> Pilot:
        """importance [V], float64: the random ones are taken in proportion to it."""
        count = max(importance.numel() // PILOT_SHARE, PILOT_LEAST)
        heaviest = importance.topk(min(count, importance.numel())).indices
        chance = importance.index_fill(0, heaviest, 0.0)
        chance *= count / chance.sum().clamp_min(torch.finfo(chance.dtype).tiny)
        chance.index_fill_(0, heaviest, 1.0)
        index = _draw(chance)
        return cls(index, chance[index].clamp_(max=1.0))

    def total(self, squares: Tensor) -> float:
        """An estimate without bias of the sum over all columns of what these [m] are of the pilot's."""
        return (squares.double() / self.chance).sum().item()

    def norm_of_sum(self, product: Tensor, sizes: Tensor) -> float:
        """An estimate of the norm of the sum over all columns of terms; 0 where it is lost in the noise.

        product: the sum of the pilot's terms, each divided by its chance. sizes [m]: their norms.
        """
        square = product.double().square().sum().item()
        noise = (sizes.square() * (1 - self.chance) / self.chance.square()).sum().item()
        return 0.0 if square < _LEAST_SIGNAL * noise else math.sqrt(square - noise)

    def mean_of_random(self, values: Tensor) -> float:
        """The mean of values [m] over the random columns; 0 where there is none."""
        random = values[self.chance < 1]
        return random.double().mean().item() if random.numel() else 0.0


@dataclass(frozen=True)
class Draw:
    """The columns that are multiplied, and what that leaves of noise."""

    index: Tensor  # [k] int64, ascending
    inverse: Tensor  # [k] float64: 1 / pi_j
    input_variance: float  # E |error of dh|^2, of the scaled gradient
    weight_variance: float

    @classmethod
    def of(cls, columns: Columns, pilot: Pilot, importance: Tensor, gain: float) -> Draw | None:
        """The draw whose variances are within bounds; None where it would take more than half of the columns.

        importance [V]: such that ``sum_j importance_j^2 (1 / pi_j - 1)`` may be 1. gain: the root mean
        square of ``|E_j^T h| / |E_j|``.
        """
        left = importance.index_fill(0, pilot.index, 0.0)
        tau = threshold(left)
        if not tau > 0:  # NaN: so is a row of the gradient, and none but its own may be
            return None
        chance = (left / tau).clamp_(max=1.0)
        chance.index_fill_(0, pilot.index, 1.0)
        if not 2 * chance.sum().item() <= chance.numel():
            return None
        index = _draw(chance)
        excess = (1 / chance - 1).masked_fill_(chance == 0, 0.0) * columns.residual.square()
        return cls(
            index,
            1 / chance[index],
            (excess * columns.head.square()).sum().item(),
            gain**2 * excess.sum().item(),
        )


def importance(columns: Columns, to_input: float | None, to_weight: float | None, gain: float) -> Tensor:
    """What columns are drawn in proportion to, [V], such that ``sum of its square (1 / pi_j - 1)`` may be 1.

    to_input, to_weight: the errors allowed; None: of no interest. gain: as for `Draw.of`.
    """
    weighed = torch.zeros_like(columns.head)
    if to_input is not None:
        weighed = columns.head / (_AIM * to_input) if to_input else torch.full_like(weighed, math.inf)
    if to_weight is not None:
        weighed = weighed.clamp(min=gain / (_AIM * to_weight) if to_weight else math.inf)
    return torch.where(columns.residual == 0, 0.0, columns.residual * weighed)


def threshold(r: Tensor) -> float:
    """The tau for which the sum over ``r_j < tau`` of ``r_j (tau - r_j)`` is 1; NaN where an r is not finite.

    r [V], at least 0. The sum is convex and piecewise linear in tau, so Newton's method meets the root
    exactly, and from above: in 3 to 7 steps, where sorting would take longer than all of them.
    """
    total = r.sum().item()
    if not total < math.inf:
        return math.nan
    if total == 0:
        return 1.0
    while True:
        tau = (1.0 + r.square().sum().item()) / total
        below = r[r < tau]
        if below.numel() in (0, r.numel()):
            return tau if below.numel() else 0.0
        r, total = below, below.sum().item()
        if total == 0:
            return tau


def _draw(chance: Tensor) -> Tensor:
    """Indices drawn with these probabilities, each by itself, from torch's default generator."""
    # In float64: of float32 one number in 2^24 is 0, more often than a light column is to be taken.
    return (torch.rand_like(chance) < chance).nonzero().squeeze(-1)
