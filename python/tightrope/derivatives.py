"""The derivatives of row statistics as autograd Functions: what second order and torch.func are made of.

With s the statistics of values theta (hidden states, head and bias, or logits, and temperatures), J their
Jacobian and H_g the Hessian of ``<g, s>``, four Functions are closed under one derivative more:

    VocabStats      s              backward: StatsGradient     forward mode: StatsTangent
    StatsGradient   J^T g          backward: StatsCurvature (theta), StatsTangent (g)
    StatsTangent    J v            backward: StatsCurvature (theta), StatsGradient (v)
    StatsCurvature  H_g v          a derivative of it is of third order, and an error

What a loss does with the statistics is PyTorch's on vectors of rows. First order alone takes the Functions of
`autograd`, which save less and cost less.

Each takes plain tensors: (..., input [N, D] or logits [N, V], weight [V, D], bias [V], *arguments), where the
arguments are `LinearArguments`, or without a weight `LogitsArguments`. The summary that they are given
follows from these, and no gradient goes to it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import Function

from .ambient import differentiable
from .arguments import LogitsArguments
from .coefficients import row_coefficients
from .statistics import FLOATING, StatGrads, row_stats
from .strategies import ops, soft, soft_ops, tangent_ops
from .strategies.products import Needs
from .strategies.tangents import Direction
from .theta import (
    Saved,
    constants,
    fields_of,
    grads_of_summary,
    group_of,
    kept,
    mass_needed,
    mass_of,
    of_arguments,
    of_summary,
    of_theta,
    other_tangents,
    refuse_mixture,
    spread,
    statistics,
    upstream_of,
    values_of,
)
from .vectorize import COLUMNS, ROWS, THETA, TOKENS, batched, of_values

_GRADS = len(StatGrads._fields)
_THIRD = (
    "tightrope: got a derivative of third order (of what a gradient's derivative gave), expected second "
    "order at most; for that part of a loss take F.cross_entropy of logits"
)
_FORWARD_TWICE = (
    "tightrope: got forward-mode differentiation of forward mode, expected it of a gradient by backward: "
    "jacfwd(jacrev(f)), or jvp(grad(f))"
)
_MASSES_TWICE = (
    "tightrope: got a derivative of a gradient by a target's probabilities, or of these in forward mode, "
    "expected one of first order by backward; for that part of a loss take F.cross_entropy of logits"
)
_SHARED = (
    "tightrope: got a derivative of a gradient, or forward mode, with vocab_parallel, expected gradients of "
    "first order where ranks hold the vocabulary together"
)


def refuse_shared(arguments: LogitsArguments) -> None:
    """Raise RuntimeError where ranks hold the vocabulary together."""
    if arguments.group is not None:
        raise RuntimeError(_SHARED)


def _refuse_tangents_of_targets(tangents: tuple, weight: Tensor | None) -> None:
    if other_tangents(tangents, weight):
        raise RuntimeError(_MASSES_TWICE)


def pulled_back(
    flags: tuple, mass: bool, summary: Tensor, grads: StatGrads, values: tuple, arguments: LogitsArguments
) -> tuple[Tensor | None, ...]:
    """The gradients of (input, weight, bias, *arguments), which can be differentiated.

    flags: which of them are wanted; mass: whether those of the target's masses are.
    """
    refuse_mixture(arguments)
    needed = of_theta(flags, values[1])
    name, guarded = mass_of(arguments), arguments
    if name is not None and differentiable():
        guarded = replace(arguments, **{name: _MassOnce.apply(getattr(arguments, name))})
    gradients = (None,) * 4
    if any(needed):
        gradients = StatsGradient.apply(needed, summary, *grads, *values, *guarded.flat())
    to_mass = None
    if mass:
        slopes = soft.slopes(grads, summary)
        to_mass = MassGradient.apply(summary, *slopes, *values, *arguments.flat())
    return of_arguments(gradients, arguments, to_mass)


class VocabStats(Function):
    """(input, weight, bias, *arguments) -> (the fields of RowStats [N] each, summary).

    The fields of a set of classes, and of a teacher, are there where one is given.
    """

    @staticmethod
    def forward(input, weight, bias, *flat):
        arguments = group_of(weight)(*flat)
        refuse_mixture(arguments)
        operator = ops.logits_stats if weight is None else ops.linear_stats
        summary, argmax = operator(*values_of(input, weight, bias), arguments)
        return *statistics(summary, argmax), summary

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, *flat = inputs
        ctx.mark_non_differentiable(*constants(output, group_of(weight)(*flat)), output[-1])
        Saved.save(ctx, output[-1:], input, weight, bias, flat)

    @staticmethod
    def backward(ctx, *grads):
        (summary,), values, arguments = Saved.load(ctx)
        wanted = ctx.needs_input_grad, mass_needed(ctx, 3, arguments)
        return pulled_back(*wanted, summary, upstream_of(grads[:-1], arguments), values, arguments)

    @staticmethod
    def jvp(ctx, *tangents):
        (summary,), values, arguments = Saved.load(ctx)
        _refuse_tangents_of_targets(tangents, values[1])
        direction = of_theta(tangents, values[1])
        (tangent,) = StatsTangent.apply(summary, *direction, *values, *arguments.flat())
        moved = row_stats(tangent, None)
        return *(getattr(moved, n) if n in FLOATING else None for n in fields_of(arguments)), None

    @staticmethod
    def vmap(info, dims, *given):
        arguments = group_of(given[1])(*given[3:])
        outputs = (*(ROWS for _ in fields_of(arguments)), COLUMNS)
        return batched(VocabStats, info.batch_size, dims, given, of_values(type(arguments)), outputs)


class StatsGradient(Function):
    """(needs, summary, *StatGrads, input, weight, bias, *arguments) -> gradients of `of_theta`, or None.

    needs: which of them are wanted.
    """

    @staticmethod
    def forward(needs, summary, *rest):
        grads, (input, weight, bias, *flat) = rest[:_GRADS], rest[_GRADS:]
        arguments = group_of(weight)(*flat)
        here = input.shape[1] if weight is None else weight.shape[0]
        coef = row_coefficients(summary, StatGrads(*grads), arguments.vocab_size(here))
        if weight is None:
            gradients = ops.logits_stats_backward(summary, coef, needs[3], input, arguments)
        else:
            gradients = ops.linear_stats_backward(
                summary, coef, Needs(*needs), input, weight, bias, arguments
            )
        return kept(spread(gradients, weight), needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        needs, summary, *rest = inputs
        grads, (input, weight, bias, *flat) = rest[:_GRADS], rest[_GRADS:]
        ctx.wanted = needs
        Saved.save(ctx, (summary, *grads), input, weight, bias, flat)

    @staticmethod
    def backward(ctx, *direction):
        (summary, *grads), values, arguments = Saved.load(ctx)
        to_grads, to_theta = ctx.needs_input_grad[2 : 2 + _GRADS], ctx.needs_input_grad[2 + _GRADS :]
        needed = of_theta(to_theta, values[1])
        if all(along is None for along in direction):
            return (None,) * len(ctx.needs_input_grad)
        gradients, tangent = _second(needed, summary, grads, (None,) * _GRADS, direction, values, arguments)
        return None, None, *kept(of_summary(tangent), to_grads), *of_arguments(gradients, arguments)

    @staticmethod
    def jvp(ctx, *tangents):
        (summary, *grads), values, arguments = Saved.load(ctx)
        moved, theta = tangents[2 : 2 + _GRADS], tangents[2 + _GRADS :]
        _refuse_tangents_of_targets(theta, values[1])
        direction = of_theta(theta, values[1])
        gradients, _ = _second(ctx.wanted, summary, grads, moved, direction, values, arguments)
        return gradients

    @staticmethod
    def vmap(info, dims, *given):
        values = of_values(group_of(given[3 + _GRADS]))
        kinds = (None, COLUMNS, *(ROWS,) * _GRADS, *values)
        return batched(StatsGradient, info.batch_size, dims, given, kinds, THETA, given[0])


class _Last(Function):
    """The same tensor, whose gradient is an error: what is of third order depends on it.

    An error of a node of its own, as of what depends on a tensor only some may be asked for.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_THIRD)

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(_THIRD)


