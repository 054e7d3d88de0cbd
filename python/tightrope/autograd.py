"""The autograd Functions: they save tensors, call the drivers, and scale what comes back.

`ChunkedLoss` and `OwnChunkedLoss` make the gradients in the forward pass, for a loss that is one number;
`LinearVocabStats` and `LogitsVocabStats` make the statistics, and the gradients when the upstream gradients
of the statistics arrive. The losses between statistics and result are plain PyTorch, recorded by autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from .ambient import has_values, may_read
from .arguments import Arguments, LinearArguments, LogitsArguments
from .coefficients import row_coefficients
from .distributed.collectives import same_on_ranks
from .losses import RealityCreativity
from .statistics import FLOATING, RowStats, StatGrads, row_stats
from .strategies import ops, own
from .strategies.chunked import Needs

_FIRST_ORDER = (
    "tightrope: got a derivative of a gradient (a gradient penalty, a Hessian-vector product, any use of "
    "what create_graph=True gave), expected gradients of first order only; for that part of a loss take "
    "F.cross_entropy of logits"
)


class _FirstOrder(Function):
    """(count, *gradients, *sources) -> the gradients, whose own derivative by the sources is an error."""

    @staticmethod
    def forward(ctx, count, *tensors):
        ctx.mark_dirty(*tensors[:count])  # no copy, and no view, which nobody could add to in place
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_FIRST_ORDER)


def first_order(backward: Callable) -> Callable:
    """A backward whose gradients cannot be differentiated, and say so, whatever else the graph holds.

    torch's once_differentiable raises only where the upstream gradient requires grad: a penalty on a gradient
    that is added to another loss would silently be lost. The sources are the saved tensors that require grad.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *upstream):
        create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            result = backward(ctx, *upstream)
        if not create_graph:
            return result
        sources = [t for t in (*ctx.saved_tensors, *upstream) if t is not None and t.requires_grad]
        places = [i for i, gradient in enumerate(result) if gradient is not None]
        marked = _FirstOrder.apply(len(places), *(result[i] for i in places), *sources)
        out = list(result)
        for i, gradient in zip(places, marked):
            out[i] = gradient
        return tuple(out)

    return wrapped


def _stat_grads(grads: tuple[Tensor | None, ...]) -> StatGrads:
    named = dict(zip(RowStats._fields, grads))
    return StatGrads(**{name: named[name] for name in FLOATING if name in named})


def _wanted(gradients, needed) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(gradients, needed))


def _statistics(summary: Tensor, argmax: Tensor) -> tuple[Tensor, ...]:
    """The fields of RowStats, as many as there are."""
    return tuple(s for s in row_stats(summary, argmax) if s is not None)


def _temperature_needed(ctx, after: int, group: type[Arguments]) -> bool:
    """Whether the gradient of the temperature is wanted, which is one of a group's arguments."""
    return ctx.needs_input_grad[after + group._names.index("temperature")]


def _of_group(to_temperature: Tensor | None, group: type[Arguments]) -> tuple[Tensor | None, ...]:
    """The gradients of a group's arguments, of which the temperature alone has one."""
    return tuple(to_temperature if name == "temperature" else None for name in group._names)


