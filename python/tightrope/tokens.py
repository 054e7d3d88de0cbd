"""From a caller's tokens of any shape to the N rows of the drivers, and back.

One rule holds for every per-token tensor, in and out: its shape is that of the tokens, ``input.shape[:-1]``.
With ``shift = s`` position t is scored against the target of t + s, so the last s positions of the last
token dimension have no target and count as ignored.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .arguments import SetArguments, TokenTarget
from .statistics import RowStats
from .support import Classes, MinP, ascending
from .targets import NO_CLASS, OverRanks, TeacherTarget, TopKTarget, smoothed_square


def flatten_target(
    target: Tensor | TopKTarget | TeacherTarget | None,
    tokens: torch.Size,
    ignore_index: int,
    shift: int,
    device: torch.device,
) -> TokenTarget:
    """Rows of a checked target. Index targets are shifted here, wide ones row by row as they are used."""
    index = dense = topk_index = topk_prob = valid = None
    teacher: dict[str, object] = {}
    if isinstance(target, TeacherTarget):
        teacher = _of_teacher(target, tokens, shift)
    elif isinstance(target, TopKTarget):
        width = target.indices.shape[-1]
        indices = target.indices.long()  # before the comparison: ignore_index may not fit a narrow dtype
        kept = indices != ignore_index
        topk_index = indices.masked_fill(~kept, NO_CLASS).reshape(-1, width)
        topk_prob = target.probs.masked_fill(~kept, 0.0).reshape(-1, width)
        valid = _shifted(kept.any(-1), shift, False)
    elif target is not None and target.is_floating_point():
        dense = target
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
        valid=None if valid is None else valid.reshape(-1).contiguous(),
        shift=shift,
        **teacher,
    )


def _of_teacher(target: TeacherTarget, tokens: torch.Size, shift: int) -> dict[str, object]:
    """The fields of `TeacherArguments`; nothing of it is differentiated."""
    hidden = _shifted(target.hidden.detach().movedim(-1, 0), shift, 0.0).movedim(0, -1)
    return {
        "teacher_input": hidden.reshape(math.prod(tokens), hidden.shape[-1]),
        "teacher_weight": target.weight.detach(),
        "teacher_bias": None if target.bias is None else target.bias.detach(),
        "teacher_scale": float(target.logit_scale),
        "teacher_softcap": None if target.softcap is None else float(target.softcap),
    }


def flatten_support(
    support: MinP | Classes | None, tokens: torch.Size, ignore_index: int, shift: int
) -> SetArguments:
    """Rows of a checked set of classes; as an index target they are shifted here."""
    if support is None:
        return SetArguments()
    if isinstance(support, MinP):
        return SetArguments(min_p=float(support.x))
    indices = support.indices
    if shift:
        indices = _shifted(indices.long().movedim(-1, 0), shift, ignore_index).movedim(0, -1)
    return SetArguments(classes=ascending(indices, ignore_index).reshape(-1, indices.shape[-1]))


def without_weightless(target: TokenTarget, weight: Tensor) -> TokenTarget:
    """The same target, with rows of weight 0 ignored. A weight [N] that is learned is not looked at."""
    if weight.requires_grad:
        return target
    weighs = weight != 0
    return replace(target, valid=weighs if target.valid is None else target.valid & weighs)


def with_class_weight(
    target: TokenTarget, class_weight: Tensor, label_smoothing: float
) -> tuple[TokenTarget, Tensor | None]:
    """(target whose masses are those of the weighted classes, weight of each row's class [N]).

    The second is None where no row has a class of its own. Sparse targets stay sparse without label
    smoothing; else the driver makes a tile of a dense target when its turn comes (`TargetChunk`).
    """
    rows_weight = None
    if target.index is not None:
        rows_weight = _of_classes(class_weight, target.index)
        if not label_smoothing:
            inside = target.index.clamp(0, class_weight.shape[0] - 1)
            sparse = {"topk_index": inside.unsqueeze(-1), "topk_prob": rows_weight.unsqueeze(-1)}
            # An index is shifted already.
            return replace(target, index=None, **sparse, shift=0), rows_weight
    elif target.topk_index is not None and not label_smoothing:
        carries = target.topk_index != NO_CLASS
        weight = _of_classes(class_weight, target.topk_index).masked_fill(~carries, 0.0)
        dtype = torch.promote_types(weight.dtype, target.topk_prob.dtype)
        return replace(target, topk_prob=target.topk_prob.to(dtype) * weight), None
    return replace(target, class_weight=class_weight, smoothing=label_smoothing), rows_weight


def _of_classes(class_weight: Tensor, index: Tensor) -> Tensor:
    """The weight of each class; NaN where that is out of range, which nothing looks at on a GPU."""
    inside = (index >= 0) & (index < class_weight.shape[0])
    return torch.where(inside, class_weight[index.clamp(0, class_weight.shape[0] - 1)], torch.nan)


def target_square(
    target: Tensor | TopKTarget,
    vocab_size: int,
    ignore_index: int,
    shift: int,
    label_smoothing: float,
    dtype: torch.dtype,
    over_ranks: OverRanks | None = None,
) -> Tensor:
    """|b|^2 of each row's smoothed target, [N]; over_ranks as in `smoothed_square`."""
    if isinstance(target, TopKTarget):
        indices = target.indices.long()
        target = TopKTarget(indices, target.probs.masked_fill(indices == ignore_index, 0.0))
    square = smoothed_square(target, vocab_size, label_smoothing, dtype, over_ranks)
    return _shifted(square, shift, 0.0).reshape(-1)


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


# torch 2.11 chooses between no unsigned integers but bytes.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def flatten_arg(arg: Tensor, tokens: torch.Size, valid: Tensor | None) -> Tensor:
    """A user's per-row tensor, of shape (..., *rest) or broadcastable to the tokens, as [N, *rest]."""
    rest = arg.shape[len(tokens) :] if arg.shape[: len(tokens)] == tokens else ()
    flat = arg.expand((*tokens, *rest)).reshape(math.prod(tokens), *rest)
    if valid is None:
        return flat
    if flat.dtype in _SIGNED:
        return flatten_arg(flat.view(_SIGNED[flat.dtype]), valid.shape, valid).view(flat.dtype)
    # A zero of its own dtype: a bool stays one.
    return torch.where(valid.view(-1, *(1,) * len(rest)), flat, flat.new_zeros(()))


def row_scale(
    weight: Tensor, reduction: str, normalizer: float | Tensor | None, total: Tensor | None
) -> Tensor:
    """What each row's loss is multiplied by before the sum, [N]; differentiable in row_weight.

    weight [N]: of each row, 0 where it does not count. total (0-dimensional): what "mean" divides by where no
    normalizer is given. Nothing to divide by makes the mean 0, and not NaN; a normalizer that is negative or
    not finite makes it NaN where its value was not looked at.
    """
    if reduction != "mean":
        return weight
    if normalizer is None:
        return weight / torch.where(total == 0, 1.0, total)
    if not isinstance(normalizer, Tensor):
        normalizer = torch.full((), normalizer, dtype=weight.dtype, device=weight.device)
    divisor = normalizer.reshape(()).to(device=weight.device, dtype=weight.dtype)
    usable = torch.where((divisor > 0) & divisor.isfinite(), divisor, torch.nan)
    # 1 and not NaN in the branch that is not taken, whose gradient must not be NaN.
    return torch.where(divisor == 0, 0.0, weight / torch.where(divisor == 0, 1.0, usable))


def unflatten(stats: RowStats, tokens: torch.Size, has_target: bool) -> RowStats:
    """Statistics of rows [N] in the tokens' shape; None for those of a target that was not given."""
    shaped = RowStats(*(None if value is None else value.view(tokens) for value in stats))
    return shaped if has_target else without_target(shaped)


def without_target(stats: RowStats) -> RowStats:
    """The same statistics, None for those of a target that was not given."""
    return stats._replace(**{name: None for name in RowStats._fields if name.startswith("target_")})