class _MassOnce(_Last):
    """The same of a target's masses: a gradient depends on them, whose derivative by them is not offered."""

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_MASSES_TWICE)

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(_MASSES_TWICE)


def _last(tensors):
    if not differentiable():
        return tensors
    return [_Last.apply(t) if t is not None and t.is_floating_point() else t for t in tensors]


def _second(
    needed, summary, grads, moved, direction, values, arguments
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """The derivatives of the gradients, of those that are needed, and of the summary.

    They can be differentiated by what they are linear in, the direction and `moved`, and by nothing else.
    """
    refuse_shared(arguments)
    if not any(needed):
        (tangent,) = StatsTangent.apply(summary, *direction, *values, *arguments.flat())
        return (None,) * 4, tangent
    (temperature,) = _last([arguments.temperature])
    flat = replace(arguments, temperature=temperature).flat()
    *gradients, tangent = StatsCurvature.apply(
        needed, summary, *_last(grads), *moved, *direction, *_last(values), *flat
    )
    return tuple(gradients), tangent


class MassGradient(Function):
    """(summary, three upstream gradients as in `soft.slopes`, input, weight, bias, *arguments) -> that of a
    target's masses: of a distribution (..., V), or of top-k probabilities [N, K].
    """

    @staticmethod
    def forward(summary, *rest):
        slopes, (input, weight, bias, *flat) = rest[:3], rest[3:]
        operator = soft_ops.logits_target_grad if weight is None else soft_ops.linear_target_grad
        values = values_of(input, weight, bias)
        return operator(summary, torch.stack(slopes), *values, group_of(weight)(*flat))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_MASSES_TWICE)

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(_MASSES_TWICE)

    @staticmethod
    def vmap(info, dims, *given):
        arguments = group_of(given[5])(*given[7:])
        kinds = (COLUMNS, ROWS, ROWS, ROWS, *of_values(type(arguments)))
        output = TOKENS if mass_of(arguments) == "dense" else ROWS
        (out,), (place,) = batched(MassGradient, info.batch_size, dims, given, kinds, (output,))
        return out, place