class LinearVocabStats(Function):
    """(input [N, D], weight [V, D], bias [V], *LinearArguments) -> the fields of RowStats, [N] each.

    The last three are there with a set of classes only.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, *flat):
        arguments = LinearArguments(*flat)
        summary, argmax = ops.linear_stats(input, weight, bias, arguments)
        ctx.save_for_backward(summary, input, weight, bias, *arguments.tensors())
        ctx.others = arguments.others()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(argmax)
        return _statistics(summary, argmax)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        summary, input, weight, bias, *tensors = ctx.saved_tensors
        arguments = LinearArguments.join(tensors, ctx.others)
        coef = row_coefficients(summary, _stat_grads(grads), arguments.vocab_size(weight.shape[0]))
        needed = (*ctx.needs_input_grad[:3], _temperature_needed(ctx, 3, LinearArguments))
        gradients = ops.linear_stats_backward(summary, coef, Needs(*needed), input, weight, bias, arguments)
        *to_head, to_temperature = _wanted(gradients, needed)
        return *to_head, *_of_group(to_temperature, LinearArguments)


class LogitsVocabStats(Function):
    """(logits [N, V], *LogitsArguments) -> as `LinearVocabStats`."""

    @staticmethod
    def forward(ctx, logits, *flat):
        arguments = LogitsArguments(*flat)
        summary, argmax = ops.logits_stats(logits, arguments)
        ctx.save_for_backward(summary, logits, *arguments.tensors())
        ctx.others = arguments.others()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(argmax)
        return _statistics(summary, argmax)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        summary, logits, *tensors = ctx.saved_tensors
        arguments = LogitsArguments.join(tensors, ctx.others)
        coef = row_coefficients(summary, _stat_grads(grads), arguments.vocab_size(logits.shape[1]))
        needed = (ctx.needs_input_grad[0], _temperature_needed(ctx, 1, LogitsArguments))
        gradients = ops.logits_stats_backward(summary, coef, needed[1], logits, arguments)
        to_logits, to_temperature = _wanted(gradients, needed)
        return to_logits, *_of_group(to_temperature, LogitsArguments)


class ChunkedLoss(Function):
    """``sum(row_scale * loss)`` of the built-in losses, with its gradients made in the forward pass.

    (row_scale [N], balance [N], target_square [N], family, input [N, D], weight [V, D], bias [V],
    *LinearArguments) -> (loss, summary [SUMMARY, N], argmax [N]); only the loss has a gradient.
    """

    @staticmethod
    def forward(ctx, row_scale, balance, target_square, family, input, weight, bias, *flat):
        arguments = LinearArguments(*flat)
        needed = (*ctx.needs_input_grad[4:7], _temperature_needed(ctx, 7, LinearArguments))
        row_loss, summary, argmax, *gradients, to_balance = ops.linear_loss(
            row_scale,
            balance,
            target_square,
            RealityCreativity(*family),
            Needs(*needed),
            input,
            weight,
            bias,
            arguments,
        )
        sources = (row_scale, balance, input, weight, bias, arguments.temperature)
        ctx.save_for_backward(row_loss, to_balance, *_wanted(gradients, needed), *sources)
        ctx.dtypes = [None if t is None else t.dtype for t in sources]
        ctx.shared_by = arguments.group if arguments.sharded else None
        ctx.mark_non_differentiable(summary, argmax)
        return (row_scale * row_loss).sum(), summary, argmax

    @staticmethod
    @first_order
    def backward(ctx, upstream, *_):
        needs = ctx.needs_input_grad
        needed = (*needs[:2], *needs[4:7], _temperature_needed(ctx, 7, LinearArguments))
        if ctx.shared_by is not None:
            upstream = same_on_ranks(upstream, ctx.shared_by)
        scaled = _scale(_wanted(ctx.saved_tensors, needed), ctx.dtypes, upstream)
        return *scaled[:2], None, None, *scaled[2:5], *_of_group(scaled[5], LinearArguments)


class OwnChunkedLoss(Function):
    """`ChunkedLoss` for a user's loss.

    (loss_fn, row_scale, input, weight, bias, temperature, arguments, *row_args); the arguments hold the
    temperature too.
    """

    @staticmethod
    def forward(ctx, loss_fn, row_scale, input, weight, bias, temperature, arguments, *row_args):
        needs = ctx.needs_input_grad
        record, gradients = own.loss_and_gradients(
            loss_fn, row_scale, row_args, needs[7:], Needs(*needs[2:6]), input, weight, bias, arguments
        )
        # Without a single row that counts, loss_fn was never called.
        to_args = record.args or tuple(torch.zeros_like(a) for a in row_args)
        sources = (row_scale, input, weight, bias, temperature, *row_args)
        ctx.save_for_backward(record.row_loss, *gradients.flat(), *to_args, *sources)
        ctx.dtypes = [None if t is None else t.dtype for t in sources]
        ctx.shared_by = arguments.group if arguments.sharded else None
        ctx.mark_non_differentiable(record.summary, record.argmax)
        return (row_scale * record.row_loss).sum(), record.summary, record.argmax

    @staticmethod
    @first_order
    def backward(ctx, upstream, *_):
        needs = ctx.needs_input_grad
        needed = (*needs[1:6], *needs[7:])
        if ctx.shared_by is not None:
            upstream = same_on_ranks(upstream, ctx.shared_by)
        scaled = _scale(_wanted(ctx.saved_tensors, needed), ctx.dtypes, upstream)
        return None, *scaled[:5], None, *scaled[5:]


def _scale(gradients, dtypes, upstream: Tensor) -> list[Tensor | None]:
    """Each gradient times the upstream one, then rounded to its tensor's dtype: once.

    The saved gradients are scaled in place only where nobody can see them again, that is where the graph
    is freed after this backward. A second backward through a kept graph so gets the right answer, and an
    ordinary one holds no second gradient of the head.
    """
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    seen = has_values(upstream)
    kept = not seen or keep_graph()  # a compiler that traces this cannot follow the question
    if not kept and may_read(upstream) and upstream.item() == 1.0:
        return [None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes)]

    def scaled(gradient: Tensor, dtype: torch.dtype) -> Tensor:
        if seen and gradient.dtype != dtype and _rounds_at_once(gradient):
            return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))
        return (gradient * upstream if kept else gradient.mul_(upstream)).to(dtype)

    return [None if g is None else scaled(g, dtype) for g, dtype in zip(gradients, dtypes)]


def _rounds_at_once(gradient: Tensor) -> bool:
    """Whether a product is rounded to another dtype as it is written; on a CPU it is made whole first."""
    return gradient.device.type != "cpu"
