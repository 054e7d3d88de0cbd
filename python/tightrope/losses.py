"""The built-in loss family: statistics of a row in, loss of that row out, in plain PyTorch.

The derivative stands beside the value because the loss of a chunk of rows is differentiated inside a
dispatcher operator, where autograd does not record; a test holds the one against autograd of the other.
"""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from .arguments import Arguments, SetArguments, group
from .coefficients import RowUpstream
from .statistics import RowStats, StatGrads
from .targets import square_of_smoothed

REALITY = ("cross_entropy", "squared_error", "reverse_kl", "jensen_shannon")
# What a tile of a teacher's is, for those losses that take no other target (`TeacherArguments`).
TEACHER_FORMS = {"reverse_kl": "log", "jensen_shannon": "mixture"}
CREATIVITY = ("entropy", "collision", "support_entropy")


class BalanceWarning(UserWarning):
    """A balance at which the best model of the loss is noise."""


def cliff(creativity: str, vocab_size: int, sets: SetArguments) -> float:
    """The balance from which on the best model of cross-entropy and creativity gives noise a floor.

    In docs/mathematics.md. For an entropy over n classes ``1 / (1 + log n)``; with min-p x the place of n is
    taken by 1 / x.
    """
    if creativity == "collision":
        return 1 / 3
    if creativity == "entropy":
        return 1 / (1 + math.log(vocab_size))
    count = 1 / sets.min_p if sets.min_p else sets.classes.shape[-1]
    return 1 / (1 + math.log(count))


_warned: set[str] = set()
_REMEDIES = {
    "entropy": 'creativity="support_entropy", or "collision" with a balance below 0.33',
    "collision": "a balance below 0.33",
    "support_entropy": "a smaller balance, or a set of fewer classes",
}


def warn_beyond_cliff(creativity: str, balance: float, vocab_size: int, sets: SetArguments) -> None:
    """Warn, once for each creativity, where the balance is beyond the cliff."""
    if creativity in _warned or balance <= (limit := cliff(creativity, vocab_size, sets)):
        return
    _warned.add(creativity)
    warnings.warn(
        f"balance: got {balance:.4g} with creativity={creativity!r}, beyond {limit:.4g}, from which on the "
        "best model is noise even where the answer is certain (docs/mathematics.md); take "
        + _REMEDIES[creativity],
        BalanceWarning,
        stacklevel=5,
    )


@group
class RealityCreativity(Arguments):
    """``(1 - balance) reality + balance creativity + regularisers`` of each row.

    After Sinha, Song and Zhou, *A Mathematical Abstraction for Balancing the Trade-off Between Creativity
    and Reality in Large Language Models* (arXiv 2306.02295). Label smoothing replaces the target ``b`` by
    ``(1 - label_smoothing) b + label_smoothing / V`` in the reality term.
    """

    vocab_size: int
    reality: str = "cross_entropy"
    creativity: str = "entropy"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_l2: float = 0.0

    def terms(self, stats: RowStats, target_square: Tensor | None) -> tuple[Tensor, Tensor]:
        """Reality and creativity, [rows] each. target_square [rows]: |b|^2 of the smoothed target."""
        keep, smoothing = 1.0 - self.label_smoothing, self.label_smoothing
        if self.reality == "cross_entropy":
            reality = -keep * stats.target_log_prob
            if smoothing:
                reality = reality - smoothing * stats.mean_log_prob
        elif self.reality == "reverse_kl":
            # What p is taken against is log b, smoothed already.
            reality = -stats.entropy - stats.target_prob
        elif self.reality == "jensen_shannon":
            # KL(p || m) and -KL(b || m). What the parts gain as m moves cancels, so of the first, with m
            # fixed, comes the whole gradient.
            reality = 0.5 * (stats.target_prob - stats.target_log_prob.detach())
        else:
            if target_square is None:  # a teacher's is among the statistics
                target_square = square_of_smoothed(stats.target_collision, 1.0, self.vocab_size, smoothing)
            overlap = keep * stats.target_prob + smoothing / self.vocab_size
            reality = 0.5 * (stats.collision - 2.0 * overlap + target_square)
        if self.creativity == "collision":
            return reality, stats.collision.log()
        return reality, -getattr(stats, self.creativity)

    def __call__(self, stats: RowStats, balance: Tensor, target_square: Tensor | None) -> Tensor:
        """The loss of each row, [rows]."""
        reality, creativity = self.terms(stats, target_square)
        loss = (1.0 - balance) * reality + balance * creativity
        if self.z_loss:
            # In this order: the square of a large lse overflows.
            loss = loss + self.z_loss * stats.lse * stats.lse
        if self.logit_l2:
            loss = loss + 0.5 * self.logit_l2 * stats.logit_square_sum
        return loss

    def gradients(
        self, stats: RowStats, balance: Tensor, target_square: Tensor | None, upstream: Tensor
    ) -> tuple[StatGrads, Tensor]:
        """Gradients of ``sum(upstream * loss)``: to the statistics, and to the balance, [rows]."""
        keep, smoothing = 1.0 - self.label_smoothing, self.label_smoothing
        to_reality, to_creativity = upstream * (1.0 - balance), upstream * balance
        grads: dict[str, Tensor] = {}
        if self.reality == "cross_entropy":
            grads["target_log_prob"] = -keep * to_reality
            if smoothing:
                grads["mean_log_prob"] = -smoothing * to_reality
        elif self.reality == "reverse_kl":
            grads["entropy"] = grads["target_prob"] = -to_reality
        elif self.reality == "jensen_shannon":
            grads["target_prob"] = 0.5 * to_reality
        else:
            grads["target_prob"] = -keep * to_reality
            grads["collision"] = 0.5 * to_reality
        if self.creativity == "collision":
            grads["collision"] = grads.get("collision", 0.0) + to_creativity / stats.collision
        else:
            grads[self.creativity] = grads.get(self.creativity, 0.0) - to_creativity
        if self.z_loss:
            grads["lse"] = 2.0 * self.z_loss * upstream * stats.lse
        if self.logit_l2:
            grads["logit_square_sum"] = 0.5 * self.logit_l2 * upstream
        reality, creativity = self.terms(stats, target_square)
        return StatGrads(**grads), upstream * (creativity - reality)

    def upstream(self, balance: Tensor, upstream: Tensor) -> Tensor:
        """`gradients` without the statistics: [UPSTREAM, rows], for a fused kernel.

        It has no set, and no teacher, so none of the losses that want one.
        """
        to_reality, to_creativity = upstream * (1.0 - balance), upstream * balance
        keep = 1.0 - self.label_smoothing
        cross_entropy, collision = self.reality == "cross_entropy", self.creativity == "collision"
        return RowUpstream.of(
            upstream,
            lse_slope=2.0 * self.z_loss * upstream,
            collision=0.0 if cross_entropy else 0.5 * to_reality,
            collision_rate=to_creativity if collision else 0.0,
            entropy=0.0 if collision else -to_creativity,
            target_prob=0.0 if cross_entropy else -keep * to_reality,
            target_log_prob=-keep * to_reality if cross_entropy else 0.0,
            mean_log_prob=-self.label_smoothing * to_reality if cross_entropy else 0.0,
            logit_square_sum=0.5 * self.logit_l2 * upstream,
        )
