"""The row primitives as dispatcher operators, and the plain PyTorch that serves where no kernel does.

Schemas live here, not in C++, so that the operators exist without the extension; the extension adds a
faster implementation for its device. A profiler shows them as ``tightrope::row_stats`` and ``row_grad``.

Shapes: logits [R, T] (a tile: entries offset .. offset + T of the vocabulary, adjacent along either
dimension; the CUDA kernels take logits whose entries are adjacent); partial [11, R] and argmax [R] are merged
into; index [R] int64 and topk_index [R, K] int64 count from the start of the vocabulary; dense [R, T],
topk_prob [R, K], bias [T]; active [R] bool: other rows keep their statistics and get zero gradients; norm
[2, R] (max, log_sum) and coef [7, R] of whole rows; out [R, T], laid out as the logits are, which it may be.
row_loss_grad takes whole rows: with upstream [11, R] (`RowUpstream`) it writes partial, argmax and out in one
go; where the backend fuses, an out of a narrower dtype may have the front of each row's memory.
Arithmetic is float32, float64 for float64 logits; all but logits and out have that dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..coefficients import RowCoefficients, RowUpstream, row_coefficients
from ..statistics import LOG_ZERO, SUM_SCALE, empty_partial, merge, origin, scaled_shift, summarise

_library = torch.library.Library("tightrope", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> None:
    """Register an operator ``tightrope::<schema>`` for every device, and its fake for torch.compile."""
    _library.define(schema)
    name = schema[: schema.index("(")]
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tightrope::{name}", fake, lib=_library)


def _transform(raw: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    u = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if bias is not None:
        u = u + bias
    if logit_scale != 1.0:
        u = u * logit_scale
    return u if softcap is None else softcap * torch.tanh(u / softcap)


def _sparse_target(
    z: Tensor,
    offset: int,
    index: Tensor | None,
    topk_index: Tensor | None,
    topk_prob: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Columns [R, K] of the sparse targets that fall in this tile, and their mass (0 where they do not)."""
    indices = index.unsqueeze(-1) if topk_index is None else topk_index
    inside = (indices >= offset) & (indices < offset + z.shape[-1])
    mass = inside.to(z.dtype) if topk_prob is None else topk_prob * inside
    return (indices - offset).masked_fill(~inside, 0), mass


def row_stats(
    logits,
    partial,
    argmax,
    offset,
    index,
    dense,
    topk_index,
    topk_prob,
    bias,
    active,
    logit_scale,
    softcap,
) -> None:
    """Merge the statistics of a tile of logits into partial and argmax; see the top of this file."""
    if logits.shape[-1] == 0:
        return
    z = _transform(logits, bias, logit_scale, softcap)
    top, best = z.max(-1)
    start = origin(top).unsqueeze(-1)
    d = z - start
    e = d.exp()
    shift_exp = d.clamp_(min=LOG_ZERO).mul_(e).sum(-1)
    del d  # a tile less at a time
    scaled = scaled_shift(z, start)
    sum_exp, square_exp = e.sum(-1), e.square().sum(-1)
    zero = torch.zeros_like(top)
    target_shift, target_exp, mass = zero, zero, zero
    if dense is not None:
        target_shift = (dense * scaled.masked_fill(dense == 0, 0.0)).sum(-1)
        target_exp, mass = (dense * e).sum(-1), dense.sum(-1)
    elif index is not None or topk_index is not None:
        columns, b = _sparse_target(z, offset, index, topk_index, topk_prob)
        target_shift = (b * scaled.gather(-1, columns).masked_fill(b == 0, 0.0)).sum(-1)
        target_exp, mass = (b * e.gather(-1, columns)).sum(-1), b.sum(-1)
    tile = torch.stack(
        [
            top,
            sum_exp,
            shift_exp,
            square_exp,
            target_shift,
            target_exp,
            mass,
            scaled.sum(-1),
            z.square().sum(-1),
            torch.full_like(top, z.shape[-1]),
            (z * SUM_SCALE).sum(-1),
        ]
    )
    better = (argmax < 0) | (top > partial[0]) | (top.isnan() & ~partial[0].isnan())
    merged = merge(partial, tile)
    if active is not None:
        better = better & active
        merged = torch.where(active, merged, partial)
    argmax.copy_(torch.where(better, best + offset, argmax))
    partial.copy_(merged)


def row_grad(
    logits,
    out,
    norm,
    coef,
    offset,
    index,
    dense,
    topk_index,
    topk_prob,
    bias,
    active,
    logit_scale,
    softcap,
) -> None:
    """Write dloss/dlogits of a tile to out; see the top of this file."""
    z = _transform(logits, bias, logit_scale, softcap)
    c = RowCoefficients(*coef.unsqueeze(-1))
    log_p = (z - norm[0].unsqueeze(-1)) - norm[1].unsqueeze(-1)
    p = log_p.exp()
    grad = p * (c.prob + c.prob_log_prob * log_p.masked_fill(p == 0, 0.0) + c.prob_square * p)
    if dense is not None:
        grad += dense * (c.target + c.target_prob * p)
    elif index is not None or topk_index is not None:
        columns, b = _sparse_target(z, offset, index, topk_index, topk_prob)
        grad.scatter_add_(-1, columns, b * (c.target + c.target_prob * p.gather(-1, columns)))
    # Skipped when absent, not multiplied by zero: a masked entry has z = -inf.
    grad += torch.where(c.logit == 0, 0.0, c.logit * z) + c.constant
    if softcap is not None:
        grad *= 1.0 - (z / softcap).square()
    if logit_scale != 1.0:
        grad *= logit_scale
    if active is not None:
        grad.masked_fill_(~active.unsqueeze(-1), 0.0)
    out.copy_(grad)


def row_loss_grad(
    logits,
    out,
    partial,
    argmax,
    upstream,
    index,
    dense,
    topk_index,
    topk_prob,
    bias,
    active,
    logit_scale,
    softcap,
) -> None:
    """Write statistics and dloss/dlogits of whole rows in one operator; see the top of this file."""
    tail = (0, index, dense, topk_index, topk_prob, bias, active, logit_scale, softcap)
    fresh, best = empty_partial(logits.shape[0], partial.dtype, logits.device)
    row_stats(logits, fresh, best, *tail)
    summary = summarise(fresh, target_must_occur=index is not None)
    coef = row_coefficients(summary, RowUpstream(*upstream).at(summary), logits.shape[-1])
    row_grad(logits, out, summary[:2], coef, *tail)
    if active is not None:
        fresh, best = torch.where(active, fresh, partial), torch.where(active, best, argmax)
    partial.copy_(fresh)
    argmax.copy_(best)


_TARGET_ARGS = (
    "Tensor? index, Tensor? dense, Tensor? topk_index, Tensor? topk_prob, "
    "Tensor? bias, Tensor? active, float logit_scale, float? softcap) -> ()"
)
define(
    f"row_stats(Tensor logits, Tensor(a!) partial, Tensor(b!) argmax, int offset, {_TARGET_ARGS}",
    row_stats,
    lambda *args: None,
)
define(
    f"row_grad(Tensor logits, Tensor(a!) out, Tensor norm, Tensor coef, int offset, {_TARGET_ARGS}",
    row_grad,
    lambda *args: None,
)
define(
    "row_loss_grad(Tensor logits, Tensor(a!) out, Tensor(b!) partial, Tensor(c!) argmax, Tensor upstream, "
    f"{_TARGET_ARGS}",
    row_loss_grad,
    lambda *args: None,
)
