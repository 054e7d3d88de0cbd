"""The autograd Functions: they save tensors, call the drivers, and scale what comes back.

`ChunkedLoss` and `CustomChunkedLoss` make the gradients in the forward pass, for a loss that is one number;
`LinearVocabStats` and `LogitsVocabStats` make the statistics, and the gradients when the upstream gradients
of the statistics arrive. The losses between statistics and result are plain PyTorch, recorded by autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .arguments import LinearArguments, LogitsArguments
from .coefficients import row_coefficients
from .losses import RealityCreativity
from .statistics import RowStats, StatGrads, row_stats
from .strategies import chunked, ops
from .strategies.chunked import Needs

# Of the statistics' fields, those that have a gradient, in the order of RowStats.
_FLOATING = [name for name in RowStats._fields if name != "argmax"]


def _stat_grads(grads: tuple[Tensor | None, ...]) -> StatGrads:
    named = dict(zip(RowStats._fields, grads))
    return StatGrads(**{name: named[name] for name in _FLOATING})


def _wanted(gradients, needed) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(gradients, needed))


def _none(ctx, after: int) -> tuple[None, ...]:
    """The gradients of the arguments after so many: none has one."""
    return (None,) * (len(ctx.needs_input_grad) - after)


class LinearVocabStats(Function):
    """(input [N, D], weight [V, D], bias [V], *LinearArguments) -> the fields of RowStats, [N] each."""

    @staticmethod
    def forward(ctx, input, weight, bias, *flat):
        arguments = LinearArguments(*flat)
        summary, argmax = ops.linear_stats(input, weight, bias, arguments)
        ctx.save_for_backward(summary, input, weight, bias, *arguments.tensors())
        ctx.others = arguments.others()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(argmax)
        return tuple(row_stats(summary, argmax))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        summary, input, weight, bias, *tensors = ctx.saved_tensors
        arguments = LinearArguments.join(tensors, ctx.others)
        coef = row_coefficients(summary, _stat_grads(grads), weight.shape[0])
        needed = ctx.needs_input_grad[:3]
        gradients = ops.linear_stats_backward(summary, coef, Needs(*needed), input, weight, bias, arguments)
        return *_wanted(gradients, needed), *_none(ctx, 3)


class LogitsVocabStats(Function):
    """(logits [N, V], *LogitsArguments) -> the fields of RowStats, [N] each."""

    @staticmethod
    def forward(ctx, logits, *flat):
        arguments = LogitsArguments(*flat)
        summary, argmax = ops.logits_stats(logits, arguments)
        ctx.save_for_backward(summary, logits, *arguments.tensors())
        ctx.others = arguments.others()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(argmax)
        return tuple(row_stats(summary, argmax))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        summary, logits, *tensors = ctx.saved_tensors
        arguments = LogitsArguments.join(tensors, ctx.others)
        coef = row_coefficients(summary, _stat_grads(grads), logits.shape[1])
        return ops.logits_stats_backward(summary, coef, logits, arguments), *_none(ctx, 1)


class ChunkedLoss(Function):
    """``sum(row_scale * loss)`` of the built-in losses, with its gradients made in the forward pass.

    (row_scale [N], balance [N], target_square [N], family, input [N, D], weight [V, D], bias [V],
    *LinearArguments) -> (loss, summary [SUMMARY, N], argmax [N]); only the loss has a gradient.
    """

    @staticmethod
    def forward(ctx, row_scale, balance, target_square, family, input, weight, bias, *flat):
        needed = ctx.needs_input_grad[4:7]
        row_loss, summary, argmax, *gradients, to_balance = ops.linear_loss(
            row_scale,
            balance,
            target_square,
            RealityCreativity(*family),
            Needs(*needed),
            input,
            weight,
            bias,
            LinearArguments(*flat),
        )
        to_input, to_weight, to_bias = _wanted(gradients, needed)
        ctx.save_for_backward(row_loss, to_balance, to_input, to_weight, to_bias)
        ctx.dtypes = [None if t is None else t.dtype for t in (row_scale, balance, input, weight, bias)]
        ctx.mark_non_differentiable(summary, argmax)
        return (row_scale * row_loss).sum(), summary, argmax

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        needs = ctx.needs_input_grad
        needed = (*needs[:2], *needs[4:7])
        scaled = _scale(_wanted(ctx.saved_tensors, needed), ctx.dtypes, upstream)
        return *scaled[:2], None, None, *scaled[2:], *_none(ctx, 7)


class CustomChunkedLoss(Function):
    """`ChunkedLoss` for a user's loss: (loss_fn, row_scale, input, weight, bias, arguments, *row_args)."""

    @staticmethod
    def forward(ctx, loss_fn, row_scale, input, weight, bias, arguments, *row_args):
        problem = ops.linear_problem(input, weight, bias, arguments)
        upstream = _differentiate(loss_fn, row_scale, row_args, ctx.needs_input_grad[6:])
        with ops.no_autocast(input.device):
            result = chunked.loss_and_gradients(
                problem, upstream, Needs(*ctx.needs_input_grad[2:5]), arguments.workspace
            )
        # Without a single row that counts, loss_fn was never called.
        to_args = result.args or tuple(torch.zeros_like(a) for a in row_args)
        ctx.save_for_backward(result.row_loss, result.input, result.weight, result.bias, *to_args)
        ctx.dtypes = [None if t is None else t.dtype for t in (row_scale, input, weight, bias, *row_args)]
        ctx.mark_non_differentiable(result.summary, result.argmax)
        return (row_scale * result.row_loss).sum(), result.summary, result.argmax

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        needs = ctx.needs_input_grad
        needed = (*needs[1:5], *needs[6:])
        scaled = _scale(_wanted(ctx.saved_tensors, needed), ctx.dtypes, upstream)
        return None, *scaled[:4], None, *scaled[4:]


