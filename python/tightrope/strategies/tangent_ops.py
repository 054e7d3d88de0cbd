"""The drivers of second order as dispatcher operators, as `ops` has those of first order.

``linear_tangent`` and ``logits_tangent`` give the derivative of the statistics along a direction, the two
``_curvature`` operators that of their gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import LinearArguments, LogitsArguments, Signature
from ..statistics import StatGrads
from . import dense, ops, tangents
from .problem import LinearProblem
from .products import Needs
from .tangents import Direction, Upstream

# Upstream gradients of the statistics and where they move, each as those that there are [k, N] and which.
_GRADS = ("Tensor grads", "int[] named", "Tensor grads_tangent", "int[] named_tangent")
_GRADIENTS = "Tensor to_input, Tensor to_weight, Tensor to_bias, Tensor to_temperature"


def packed(grads: StatGrads, like: Tensor) -> tuple[Tensor, list[int]]:
    """Those that there are, [k, N], and which fields of `StatGrads` they are; like: a summary [SUMMARY, N].

    A list of tensors would not do: what batches a backward (is_grads_batched) does not look into it.
    """
    given = [(i, g) for i, g in enumerate(grads) if g is not None]
    if not given:
        return like[:0], []
    return torch.stack([g for _, g in given]), [i for i, _ in given]


def _unpacked(grads: Tensor, named: list[int]) -> StatGrads:
    return StatGrads(**{StatGrads._fields[i]: g for i, g in zip(named, grads)})


def _linear_tangent(summary, direction: Direction, input, weight, bias, arguments: LinearArguments):
    """The derivative of the summary [SUMMARY, N]."""
    problem = moving_problem(input, weight, bias, arguments)
    with ops.exact_products(input.device):
        return tangents.tangent(problem, summary, direction, arguments.budget)


def _linear_curvature(
    summary,
    grads,
    named,
    grads_tangent,
    named_tangent,
    direction: Direction,
    needs: Needs,
    input,
    weight,
    bias,
    arguments,
):
    """The derivatives of the gradients of input, weight, bias and temperature, and of the summary.

    grads, grads_tangent: the upstream gradients of the statistics and where they move, `packed`.
    """
    problem = moving_problem(input, weight, bias, arguments)
    upstream = Upstream(_unpacked(grads, named), _unpacked(grads_tangent, named_tangent))
    with ops.exact_products(input.device):
        gradients, tangent = tangents.curvature(
            problem, summary, upstream, direction, needs, arguments.budget
        )
    return *ops.given(gradients.flat(), input), tangent


def _linear_curvature_fake(
    summary, grads, named, grads_tangent, named_tangent, direction, needs, input, weight, bias, arguments
):
    return *ops.fake_gradients(needs, input, weight, bias, arguments), torch.empty_like(summary)


def moving_problem(input, weight, bias, arguments: LinearArguments) -> LinearProblem:
    """`ops.linear_problem`, for products along a direction."""
    problem = ops.linear_problem(input, weight, bias, arguments)
    # A direction may have any size, so no scale would keep its products within float16.
    return problem.in_arithmetic() if problem.operand == torch.float16 else problem


def _logits_tangent(summary, direction: Direction, logits, arguments: LogitsArguments):
    with ops.exact_products(logits.device):
        return dense.tangent(ops.logits_problem(logits, arguments), summary, direction)


def _logits_curvature(
    summary,
    grads,
    named,
    grads_tangent,
    named_tangent,
    direction: Direction,
    needs: Needs,
    logits,
    arguments: LogitsArguments,
):
    """The derivatives of the gradients of logits and temperature, and of the summary."""
    upstream = Upstream(_unpacked(grads, named), _unpacked(grads_tangent, named_tangent))
    with ops.exact_products(logits.device):
        to_logits, to_temperature, tangent = dense.curvature(
            ops.logits_problem(logits, arguments), summary, upstream, direction, needs
        )
    if to_temperature is not None:
        to_temperature = to_temperature.to(arguments.temperature.dtype)
    return *ops.given((to_logits, to_temperature), logits), tangent


def _logits_curvature_fake(
    summary, grads, named, grads_tangent, named_tangent, direction, needs, logits, arguments
):
    to_temperature = arguments.temperature if needs.temperature_grad else logits.new_empty(0)
    return torch.empty_like(logits), torch.empty_like(to_temperature), torch.empty_like(summary)


def _tangent_fake(summary, *_):
    return torch.empty_like(summary)


linear_tangent = ops.register(
    "linear_tangent",
    Signature("Tensor summary", Direction, *ops.HEAD),
    "Tensor",
    _linear_tangent,
    _tangent_fake,
)
linear_curvature = ops.register(
    "linear_curvature",
    Signature("Tensor summary", *_GRADS, Direction, Needs, *ops.HEAD),
    f"({_GRADIENTS}, Tensor tangent)",
    _linear_curvature,
    _linear_curvature_fake,
)
logits_tangent = ops.register(
    "logits_tangent",
    Signature("Tensor summary", Direction, *ops.LOGITS),
    "Tensor",
    _logits_tangent,
    _tangent_fake,
)
logits_curvature = ops.register(
    "logits_curvature",
    Signature("Tensor summary", *_GRADS, Direction, Needs, *ops.LOGITS),
    "(Tensor to_logits, Tensor to_temperature, Tensor tangent)",
    _logits_curvature,
    _logits_curvature_fake,
)
