"""What users call: losses and statistics of hidden states under a vocabulary head.

These functions check their arguments, flatten the tokens to rows, choose a strategy, and put results back
into the tokens' shape; `prepare` has what they share, `logits` the same of logits that exist already. The
mathematics is in docs/mathematics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import tokens as _tokens
from . import validation
from .autograd import ChunkedLoss, OwnChunkedLoss, linear_row_stats
from .distributed.joint import joint
from .distributed.layout import VocabParallel
from .prepare import (
    Scores,
    Space,
    choose_strategy,
    head_of,
    linear_arguments,
    rows_of,
    settled,
    target_square,
    terms_of,
    weighted_rows,
)
from .statistics import RowStats, row_stats
from .strategies.own import evaluate
from .support import Classes, MinP
from .targets import TeacherTarget, TopKTarget

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import (
        BackendName,
        Creativity,
        Integer,
        LinearLossOptions,
        Number,
        OwnLinearLossOptions,
        Reality,
        Reduction,
        Strategy,
    )


@overload
def linear_reality_creativity_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget | TeacherTarget,
    bias: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearLossOptions],
) -> Tensor: ...


@overload
def linear_reality_creativity_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget | TeacherTarget,
    bias: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearLossOptions],
) -> tuple[Tensor, RowStats]: ...


@overload
def linear_reality_creativity_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget | TeacherTarget,
    bias: Tensor | None = None,
    *,
    return_stats: bool,
    **options: Unpack[LinearLossOptions],
) -> Tensor | tuple[Tensor, RowStats]: ...


@joint
def linear_reality_creativity_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget | TeacherTarget,
    bias: Tensor | None = None,
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
    skip_ignored: bool | None = None,
    return_stats: bool = False,
    workspace_mb: Number | None = None,
    backend: BackendName | None = None,
    strategy: Strategy | None = None,
    gradient_noise: Number | tuple[Number, Number] = 0.0,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """Reality-creativity loss of hidden states under a vocabulary head, without the logits in memory.

    With ``z = softcap * tanh(u / softcap) / temperature``, ``u = logit_scale * (input @ weight.T + bias)``
    (``z = u / temperature`` without softcap) and ``p = softmax(z)``, each token's loss is

        (1 - balance) * reality + balance * creativity + z_loss * lse^2 + logit_l2 / 2 * sum(z^2)

    where reality is ``"cross_entropy"``, ``"squared_error"`` (half the squared distance of p to the target)
    or, of a :class:`TeacherTarget` alone, ``"reverse_kl"`` (KL(p || b)) or ``"jensen_shannon"`` (half of
    KL(p || m) + KL(b || m), ``m = (p + b) / 2``), and creativity is ``"entropy"`` (-H, in nats),
    ``"collision"`` (log of sum p^2) or ``"support_entropy"`` (the negative entropy of p within the set
    ``support``, renormalised). The best model of ``"entropy"`` gives every class of the vocabulary the
    same floor, ``exp(-H - (1 - balance) / balance)``: at V 49152 and a balance of 0.15 that is half of its
    mass even where the answer is certain. The others leave impossible classes alone (docs/mathematics.md).
    The defaults are ``F.cross_entropy(input @ weight.T, target)``. After Sinha, Song and Zhou
    (arXiv 2306.02295).

    Numbers may be numpy's, or tensors of one element; those that are read wait for their device.

    An entropy bonus, ``cross_entropy - lam * H``, is ``balance = lam / (1 + lam)`` times ``1 + lam``.

    Args:
        input: hidden states ``(..., D)``; float32, float64, bfloat16 or float16. The leading dimensions are
            the tokens.
        weight: vocabulary head ``(V, D)``. Its dtype may differ from that of ``input``, as under autocast.
        target: class indices ``(...)`` of any integer dtype, a distribution ``(..., V)`` of any floating
            dtype, a :class:`TopKTarget`, or a :class:`TeacherTarget`, another head's softmax. Distributions
            need not sum to one, and may require grad.
        bias: ``(V)``, or None.
        balance: a number in [0, 1], or a tensor that broadcasts to the tokens. It may require grad.
        ignore_index: tokens of this class cost nothing, count nowhere and get zero gradients. Not for
            distributions and teachers, whose tokens a row_weight of 0 ignores.
        label_smoothing: in [0, 1]; replaces the target b by ``(1 - label_smoothing) b + label_smoothing / V``
            in the reality term.
        class_weight: ``(V)``, weighs the classes of the cross-entropy as ``F.cross_entropy(weight=...)``
            does, label smoothing included; creativity and regularisers are not weighed. With it the
            ``target_*`` statistics are those of the weighted target.
        row_weight: weighs each token's loss; broadcasts to the tokens. It may require grad. A token of weight
            0 is an ignored token, whatever stands in its hidden state and target, unless the weight requires
            grad. Weights of both signs (advantages) need a normalizer for ``"mean"``.
        logit_scale: multiplies the logits.
        softcap: positive bound of the logits, or None.
        temperature: divides the logits after the softcap, as samplers do: a positive number, or a tensor that
            broadcasts to the tokens, of the position that predicts. It may require grad.
        support: :class:`MinP` or :class:`Classes`, the set of classes whose mass and entropy are wanted; then
            the statistics have ``support_log_mass``, ``rest_log_mass`` and ``support_entropy``. Default:
            None, or ``MinP(0.02)`` where creativity is ``"support_entropy"``.
        reduction: ``"none"`` (a loss for each token), ``"mean"`` or ``"sum"``.
        normalizer: what ``"mean"`` divides by, a number or a tensor of one element; by default the
            row_weight of the tokens not ignored, times the class_weight of their class index. For gradient
            accumulation pass that of all micro-batches. 0: nothing counts, and the mean is 0. What is
            negative or not finite is an error; on a GPU, where a tensor is not looked at, the loss is NaN.
        shift: ``shift=1`` scores position t of the last token dimension against the target of t + 1; the
            last position is ignored. Per-token tensors keep the tokens' shape; balance and row_weight
            stand at the position that predicts.
        skip_ignored: False puts ignored tokens through the GEMMs, masked, so that on a GPU the host need not
            learn how many are left. Default: skip them wherever that is possible.
        return_stats: also return the detached :class:`RowStats` of every token.
        workspace_mb: budget of the scratch memory for logits, in MiB, a teacher's among them; default 72, on
            a GPU 1024.
        backend: ``"cpu"`` or ``"cuda"`` (C++), ``"triton"``, ``"eager"`` (PyTorch), or None: the best for the
            device.
        strategy: ``"chunked"`` (three GEMMs; gradients are made in the forward pass), ``"streaming"`` (four,
            and memory for one tile of logits), or None: chunked where the workspace holds chunks of good
            size. Without gradients, with ``reduction="none"``, a target that requires grad, and inside of
            torch.func's transforms and forward mode, it is streaming.
        gradient_noise: the root mean square error that is allowed of the gradients of ``input`` and
            ``weight``, as a share of their norms: one number below 1, or a pair. 0: exact. Otherwise they are
            made, without bias, of some of the columns of the logits' gradients, drawn from torch's default
            generator; loss, statistics and the other gradients stay exact. In full where that would not pay:
            on flat distributions and with ``logit_l2``; on a GPU also float16, and without Triton all. Each
            chunk of rows keeps to it, and of a vocabulary over ranks each part (docs/sampled-gradients.md).
        vocab_parallel: :class:`VocabParallel` where the ranks of a process group hold the vocabulary
            together; ``weight``, ``bias`` and a dense target are then this rank's part of them. An error of
            any rank, and arguments that differ where they must not, are raised on all of them. A weight that
            is a DTensor says the same by its placements (docs/distributed.md).

    Returns:
        The loss: float32 (float64 if an input is), 0-dimensional, or the tokens' shape for ``"none"``; with
        ``return_stats`` the pair (loss, RowStats). If every token is ignored it is 0, with zero gradients,
        where ``F.cross_entropy`` gives NaN.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: where a derivative of third order is asked for, or forward mode of forward mode; or of
            second order with vocab_parallel, with ``"jensen_shannon"``, or by a target's probabilities.
        IndexError: a class outside [0, V) that is not ignore_index. On a GPU that is not looked at (the loss
            of such a token is NaN) unless TIGHTROPE_DEBUG=1.
    """
    space = Space.of_head(input, weight, bias, vocab_parallel)
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
    arguments = linear_arguments(
        scores,
        rows.target,
        skip_ignored=skip_ignored,
        workspace_mb=workspace_mb,
        backend=backend,
        gradient_noise=gradient_noise,
        strategy=strategy,
    )
    arguments = settled(
        arguments,
        space,
        reduction=reduction,
        strategy=strategy,
        **terms_of(family),
        **head_of(input, weight, bias),
    )
    square = target_square(space, target, family, ignore_index, shift)
    scores.check_balance(family, balance)
    balances, hidden = rows.flatten(balance), space.rows()
    if choose_strategy(arguments, space, strategy, reduction, hidden, weight, bias) == "chunked":
        loss, summary, argmax, sampling = ChunkedLoss.apply(
            rows.scale, balances, square, family.flat(), hidden, weight, bias, *arguments.flat()
        )
        stats = row_stats(summary, argmax) if return_stats else None
    else:
        sampling = None  # the backward comes later
        stats = linear_row_stats(hidden, weight, bias, arguments)
        loss = rows.reduce(family(stats, balances, square))
    if not arguments.noisy:
        sampling = None
    return (loss, rows.shaped(stats, sampling=sampling)) if return_stats else loss


@joint
def linear_vocab_stats(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget | TeacherTarget | None = None,
    bias: Tensor | None = None,
    *,
    ignore_index: Integer = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    temperature: Number | Tensor = 1.0,
    support: MinP | Classes | None = None,
    shift: Integer = 0,
    skip_ignored: bool | None = None,
    workspace_mb: Number | None = None,
    backend: BackendName | None = None,
    gradient_noise: Number | tuple[Number, Number] = 0.0,
    vocab_parallel: VocabParallel | None = None,
) -> RowStats:
    """Statistics of each token's logits, differentiable in every floating field, in little memory.

    Token log-probabilities are ``stats.target_log_prob`` (for class indices ``target_logit - lse``, without
    the cancellation) and entropies ``stats.entropy``; each field takes its own upstream gradient per token.
    Forward: one GEMM. Backward: three, or with a ``gradient_noise`` one and a little.

    Args:
        target: as in :func:`linear_reality_creativity_loss`, or None: then the ``target_*`` fields are None.
        others: as in :func:`linear_reality_creativity_loss`.

    Returns:
        :class:`RowStats` in the tokens' shape, float32 (float64 if an input is); zeros, and argmax -1, for
        ignored tokens.

    Raises:
        TypeError, ValueError, IndexError: as :func:`linear_reality_creativity_loss`.
    """
    space = Space.of_head(input, weight, bias, vocab_parallel)
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
    arguments = linear_arguments(
        scores,
        flat,
        skip_ignored=skip_ignored,
        workspace_mb=workspace_mb,
        backend=backend,
        gradient_noise=gradient_noise,
    )
    arguments = settled(arguments, space, **head_of(input, weight, bias))
    stats = linear_row_stats(space.rows(), weight, bias, arguments)
    return _tokens.unflatten(stats, space.tokens, target is not None)


@overload
def linear_vocab_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget | TeacherTarget | None,
    loss_fn: Callable[..., Tensor],
    bias: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[OwnLinearLossOptions],
) -> Tensor: ...


@overload
def linear_vocab_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget | TeacherTarget | None,
    loss_fn: Callable[..., Tensor],
    bias: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[OwnLinearLossOptions],
) -> tuple[Tensor, RowStats]: ...


@overload
def linear_vocab_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget | TeacherTarget | None,
    loss_fn: Callable[..., Tensor],
    bias: Tensor | None = None,
    *,
    return_stats: bool,
    **options: Unpack[OwnLinearLossOptions],
) -> Tensor | tuple[Tensor, RowStats]: ...


@joint
def linear_vocab_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget | TeacherTarget | None,
    loss_fn: Callable[..., Tensor],
    bias: Tensor | None = None,
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
    skip_ignored: bool | None = None,
    return_stats: bool = False,
    workspace_mb: Number | None = None,
    backend: BackendName | None = None,
    strategy: Strategy | None = None,
    gradient_noise: Number | tuple[Number, Number] = 0.0,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """A loss of your own, of the row statistics, at the speed and memory of the built-in ones.

    Args:
        loss_fn: ``loss_fn(stats, *row_args) -> Tensor [n]``: any differentiable function of
            :class:`RowStats` whose fields are ``[n]`` vectors of some of the tokens, row by row. It is called
            for each chunk of rows, and must not mix rows: the first time (TIGHTROPE_DEBUG=1: each time) it is
            also called on halves of a chunk, on a CPU, and where these disagree that is an error. Ignored
            rows may be among them, with statistics of 0; what it gives for those is discarded. Its result may
            have any real dtype.
        row_args: tensors of the tokens' shape, ``(..., *rest)``, or that broadcast to the tokens: a balance,
            an advantage. They are sliced along with the rows, keep their dtype and may require grad.
        target: as there, or None for a loss that uses no target: the ``target_*`` fields are None then.
        others: as in :func:`linear_reality_creativity_loss`.

    Returns:
        As :func:`linear_reality_creativity_loss`.

    Raises:
        TypeError, ValueError, IndexError: as :func:`linear_reality_creativity_loss`; also where loss_fn does
            not return one loss a row, or, in the chunked strategy, depends on a tensor that requires grad
            and is not in row_args.
    """
    space = Space.of_head(input, weight, bias, vocab_parallel)
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
    arguments = linear_arguments(
        scores,
        rows.target,
        skip_ignored=skip_ignored,
        workspace_mb=workspace_mb,
        backend=backend,
        gradient_noise=gradient_noise,
        strategy=strategy,
    )
    arguments = settled(
        arguments, space, reduction=reduction, strategy=strategy, **head_of(input, weight, bias)
    )
    args, hidden = rows.flatten_args(row_args), space.rows()
    chosen = choose_strategy(arguments, space, strategy, reduction, hidden, weight, bias)
    # A compiler sees a user's loss between two operators, and not in a loop over chunks; nor does a trace
    # whose number of tokens is a symbol.
    if chosen == "chunked" and not torch.compiler.is_compiling() and isinstance(hidden.shape[0], int):
        loss, summary, argmax, sampling = OwnChunkedLoss.apply(
            loss_fn, rows.scale, hidden, weight, bias, arguments.temperature, arguments, *args
        )
        stats = row_stats(summary, argmax) if return_stats else None
    else:
        sampling = None  # the backward comes later
        stats = linear_row_stats(hidden, weight, bias, arguments)
        loss = rows.reduce(evaluate(loss_fn, stats, args, target is not None))
    if not arguments.noisy:
        sampling = None
    return (loss, rows.shaped(stats, target is not None, sampling)) if return_stats else loss
