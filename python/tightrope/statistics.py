"""Row statistics: what the kernels accumulate, how parts merge, and what users see.

A row's statistics pass through three forms. ``partial`` [PARTIAL, rows] holds sums over the part of the
vocabulary seen so far, relative to its maximum; ``summary`` [SUMMARY, rows] is what follows from a whole
row, and what the backward needs; `RowStats` are the summary's public fields. Sums stay relative to the
maximum from end to end, so a large common offset of the logits costs no precision. The merge rule is
that of design ``docs/mathematics.md`` and stands in C++ in ``csrc/row_math.h``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Rows of the `partial` tensors, in the order of `Partial` in csrc/row_math.h.
PARTIAL = (
    "max",
    "sum_exp",
    "sum_exp_shift",
    "sum_exp_square",
    "target_shift",
    "target_exp",
    "target_mass",
    "shift_sum",
    "square_sum",
    "count",
    "logit_sum",
)
# e^x is 0 in every dtype long before x reaches this.
LOG_ZERO = -1e4
# Logits may be as large as their dtype allows (a mask of its lowest number, say). A difference of two, or a
# sum over the vocabulary, then overflows where the mean, which is what is wanted of it, does not: so
# target_shift, shift_sum and logit_sum are kept times this. A power of two changes no bit of other sums.
SUM_SCALE = 2.0**-32
# Rows of the `summary` tensors. The first two are kept apart, and not added to an lse, so that
# z - max - log_sum keeps the precision of the difference.
SUMMARY = (
    "max",
    "log_sum",
    "entropy",
    "collision",
    "target_logit",
    "target_prob",
    "target_log_prob",
    "mean_log_prob",
    "logit_sum",
    "logit_square_sum",
    "target_mass",
)
# Statistics of the two sides of a row, a set of classes and the rest, each relative to its own maximum: so
# nothing is found by subtraction, and both are precise where they hold nearly nothing. Rows of the `sides`
# tensors, in the order of `Sides` in csrc/row_math.h.
SIDES = ("set_max", "set_sum_exp", "set_sum_exp_shift", "rest_max", "rest_sum_exp", "rest_sum_exp_shift")
# Rows that the summary has more where there is a set. The first four normalise the sides' probabilities.
SIDE_SUMMARY = (
    "rest_max",
    "rest_log_sum",
    "set_max",
    "set_log_sum",
    "support_log_mass",
    "rest_log_mass",
    "support_entropy",
)
# The statistics of a set: fields of `RowStats`.
OF_SUPPORT = SIDE_SUMMARY[4:]
# Rows that the summary has more where the target is a teacher's softmax: what normalises it, and its own
# statistics. They do not depend on what is differentiated.
TEACHER_SUMMARY = ("teacher_max", "teacher_log_sum", "target_entropy", "target_collision")
# The statistics of a teacher: fields of `RowStats`.
OF_TEACHER = TEACHER_SUMMARY[2:]
_LAYOUTS = {
    len(names): names
    for names in (
        SUMMARY,
        SUMMARY + SIDE_SUMMARY,
        SUMMARY + TEACHER_SUMMARY,
        SUMMARY + SIDE_SUMMARY + TEACHER_SUMMARY,
    )
}


class RowStats(NamedTuple):
    """The statistics of each token's logits ``z`` (after bias, logit_scale and softcap), ``p = softmax(z)``.

    Every field but the last two has the tokens' shape ``(...)``; floating fields are float32 (float64 if an
    input is), and are 0 for ignored tokens. ``b`` is the target, one-hot for class indices, without label
    smoothing. The ``target_*`` fields are None where no target was given, those of a set where no ``support``
    was, ``target_entropy`` and ``target_collision`` where the target is not a :class:`TeacherTarget`, and the
    last two without a ``gradient_noise`` or where the backward comes later. The types leave that out: who
    uses a field has given what it is of.
    """

    lse: Tensor  #: log sum_j exp(z_j)
    entropy: Tensor  #: H = -sum_j p_j log p_j, in nats
    collision: Tensor  #: collision probability |p|^2 = sum_j p_j^2
    target_logit: Tensor  #: <b, z>
    target_prob: Tensor  #: <b, p>
    argmax: Tensor  #: the lowest index of the largest logit, int64; -1 for ignored tokens
    target_log_prob: Tensor  #: <b, log p>; cross-entropy is its negative
    mean_log_prob: Tensor  #: (1/V) sum_j log p_j, what label smoothing needs
    logit_sum: Tensor  #: sum_j z_j
    logit_square_sum: Tensor  #: sum_j z_j^2
    #: log of the mass of the set of classes; -inf where it is empty
    support_log_mass: Tensor = None  # type: ignore[assignment]
    #: log of the mass of the other classes; -inf where there are none
    rest_log_mass: Tensor = None  # type: ignore[assignment]
    #: entropy of p restricted to the set and renormalised, in nats; 0 where the set is empty
    support_entropy: Tensor = None  # type: ignore[assignment]
    #: entropy of a teacher's distribution, -<b, log b>, in nats; the forward KL is cross-entropy less this
    target_entropy: Tensor = None  # type: ignore[assignment]
    #: its collision probability |b|^2
    target_collision: Tensor = None  # type: ignore[assignment]
    #: of all tokens together, 0-dimensional: the share of the columns whose products were made; 1 is in full
    sampled_share: Tensor = None  # type: ignore[assignment]
    #: [2]: the expected root mean square errors of the gradients of input and weight, over their norms
    sampled_noise: Tensor = None  # type: ignore[assignment]


# The fields that are of all tokens together: there with a gradient_noise only.
OF_CALL = ("sampled_share", "sampled_noise")
# The fields that have a gradient.
FLOATING = tuple(name for name in RowStats._fields if name not in ("argmax", *OF_TEACHER, *OF_CALL))


class StatGrads(NamedTuple):
    """Upstream gradients of the floating fields of `RowStats`, [rows] each; None means zero."""

    lse: Tensor | None = None
    entropy: Tensor | None = None
    collision: Tensor | None = None
    target_logit: Tensor | None = None
    target_prob: Tensor | None = None
    target_log_prob: Tensor | None = None
    mean_log_prob: Tensor | None = None
    logit_sum: Tensor | None = None
    logit_square_sum: Tensor | None = None
    support_log_mass: Tensor | None = None
    rest_log_mass: Tensor | None = None
    support_entropy: Tensor | None = None


def empty_partial(rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Statistics of nothing seen yet: partial [PARTIAL, rows] and argmax [rows], int64."""
    partial = torch.zeros(len(PARTIAL), rows, dtype=dtype, device=device)
    partial[0] = -torch.inf
    return partial, torch.full((rows,), -1, dtype=torch.int64, device=device)


