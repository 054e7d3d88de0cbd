"""What users call with logits that exist already: `functional` without the head.

Rows that do not count are masked, which costs no product; the only large memory is the gradient of the
logits, in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from . import tokens as _tokens
from . import validation
from .arguments import LogitsArguments
from .autograd import logits_row_stats
from .distributed.joint import joint
from .distributed.layout import VocabParallel
from .prepare import Scores, Space, rows_of, settled, target_square, terms_of, weighted_rows
from .statistics import RowStats
from .strategies.own import evaluate
from .support import Classes, MinP
from .targets import TeacherTarget, TopKTarget

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .arguments import TokenTarget
    from .options import (
        BackendName,
        Creativity,
        Integer,
        LogitsLossOptions,
        Number,
        OwnLogitsLossOptions,
        Reality,
        Reduction,
    )


@overload
def reality_creativity_loss(
    logits: Tensor,
    target: Tensor | TopKTarget | TeacherTarget,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LogitsLossOptions],
) -> Tensor: ...


@overload
def reality_creativity_loss(
    logits: Tensor,
    target: Tensor | TopKTarget | TeacherTarget,
    *,
    return_stats: Literal[True],
    **options: Unpack[LogitsLossOptions],
) -> tuple[Tensor, RowStats]: ...


@overload
def reality_creativity_loss(
    logits: Tensor,
    target: Tensor | TopKTarget | TeacherTarget,
    *,
    return_stats: bool,
    **options: Unpack[LogitsLossOptions],
) -> Tensor | tuple[Tensor, RowStats]: ...


@joint
def reality_creativity_loss(
    logits: Tensor,
    target: Tensor | TopKTarget | TeacherTarget,
    *,
    balance: Number | Tensor = 0.0,
    reality: Reality = "cross_entropy",
    creativity: Creativity = "entropy",
    ignore_index: Integer = -100,
    label_smoothing: Number = 0.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    temperature: Number | Tensor = 1.0,
    support: MinP | Classes | None = None,
    z_loss: Number = 0.0,
    logit_l2: Number = 0.0,
    reduction: Reduction = "mean",
    normalizer: Number | Tensor | None = None,
    shift: Integer = 0,
    return_stats: bool = False,
    backend: BackendName | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`linear_reality_creativity_loss` of logits that exist already.

    The only large memory it takes is the gradient of the logits, in the backward pass.

    Args:
        logits: ``(..., V)``; float32, float64, bfloat16 or float16. Vocabulary last, unlike F.cross_entropy.
        others: as in :func:`linear_reality_creativity_loss`, with the tokens ``logits.shape[:-1]``.

    Returns:
        As :func:`linear_reality_creativity_loss`. Losses of bfloat16 and float16 logits are float32.

    Raises:
        TypeError, ValueError, IndexError: as :func:`linear_reality_creativity_loss`.
    """
    space = Space.of_logits(logits, vocab_parallel)
    family = validation.loss_terms(
        space.vocab_size, reality, creativity, label_smoothing, z_loss, logit_l2, space.dtype
    )
    scores = Scores.of(
        space,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        support=support,
        ignore_index=ignore_index,
        shift=shift,
        creativity=creativity,
    )
    balance = validation.balance(balance, space.tokens, space.device)
    validation.flag("return_stats", return_stats, (True, False))
    rows, family = weighted_rows(
        space,
        target,
        family,
        class_weight,
        ignore_index=ignore_index,
        shift=shift,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=normalizer,
    )
    stats = _statistics(scores, rows.target, backend, reduction=reduction, **terms_of(family))
    square = target_square(space, target, family, ignore_index, shift)
    scores.check_balance(family, balance)
    loss = rows.reduce(family(stats, rows.flatten(balance), square))
    return (loss, rows.shaped(stats)) if return_stats else loss


