"""The autograd Functions: they save tensors, call the drivers, and scale what comes back.

`ChunkedLoss` and `OwnChunkedLoss` make the gradients in the forward pass, for a loss that is one number;
`LinearVocabStats` and `LogitsVocabStats` make the statistics, and the gradients when the upstream gradients
of the statistics arrive. The losses between statistics and result are plain PyTorch, recorded by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .ambient import differentiable, has_values, may_read, transformed
from .arguments import Arguments, LinearArguments, LogitsArguments
from .coefficients import row_coefficients
from .derivatives import VocabStats, pulled_back
from .distributed.collectives import same_on_ranks
from .loss_gradient import LossGradient, Recipe, Sources, gradients_by_statistics
from .losses import RealityCreativity
from .statistics import RowStats
from .strategies import ops, own, row_losses, soft, soft_ops
from .strategies.products import Needs
from .targets import Target
from .theta import constants, fields_of, mass_needed, of_arguments, refuse_mixture, statistics, upstream_of


def _wanted(gradients, needed) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(gradients, needed))


def _temperature_needed(ctx, after: int, group: type[Arguments]) -> bool:
    """Whether the gradient of the temperature is wanted, which is one of a group's arguments."""
    return ctx.needs_input_grad[after + group._names.index("temperature")]


def _of_group(to_temperature: Tensor | None, group: type[Arguments]) -> tuple[Tensor | None, ...]:
    """The gradients of a group's arguments, of which the temperature alone has one."""
    return tuple(to_temperature if name == "temperature" else None for name in group._names)


