"""The losses of the scenarios as people write them, over all the logits; in float64 they are the truth."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .cases import Loss
from .inputs import IGNORE_INDEX, Step

ENTROPY_BONUS = 0.01  # of the reinforcement learning scenario
LOGITS_AT_A_TIME = 2**25
KEPT_HEAD_ROWS = 1024


def row_losses(logits: Tensor, step: Step, loss: Loss) -> Tensor:
    """The loss of each row [N] from all its logits [N, V]; 0 where it is ignored."""
    log_p = torch.log_softmax(logits, -1)
    counts = None
    if step.probs is not None:
        cross_entropy = -(step.probs.to(log_p.dtype) * log_p.gather(1, step.target)).sum(-1)
    else:
        cross_entropy = torch.nn.functional.nll_loss(
            log_p, step.target, ignore_index=IGNORE_INDEX, reduction="none"
        )
        counts = step.target != IGNORE_INDEX
    bonus = loss.balance if step.advantage is None else ENTROPY_BONUS * (loss.balance > 0)
    negative_entropy = (log_p.exp() * log_p).sum(-1) if bonus else 0.0
    if step.advantage is not None:
        return step.advantage.to(log_p.dtype) * cross_entropy + bonus * negative_entropy
    reality = cross_entropy if loss.reality == "cross_entropy" else _squared_error(log_p, step)
    rows = (1 - bonus) * reality + bonus * negative_entropy
    return rows if counts is None else torch.where(counts, rows, 0.0)


def _squared_error(log_p: Tensor, step: Step) -> Tensor:
    p = log_p.exp()
    if step.probs is None:
        return 0.5 * (p.square().sum(-1) - 2 * p.gather(1, step.target.clamp(min=0)[:, None])[:, 0] + 1)
    b = step.probs.to(p.dtype)
    return 0.5 * (p.square().sum(-1) - 2 * (b * p.gather(1, step.target)).sum(-1) + b.square().sum(-1))


def eager_loss(step: Step, loss: Loss) -> Tensor:
    """The mean over the rows that count, with the N x V logits in memory."""
    return row_losses(step.hidden @ step.weight.T, step, loss).sum() / step.normalizer


def write_truth(step: Step, loss: Loss, path: Path) -> None:
    """Loss and gradients in float64, by blocks of rows; of dW a fixed sample of the head's rows is kept."""
    hidden, weight = step.hidden.detach().double(), step.weight.detach().double()
    weight.requires_grad_(step.weight.requires_grad)
    normalizer, total, hidden_grad = step.normalizer, 0.0, torch.zeros_like(hidden)
    block = max(1, LOGITS_AT_A_TIME // weight.shape[0])
    for start in range(0, len(hidden), block):
        part = step.rows(start, start + block)
        h = hidden[start : start + block].requires_grad_()
        value = row_losses(h @ weight.T, part, loss).sum() / normalizer
        value.backward()
        total += value.item()
        hidden_grad[start : start + block] = h.grad
    truth = {"loss": total, "hidden": hidden_grad.cpu()}
    if weight.requires_grad:
        kept = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:KEPT_HEAD_ROWS]
        # Rows of targets carry the largest gradients.
        named = step.target.flatten().cpu()
        kept = torch.cat([kept, named[named >= 0][:KEPT_HEAD_ROWS]]).unique()
        truth |= {"kept": kept, "weight": weight.grad[kept.to(weight.device)].cpu()}
    torch.save(truth, path)


def errors(loss: Tensor, step: Step, truth: dict) -> dict[str, float | None]:
    """Relative errors of the loss, and of the gradients in the Euclidean norm; None for a frozen head."""
    found = {
        "loss_error": abs(loss.item() - truth["loss"]) / max(abs(truth["loss"]), 1e-30),
        "hidden_grad_error": _relative(step.hidden.grad.cpu(), truth["hidden"]),
        "weight_grad_error": None,
    }
    if "weight" in truth:
        kept = truth["kept"].to(step.weight.device)
        found["weight_grad_error"] = _relative(step.weight.grad[kept].cpu(), truth["weight"])
    return found


def _relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()
