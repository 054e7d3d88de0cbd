"""The arithmetic of the figures: plain functions of lists of seconds, so that they can be tested."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def rounds_for(seconds: float, budget: float) -> int:
    """How many rounds of so many seconds fit the budget, up to 15.

    At least 3 where one takes no more than twice the budget, 2 where no more than four times.
    """
    least = 3 if seconds <= 2 * budget else 2 if seconds <= 4 * budget else 1
    return max(least, min(15, int(budget / seconds))) if seconds > 0 else 15


def spread(samples: Sequence[float]) -> float:
    """(largest - smallest) / median."""
    return (max(samples) - min(samples)) / statistics.median(samples)


def ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of ``samples / base``: both of a round saw one machine, so drift cancels."""
    if len(samples) != len(base):
        raise ValueError(f"samples and base: got {len(samples)} and {len(base)} rounds, expected as many")
    return statistics.median(a / b for a, b in zip(samples, base))


def summary(seconds: dict[str, Sequence[float]]) -> dict[str, float]:
    """Figures of a competitor from the seconds of the rounds of 'gemms', 'ours' and 'competitor'."""
    own = seconds["competitor"]
    return {
        "ms": 1e3 * statistics.median(own),
        "spread": spread(own),
        "gemms_ms": 1e3 * statistics.median(seconds["gemms"]),
        "x_gemms": ratio(own, seconds["gemms"]),
        "x_ours": ratio(own, seconds["ours"]),
        "rounds": len(own),
    }
