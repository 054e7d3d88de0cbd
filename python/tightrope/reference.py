"""The mathematics of Tightrope, dense and obvious: the oracle that every kernel is tested against.

Everything here holds the full ``N x V`` logits and leaves the gradients to autograd, so it is slow and
large on purpose. It computes in the dtype it is given; pass float64 tensors for an oracle. It shares no
code with the rest of the package: an error there cannot hide itself here. A top-k target is any pair
``(indices, probs)``.
"""

from __future__ import annotations

import math
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


def logits(input, weight, bias=None, **options) -> Tensor:
    """Logits of hidden states (..., D) and a head (V, D), (..., V); `transform` says what the options do."""
    u = input @ weight.transpose(-1, -2)
    return transform(u if bias is None else u + bias, **options)


def transform(raw, *, logit_scale=1.0, softcap=None, temperature=1.0) -> Tensor:
    """Scale, softcap, and temperature (a number, or of each token (...)) of raw logits (..., V)."""
    u = logit_scale * raw
    z = u if softcap is None else softcap * torch.tanh(u / softcap)
    return z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)


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


def members(z, support, ignore_index=-100) -> Tensor:
    """Which classes are in the set of each token, (..., V) bool.

    support: a number x, for the classes with p >= x max p, or indices (..., K).
    """
    if not isinstance(support, Tensor):
        return z >= z.detach().amax(-1, keepdim=True) + math.log(support)
    place = torch.where(support == ignore_index, z.shape[-1], support.long())
    inside = torch.zeros(*z.shape[:-1], z.shape[-1] + 1, dtype=torch.bool)
    return inside.scatter(-1, place, True)[..., :-1]


def set_stats(z, inside) -> tuple[Tensor, Tensor, Tensor]:
    """(support_log_mass, rest_log_mass, support_entropy) of the set ``inside`` (..., V), (...) each."""

    def log_sum(where):
        """(largest, log of the sum relative to it, whether there is nothing to sum)."""
        # What is masked has no gradient, and a sum of nothing none either. The largest is kept apart, since a
        # large one would swallow the log of the sum.
        kept = torch.where(where, z, -torch.inf)
        top = kept.detach().amax(-1)
        empty = top == -torch.inf
        top = torch.where(empty, 0.0, top)
        shifted = torch.where(empty.unsqueeze(-1), 0.0, kept - top.unsqueeze(-1))
        return top, shifted.logsumexp(-1), empty

    (set_top, of_set, empty), (rest_top, of_rest, full) = log_sum(inside), log_sum(~inside)
    # Which of the two it is that 1 is near to.
    apart = (set_top - rest_top) + (of_set - of_rest)
    small = -apart.abs() - torch.log1p((-apart.abs()).exp())
    large = -torch.log1p((-apart.abs()).exp())
    set_mass = torch.where(apart > 0, large, small)
    rest_mass = torch.where(apart > 0, small, large)
    set_mass = torch.where(empty, -torch.inf, torch.where(full, 0.0, set_mass))
    rest_mass = torch.where(full, -torch.inf, torch.where(empty, 0.0, rest_mass))
    log_r = torch.where(inside, (z - set_top.unsqueeze(-1)) - of_set.unsqueeze(-1), -torch.inf)
    r = log_r.exp()
    entropy = -torch.where(r == 0, 0.0, r * torch.where(r == 0, 0.0, log_r)).sum(-1)
    return set_mass, rest_mass, entropy


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
    inside=None,
) -> Tensor:
    """``(1 - balance) reality + balance creativity + regularisers``: (..., V), (..., V) -> (...).

    inside (..., V): the set of classes that ``creativity="support_entropy"`` needs.
    """
    stats = row_stats(z)
    if label_smoothing:
        b = (1 - label_smoothing) * b + label_smoothing / z.shape[-1]
    if reality == "cross_entropy":
        match = -row_stats(z, b).target_log_prob
    else:
        match = 0.5 * (torch.softmax(z, -1) - b).square().sum(-1)
    if creativity == "support_entropy":
        spread = -set_stats(z, inside)[2]
    else:
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
    temperature=1.0,
    support=0.02,
    reduction="mean",
    normalizer=None,
    shift=0,
    **terms,
) -> Tensor:
    """The loss of logits (..., V); ``terms`` are those of :func:`token_loss`, ``support`` of `members`."""
    z = transform(logits, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    if isinstance(support, Tensor):
        support = support.roll(-shift, -2) if shift else support
    b, valid = dense_target(target, z.shape[-1], dtype=z.dtype, ignore_index=ignore_index, shift=shift)
    loss = token_loss(z, b, inside=members(z, support, ignore_index), **terms)
    return reduce(loss, valid, row_weight=row_weight, reduction=reduction, normalizer=normalizer)


def linear_reality_creativity_loss(input, weight, target, bias=None, **options) -> Tensor:
    """The loss of hidden states (..., D) under a vocabulary head (V, D) and bias (V)."""
    raw = input @ weight.transpose(-1, -2)
    return reality_creativity_loss(raw if bias is None else raw + bias, target, **options)
