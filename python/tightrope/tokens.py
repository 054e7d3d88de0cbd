"""From a caller's tokens of any shape to the N rows of the drivers, and back.

One rule holds for every per-token tensor, in and out: its shape is that of the tokens, ``input.shape[:-1]``.
With ``shift = s`` position t is scored against the target of t + s, so the last s positions of the last
token dimension have no target and count as ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import TokenTarget
from .statistics import RowStats
from .targets import NO_CLASS, TopKTarget, smoothed_square


def flatten_target(
    target: Tensor | TopKTarget | None,
    tokens: torch.Size,
    ignore_index: int,
    shift: int,
    device: torch.device,
) -> TokenTarget:
    """Rows of a checked target. Index targets are shifted here, wide ones row by row as they are used."""
    index = dense = topk_index = topk_prob = valid = None
    if isinstance(target, TopKTarget):
        width = target.indices.shape[-1]
        kept = target.indices != ignore_index
        topk_index = target.indices.long().masked_fill(~kept, NO_CLASS).reshape(-1, width)
        topk_prob = target.probs.masked_fill(~kept, 0.0).reshape(-1, width)
        valid = _shifted(kept.any(-1), shift, False)
    elif target is not None and target.is_floating_point():
        dense = target.reshape(-1, target.shape[-1])
    elif target is not None:
        index = _shifted(target.long(), shift, ignore_index)
        valid = index != ignore_index
    if valid is None and shift:
        valid = _shifted(torch.ones(tokens, dtype=torch.bool, device=device), shift, False)
    return TokenTarget(
        None if index is None else index.reshape(-1).contiguous(),
        dense,
        topk_index,
        topk_prob,
        None if valid is None else valid.reshape(-1).contiguous(),
        shift,
    )


def target_square(
    target: Tensor | TopKTarget,
    vocab_size: int,
    ignore_index: int,
    shift: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """|b|^2 of each row's smoothed target, [N]."""
    if isinstance(target, TopKTarget):
        target = target._replace(probs=target.probs.masked_fill(target.indices == ignore_index, 0.0))
    return _shifted(smoothed_square(target, vocab_size, label_smoothing, dtype), shift, 0.0).reshape(-1)


def _shifted(values: Tensor, shift: int, fill: float) -> Tensor:
    if not shift:
        return values
    length = values.shape[-1]
    tail = values.new_full((*values.shape[:-1], min(shift, length)), fill)
    return torch.cat([values[..., shift:], tail], dim=-1)


def flatten_rows(
    value: Tensor | float,
    tokens: torch.Size,
    valid: Tensor | None,
    like: Tensor,
    dtype: torch.dtype,
):
    """A number or per-token tensor as [N]. Rows that do not count get 0, and no gradient flows from them."""
    if not isinstance(value, Tensor):
        # Not torch.tensor: that copies from the host, which waits for a GPU and cannot be captured.
        value = torch.full((), value, dtype=dtype, device=like.device)
    flat = value.to(dtype).expand(tokens).reshape(-1)
    return flat if valid is None else torch.where(valid, flat, 0.0)


def flatten_arg(arg: Tensor, tokens: torch.Size, valid: Tensor | None) -> Tensor:
    """A user's per-row tensor, of shape (..., *rest) or broadcastable to the tokens, as [N, *rest]."""
    rest = arg.shape[len(tokens) :] if arg.shape[: len(tokens)] == tokens else ()
    flat = arg.expand((*tokens, *rest)).reshape(tokens.numel(), *rest)
    if valid is None:
        return flat
    return torch.where(valid.view(-1, *(1,) * len(rest)), flat, 0)


def row_scale(
    valid: Tensor | None,
    row_weight: Tensor | None,
    reduction: str,
    normalizer,
    tokens,
    like: Tensor,
    dtype,
) -> Tensor:
    """What each row's loss is multiplied by before the sum, [N]; differentiable in row_weight."""
    scale = flatten_rows(1.0 if row_weight is None else row_weight, tokens, valid, like, dtype)
    if reduction != "mean":
        return scale
    if normalizer is None:
        total = scale.sum()
    elif isinstance(normalizer, Tensor):
        total = normalizer.to(device=like.device, dtype=dtype)
    else:
        total = torch.full((), normalizer, dtype=dtype, device=like.device)
    # No row counts, or all weigh nothing: the mean is 0, and not NaN.
    return scale / torch.where(total == 0, 1.0, total)


def unflatten(stats: RowStats, tokens: torch.Size, has_target: bool) -> RowStats:
    """Statistics of rows [N] in the tokens' shape; None for those of a target that was not given."""
    return RowStats(
        **{
            name: None if name.startswith("target_") and not has_target else value.view(tokens)
            for name, value in zip(RowStats._fields, stats)
        }
    )
