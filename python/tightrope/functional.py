"""What users call: losses and statistics of hidden states under a vocabulary head, and of logits.

These functions check their arguments, flatten the tokens to rows, choose a strategy, and put results back
into the tokens' shape. The mathematics is in docs/mathematics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import tokens as _tokens
from . import validation
from .arguments import LinearArguments, LogitsArguments, TokenTarget, Transform
from .autograd import (
    ChunkedLoss,
    CustomChunkedLoss,
    LinearVocabStats,
    LogitsVocabStats,
    check_row_loss,
)
from .losses import RealityCreativity
from .statistics import RowStats, row_stats
from .strategies import plan
from .strategies.problem import arithmetic_dtype
from .targets import TopKTarget


def linear_reality_creativity_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget,
    bias: Tensor | None = None,
    *,
    balance: float | Tensor = 0.0,
    reality: str = "cross_entropy",
    creativity: str = "entropy",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    logit_l2: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    shift: int = 0,
    skip_ignored: bool | None = None,
    return_stats: bool = False,
    workspace_mb: float | None = None,
    backend: str | None = None,
    strategy: str | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """Reality-creativity loss of hidden states under a vocabulary head, without the logits in memory.

    With ``z = softcap * tanh(u / softcap)``, ``u = logit_scale * (input @ weight.T + bias)`` (``z = u``
    without softcap) and ``p = softmax(z)``, each token's loss is

        (1 - balance) * reality + balance * creativity + z_loss * lse^2 + logit_l2 / 2 * sum(z^2)

    where reality is ``"cross_entropy"`` or ``"squared_error"`` (half the squared distance of p to the
    target) and creativity is ``"entropy"`` (-H, in nats) or ``"collision"`` (log of sum p^2). The defaults
    are ``F.cross_entropy(input @ weight.T, target)``. After Sinha, Song and Zhou (arXiv 2306.02295).

    An entropy bonus, ``cross_entropy - lam * H``, is ``balance = lam / (1 + lam)`` times ``1 + lam``.

    Args:
        input: hidden states ``(..., D)``; float32, float64, bfloat16 or float16. The leading dimensions are
            the tokens.
        weight: vocabulary head ``(V, D)``. Its dtype may differ from that of ``input``, as under autocast.
        target: class indices ``(...)`` of any integer dtype, a distribution ``(..., V)`` of any floating
            dtype, or a :class:`TopKTarget`. Distributions need not sum to one.
        bias: ``(V)``, or None.
        balance: a number in [0, 1], or a tensor that broadcasts to the tokens. It may require grad.
        ignore_index: tokens of this class cost nothing, count nowhere and get zero gradients.
        label_smoothing: in [0, 1]; replaces the target b by ``(1 - label_smoothing) b + label_smoothing / V``
            in the reality term.
        row_weight: weighs each token's loss; broadcasts to the tokens. It may require grad.
        logit_scale: multiplies the logits.
        softcap: positive bound of the logits, or None.
        reduction: ``"none"`` (a loss for each token), ``"mean"`` or ``"sum"``.
        normalizer: what ``"mean"`` divides by, a positive number or 0-dimensional tensor; by default the
            row_weight of the tokens not ignored. For gradient accumulation pass that of all micro-batches.
        shift: ``shift=1`` scores position t of the last token dimension against the target of t + 1; the
            last position is ignored. Per-token tensors keep the tokens' shape; balance and row_weight
            stand at the position that predicts.
        skip_ignored: False puts ignored tokens through the GEMMs, masked, so that on a GPU the host need not
            learn how many are left. Default: skip them wherever that is possible.
        return_stats: also return the detached :class:`RowStats` of every token.
        workspace_mb: budget of the scratch memory for logits, in MiB; default 72, on a GPU 1024.
        backend: ``"cpu"`` or ``"cuda"`` (C++), ``"triton"``, ``"eager"`` (PyTorch), or None: the best for the
            device.
        strategy: ``"chunked"`` (three GEMMs; gradients are made in the forward pass), ``"streaming"`` (four,
            and memory for one tile of logits), or None: chunked where the workspace holds chunks of good
            size. Without gradients, or with ``reduction="none"``, it is streaming.

    Returns:
        The loss: float32 (float64 if an input is), 0-dimensional, or the tokens' shape for ``"none"``; with
        ``return_stats`` the pair (loss, RowStats). If every token is ignored it is 0, with zero gradients,
        where ``F.cross_entropy`` gives NaN.

    Raises:
        TypeError, ValueError: an argument is not as above.
        IndexError: a class outside [0, V) that is not ignore_index. On a GPU that is not looked at (the loss
            of such a token is NaN) unless TIGHTROPE_DEBUG=1.
    """
    validation.head(input, weight, bias)
    shape, vocab_size = input.shape[:-1], weight.shape[0]
    _check_loss(
        target,
        balance,
        row_weight,
        shape,
        vocab_size,
        input.device,
        "input",
        ignore_index,
        reduction,
        normalizer,
        shift,
    )
    validation.loss_terms(reality, creativity, label_smoothing, z_loss, logit_l2)
    validation.transform(logit_scale, softcap)
    validation.run_options(backend, workspace_mb, strategy, skip_ignored)
    validation.flag("return_stats", return_stats, (True, False))

    dtype = arithmetic_dtype(input, weight, bias)
    flat = _tokens.flatten_target(target, shape, ignore_index, shift, input.device)
    scale = _tokens.row_scale(flat.valid, row_weight, reduction, normalizer, shape, input, dtype)
    balances = _tokens.flatten_rows(balance, shape, flat.valid, input, dtype)
    family = RealityCreativity(
        vocab_size, reality, creativity, float(label_smoothing), float(z_loss), float(logit_l2)
    )
    square = None
    if reality == "squared_error":
        square = _tokens.target_square(target, vocab_size, ignore_index, shift, label_smoothing, dtype)
    rows = input.reshape(shape.numel(), input.shape[-1])
    transform = Transform(float(logit_scale), None if softcap is None else float(softcap))
    arguments = _linear_arguments(flat, transform, skip_ignored, workspace_mb, backend, input.device)
    if _strategy(strategy, reduction, rows, weight, bias, workspace_mb) == "chunked":
        loss, summary, argmax = ChunkedLoss.apply(
            scale, balances, square, family.flat(), rows, weight, bias, *arguments.flat()
        )
        stats = row_stats(summary, argmax) if return_stats else None
    else:
        stats = RowStats(*LinearVocabStats.apply(rows, weight, bias, *arguments.flat()))
        loss = family(stats, balances, square)
        loss = _reduce(loss, scale, flat.valid, reduction, shape)
    return (loss, _detached(stats, shape)) if return_stats else loss


def reality_creativity_loss(
    logits: Tensor,
    target: Tensor | TopKTarget,
    *,
    balance: float | Tensor = 0.0,
    reality: str = "cross_entropy",
    creativity: str = "entropy",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    logit_l2: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    shift: int = 0,
    return_stats: bool = False,
    backend: str | None = None,
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
    validation.logits(logits)
    shape, vocab_size = logits.shape[:-1], logits.shape[-1]
    _check_loss(
        target,
        balance,
        row_weight,
        shape,
        vocab_size,
        logits.device,
        "logits",
        ignore_index,
        reduction,
        normalizer,
        shift,
    )
    validation.loss_terms(reality, creativity, label_smoothing, z_loss, logit_l2)
    validation.transform(logit_scale, softcap)
    validation.run_options(backend, None, None, None)
    validation.flag("return_stats", return_stats, (True, False))

    dtype = arithmetic_dtype(logits)
    flat = _tokens.flatten_target(target, shape, ignore_index, shift, logits.device)
    scale = _tokens.row_scale(flat.valid, row_weight, reduction, normalizer, shape, logits, dtype)
    balances = _tokens.flatten_rows(balance, shape, flat.valid, logits, dtype)
    family = RealityCreativity(vocab_size, reality, creativity, label_smoothing, z_loss, logit_l2)
    square = None
    if reality == "squared_error":
        square = _tokens.target_square(target, vocab_size, ignore_index, shift, label_smoothing, dtype)
    rows = logits.reshape(-1, vocab_size)
    transform = Transform(float(logit_scale), None if softcap is None else float(softcap))
    arguments = LogitsArguments(**vars(flat), **vars(transform), backend=backend)
    stats = RowStats(*LogitsVocabStats.apply(rows, *arguments.flat()))
    loss = _reduce(family(stats, balances, square), scale, flat.valid, reduction, shape)
    return (loss, _detached(stats, shape)) if return_stats else loss


def linear_vocab_stats(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget | None = None,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shift: int = 0,
    skip_ignored: bool | None = None,
    workspace_mb: float | None = None,
    backend: str | None = None,
) -> RowStats:
    """Statistics of each token's logits, differentiable in every floating field, in little memory.

    Token log-probabilities are ``stats.target_log_prob`` (for class indices ``target_logit - lse``, without
    the cancellation) and entropies ``stats.entropy``; each field takes its own upstream gradient per token.
    Forward: one GEMM. Backward: three.

    Args:
        target: as in :func:`linear_reality_creativity_loss`, or None: then the ``target_*`` fields are None.
        others: as in :func:`linear_reality_creativity_loss`.

    Returns:
        :class:`RowStats` in the tokens' shape, float32 (float64 if an input is); zeros, and argmax -1, for
        ignored tokens.

    Raises:
        TypeError, ValueError, IndexError: as :func:`linear_reality_creativity_loss`.
    """
    validation.head(input, weight, bias)
    shape = input.shape[:-1]
    if target is not None:
        validation.target(target, shape, weight.shape[0], input.device, "input")
    validation.integer("ignore_index", ignore_index)
    validation.shift(shift, shape)
    validation.transform(logit_scale, softcap)
    validation.run_options(backend, workspace_mb, None, skip_ignored)
    flat = _tokens.flatten_target(target, shape, ignore_index, shift, input.device)
    transform = Transform(float(logit_scale), None if softcap is None else float(softcap))
    arguments = _linear_arguments(flat, transform, skip_ignored, workspace_mb, backend, input.device)
    rows = input.reshape(shape.numel(), input.shape[-1])
    stats = LinearVocabStats.apply(rows, weight, bias, *arguments.flat())
    return _tokens.unflatten(RowStats(*stats), shape, target is not None)


def linear_vocab_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor | TopKTarget,
    loss_fn: Callable[..., Tensor],
    bias: Tensor | None = None,
    *,
    row_args: Sequence[Tensor] = (),
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    shift: int = 0,
    skip_ignored: bool | None = None,
    return_stats: bool = False,
    workspace_mb: float | None = None,
    backend: str | None = None,
    strategy: str | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """A loss of your own, of the row statistics, at the speed and memory of the built-in ones.

    Args:
        loss_fn: ``loss_fn(stats, *row_args) -> Tensor [n]``: any differentiable function of
            :class:`RowStats` whose fields are ``[n]`` vectors of some of the tokens, row by row. It is called
            once for each chunk of rows, and must not mix rows. Ignored rows may be among them, with
            statistics of 0; what it gives for those is discarded.
        row_args: tensors of the tokens' shape, ``(..., *rest)``, or that broadcast to the tokens: a balance,
            an advantage. They are sliced along with the rows and may require grad.
        others: as in :func:`linear_reality_creativity_loss`.

    Returns:
        As :func:`linear_reality_creativity_loss`.

    Raises:
        TypeError, ValueError, IndexError: as :func:`linear_reality_creativity_loss`; also where loss_fn does
            not return one loss a row, or, in the chunked strategy, depends on a tensor that requires grad
            and is not in row_args.
    """
    validation.head(input, weight, bias)
    shape = input.shape[:-1]
    _check_loss(
        target,
        0.0,
        row_weight,
        shape,
        weight.shape[0],
        input.device,
        "input",
        ignore_index,
        reduction,
        normalizer,
        shift,
    )
    validation.transform(logit_scale, softcap)
    validation.run_options(backend, workspace_mb, strategy, skip_ignored)
    validation.flag("return_stats", return_stats, (True, False))
    validation.loss_function(loss_fn, row_args, shape, input.device)

    dtype = arithmetic_dtype(input, weight, bias)
    flat = _tokens.flatten_target(target, shape, ignore_index, shift, input.device)
    scale = _tokens.row_scale(flat.valid, row_weight, reduction, normalizer, shape, input, dtype)
    args = [_tokens.flatten_arg(arg, shape, flat.valid) for arg in row_args]
    rows = input.reshape(shape.numel(), input.shape[-1])
    transform = Transform(float(logit_scale), None if softcap is None else float(softcap))
    arguments = _linear_arguments(flat, transform, skip_ignored, workspace_mb, backend, input.device)
    chosen = _strategy(strategy, reduction, rows, weight, bias, workspace_mb)
    # A compiler sees a user's loss as plain Python between two operators, and not in a loop over chunks.
    if chosen == "chunked" and not torch.compiler.is_compiling():
        loss, summary, argmax = CustomChunkedLoss.apply(loss_fn, scale, rows, weight, bias, arguments, *args)
        stats = row_stats(summary, argmax) if return_stats else None
    else:
        stats = RowStats(*LinearVocabStats.apply(rows, weight, bias, *arguments.flat()))
        loss = loss_fn(stats, *args)
        check_row_loss(loss, rows.shape[0])
        loss = _reduce(loss, scale, flat.valid, reduction, shape)
    return (loss, _detached(stats, shape)) if return_stats else loss


def _check_loss(
    target,
    balance,
    row_weight,
    shape,
    vocab_size,
    device,
    owner,
    ignore_index,
    reduction,
    normalizer,
    shift,
):
    """What all losses take."""
    validation.target(target, shape, vocab_size, device, owner)
    validation.balance(balance, shape, device)
    if row_weight is not None:
        validation.per_token("row_weight", row_weight, shape, device)
    validation.integer("ignore_index", ignore_index)
    validation.choice("reduction", reduction, validation.REDUCTIONS)
    if normalizer is not None:
        validation.normalizer(normalizer)
    validation.shift(shift, shape)


def _linear_arguments(
    target: TokenTarget,
    transform: Transform,
    skip_ignored: bool | None,
    workspace_mb: float | None,
    backend: str | None,
    device: torch.device,
) -> LinearArguments:
    # On a GPU skipping needs the count of rows on the host, which a graph capture or a trace cannot give.
    skip = skip_ignored is not False
    if skip and target.valid is not None and device.type == "cuda":
        skip = not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    workspace = plan.workspace_bytes(workspace_mb, device)
    return LinearArguments(**vars(target), **vars(transform), backend=backend, skip=skip, workspace=workspace)


def _strategy(strategy, reduction, rows, weight, bias, workspace_mb) -> str:
    """Chunked needs the upstream gradient to be one number, and someone to want the gradients."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, weight, bias))
    if reduction == "none" or not wanted:
        return "streaming"
    itemsize, device = arithmetic_dtype(rows, weight, bias).itemsize, rows.device
    workspace = plan.workspace_bytes(workspace_mb, device)
    return strategy or plan.choose_strategy(rows.shape[0], weight.shape[0], itemsize, workspace, device)


def _reduce(loss: Tensor, scale: Tensor, valid: Tensor | None, reduction: str, shape: torch.Size) -> Tensor:
    if valid is not None:
        loss = torch.where(valid, loss, 0.0)
    loss = loss * scale
    return loss.view(shape) if reduction == "none" else loss.sum()


def _detached(stats: RowStats, shape: torch.Size) -> RowStats:
    return _tokens.unflatten(RowStats(*(s.detach() for s in stats)), shape, has_target=True)
