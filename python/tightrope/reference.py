"""The mathematics of Tightrope, dense and obvious: the oracle that every kernel is tested against.

Everything here holds the full ``N x V`` logits and leaves the gradients to autograd, so it is slow and
large on purpose. It computes in the dtype it is given; pass float64 tensors for an oracle. It shares no
code with the rest of the package: an error there cannot hide itself here. A top-k target is any pair
``(indices, probs)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceStats(NamedTuple):
    """The statistics of each row of logits; the fields of :class:`tightrope.RowStats`, shape (...) each."""

    lse: Tensor
    entropy: Tensor
    collision: Tensor
    target_logit: Tensor | None
    target_prob: Tensor | None
    argmax: Tensor
    target_log_prob: Tensor | None
    mean_log_prob: Tensor
    logit_sum: Tensor
    logit_square_sum: Tensor


def logits(input, weight, bias=None, *, logit_scale=1.0, softcap=None) -> Tensor:
    """``z = softcap tanh(u / softcap)``, ``u = logit_scale (h W^T + bias)``: (..., D), (V, D) -> (..., V)."""
    u = input @ weight.transpose(-1, -2)
    return transform(u if bias is None else u + bias, logit_scale=logit_scale, softcap=softcap)


def transform(raw, *, logit_scale=1.0, softcap=None) -> Tensor:
    """Scale, then softcap, of raw logits (..., V)."""
    u = logit_scale * raw
    return u if softcap is None else softcap * torch.tanh(u / softcap)


def dense_target(target, vocab_size, *, dtype, ignore_index=-100, shift=0) -> tuple[Tensor, Tensor]:
    """Any kind of target as ``(b, valid)``: distributions (..., V) and which tokens count, (...).

    Class indices become one-hot rows, top-k pairs are scattered (duplicates add up), ``shift`` moves the
    target of position ``t + shift`` to position ``t``; ignored tokens get a row of zeros.
    """
    if isinstance(target, tuple):
        indices, probs = (torch.as_tensor(x) for x in target)
        kept = indices != ignore_index
        b = torch.zeros(*indices.shape[:-1], vocab_size, dtype=dtype)
        b = b.scatter_add(-1, indices.long() * kept, probs.to(dtype) * kept)
        valid = kept.any(-1)
    elif target.is_floating_point():
        b = target.to(dtype)
        valid = torch.ones(target.shape[:-1], dtype=torch.bool)
    else:
        valid = target != ignore_index
        b = torch.nn.functional.one_hot(target.long() * valid, vocab_size).to(dtype)
        b = b * valid.unsqueeze(-1)
    if shift:
        b, valid = b.roll(-shift, -2), valid.roll(-shift, -1)
        valid[..., max(valid.shape[-1] - shift, 0) :] = False
        b = b * valid.unsqueeze(-1)
    return b, valid


def row_stats(z, b=None) -> ReferenceStats:
    """All statistics of logits ``z`` (..., V) against targets ``b`` (..., V). A zero times log 0 is 0."""
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    # The gradient of logsumexp is e^(z - lse), which loses log V where z is large: so it is taken near 0.
    top = z.detach().amax(-1, keepdim=True)
    top = top.masked_fill(~top.isfinite(), 0.0)
    p_log_p = torch.where(p == 0, 0.0, p * log_p.masked_fill(p == 0, 0.0))
    inner = None if b is None else lambda x: torch.where(b == 0, 0.0, b * x.masked_fill(b == 0, 0.0)).sum(-1)
    return ReferenceStats(
        lse=top.squeeze(-1) + torch.logsumexp(z - top, -1),
        entropy=-p_log_p.sum(-1),
        collision=p.square().sum(-1),
        target_logit=inner and inner(z),
        target_prob=inner and inner(p),
        argmax=z.argmax(-1),
        target_log_prob=inner and inner(log_p),
        mean_log_prob=log_p.mean(-1),
        logit_sum=z.sum(-1),
        logit_square_sum=z.square().sum(-1),
    )


def token_loss(
    z,
    b,
    *,
    balance=0.0,
    reality="cross_entropy",
    creativity="entropy",
    label_smoothing=0.0,
    z_loss=0.0,
    logit_l2=0.0,
) -> Tensor:
    """``(1 - balance) reality + balance creativity + regularisers``: (..., V), (..., V) -> (...)."""
    stats = row_stats(z)
    if label_smoothing:
        b = (1 - label_smoothing) * b + label_smoothing / z.shape[-1]
    if reality == "cross_entropy":
        match = -row_stats(z, b).target_log_prob
    else:
        match = 0.5 * (torch.softmax(z, -1) - b).square().sum(-1)
    spread = -stats.entropy if creativity == "entropy" else stats.collision.log()
    loss = (1 - balance) * match + balance * spread
    if z_loss:
        loss = loss + z_loss * stats.lse.square()
    if logit_l2:
        loss = loss + 0.5 * logit_l2 * stats.logit_square_sum
    return loss


def reduce(loss, valid, *, row_weight=None, reduction="mean", normalizer=None) -> Tensor:
    """Zero the ignored tokens, weigh the others, and reduce; an empty mean is 0."""
    weight = (
        torch.ones_like(loss)
        if row_weight is None
        else torch.as_tensor(row_weight).to(loss.dtype).expand(loss.shape)
    )
    weight = torch.where(valid, weight, 0.0)
    loss = weight * torch.where(valid, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = weight.sum() if normalizer is None else torch.as_tensor(normalizer)
    return loss.sum() / torch.where(total == 0, 1.0, total)


def reality_creativity_loss(
    logits,
    target,
    *,
    ignore_index=-100,
    row_weight=None,
    logit_scale=1.0,
    softcap=None,
    reduction="mean",
    normalizer=None,
    shift=0,
    **terms,
) -> Tensor:
    """The loss of logits (..., V); ``terms`` are those of :func:`token_loss`."""
    z = transform(logits, logit_scale=logit_scale, softcap=softcap)
    b, valid = dense_target(target, z.shape[-1], dtype=z.dtype, ignore_index=ignore_index, shift=shift)
    loss = token_loss(z, b, **terms)
    return reduce(loss, valid, row_weight=row_weight, reduction=reduction, normalizer=normalizer)


def linear_reality_creativity_loss(input, weight, target, bias=None, **options) -> Tensor:
    """The loss of hidden states (..., D) under a vocabulary head (V, D) and bias (V)."""
    raw = input @ weight.transpose(-1, -2)
    return reality_creativity_loss(raw if bias is None else raw + bias, target, **options)