def empty_sides(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Statistics of two sides of which nothing is seen yet, [SIDES, rows]."""
    sides = torch.zeros(len(SIDES), rows, dtype=dtype, device=device)
    sides[::3] = -torch.inf
    return sides


def origin(maximum: Tensor) -> Tensor:
    """The point that shifted sums refer to: the maximum, or 0 where every logit is -inf."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def scaled_shift(z: Tensor, start: Tensor) -> Tensor:
    """``(z - start) * SUM_SCALE``, finite for any two finite numbers. z [R, T], start [R, 1]; or [R]."""
    return torch.add(start * -SUM_SCALE, z, alpha=SUM_SCALE)


def merge(*parts: Tensor) -> Tensor:
    """Partial statistics [PARTIAL, rows] of disjoint parts of the vocabulary, as one. Associative."""
    tops, s0, s1, s2, target_shift, target_exp, mass, shift_sum, square_sum, count, logit_sum = torch.stack(
        parts, 1
    )
    maximum = tops.amax(0)
    start, end = origin(tops), origin(maximum)
    # Clamped where e^shift is 0: with -inf, or a shift times a sum that overflows, 0 * inf is NaN.
    shift, scaled = (start - end).clamp_min(LOG_ZERO), scaled_shift(start, end)
    scale = torch.where(s0 == 0, 0.0, shift.exp())
    rebased = [
        scale * s0,
        scale * (s1 + shift * s0),
        scale * scale * s2,
        target_shift + scaled * mass,
        scale * target_exp,
        mass,
        shift_sum + scaled * count,
        square_sum,
        count,
        logit_sum,
    ]
    return torch.stack([maximum, *(sums.sum(0) for sums in rebased)])


def merge_argmax(tops: Tensor, indices: Tensor) -> Tensor:
    """The index of the largest logit of all parts, from those of each [parts, rows]; -1 where none has any.

    As in one sweep: the lowest of equal ones, and a NaN is the largest.
    """
    best = (indices >= 0) & ((tops == tops.amax(0)) | tops.isnan())
    lowest = torch.where(best, indices, torch.iinfo(indices.dtype).max).amin(0)
    return torch.where(best.any(0), lowest, -1)


def merge_sides(*parts: Tensor) -> Tensor:
    """Statistics [SIDES, rows] of the sides of disjoint parts of the vocabulary, as one. Associative."""
    # A maximum and its sums, as in `merge`, for both sides at once.
    sides = torch.stack(parts)
    tops, s0, s1 = sides[:, ::3], sides[:, 1::3], sides[:, 2::3]
    maximum = tops.amax(0)
    shift = (origin(tops) - origin(maximum)).clamp_min(LOG_ZERO)
    scale = torch.where(s0 == 0, 0.0, shift.exp())
    sums = [(scale * s0).sum(0), (scale * (s1 + shift * s0)).sum(0)]
    return torch.stack([maximum, *sums], 1).flatten(0, 1)


def summarise_sides(sides: Tensor) -> Tensor:
    """Statistics [SIDES, rows] of whole rows -> [SIDE_SUMMARY, rows].

    The log masses come from the difference of the sides' lse alone: each is precise, whichever side holds
    nearly everything.
    """
    set_max, set_sum, set_shift, rest_max, rest_sum, _ = sides
    set_max, rest_max = origin(set_max), origin(rest_max)
    nowhere, everywhere = set_sum == 0, rest_sum == 0
    # An empty side has no entry that these would normalise.
    set_log, rest_log = (s.log().masked_fill(s == 0, 0.0) for s in (set_sum, rest_sum))
    apart = (set_max - rest_max) + (set_log - rest_log)
    apart = torch.where(nowhere, -torch.inf, torch.where(everywhere, torch.inf, apart))
    entropy = set_log - torch.where(nowhere, 0.0, set_shift / set_sum.masked_fill(nowhere, 1.0))
    # Of a row with a NaN nothing is known, the set's part included.
    unknown = 0.0 * (set_log + rest_log)
    log_mass = torch.nn.functional.logsigmoid
    return torch.stack(
        [
            rest_max,
            rest_log,
            set_max,
            set_log,
            log_mass(apart) + unknown,
            log_mass(-apart) + unknown,
            entropy + unknown,
        ]
    )


def summarise(partial: Tensor, *, target_must_occur: bool = False) -> Tensor:
    """Partial statistics of whole rows, [PARTIAL, rows] -> summary [SUMMARY, rows].

    target_must_occur: each row has one target class. Where none was met the class is out of range, and the
    statistics of the target are NaN; so is, then, that row's loss.
    """
    top, s0, s1, s2, target_shift, target_exp, mass, shift_sum, square_sum, count, logit_sum = partial
    if target_must_occur:
        target_shift, target_exp, mass = partial[4:7].masked_fill(mass == 0, torch.nan)
    log_sum = s0.log()
    return torch.stack(
        [
            top,
            log_sum,
            log_sum - s1 / s0,
            s2 / s0.square(),
            torch.addcmul(target_shift, origin(top), mass, value=SUM_SCALE) / SUM_SCALE,
            target_exp / s0,
            target_shift / SUM_SCALE - mass * log_sum,
            shift_sum / count / SUM_SCALE - log_sum,
            logit_sum / SUM_SCALE,
            square_sum,
            mass,
        ]
    )


class RowSums(NamedTuple):
    """What the derivatives of a row's statistics along a direction zdot of its logits are made of, [R] each.

    The order is that of the `sums` tensors, [7, R]. With a set, [14, R]: of the rest, then of the set, where
    p is the probability within the side.
    """

    prob: Tensor  #: sum p zdot
    prob_log_prob: Tensor  #: sum p log p zdot
    prob_square: Tensor  #: sum p^2 zdot
    target: Tensor  #: sum b zdot
    target_prob: Tensor  #: sum b p zdot
    constant: Tensor  #: sum zdot
    logit: Tensor  #: sum z zdot


def empty_sums(rows: int, with_set: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sums of nothing seen yet, [7 or 14, rows]."""
    count = len(RowSums._fields) * (2 if with_set else 1)
    return torch.zeros(count, rows, dtype=dtype, device=device)


def summarise_tangent(sums: Tensor, summary: Tensor, vocab_size: int) -> Tensor:
    """The derivative of a summary [SUMMARY, R], with SIDE_SUMMARY more rows or without, by whole rows' sums.

    A maximum counts as fixed: that of lse stands in the place of the log of the sum.
    """
    s, with_set = named(summary), has_set(summary)
    if with_set:
        rest, inside = (RowSums(*side) for side in sums.view(2, len(RowSums._fields), -1))
        whole = _joined_sums(rest, inside, s["rest_log_mass"], s["support_log_mass"])
    else:
        whole = RowSums(*sums)
    lse, zero = whole.prob, torch.zeros_like(whole.prob)
    rows = {
        "log_sum": lse,
        "entropy": -(whole.prob_log_prob + s["entropy"] * lse),
        "collision": 2.0 * (whole.prob_square - s["collision"] * lse),
        "target_logit": whole.target,
        "target_prob": whole.target_prob - s["target_prob"] * lse,
        "target_log_prob": whole.target - s["target_mass"] * lse,
        "mean_log_prob": whole.constant / vocab_size - lse,
        "logit_sum": whole.constant,
        "logit_square_sum": 2.0 * whole.logit,
    }
    if with_set:
        # An empty side has no entry that could move; what the other side's lse does is not to be seen then.
        both = (s["rest_log_mass"] != -torch.inf) & (s["support_log_mass"] != -torch.inf)
        apart = torch.where(both, inside.prob - rest.prob, 0.0)
        rows |= {
            "rest_log_sum": rest.prob,
            "set_log_sum": inside.prob,
            "support_log_mass": s["rest_log_mass"].exp() * apart,
            "rest_log_mass": -s["support_log_mass"].exp() * apart,
            "support_entropy": -(inside.prob_log_prob + s["support_entropy"] * inside.prob),
        }
    return torch.stack([rows.get(name, zero) for name in s])


def _joined_sums(rest: RowSums, inside: RowSums, rest_log_mass: Tensor, set_log_mass: Tensor) -> RowSums:
    """The sums of a whole row, of those of its sides, whose probabilities are within the side."""
    parts = []
    for sums, log_mass in ((rest, rest_log_mass), (inside, set_log_mass)):
        mass, log_mass = log_mass.exp(), log_mass.masked_fill(log_mass == -torch.inf, 0.0)
        parts.append(
            sums._replace(
                prob=mass * sums.prob,
                prob_log_prob=mass * (sums.prob_log_prob + log_mass * sums.prob),
                prob_square=mass * mass * sums.prob_square,
                target_prob=mass * sums.target_prob,
            )
        )
    return RowSums(*(a + b for a, b in zip(*parts)))


def norm_tangent_rows(tangent: Tensor) -> Tensor:
    """The derivative of what `norm_rows` gives, but for the maxima: [1, rows], or [2, rows] of the sides."""
    if not has_set(tangent):
        return tangent[1:2]
    return tangent[len(SUMMARY) :][1:4:2]


def norm_rows(summary: Tensor) -> Tensor:
    """What the gradients of a row's logits need of its summary: [2, rows], or with a set [5, rows].

    Maximum and log of the sum; with a set the maximum, and both of the rest and of the set.
    """
    if not has_set(summary):
        return summary[:2]
    return torch.cat([summary[:1], summary[len(SUMMARY) :][:4]])


def row_stats(summary: Tensor, argmax: Tensor) -> RowStats:
    """The public statistics of a summary [SUMMARY, rows], and of a set and a teacher, where it has them."""
    s = named(summary)
    return RowStats(
        lse=s["max"] + s["log_sum"],
        argmax=argmax,
        **{name: s[name].clone() for name in (*FLOATING, *OF_TEACHER) if name in s},
    )


def fields(with_set: bool, with_teacher: bool) -> tuple[str, ...]:
    """The fields of `RowStats` that each row has, in its order."""
    absent = (() if with_set else OF_SUPPORT) + (() if with_teacher else OF_TEACHER) + OF_CALL
    return tuple(name for name in RowStats._fields if name not in absent)


def summary_rows(with_set: bool, with_teacher: bool = False) -> int:
    """How many rows a summary has."""
    return len(SUMMARY) + len(SIDE_SUMMARY) * with_set + len(TEACHER_SUMMARY) * with_teacher


def has_set(summary: Tensor) -> bool:
    """Whether a summary has the rows of a set."""
    return "set_max" in _LAYOUTS[len(summary)]


def teacher_norm(summary: Tensor) -> Tensor:
    """What normalises a teacher's logits, [2, rows], of a summary that has the rows of one."""
    return summary[-len(TEACHER_SUMMARY) :][:2]


def named(summary: Tensor) -> dict[str, Tensor]:
    """The rows of a summary, [rows] each, by their names."""
    return dict(zip(_LAYOUTS[len(summary)], summary))
