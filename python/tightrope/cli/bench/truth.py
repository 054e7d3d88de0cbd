"""The losses of the scenarios as people write them, over all the logits; in float64 they are the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .cases import Case, Loss
from .inputs import IGNORE_INDEX, Step, make_step

ENTROPY_BONUS = 0.01  # of the reinforcement learning scenario
LOGITS_AT_A_TIME = 2**25
KEPT_ROWS, KEPT_HEAD_ROWS = 256, 1024


def entropy_bonus(step: Step, loss: Loss) -> float:
    """What the entropy of a token is multiplied by."""
    return loss.balance if step.advantage is None else ENTROPY_BONUS * (loss.balance > 0)


def row_losses(log_p: Tensor, step: Step, loss: Loss) -> Tensor:
    """The loss of each row [N] from all its log-probabilities [N, V]; 0 where it is ignored."""
    counts = taught = None
    if step.teacher is not None:
        hidden, weight = (t.to(log_p.dtype) for t in step.teacher)
        log_b = torch.log_softmax(hidden @ weight.T, -1)
        if loss.reality == "jensen_shannon":
            return _jensen_shannon(log_p, log_b)
        taught = log_b.exp()
        cross_entropy = -(taught * log_p).sum(-1)
    elif step.probs is not None:
        cross_entropy = -(step.probs.to(log_p.dtype) * log_p.gather(1, step.target)).sum(-1)
    else:
        cross_entropy = torch.nn.functional.nll_loss(
            log_p, step.target, ignore_index=IGNORE_INDEX, reduction="none"
        )
        counts = step.target != IGNORE_INDEX
    bonus = entropy_bonus(step, loss)
    negative_entropy = (log_p.exp() * log_p).sum(-1) if bonus else 0.0
    if step.advantage is not None:
        return step.advantage.to(log_p.dtype) * cross_entropy + bonus * negative_entropy
    reality = cross_entropy if loss.reality == "cross_entropy" else _squared_error(log_p, step, taught)
    rows = (1 - bonus) * reality + bonus * negative_entropy
    return rows if counts is None else torch.where(counts, rows, 0.0)


def _jensen_shannon(log_p: Tensor, log_b: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_b) - math.log(2)
    return 0.5 * ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_b.exp() * (log_b - log_m)).sum(-1))


def _squared_error(log_p: Tensor, step: Step, taught: Tensor | None) -> Tensor:
    p = log_p.exp()
    if taught is not None:
        return 0.5 * (p - taught).square().sum(-1)
    if step.probs is None:
        return 0.5 * (p.square().sum(-1) - 2 * p.gather(1, step.target.clamp(min=0)[:, None])[:, 0] + 1)
    b = step.probs.to(p.dtype)
    return 0.5 * (p.square().sum(-1) - 2 * (b * p.gather(1, step.target)).sum(-1) + b.square().sum(-1))


def eager_loss(step: Step, loss: Loss) -> Tensor:
    """The mean over the rows that count, with the N x V logits in memory."""
    log_p = torch.log_softmax(step.hidden @ step.weight.T, -1)
    return row_losses(log_p, step, loss).sum() / step.normalizer


def truths(step: Step, losses: Sequence[Loss]) -> dict[str, dict]:
    """By name of the loss: its value and gradients in float64, by blocks of rows.

    Where the step has a direction a Hessian-vector product stands for the gradients. The products are the
    cost of it: of dh and dW only a sample of rows is made, the same for each loss.
    """
    hidden, weight = step.hidden.detach().double(), step.weight.detach().double()
    kept, kept_head = sample(step)
    found = {loss.name: {"loss": 0.0, "hidden": torch.zeros_like(hidden[kept])} for loss in losses}
    if step.weight.requires_grad:
        for truth in found.values():
            truth["weight"] = torch.zeros_like(weight[kept_head])
    block = max(1, LOGITS_AT_A_TIME // weight.shape[0])
    for start in range(0, len(hidden), block):
        h, part = hidden[start : start + block], step.rows(start, start + block)
        here = (kept >= start) & (kept < start + block)
        logits = (h @ weight.T).requires_grad_()
        log_p = torch.log_softmax(logits, -1)
        for loss in losses:
            value, truth = row_losses(log_p, part, loss).sum() / step.normalizer, found[loss.name]
            truth["loss"] += value.item()
            for grad, states, head in _factors(value, logits, h, weight, part.direction):
                truth["hidden"][here] += grad[kept[here] - start] @ head
                if "weight" in truth:
                    truth["weight"] += grad[:, kept_head].T @ states
    return found


def _factors(
    value: Tensor, logits: Tensor, hidden: Tensor, weight: Tensor, direction: tuple[Tensor, Tensor] | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(gradient of logits, hidden states, head) of the products ``grad @ head`` and ``grad.T @ hidden``.

    dh and dW are their sums, or where there is a direction a Hessian-vector product is.
    """
    (grad,) = torch.autograd.grad(value, logits, create_graph=direction is not None, retain_graph=True)
    if direction is None:
        return [(grad, hidden, weight)]
    hidden_moved, weight_moved = (d.double() for d in direction)
    along = hidden_moved @ weight.T + hidden @ weight_moved.T
    (grad_moved,) = torch.autograd.grad(grad, logits, along, retain_graph=True)
    return [(grad_moved, hidden, weight), (grad.detach(), hidden_moved, weight_moved)]


def write_truths(case: Case, losses: Sequence[Loss], path: Path) -> None:
    found = truths(make_step(case), losses)
    with path.open("wb") as file:  # of a full disk Python's own error tells; PyTorch's does not
        torch.save(found, file)


def sample(step: Step) -> tuple[Tensor, Tensor]:
    """The rows of dh and of dW that are compared: any, and of dW also targets, which have large gradients."""
    device = step.hidden.device

    def some(rows: int, kept: int) -> Tensor:
        return torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:kept].to(device)

    named = step.target[step.target >= 0][:KEPT_HEAD_ROWS]
    head = torch.cat([some(len(step.weight), KEPT_HEAD_ROWS), named]).unique()
    return some(len(step.hidden), KEPT_ROWS).sort().values, head


def errors(loss: Tensor, step: Step, truth: dict) -> dict[str, float | None]:
    """Relative errors of the loss, and of the gradients in the Euclidean norm; None for a frozen head."""
    kept, kept_head = sample(step)
    found = {
        "loss_error": abs(loss.item() - truth["loss"]) / max(abs(truth["loss"]), 1e-30),
        "hidden_grad_error": _relative(step.hidden.grad[kept], truth["hidden"]),
        "weight_grad_error": None,
    }
    if "weight" in truth:
        found["weight_grad_error"] = _relative(step.weight.grad[kept_head], truth["weight"])
    return found


def _relative(value: Tensor, truth: Tensor) -> float:
    truth = truth.to(value.device)
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()
