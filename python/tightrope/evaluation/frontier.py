"""A model beside what temperature makes of the plain one at the same entropy.

That is the comparison that counts: a point of more entropy and more cross-entropy is no trade-off where the
plain model reaches it by a number of the sampler.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from .sweep import Row

# The verdict on a model that temperature beats on both axes.
BEATEN = "temperature alone is better on both"


class Curve:
    """The plain model's figures by entropy: its temperatures, and what lies between them.

    Args:
        rows: of one model, at two temperatures at least; those of min-p are left out.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = sorted((r for r in rows if r.min_p is None), key=lambda r: r.entropy)

    def at(self, entropy: float) -> Row | None:
        """The figures at an entropy, in nats; None where no two temperatures lie around it.

        A cubic through the two temperatures on each side, where there are as many; of the logarithm for the
        implausible mass, which grows by magnitudes. The curve bends: a chord lies above its cross-entropy by
        7 thousandths of a nat where temperatures are a tenth apart, as much as some modes are said to gain.
        """
        place = bisect_right([row.entropy for row in self.rows], entropy)
        if place == len(self.rows) and self.rows and entropy == self.rows[-1].entropy:
            return self.rows[-1]
        if place in (0, len(self.rows)):
            return None
        near = self.rows[max(0, place - 2) : place + 2]
        low = self.rows[place - 1]
        weights = _lagrange([row.entropy for row in near], entropy)

        def mean(field: str) -> float:
            return sum(w * getattr(row, field) for w, row in zip(weights, near))

        masses = [row.implausible_mass for row in near]
        if min(masses) > 0:
            mass = math.exp(sum(w * math.log(m) for w, m in zip(weights, masses)))
        else:
            share = (entropy - low.entropy) / (self.rows[place].entropy - low.entropy)
            mass = (1 - share) * low.implausible_mass + share * self.rows[place].implausible_mass
        return low._replace(
            temperature=mean("temperature"),
            cross_entropy=mean("cross_entropy"),
            entropy=entropy,
            implausible_mass=mass,
            top1_accuracy=mean("top1_accuracy"),
            cross_entropy_error=None,
            entropy_error=None,
            implausible_mass_error=None,
        )


def _lagrange(points: Sequence[float], x: float) -> list[float]:
    """The weights of values at ``points`` in that of the polynomial through them at x; they sum to 1."""
    return [math.prod((x - q) / (p - q) for q in points if q != p) for p in points]


class Comparison(NamedTuple):
    """A setting of a model beside the plain model at the same entropy, by temperature alone."""

    model: str
    min_p: float | None
    entropy: float
    #: of the plain model; None, and the others with it, where its temperatures do not reach this entropy
    plain_temperature: float | None
    cross_entropy: float | None
    plain_cross_entropy: float | None
    #: ours less the plain model's, nats: negative is better
    cross_entropy_difference: float | None
    implausible_mass: float
    plain_implausible_mass: float | None
    #: ours over the plain model's: below 1 is better
    implausible_ratio: float | None
    verdict: str


def compare(rows: Sequence[Row], plain: str) -> list[Comparison]:
    """Each other model as it is, at temperature 1, and each min-p, beside the plain model's temperatures.

    Raises:
        ValueError: there are no rows of ``plain``.
    """
    curve = Curve([row for row in rows if row.model == plain])
    if not curve.rows:
        raise ValueError(f"plain: got {plain!r}, expected one of {sorted({row.model for row in rows})}")
    chosen = [r for r in rows if r.min_p is not None or (r.model != plain and r.temperature == 1)]
    return [_compared(row, curve.at(row.entropy)) for row in chosen]


def _compared(row: Row, plain: Row | None) -> Comparison:
    if plain is None:
        verdict = "no plain temperature has this entropy"
        return Comparison(
            row.model, row.min_p, row.entropy, None, row.cross_entropy, None, None, row.implausible_mass,
            None, None, verdict,
        )  # fmt: skip
    difference = None if row.cross_entropy is None else row.cross_entropy - plain.cross_entropy
    ratio = row.implausible_mass / plain.implausible_mass if plain.implausible_mass else math.nan
    return Comparison(
        row.model,
        row.min_p,
        row.entropy,
        plain.temperature,
        row.cross_entropy,
        plain.cross_entropy,
        difference,
        row.implausible_mass,
        plain.implausible_mass,
        ratio,
        _verdict(difference, ratio),
    )


def _verdict(difference: float | None, ratio: float) -> str:
    if difference is None:
        return (
            "fewer implausible than temperature" if ratio < 1 else "temperature alone has fewer implausible"
        )
    if difference > 0 and ratio > 1:
        return BEATEN
    if difference <= 0 and ratio <= 1:
        return "better than temperature on both"
    if ratio < 1:
        return f"fewer implausible, for {difference:.3f} nats"
    return "truer, and more implausible"
