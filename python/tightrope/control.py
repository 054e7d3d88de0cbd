"""A balance that steers itself: the wanted entropy in, the balance out.

A fixed balance opens a sharp model more than an open one, and a model sharpens as it trains. What is wanted
is known better as an entropy than as a balance. So the weight of the entropy is a controller's state, moved
once an optimizer step by how far the entropy of that step's tokens was from the target. The state is one
Python number, the same on all ranks, since what moves it is a mean over the tokens of all of them.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import validation
from .arguments import SetArguments
from .losses import CREATIVITY, cliff
from .statistics import RowStats
from .support import DEFAULT, Classes, MinP

RULES = ("dual", "step")
# The upper bound, as a part of the cliff, where none is given. Nothing changes suddenly at a cliff: at this
# part of it the best model of "entropy" gives 1.5 % to noise where the answer is certain (V = 49152), at 0.9
# of it 8 %; and "collision" multiplies a small probability by 3 at most, there by 7.
SHORT_OF_CLIFF = 0.75
_STATE = ("coefficient", "entropy")


class TokenSums:
    """Sums over the tokens of several calls and ranks, kept on their device until they are asked for."""

    def __init__(self, width: int):
        # Never None: that would be another graph to torch.compile, which traces `add` with the loss.
        self._sums = torch.zeros(width, dtype=torch.float64)

    def add(self, *values: Tensor | float) -> None:
        """Adds to each sum; values are numbers or tensors of one element. Nothing waits for the device."""
        device = next((value.device for value in values if isinstance(value, Tensor)), self._sums.device)
        # Not torch.tensor, whose copy to a device is waited for.
        sums = torch.stack(
            [
                value.detach().reshape(()).to(device, torch.float64)
                if isinstance(value, Tensor)
                else torch.full((), value, dtype=torch.float64, device=device)
                for value in values
            ]
        )
        self._sums = self._sums.to(device) + sums

    def close(self, group: dist.ProcessGroup | None = None) -> list[float]:
        """The sums over all ranks of the group, if there are ranks; the next ones begin at zero.

        The one place that waits for the device. Collective: a rank without tokens joins with zeros.
        """
        sums = self._sums
        self.clear()
        if dist.is_available() and dist.is_initialized():
            served = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
            if sums.device.type not in served:  # NCCL takes no tensor of the CPU
                sums = sums.to(served[0])
            dist.all_reduce(sums, group=group)
        return sums.tolist()

    def clear(self) -> None:
        """Forget what was added."""
        self._sums = torch.zeros_like(self._sums)


class EntropyTarget:
    """Steers the balance to a wanted entropy: ``balance = target.update(stats)`` once an optimizer step.

    What moves is ``lam``, the coefficient of an entropy bonus (H is the entropy, or what else is steered):

    - ``rule="dual"``: ``lam += rate * (target - H)``. With the loss ``CE - lam (H - target)`` this is dual
      ascent on the least cross-entropy subject to ``H >= target``: at rest either H is the target, or lam is
      at a bound.
    - ``rule="step"``: the arithmetic of TRL's ``use_adaptive_entropy`` (Skywork-OR1, arXiv 2505.22312):
      ``lam += rate`` where ``H <= target``, else ``lam -= rate``; and it is applied only where the last H was
      at most the target: elsewhere, and before the first update, `balance` is 0 whatever lam is.

    Either is clipped to the bounds. **Arithmetic.** An entropy bonus is the reality-creativity loss with

        balance = lam / (1 + lam)      CE - lam H = (1 + lam) ((1 - balance) CE - balance H)

    so Tightrope's loss, and its gradient, is ``1 + lam = 1 / (1 - balance)`` times smaller than
    ``CE - lam H``: 1.25 times at a balance of 0.2. A learning rate that was found for ``CE - lam H`` is
    multiplied by ``1 + lam`` for plain SGD, and a threshold that gradients are clipped at divided by it. The
    steps of Adam and its kin do not depend on the size of a loss, but for epsilon and while lam changes.

    The target is only approached from below: a model that is more open than it without any creativity gets
    ``lam = 0``, and is not sharpened.

    Args:
        target: the wanted mean over tokens, in nats, above 0.
        balance: to start from, within the bounds.
        rule: "dual" or "step".
        rate: how far lam moves in an update: per nat of distance with "dual", in all with "step" (TRL's
            ``entropy_coef_delta``, whose default this is).
        bounds: (low, high), balances in [0, 1). Default: from 0 to 0.75 of the cliff of the creativity, from
            which on the best model of the loss is noise (docs/mathematics.md): ``1 / (1 + ln V)`` for
            "entropy", ``1 / (1 + ln(1 / x))`` for "support_entropy" with ``MinP(x)``, 1/3 for "collision".
        creativity: of the loss whose balance this is.
        support: of that loss, where its creativity is "support_entropy". Default ``MinP(0.02)``, as there.
        vocab_size: V, for the default bounds of "entropy" alone.
        statistic: what is steered: "entropy"; "support_entropy"; or "collision", the Renyi-2 entropy
            ``-log |p|^2``. Default: that of the creativity.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        target: float,
        *,
        balance: float = 0.0,
        rule: str = "dual",
        rate: float = 0.005,
        bounds: Sequence[float] | None = None,
        creativity: str = "entropy",
        support: MinP | Classes | None = None,
        vocab_size: int | None = None,
        statistic: str | None = None,
    ):
        self.target = validation.number("target", target, low=0.0, above=True)
        validation.choice("rule", rule, RULES)
        self.rule = rule
        self.rate = validation.number("rate", rate, low=0.0, above=True)
        validation.choice("creativity", creativity, CREATIVITY)
        sets = _sets(creativity, support)
        if vocab_size is not None:
            vocab_size = validation.integer("vocab_size", vocab_size, low=1)
        elif creativity == "entropy" and bounds is None:
            raise ValueError(
                'vocab_size: got None, expected V, from which the default bounds of creativity="entropy" '
                "follow; or bounds"
            )
        if bounds is None:
            bounds = (0.0, SHORT_OF_CLIFF * cliff(creativity, vocab_size or 0, sets))
        self.bounds = _checked_bounds(bounds)
        self.statistic = creativity if statistic is None else statistic
        validation.choice("statistic", self.statistic, CREATIVITY)
        low, high = self.bounds
        balance = validation.number("balance", balance)
        if not low <= balance <= high:
            raise ValueError(f"balance: got {balance:g}, expected one within the bounds, {low:g} to {high:g}")
        self._coefficient = _coefficient(balance)
        self._entropy: float | None = None
        self._window = TokenSums(2)

    @property
    def balance(self) -> float:
        """The balance for the next step."""
        if self.rule == "step" and (self._entropy is None or self._entropy > self.target):
            return 0.0
        return _clipped(self._coefficient / (1.0 + self._coefficient), *self.bounds)

    @property
    def coefficient(self) -> float:
        """``lam``: what the rule moves."""
        return self._coefficient

    @property
    def entropy(self) -> float | None:
        """The mean over tokens that the last update saw, in nats; None before the first."""
        return self._entropy

    def observe(self, stats: RowStats | Tensor | float, count: Tensor | float = 1) -> None:
        """Adds tokens to the mean that the next update takes: a micro-batch of gradient accumulation.

        Waits for no device.

        Args:
            stats: a loss call's statistics, whose ignored tokens (argmax -1) do not count; or the mean of
                ``count`` tokens in nats, a number or a tensor of one element, detached here.
            count: how many tokens that mean is over, likewise. 0: none, whatever the mean is.

        Raises:
            TypeError: stats or count is none of these.
            ValueError: the statistic that is steered is not among the stats; count is negative.
        """
        if isinstance(stats, RowStats):
            self._window.add(*_sum_of_tokens(stats, self.statistic))
            return
        mean, count = _scalar("stats", stats), _scalar("count", count)
        if isinstance(count, Tensor):
            # Of no tokens the mean is often 0 / 0.
            self._window.add(torch.where(count > 0, mean * count, 0.0), count)
        elif count < 0:
            raise ValueError(f"count: got {count:g}, expected a number of at least 0")
        elif count:
            self._window.add(mean * count, count)

    def update(
        self,
        stats: RowStats | Tensor | float | None = None,
        count: Tensor | float = 1,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> float:
        """Ends an optimizer step: the balance for the next one, from the mean over this one's tokens.

        The mean is over what was observed since the last update, and over ``stats`` (as in `observe`), each
        token counting once, on all ranks of ``group`` where torch.distributed is initialised: then a
        collective, that all ranks must call, and after which all have the same balance. It waits for the
        device once.

        No tokens on any rank: nothing moves. A mean that is not finite: nothing moves either, with a
        RuntimeWarning; such a step of training is lost, but the balance is not.
        """
        if stats is not None:
            self.observe(stats, count)
        total, tokens = self._window.close(group)
        if not tokens:
            return self.balance
        entropy = total / tokens
        if not math.isfinite(entropy):
            warnings.warn(
                f"EntropyTarget: got a mean {self.statistic} of {entropy} over {tokens:g} tokens, expected a "
                f"finite one; the balance stays at {self.balance:.4g}",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.balance
        self._entropy = entropy
        if self.rule == "dual":
            moved = self._coefficient + self.rate * (self.target - entropy)
        elif entropy <= self.target:
            moved = self._coefficient + self.rate
        else:
            moved = self._coefficient - self.rate
        self._coefficient = _clipped(moved, *map(_coefficient, self.bounds))
        return self.balance

    def state_dict(self) -> dict[str, float | None]:
        """What an update has changed: numbers that JSON keeps. Tokens not yet part of one are left out."""
        return {"coefficient": self._coefficient, "entropy": self._entropy}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """The state of another one, of whatever target and rule. Beyond the bounds here it is clipped.

        Raises:
            TypeError, ValueError: it is no such state; then nothing has changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: got {type(state).__name__}, expected a state_dict of EntropyTarget")
        if set(state) != set(_STATE):
            names = ", ".join(map(str, state)) or "nothing"
            raise ValueError(f"state: got {names}, expected {' and '.join(_STATE)}")
        coefficient = validation.number("state.coefficient", state["coefficient"], low=0.0)
        entropy = state["entropy"]
        if entropy is not None:
            entropy = validation.number("state.entropy", entropy)
        self._coefficient = _clipped(coefficient, *map(_coefficient, self.bounds))
        self._entropy = entropy
        self._window.clear()

    def __repr__(self) -> str:
        low, high = self.bounds
        return (
            f"EntropyTarget({self.target:g}, rule={self.rule!r}, rate={self.rate:g}, "
            f"bounds=({low:.4g}, {high:.4g}), statistic={self.statistic!r}, balance={self.balance:.4g})"
        )


def _clipped(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _coefficient(balance: float) -> float:
    """The entropy bonus that is this balance."""
    return balance / (1.0 - balance)


def _sets(creativity: str, support: MinP | Classes | None) -> SetArguments:
    """The set of classes of a loss, as far as its cliff depends on it."""
    if creativity != "support_entropy":
        if support is not None:
            raise ValueError(
                f"support: got {support!r} with creativity={creativity!r}, expected "
                'creativity="support_entropy"'
            )
        return SetArguments()
    support = DEFAULT if support is None else support
    if isinstance(support, Classes):
        indices = validation.tensor("support.indices", support.indices, validation.INTEGER)
        validation.support(support, indices.shape[:-1], indices.device, "support")
        return SetArguments(classes=indices)
    validation.support(support, torch.Size(), torch.device("cpu"), "support")
    return SetArguments(min_p=float(support.x))


def _checked_bounds(bounds: object) -> tuple[float, float]:
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        raise TypeError(f"bounds: got {bounds!r}, expected two balances (low, high)")
    low, high = (validation.number(f"bounds[{i}]", bound, low=0.0) for i, bound in enumerate(bounds))
    if not low <= high < 1.0:
        raise ValueError(f"bounds: got ({low:g}, {high:g}), expected 0 <= low <= high < 1")
    return low, high


def _sum_of_tokens(stats: RowStats, statistic: str) -> tuple[Tensor, Tensor]:
    """The sum of what is steered, minus the creativity of that name, and how many tokens it is over."""
    values = getattr(stats, statistic)
    if values is None:
        raise ValueError(
            f"stats: got no {statistic}, expected those of a loss with support=, or another statistic than "
            f"{statistic!r}"
        )
    counted = stats.argmax >= 0
    if statistic == "collision":
        values = -values.where(counted, 1.0).log()
    return values.sum(dtype=torch.float64), counted.sum()


def _scalar(name: str, value: object) -> Tensor | float:
    """A number of any value, NaN too, or a real tensor of one element, detached; else TypeError."""
    expected = "a number or a tensor of one element" + (", or RowStats" if name == "stats" else "")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"{name}: got a tensor of shape {list(value.shape)}, expected {expected}")
        return value.detach().reshape(()).to(torch.float64)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")
    return float(value)