def _scale(gradients, dtypes, upstream: Tensor) -> list[Tensor | None]:
    """Each gradient times the upstream one, then rounded to its tensor's dtype: once.

    The saved gradients are scaled in place only where nobody can see them again, that is where the graph
    is freed after this backward. A second backward through a kept graph so gets the right answer, and an
    ordinary one holds no second gradient of the head.
    """
    if torch.compiler.is_compiling():
        return [None if g is None else (g * upstream).to(t) for g, t in zip(gradients, dtypes)]
    if getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)():
        scaled = [None if g is None else g * upstream for g in gradients]
    elif upstream.device.type == "cpu" and upstream.item() == 1.0:
        scaled = gradients
    else:
        scaled = [None if g is None else g.mul_(upstream) for g in gradients]
    return [None if g is None else g.to(t) for g, t in zip(scaled, dtypes)]


def _differentiate(
    loss_fn: Callable, row_scale: Tensor, row_args: tuple[Tensor, ...], args_need: tuple[bool, ...]
):
    """A user's loss as the chunk loop wants it: autograd gives the gradients of the statistics."""

    def upstream(stats: RowStats, chunk):
        with torch.enable_grad():
            leaves = {name: getattr(stats, name).detach().requires_grad_() for name in _FLOATING}
            args = [arg.detach()[chunk.where].requires_grad_(need) for arg, need in zip(row_args, args_need)]
            loss = loss_fn(stats._replace(**leaves), *args)
            check_row_loss(loss, chunk.size)
            inputs = [*leaves.values(), *(a for a in args if a.requires_grad)]
            if loss.requires_grad:
                _refuse_captured(loss, inputs)
                total = (loss * row_scale[chunk.where]).sum()
                grads = torch.autograd.grad(total, inputs, allow_unused=True)
            else:
                grads = [None] * len(inputs)
        to_stats = StatGrads(*grads[: len(leaves)])
        rest = iter(grads[len(leaves) :])
        to_args = []
        for arg in args:
            grad = next(rest) if arg.requires_grad else None
            to_args.append(torch.zeros_like(arg) if grad is None and arg.requires_grad else grad)
        return loss.detach(), to_stats, tuple(to_args)

    return upstream


def check_row_loss(loss: object, rows: int) -> None:
    """Raise unless a user's loss_fn gave one number a row."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: returned {type(loss).__name__}, expected a tensor of shape [{rows}]")
    if loss.shape != (rows,):
        raise ValueError(
            f"loss_fn: returned a tensor of shape {list(loss.shape)}, expected [{rows}]: one loss a row"
        )


def _refuse_captured(loss: Tensor, inputs: list[Tensor]) -> None:
    """Raise where the loss depends on a tensor that requires grad and is not among the inputs.

    The gradients are made here, in the forward pass, so such a tensor would silently get none.
    """
    known = {id(t) for t in inputs}
    seen, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"loss_fn: depends on a tensor of shape {list(leaf.shape)} that requires grad and is not in "
                'row_args; expected it in row_args, or strategy="streaming"'
            )
        queue.extend(parent for parent, _ in node.next_functions)