class StatsTangent(Function):
    """(summary, *Direction, input, weight, bias, *arguments) -> (derivative of the summary,)."""

    @staticmethod
    def forward(summary, *rest):
        direction, (input, weight, bias, *flat) = rest[:4], rest[4:]
        operator = tangent_ops.logits_tangent if weight is None else tangent_ops.linear_tangent
        values = values_of(input, weight, bias)
        return (operator(summary, Direction(*direction), *values, group_of(weight)(*flat)),)

    @staticmethod
    def setup_context(ctx, inputs, output):
        summary, *rest = inputs
        direction, (input, weight, bias, *flat) = rest[:4], rest[4:]
        Saved.save(ctx, (summary, *direction), input, weight, bias, flat)

    @staticmethod
    def backward(ctx, upstream):
        (summary, *direction), values, arguments = Saved.load(ctx)
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        to_direction, to_theta = ctx.needs_input_grad[1:5], ctx.needs_input_grad[5:]
        grads = grads_of_summary(upstream)
        along = to_theta_grads = (None,) * 4
        if any(to_direction):
            along = StatsGradient.apply(to_direction, summary, *grads, *values, *arguments.flat())
        needed = of_theta(to_theta, values[1])
        if any(needed):
            to_theta_grads, _ = _second(
                needed, summary, grads, (None,) * _GRADS, direction, values, arguments
            )
        return None, *along, *of_arguments(to_theta_grads, arguments)

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(_FORWARD_TWICE)

    @staticmethod
    def vmap(info, dims, *given):
        kinds = (COLUMNS, *THETA, *of_values(group_of(given[6])))
        return batched(StatsTangent, info.batch_size, dims, given, kinds, (COLUMNS,))


class StatsCurvature(Function):
    """(needs, summary, *StatGrads, *StatGrads, *Direction, input, weight, bias, *arguments) ->
    (derivatives of the gradients of `of_theta`, or None; derivative of the summary).

    Along the direction, where the first upstream gradients move by the second.
    """

    @staticmethod
    def forward(needs, summary, *rest):
        grads, moved, direction, (input, weight, bias, *flat) = (
            rest[:_GRADS],
            rest[_GRADS : 2 * _GRADS],
            rest[2 * _GRADS : 2 * _GRADS + 4],
            rest[2 * _GRADS + 4 :],
        )
        operator = tangent_ops.logits_curvature if weight is None else tangent_ops.linear_curvature
        *gradients, tangent = operator(
            summary,
            *tangent_ops.packed(grads, summary),
            *tangent_ops.packed(moved, summary),
            Direction(*direction),
            Needs(*needs),
            *values_of(input, weight, bias),
            group_of(weight)(*flat),
        )
        return *kept(spread(tuple(gradients), weight), needs), tangent

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, summary, *rest = inputs
        own, (input, weight, bias, *flat) = rest[: 2 * _GRADS + 4], rest[2 * _GRADS + 4 :]
        Saved.save(ctx, (summary, *own), input, weight, bias, flat)

    @staticmethod
    def backward(ctx, *upstream):
        (summary, *own), values, arguments = Saved.load(ctx)
        *along, upstream_of_summary = upstream
        first = 2 + _GRADS
        to_moved, to_direction = (
            ctx.needs_input_grad[first : first + _GRADS],
            ctx.needs_input_grad[first + _GRADS : first + _GRADS + 4],
        )
        gradients, moved = [None] * 4, (None,) * _GRADS
        if any(w is not None for w in along):
            # A Hessian is symmetric.
            gradients, tangent = _second(to_direction, summary, own[:_GRADS], moved, along, values, arguments)
            moved = kept(of_summary(tangent), to_moved)
        if upstream_of_summary is not None and any(to_direction):
            grads = grads_of_summary(upstream_of_summary)
            others = StatsGradient.apply(to_direction, summary, *grads, *values, *arguments.flat())
            gradients = [b if a is None else a if b is None else a + b for a, b in zip(gradients, others)]
        return None, None, *(None,) * _GRADS, *moved, *gradients, *(None,) * (3 + len(arguments._names))

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(_THIRD)

    @staticmethod
    def vmap(info, dims, *given):
        values = of_values(group_of(given[2 + 2 * _GRADS + 5]))
        kinds = (None, COLUMNS, *(ROWS,) * 2 * _GRADS, *THETA, *values)
        outputs = (*THETA, COLUMNS)
        return batched(StatsCurvature, info.batch_size, dims, given, kinds, outputs, (*given[0], True))
