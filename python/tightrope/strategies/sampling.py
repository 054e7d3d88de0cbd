"""Which columns of a gradient are multiplied: the mathematics of sampled gradients, on vectors of V numbers.

A chunk's gradient G [n, V] is ``basis^T along + E``, where along is the part of each column that lies in the
span of one or two fixed row vectors. Column j of E is taken with probability ``pi_j = min(1, r_j / tau)`` and
divided by it, so products with it have no bias, whatever r and tau are. What they have is variance, which is
known before anything is drawn: with ``s_j = |E_j| |W_j|``

    E |error of dh|^2 = sum_j s_j^2 (1 / pi_j - 1) = sum over s_j < tau of s_j (tau - s_j),  for r = s

so tau is solved for the noise that is allowed (docs/sampled-gradients.md). That is a share of the norms of
the products, which nobody knows yet. Some columns, the pilot, are therefore multiplied first: the heaviest
ones, and some of the others at random. They estimate the norms without bias, and are exact in the end.

All of it is arithmetic on tensors. A CPU may look at a value, so there only what was drawn is gathered. A GPU
would have to be waited for: `reads` is false, and what was drawn stands first in a tensor of fixed size.
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
# Steps where nobody looks whether the root is met: halvings of the logarithms that it lies between, which
# brings 18 decades within a factor of 1.4, and Newton's from there.
_HALVINGS, _NEWTON = 7, 4
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
    inverse: Tensor  # [m] float64: 1 over the chance with which each was taken; 0 of those that only fill up

    @classmethod
    def draw(cls, importance: Tensor, reads: bool) -> Pilot:
        """importance [V], float64: the random ones are taken in proportion to it."""
        vocab = importance.numel()
        count = max(vocab // PILOT_SHARE, PILOT_LEAST)
        heaviest = importance.topk(min(count, vocab)).indices
        chance = importance.index_fill(0, heaviest, 0.0)
        chance *= count / chance.sum().clamp_min(torch.finfo(chance.dtype).tiny)
        chance.index_fill_(0, heaviest, 1.0)
        index, drawn = _draw(chance, reads)
        if drawn is None:
            return cls(index, 1 / chance[index].clamp_(max=1.0))
        # As many as there may be, but once in 10^15 times: then a norm is estimated from a few less.
        index = index[: 2 * count + 8 * math.isqrt(count)]
        live = torch.arange(len(index), device=index.device) < drawn
        index = torch.where(live, index, index[:1])
        return cls(index, torch.where(live, 1 / chance[index].clamp_(max=1.0), 0.0))

    def total(self, squares: Tensor) -> Tensor:
        """An estimate without bias of the sum over all columns of what these [m] are of the pilot's."""
        return (squares.double() * self.inverse).sum()

    def norm_of_sum(self, product: Tensor, sizes: Tensor) -> Tensor:
        """An estimate of the norm of the sum over all columns of terms; 0 where it is lost in the noise.

        product: the sum of the pilot's terms, each divided by its chance. sizes [m]: their norms.
        """
        square = product.double().square().sum()
        noise = (sizes.square() * self.inverse * (self.inverse - 1)).sum()
        return torch.where(square < _LEAST_SIGNAL * noise, 0.0, square - noise).sqrt()

    def mean_of_random(self, values: Tensor) -> Tensor:
        """The mean of values [m] over the random columns; 0 where there is none."""
        random = self.inverse > 1
        return torch.where(random, values, 0.0).sum() / random.sum().clamp_min(1)


