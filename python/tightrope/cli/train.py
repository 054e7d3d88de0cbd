"""The training loop of one mode, and its evaluation: where Tightrope takes the place of the loss.

`tightrope.linear_reality_creativity_loss` is given hidden states and the head, and returns the loss
with the statistics of every token. So what the log shows (reality, entropy) costs no further pass over
the vocabulary, and the logits of a step never exist.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import tightrope

from .model import Tail

# The modes of a comparison are there to be compared, whatever their balance.
warnings.filterwarnings("ignore", category=tightrope.BalanceWarning)

MAX_GRADIENT_NORM = 1.0


class Step(NamedTuple):
    """One optimizer step: what a line of steps.csv holds."""

    step: int
    loss: float
    reality: float
    entropy: float
    learning_rate: float
    gradient_norm: float
    step_seconds: float
    tokens_per_second: float


class Quality(NamedTuple):
    """Means over held-out tokens, in nats."""

    cross_entropy: float
    entropy: float


class Batches(NamedTuple):
    """Token ids [batch, length] of each batch, beside what the frozen blocks make of them."""

    tokens: list[Tensor]
    frozen: list[Tensor]


def train(
    tail: Tail,
    batches: Batches,
    *,
    balance: float,
    reality: str,
    creativity: str,
    support: tightrope.MinP | None,
    steps: int,
    learning_rate: float,
) -> Iterator[Step]:
    """Trains ``tail`` on the batches in turn, over and over, and yields after each step."""
    optimizer = torch.optim.AdamW(tail.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    for step in range(steps):
        begin = time.perf_counter()
        index = step % len(batches.tokens)
        tokens = batches.tokens[index]
        hidden = tail(batches.frozen[index])
        loss, stats = tightrope.linear_reality_creativity_loss(
            hidden,
            tail.head.weight,
            tokens,
            balance=balance,
            reality=reality,
            creativity=creativity,
            support=support,
            shift=1,
            return_stats=True,
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(tail.parameters(), MAX_GRADIENT_NORM)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step_seconds = time.perf_counter() - begin
        scored = stats.argmax >= 0  # the last position of a window has no target
        yield Step(
            step=step + 1,
            loss=loss.item(),
            reality=_reality(stats, reality)[scored].mean().item(),
            entropy=stats.entropy[scored].mean().item(),
            learning_rate=rate,
            gradient_norm=norm.item(),
            step_seconds=step_seconds,
            tokens_per_second=tokens.numel() / step_seconds,
        )


@torch.no_grad()
def evaluate(tail: Tail, batches: Batches) -> Quality:
    """Held-out cross-entropy and entropy: one streaming pass over the vocabulary a batch."""
    cross_entropy = entropy = 0.0
    count = 0
    for tokens, frozen in zip(*batches):
        stats = tightrope.linear_vocab_stats(tail(frozen), tail.head.weight, tokens, shift=1)
        cross_entropy -= stats.target_log_prob.sum().item()
        entropy += stats.entropy.sum().item()
        count += int((stats.argmax >= 0).sum())
    return Quality(cross_entropy / count, entropy / count)


def rate_at(step: int, steps: int) -> float:
    """A tenth of the steps of linear warmup, then a linear decay to a tenth of the peak."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - 0.9 * (step - warmup) / max(1, steps - warmup)


def _reality(stats: tightrope.RowStats, reality: str) -> Tensor:
    """The reality term of each token with a target class."""
    if reality == "cross_entropy":
        return -stats.target_log_prob
    return 0.5 * (stats.collision - 2 * stats.target_prob + 1)