@joint
def vocab_stats(
    logits: Tensor,
    target: Tensor | TopKTarget | TeacherTarget | None = None,
    *,
    ignore_index: Integer = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    temperature: Number | Tensor = 1.0,
    support: MinP | Classes | None = None,
    shift: Integer = 0,
    backend: BackendName | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> RowStats:
    """:func:`linear_vocab_stats` of logits that exist already: one sweep over them, and one backward.

    Args:
        logits: ``(..., V)``; float32, float64, bfloat16 or float16.
        others: as in :func:`linear_vocab_stats`, with the tokens ``logits.shape[:-1]``.

    Returns:
        As :func:`linear_vocab_stats`. Statistics of bfloat16 and float16 logits are float32.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`linear_reality_creativity_loss`.
    """
    space = Space.of_logits(logits, vocab_parallel)
    scores = Scores.of(
        space,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        support=support,
        ignore_index=ignore_index,
        shift=shift,
    )
    flat = space.target(target, ignore_index, shift)
    stats = _statistics(scores, flat, backend)
    return _tokens.unflatten(stats, space.tokens, target is not None)


@overload
def vocab_loss(
    logits: Tensor,
    target: Tensor | TopKTarget | TeacherTarget | None,
    loss_fn: Callable[..., Tensor],
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[OwnLogitsLossOptions],
) -> Tensor: ...


@overload
def vocab_loss(
    logits: Tensor,
    target: Tensor | TopKTarget | TeacherTarget | None,
    loss_fn: Callable[..., Tensor],
    *,
    return_stats: Literal[True],
    **options: Unpack[OwnLogitsLossOptions],
) -> tuple[Tensor, RowStats]: ...


@overload
def vocab_loss(
    logits: Tensor,
    target: Tensor | TopKTarget | TeacherTarget | None,
    loss_fn: Callable[..., Tensor],
    *,
    return_stats: bool,
    **options: Unpack[OwnLogitsLossOptions],
) -> Tensor | tuple[Tensor, RowStats]: ...


@joint
def vocab_loss(
    logits: Tensor,
    target: Tensor | TopKTarget | TeacherTarget | None,
    loss_fn: Callable[..., Tensor],
    *,
    row_args: Sequence[Tensor] = (),
    ignore_index: Integer = -100,
    row_weight: Tensor | None = None,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    temperature: Number | Tensor = 1.0,
    support: MinP | Classes | None = None,
    reduction: Reduction = "mean",
    normalizer: Number | Tensor | None = None,
    shift: Integer = 0,
    return_stats: bool = False,
    backend: BackendName | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`linear_vocab_loss` of logits that exist already.

    Args:
        logits: ``(..., V)``; float32, float64, bfloat16 or float16.
        loss_fn: as in :func:`linear_vocab_loss`; it is called once, with all tokens, and must not mix them.
        others: as in :func:`linear_vocab_loss`, with the tokens ``logits.shape[:-1]``.

    Returns:
        As :func:`linear_reality_creativity_loss`.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`linear_vocab_loss`.
    """
    space = Space.of_logits(logits, vocab_parallel)
    scores = Scores.of(
        space,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        support=support,
        ignore_index=ignore_index,
        shift=shift,
    )
    validation.flag("return_stats", return_stats, (True, False))
    validation.loss_function(loss_fn, row_args, space.tokens, space.device)
    rows = rows_of(
        space,
        target,
        ignore_index=ignore_index,
        shift=shift,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=normalizer,
        target_required=False,
    )
    stats = _statistics(scores, rows.target, backend, reduction=reduction)
    loss = rows.reduce(evaluate(loss_fn, stats, rows.flatten_args(row_args), target is not None))
    return (loss, rows.shaped(stats, target is not None)) if return_stats else loss


def _statistics(scores: Scores, target: TokenTarget, backend: str | None, **alike: object) -> RowStats:
    """alike: what ranks that hold the vocabulary together must have alike."""
    validation.run_options(backend)
    arguments = LogitsArguments(**scores.arguments(target), backend=backend)
    arguments = settled(arguments, scores.space, **alike)
    return logits_row_stats(scores.space.rows(), arguments)