@dataclass(frozen=True)
class Draw:
    """The columns that are multiplied, and what that leaves of noise."""

    index: Tensor  # [k] int64, ascending; where nobody reads [V], those first that were drawn
    drawn: Tensor | None  # how many, where nobody reads
    inverse: Tensor  # as index, float64: 1 / pi_j
    full: Tensor  # [] bool: all columns are multiplied
    input_variance: Tensor  # E |error of dh|^2, of the scaled gradient
    weight_variance: Tensor

    @classmethod
    def of(
        cls,
        columns: Columns,
        pilot: Pilot,
        importance: Tensor,
        gain: Tensor,
        dense: Tensor,
        reads: bool,
    ) -> Draw | None:
        """The draw whose variances are within bounds; all columns where it would take more than half of them,
        where a row of the gradient is not finite (none but its own may be), and where it is dense. None for
        that, where values are read.

        importance [V]: such that ``sum_j importance_j^2 (1 / pi_j - 1)`` may be 1. gain: the root mean
        square of ``|E_j^T h| / |E_j|``. dense: a bool.
        """
        left = importance.index_fill(0, pilot.index, 0.0)
        tau = threshold(left) if reads else threshold_in_steps(left)
        chance = (left / tau).clamp_(max=1.0)
        chance.index_fill_(0, pilot.index, 1.0)
        # As NaN is neither.
        full = ~(~dense & (2 * chance.sum() <= chance.numel()) & (tau > 0))
        if reads and full:
            return None
        chance.masked_fill_(full, 1.0)
        index, drawn = _draw(chance, reads)
        light = (chance > 0) & (chance < 1)
        excess = torch.where(light, (1 / chance - 1) * columns.residual.square(), 0.0)
        return cls(
            index,
            drawn,
            1 / chance[index],
            full,
            (excess * columns.head.square()).sum(),
            gain.square() * excess.sum(),
        )


def importance(columns: Columns, to_input: Tensor | None, to_weight: Tensor | None, gain: Tensor) -> Tensor:
    """What columns are drawn in proportion to, [V], such that ``sum of its square (1 / pi_j - 1)`` may be 1.

    to_input, to_weight: the errors allowed; None: of no interest. gain: as for `Draw.of`.
    """
    weighed = torch.zeros_like(columns.head)
    if to_input is not None:
        weighed = _over(columns.head, to_input)
    if to_weight is not None:
        weighed = torch.maximum(weighed, _over(gain, to_weight))
    return torch.where(columns.residual == 0, 0.0, columns.residual * weighed)


def _over(size: Tensor, allowed: Tensor) -> Tensor:
    """A size in units of the error that is aimed at; infinite where none is allowed, or nobody knows."""
    known = (allowed > 0) & (allowed < math.inf)
    return torch.where(known, size / (_AIM * allowed), math.inf)


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


def threshold_in_steps(r: Tensor) -> Tensor:
    """As `threshold`, and no value is read: in a number of steps that is fixed, from no further than they go.

    As ``r_j (tau - r_j)`` is at most ``r_j tau``, tau is no less than 1 over the sum of all r.
    """
    powers = torch.stack([r, r.square()])
    total, squares = powers.sum(-1)
    low, high = 1.0 / total, (1.0 + squares) / total
    for _ in range(_HALVINGS):
        tau = (low * high).sqrt()
        first, second = torch.where(r < tau, powers, 0.0).sum(-1)
        above = tau * first - second >= 1.0
        low, high = torch.where(above, low, tau), torch.where(above, tau, high)
    for _ in range(_NEWTON):
        first, second = torch.where(r < high, powers, 0.0).sum(-1)
        high = torch.where(first > 0, (1.0 + second) / first, high)
    return torch.where(total < math.inf, high, math.nan)


def _draw(chance: Tensor, reads: bool) -> tuple[Tensor, Tensor | None]:
    """Indices drawn with these probabilities, each by itself, from torch's default generator; or all indices,
    those first that were drawn, and how many these are."""
    # In float64: of float32 one number in 2^24 is 0, more often than a light column is to be taken.
    taken = torch.rand_like(chance) < chance
    if reads:
        return taken.nonzero().squeeze(-1), None
    return taken.logical_not().to(torch.uint8).sort(stable=True).indices, taken.sum()
