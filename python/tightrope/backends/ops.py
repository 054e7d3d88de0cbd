"""The row primitives as dispatcher operators, and the plain PyTorch that serves where no kernel does.

Schemas live here, not in C++, so that the operators exist without the extension; the extension adds a
faster implementation for its device. A profiler shows them as ``tightrope::row_stats`` and ``row_grad``.

Shapes: logits [R, T] (a tile: entries offset .. offset + T of the vocabulary, adjacent along either
dimension; the CUDA kernels take logits whose entries are adjacent); partial [11, R] and argmax [R] are merged
into; index [R] int64 and topk_index [R, K] int64 count from the start of the vocabulary; dense [R, T],
topk_prob [R, K], bias [T]; active [R] bool: other rows keep their statistics and get zero gradients; norm
[2, R] (max, log_sum) and coef [7, R] of whole rows; out [R, T], laid out as the logits are, which it may be.
row_sides merges into sides [6, R] what a tile adds to the two sides of its rows: the set, which is entries of
at least threshold [R], or those among classes [R, K] int64 (ascending, repeated ones count once), and the
rest. With a set row_grad takes norm [4, R] and coef [14, R]: those of the rest, then those of the set.
column_sums writes sums [r + 1, T] over the columns of gradients [R, T] times a scale: their products with
along [r, R], and their squares. row_grad_sums is row_grad, and this of what it writes, in one pass. Where a
device is not to be waited for, the scale is a tensor of one element.
The drawn_* take columns of a chunk's gradient that a device has drawn: index [V] int64, those first that were
drawn, and count, a tensor of one element: how many. A call is for the columns index[first : first + m].
drawn_columns writes those that count to part [m, R and a padding of zeros, to a multiple of 128]: each less
``along[:, j] @ basis``, times factor [V]. The gradient is flat, its tiles of the vocabulary one after another
and each row of them adjacent. drawn_by_head adds ``part^T weight[index]`` to a gradient [R, D], and
drawn_by_hidden ``part hidden`` to the rows index of one [V, D].
pairs writes bfloat16 b [K, N] to out [L / 2, N, 2], L the next multiple of 32: filled with zeros.
pair_product writes out [M, N] = a [M, K] times pairs [K / 2, N, 2], bfloat16 both, K even, in float32; a that
is float32 is rounded, and takes what pairs wrote; with add it is added to out, which is adjacent along N.
panels writes b [K, N] to out [P, K, w]: P panels of w columns each, what is missing of the last one as zeros.
product writes out [M, N] = a [M, K] times b, which is [K, N] or its panels; with add it is added to out,
which is adjacent along N. All are float32, but for b [K, N], which may be bfloat16.
product_stats is row_stats of logits [R, T] that it makes itself: of a head [T, K] and factor, which is panels
of the transpose of hidden states [R, K], or pairs where they are bfloat16. They go to out [T, R], if given.
row_loss_grad takes whole rows: with upstream [11, R] (`RowUpstream`) it writes partial, argmax and out in one
go; where the backend fuses, an out of a narrower dtype may have the front of each row's memory.
Arithmetic is float32, float64 for float64 logits; all but logits and out have that dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import SideArguments, Signature, TargetArguments, TileArguments, Transform
from ..coefficients import RowCoefficients, RowUpstream, row_coefficients
from ..statistics import (
    LOG_ZERO,
    SUM_SCALE,
    empty_partial,
    merge,
    merge_sides,
    origin,
    scaled_shift,
    summarise,
)

_library = torch.library.Library("tightrope", "DEF")


def define(
    name: str,
    signature: Signature,
    returns: str,
    implementation: Callable,
    fake: Callable,
    *tags: torch.Tag,
) -> None:
    """Register ``tightrope::<name>`` for every device, and its fake for torch.compile."""
    _library.define(f"{name}({signature.schema}) -> {returns}", tags=tags)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tightrope::{name}", fake, lib=_library)


def to_logits(raw: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    """Logits of raw values [R, T], in the dtype of the arithmetic."""
    logit_scale, softcap = transform.logit_scale, transform.softcap
    u = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if bias is not None:
        u = u + bias
    if logit_scale != 1.0:
        u = u * logit_scale
    return u if softcap is None else softcap * torch.tanh(u / softcap)


def to_raw_gradient(grad: Tensor, z: Tensor, transform: Transform) -> Tensor:
    """dloss/dz [R, T] to dloss/draw, in place."""
    if transform.softcap is not None:
        grad *= 1.0 - (z / transform.softcap).square()
    if transform.logit_scale != 1.0:
        grad *= transform.logit_scale
    return grad


def in_set(z: Tensor, offset: int, sides: SideArguments) -> Tensor:
    """Which entries of a tile are in the set, [R, T] bool. Where it is of classes, only the shape counts."""
    if sides.threshold is not None:
        return z >= sides.threshold.unsqueeze(-1)
    inside = (sides.classes >= offset) & (sides.classes < offset + z.shape[-1])
    # What is not in this tile goes to a column of its own; kernels load whole vectors from where rows start.
    columns = (sides.classes - offset).masked_fill(~inside, z.shape[-1])
    width = (z.shape[-1] // 16 + 1) * 16
    members = torch.zeros(z.shape[0], width, dtype=torch.bool, device=z.device)
    return members.scatter_(-1, columns, True)[:, : z.shape[-1]]


def _sparse_target(z: Tensor, offset: int, target: TargetArguments) -> tuple[Tensor, Tensor] | None:
    """Columns [R, K] of the sparse targets that fall in this tile, and their mass (0 where they do not)."""
    index, topk_index, topk_prob = target.index, target.topk_index, target.topk_prob
    if index is None and topk_index is None:
        return None
    indices = index.unsqueeze(-1) if topk_index is None else topk_index
    inside = (indices >= offset) & (indices < offset + z.shape[-1])
    mass = inside.to(z.dtype) if topk_prob is None else topk_prob * inside
    return (indices - offset).masked_fill(~inside, 0), mass


def row_stats(logits, partial, argmax, offset, *arguments) -> None:
    """Merge the statistics of a tile of logits into partial and argmax; see the top of this file."""
    if logits.shape[-1] == 0:
        return
    tile = TileArguments(*arguments)
    z = to_logits(logits, tile.bias, tile)
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
    sparse = _sparse_target(z, offset, tile)
    if tile.dense is not None:
        target_shift = (tile.dense * scaled.masked_fill(tile.dense == 0, 0.0)).sum(-1)
        target_exp, mass = (tile.dense * e).sum(-1), tile.dense.sum(-1)
    elif sparse is not None:
        columns, b = sparse
        target_shift = (b * scaled.gather(-1, columns).masked_fill(b == 0, 0.0)).sum(-1)
        target_exp, mass = (b * e.gather(-1, columns)).sum(-1), b.sum(-1)
    part = torch.stack(
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
    merged = merge(partial, part)
    if tile.active is not None:
        better = better & tile.active
        merged = torch.where(tile.active, merged, partial)
    argmax.copy_(torch.where(better, best + offset, argmax))
    partial.copy_(merged)


def row_sides(logits, sides, offset, threshold, classes, *arguments) -> None:
    """Merge the statistics of the two sides of a tile into sides; see the top of this file."""
    if logits.shape[-1] == 0:
        return
    tile = TileArguments(*arguments)
    z = to_logits(logits, tile.bias, tile)
    members = in_set(z, offset, SideArguments(threshold, classes))
    part = []
    for outside in (~members, members):
        top = z.masked_fill(outside, -torch.inf).amax(-1)
        d = z - origin(top).unsqueeze(-1)
        e = d.exp().masked_fill_(outside, 0.0)
        part += [top, e.sum(-1), d.clamp_(min=LOG_ZERO).mul_(e).masked_fill_(outside, 0.0).sum(-1)]
    merged = merge_sides(sides, torch.stack(part))
    sides.copy_(merged if tile.active is None else torch.where(tile.active, merged, sides))


def row_grad(logits, out, norm, coef, offset, threshold, classes, *arguments) -> None:
    """Write dloss/dlogits of a tile to out; see the top of this file."""
    tile = TileArguments(*arguments)
    z = to_logits(logits, tile.bias, tile)
    if len(norm) == 2:
        top, log_sum = norm.unsqueeze(-1)
        c = RowCoefficients(*coef.unsqueeze(-1))
    else:
        members = in_set(z, offset, SideArguments(threshold, classes))
        top, log_sum = (torch.where(members, s, rest) for rest, s in norm.view(2, 2, -1, 1).unbind(1))
        both = coef.view(2, len(RowCoefficients._fields), -1, 1)
        c = RowCoefficients(*(torch.where(members, s, rest) for rest, s in both.unbind(1)))
    log_p = (z - top) - log_sum
    p = log_p.exp()
    grad = p * (c.prob + c.prob_log_prob * log_p.masked_fill(p == 0, 0.0) + c.prob_square * p)
    sparse = _sparse_target(z, offset, tile)
    if tile.dense is not None:
        grad += tile.dense * (c.target + c.target_prob * p)
    elif sparse is not None:
        columns, b = sparse
        t, r = (x if x.shape[-1] == 1 else x.gather(-1, columns) for x in (c.target, c.target_prob))
        grad.scatter_add_(-1, columns, b * (t + r * p.gather(-1, columns)))
    # Skipped when absent, not multiplied by zero: a masked entry has z = -inf.
    grad += torch.where(c.logit == 0, 0.0, c.logit * z) + c.constant
    grad = to_raw_gradient(grad, z, tile)
    if tile.active is not None:
        grad.masked_fill_(~tile.active.unsqueeze(-1), 0.0)
    out.copy_(grad)


def column_sums(grad, along, scale, sums) -> None:
    """Write what sampling is told of the columns of a gradient to sums; see the top of this file."""
    scaled = grad * scale
    # Not by a GEMM, whose operands a GPU may be set to round.
    for row, of_row in zip(along, sums):
        torch.sum(row.unsqueeze(-1) * scaled, 0, out=of_row)
    torch.sum(scaled.square(), 0, out=sums[-1])


def row_grad_sums(logits, out, norm, coef, along, scale, sums, *arguments) -> None:
    """Write dloss/dlogits of a tile to out, and column_sums of it to sums; see the top of this file."""
    row_grad(logits, out, norm, coef, *arguments)
    column_sums(out, along, scale, sums)


def pairs(b, out) -> None:
    """Write b in pairs to out; see the top of this file."""
    filled = torch.nn.functional.pad(b, (0, 0, 0, 2 * out.shape[0] - b.shape[0]))
    out.copy_(filled.unflatten(0, (-1, 2)).transpose(1, 2))


def drawn_columns(grad, tile, index, count, factor, along, basis, first, part) -> None:
    """Write drawn columns of a gradient to part; see the top of this file."""
    (_, columns), rows, some = along.shape, basis.shape[1], slice(first, first + len(part))
    column = index[some]
    start = column // tile * tile
    width = (columns - start).clamp_(max=tile)
    place = (start * rows + column - start).unsqueeze(-1) + width.unsqueeze(-1) * _count(rows, index)
    residual = grad[place] - along[:, column].t() @ basis
    part.zero_()[: len(column), :rows] = residual * factor[some].unsqueeze(-1)


def _count(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device)


def _drawn(part: Tensor, rows: int, index: Tensor, count: Tensor, first: int) -> tuple[Tensor, ...]:
    """(column, whether it was drawn [m, 1], part [m, rows]) of those that a call is for; of the others 0."""
    column = index[first : first + len(part)]
    live = (_count(len(column), index) + first < count).unsqueeze(-1)
    return column, live, torch.where(live, part[: len(column), :rows], 0.0)


def drawn_by_head(part, weight, index, count, first, out) -> None:
    """Add the product of the drawn columns with their rows of the head to out; see the top of this file."""
    column, live, part = _drawn(part, len(out), index, count, first)
    out.addmm_(part.t().to(out.dtype), torch.where(live, weight[column], 0.0).to(out.dtype))


def drawn_by_hidden(part, hidden, index, count, first, out) -> None:
    """Add the product of the drawn columns with the hidden states to out; see the top of this file."""
    column, live, part = _drawn(part, len(hidden), index, count, first)
    product = part.to(out.dtype) @ hidden.to(out.dtype)
    out.index_add_(0, column, torch.where(live, product, 0.0))


def pair_product(a, pairs, out, add) -> None:
    """Write a product of bfloat16 matrices, in float32, to out; see the top of this file."""
    b = pairs.transpose(1, 2).flatten(0, 1)[: a.shape[1]].float()
    torch.addmm(out, a.to(pairs.dtype).float(), b, beta=int(add), out=out)


def panels(b, out) -> None:
    """Write b in panels to out; see the top of this file."""
    wide = torch.nn.functional.pad(b, (0, out.shape[0] * out.shape[2] - b.shape[1]))
    out.copy_(wide.unflatten(1, (out.shape[0], -1)).transpose(0, 1))


def product(a, b, out, add) -> None:
    """Write a product to out, or add it; see the top of this file."""
    if b.dim() == 3:
        b = b.transpose(0, 1).flatten(1)[:, : out.shape[1]]
    torch.addmm(out, a, b.to(a.dtype), beta=int(add), out=out)


def product_stats(head, factor, out, partial, argmax, offset, *arguments) -> None:
    """Merge the statistics of logits that are made here; see the top of this file."""
    logits = partial.new_empty(len(head), len(argmax)) if out is None else out
    (product if factor.dtype == logits.dtype else pair_product)(head, factor, logits, False)
    row_stats(logits.t(), partial, argmax, offset, *arguments)


def row_loss_grad(logits, out, partial, argmax, upstream, *arguments) -> None:
    """Write statistics and dloss/dlogits of whole rows in one operator; see the top of this file."""
    tile = TileArguments(*arguments)
    fresh, best = empty_partial(logits.shape[0], partial.dtype, logits.device)
    row_stats(logits, fresh, best, 0, *arguments)
    summary = summarise(fresh, target_must_occur=tile.index is not None)
    coef = row_coefficients(summary, RowUpstream(*upstream).at(summary), logits.shape[-1])
    row_grad(logits, out, summary[:2], coef, 0, *SideArguments().flat(), *arguments)
    if tile.active is not None:
        fresh, best = torch.where(tile.active, fresh, partial), torch.where(tile.active, best, argmax)
    partial.copy_(fresh)
    argmax.copy_(best)


def _fake(*_) -> None:
    """They write to what they are given."""


_STATISTICS = ("Tensor(b!) partial", "Tensor(c!) argmax")
_OUT = ("Tensor logits", "Tensor(a!) out")
define(
    "row_stats",
    Signature("Tensor logits", *_STATISTICS, "int offset", TileArguments),
    "()",
    row_stats,
    _fake,
)
define(
    "row_sides",
    Signature("Tensor logits", "Tensor(b!) sides", "int offset", SideArguments, TileArguments),
    "()",
    row_sides,
    _fake,
)
define(
    "row_grad",
    Signature(*_OUT, "Tensor norm", "Tensor coef", "int offset", SideArguments, TileArguments),
    "()",
    row_grad,
    _fake,
)
define(
    "row_grad_sums",
    Signature(
        *_OUT,
        "Tensor norm",
        "Tensor coef",
        "Tensor along",
        "float scale",
        "Tensor(b!) sums",
        "int offset",
        SideArguments,
        TileArguments,
    ),
    "()",
    row_grad_sums,
    _fake,
)
define(
    "column_sums",
    Signature("Tensor grad", "Tensor along", "float scale", "Tensor(a!) sums"),
    "()",
    column_sums,
    _fake,
)
define("pairs", Signature("Tensor b", "Tensor(a!) out"), "()", pairs, _fake)
define(
    "pair_product",
    Signature("Tensor a", "Tensor pairs", "Tensor(a!) out", "bool add"),
    "()",
    pair_product,
    _fake,
)
define("panels", Signature("Tensor b", "Tensor(a!) out"), "()", panels, _fake)
define(
    "product",
    Signature("Tensor a", "Tensor b", "Tensor(a!) out", "bool add"),
    "()",
    product,
    _fake,
)
define(
    "product_stats",
    Signature("Tensor head", "Tensor factor", "Tensor(a!)? out", *_STATISTICS, "int offset", TileArguments),
    "()",
    product_stats,
    _fake,
)
define(
    "row_loss_grad",
    Signature(*_OUT, *_STATISTICS, "Tensor upstream", TileArguments),
    "()",
    row_loss_grad,
    _fake,
)
