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

        Linear in the entropy, and for the implausible mass, which grows by magnitudes, its logarithm is.
        """
        place = bisect_right([row.entropy for row in self.rows], entropy)
        if place == len(self.rows) and self.rows and entropy == self.rows[-1].entropy:
            return self.rows[-1]
        if place in (0, len(self.rows)):
            return None
        low, high = self.rows[place - 1], self.rows[place]
        share = (entropy - low.entropy) / (high.entropy - low.entropy)

        def mean(a: float, b: float) -> float:
            return a + share * (b - a)

        masses = low.implausible_mass, high.implausible_mass
        mass = math.exp(mean(*map(math.log, masses))) if min(masses) > 0 else mean(*masses)
        return low._replace(
            temperature=mean(low.temperature, high.temperature),
            cross_entropy=mean(low.cross_entropy, high.cross_entropy),
            entropy=entropy,
            implausible_mass=mass,
            top1_accuracy=mean(low.top1_accuracy, high.top1_accuracy),
            cross_entropy_error=None,
            entropy_error=None,
            implausible_mass_error=None,
        )


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