class LinearVocabStats(Function):
    """(input [N, D], weight [V, D], bias [V], *LinearArguments) -> the fields of RowStats, [N] each.

    Those of a set of classes, and of a teacher, are there where one is given.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, *flat):
        arguments = LinearArguments(*flat)
        summary, argmax = ops.linear_stats(input, weight, bias, arguments)
        ctx.save_for_backward(summary, input, weight, bias, *arguments.tensors())
        ctx.others = arguments.others()
        ctx.set_materialize_grads(False)
        outputs = statistics(summary, argmax)
        ctx.mark_non_differentiable(*constants(outputs, arguments))
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        summary, input, weight, bias, *tensors = ctx.saved_tensors
        arguments = LinearArguments.join(tensors, ctx.others)
        needed = (*ctx.needs_input_grad[:3], _temperature_needed(ctx, 3, LinearArguments))
        mass, upstream = mass_needed(ctx, 3, arguments), upstream_of(grads, arguments)
        if differentiable():
            values = (input, weight, bias)
            return pulled_back(ctx.needs_input_grad, mass, summary, upstream, values, arguments)
        coef = row_coefficients(summary, upstream, arguments.vocab_size(weight.shape[0]))
        values, gradients = (input, weight, bias, arguments), (None,) * 4
        if any(needed):
            gradients = _wanted(ops.linear_stats_backward(summary, coef, Needs(*needed), *values), needed)
        to_mass = None
        if mass:
            to_mass = soft_ops.linear_target_grad(summary, soft.slopes(upstream, summary), *values)
        return of_arguments(gradients, arguments, to_mass)


class LogitsVocabStats(Function):
    """(logits [N, V], *LogitsArguments) -> as `LinearVocabStats`."""

    @staticmethod
    def forward(ctx, logits, *flat):
        arguments = LogitsArguments(*flat)
        summary, argmax = ops.logits_stats(logits, arguments)
        ctx.save_for_backward(summary, logits, *arguments.tensors())
        ctx.others = arguments.others()
        ctx.set_materialize_grads(False)
        outputs = statistics(summary, argmax)
        ctx.mark_non_differentiable(*constants(outputs, arguments))
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        summary, logits, *tensors = ctx.saved_tensors
        arguments = LogitsArguments.join(tensors, ctx.others)
        needed = (ctx.needs_input_grad[0], _temperature_needed(ctx, 1, LogitsArguments))
        mass, upstream = mass_needed(ctx, 1, arguments), upstream_of(grads, arguments)
        if differentiable():
            flags = (needed[0], False, False, *ctx.needs_input_grad[1:])
            values = (logits, None, None)
            to_logits, _, _, *rest = pulled_back(flags, mass, summary, upstream, values, arguments)
            return to_logits, *rest
        coef = row_coefficients(summary, upstream, arguments.vocab_size(logits.shape[1]))
        to_logits = to_temperature = to_mass = None
        if any(needed):
            gradients = ops.logits_stats_backward(summary, coef, needed[1], logits, arguments)
            to_logits, to_temperature = _wanted(gradients, needed)
        if mass:
            slopes = soft.slopes(upstream, summary)
            to_mass = soft_ops.logits_target_grad(summary, slopes, logits, arguments)
        _, _, _, *rest = of_arguments((None, None, None, to_temperature), arguments, to_mass)
        return to_logits, *rest


def linear_row_stats(
    input: Tensor, weight: Tensor, bias: Tensor | None, arguments: LinearArguments
) -> RowStats:
    """The statistics of each row [N] of hidden states under a head, in whatever way is differentiated."""
    if transformed():
        values = VocabStats.apply(input, weight, bias, *arguments.flat())
    else:
        values = LinearVocabStats.apply(input, weight, bias, *arguments.flat())
    return RowStats(**dict(zip(fields_of(arguments), values)))


def logits_row_stats(logits: Tensor, arguments: LogitsArguments) -> RowStats:
    """The same of logits."""
    if transformed():
        values = VocabStats.apply(logits, None, None, *arguments.flat())
    else:
        values = LogitsVocabStats.apply(logits, *arguments.flat())
    return RowStats(**dict(zip(fields_of(arguments), values)))


class ChunkedLoss(Function):
    """``sum(row_scale * loss)`` of the built-in losses, with its gradients made in the forward pass.

    (row_scale [N], balance [N], target_square [N], family, input [N, D], weight [V, D], bias [V],
    *LinearArguments) -> (loss, summary [SUMMARY, N], argmax [N], sampling [3]); only the loss has a gradient.
    """

    @staticmethod
    def forward(ctx, row_scale, balance, target_square, family, input, weight, bias, *flat):
        arguments = LinearArguments(*flat)
        needed = (*ctx.needs_input_grad[4:7], _temperature_needed(ctx, 7, LinearArguments))
        family = RealityCreativity(*family)
        row_loss, summary, argmax, *gradients, to_balance, sampling = ops.linear_loss(
            row_scale, balance, target_square, family, Needs(*needed), input, weight, bias, arguments
        )
        sources = (row_scale, balance, input, weight, bias, arguments.temperature)
        known = (row_loss, to_balance, *_wanted(gradients, needed))
        _save(ctx, row_losses.BuiltIn(family), (target_square,), arguments, known, sources, (summary, argmax))
        ctx.mark_non_differentiable(summary, argmax, sampling)
        return (row_scale * row_loss).sum(), summary, argmax, sampling

    @staticmethod
    def backward(ctx, upstream, *_):
        needs = ctx.needs_input_grad
        needed = (*needs[:2], *needs[4:7], _temperature_needed(ctx, 7, LinearArguments))
        scaled = _gradients(ctx, needed, upstream)
        return *scaled[:2], None, None, *scaled[2:5], *_of_group(scaled[5], LinearArguments)


class OwnChunkedLoss(Function):
    """`ChunkedLoss` for a user's loss.

    (loss_fn, row_scale, input, weight, bias, temperature, arguments, *row_args); the arguments hold the
    temperature too.
    """

    @staticmethod
    def forward(ctx, loss_fn, row_scale, input, weight, bias, temperature, arguments, *row_args):
        needs = ctx.needs_input_grad
        record, gradients, sampling = own.loss_and_gradients(
            loss_fn, row_scale, row_args, needs[7:], Needs(*needs[2:6]), input, weight, bias, arguments
        )
        # Without a single row that counts, loss_fn was never called.
        to_args = record.args or tuple(torch.zeros_like(a) for a in row_args)
        sources = (row_scale, *row_args, input, weight, bias, temperature)
        known = (record.row_loss, *to_args, *gradients.flat())
        loss = row_losses.Own(loss_fn, arguments.part(Target).is_given)
        _save(ctx, loss, (), arguments, known, sources, (record.summary, record.argmax))
        ctx.mark_non_differentiable(record.summary, record.argmax, sampling)
        return (row_scale * record.row_loss).sum(), record.summary, record.argmax, sampling

    @staticmethod
    def backward(ctx, upstream, *_):
        needs = ctx.needs_input_grad
        to_scale, *rest = _gradients(ctx, (needs[1], *needs[7:], *needs[2:6]), upstream)
        to_args, theta = rest[:-4], rest[-4:]
        return None, to_scale, *theta, None, *to_args


def _save(ctx, loss, constants, arguments: LinearArguments, gradients, sources, statistics) -> None:
    """What the backward of a chunked loss takes. gradients, sources: in the order of `Sources`.

    statistics: summary and argmax. loss, constants: as in `Recipe`.
    """
    ctx.save_for_backward(*gradients, *sources, *statistics)
    ctx.dtypes = [None if t is None else t.dtype for t in sources]
    ctx.shared_by = arguments.group if arguments.sharded else None
    if not torch.compiler.is_compiling():
        ctx.recipe = Recipe(loss, constants, arguments, linear_row_stats)


def _gradients(ctx, needed: tuple[bool, ...], upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of a chunked loss, of those of its sources that are needed; with a graph if asked for."""
    if ctx.shared_by is not None:
        upstream = same_on_ranks(upstream, ctx.shared_by)
    *saved, summary, argmax = ctx.saved_tensors
    known, sources = _wanted(saved, needed), saved[len(needed) :]
    if torch.compiler.is_compiling():
        return _scale(known, ctx.dtypes, upstream, kept=True)
    if torch.is_grad_enabled():
        ctx.recipe.check_unchanged()
        refuse_mixture(ctx.recipe.arguments)
        if transformed() or not has_values(upstream):
            return gradients_by_statistics(ctx.recipe, upstream, Sources.of(sources), needed)[0]
        return LossGradient.apply(ctx.recipe, upstream, summary, argmax, *known, *sources)
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    if not kept:
        ctx.recipe = None  # who keeps the loss keeps no target with it
    return _scale(known, ctx.dtypes, upstream, kept)


def _scale(gradients, dtypes, upstream: Tensor, kept: bool) -> tuple[Tensor | None, ...]:
    """Each gradient times the upstream one, then rounded to its tensor's dtype: once.

    kept: the graph is kept after this backward. The saved gradients are scaled in place only where nobody can
    see them again. A second backward through a kept graph so gets the right answer, and an ordinary one holds
    no second gradient of the head.
    """
    # While the graph is differentiated, or a compiler traces it, another may see the same numbers.
    seen = has_values(upstream) and not transformed()
    kept = kept or not seen
    if not kept and may_read(upstream) and upstream.item() == 1.0:
        return tuple(None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes))

    def scaled(gradient: Tensor, dtype: torch.dtype) -> Tensor:
        if seen and gradient.dtype != dtype and _rounds_at_once(gradient):
            return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))
        return (gradient * upstream if kept else gradient.mul_(upstream)).to(dtype)

    return tuple(None if g is None else scaled(g, dtype) for g, dtype in zip(gradients, dtypes))


def _rounds_at_once(gradient: Tensor) -> bool:
    """Whether a product is rounded to another dtype as it is written; on a CPU it is made whole first."""
    return gradient.device.type != "cpu"
