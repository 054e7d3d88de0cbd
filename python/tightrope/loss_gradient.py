"""The gradient of a chunked loss as a Function with a derivative of its own: what create_graph=True gives.

The forward pass of a chunked loss made statistics and gradients, as numbers. So a graph of the gradients
costs nothing until a derivative of theirs is asked for. Then one sweep along the direction makes those of all
of them (`strategies.row_losses`): seven products where hidden states and head move, and the workspace holds
chunks of good size. Where that derivative is to be differentiated in turn, or a direction has no values, the
loss is taken once more as a function of the statistics, whose derivatives are Functions (`derivatives`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import Function

from .ambient import has_values
from .arguments import LinearArguments
from .derivatives import refuse_shared
from .statistics import RowStats
from .strategies import row_losses, tangent_ops
from .strategies.products import Needs
from .strategies.row_losses import MovingLoss, weighed
from .strategies.tangents import Direction

Values = tuple[Tensor | None, ...]
# Input, weight, bias and temperature.
_THETA = 4


class Recipe:
    """What a chunked loss is, beside what it is differentiated by.

    function: of the statistics and values of rows (`row_losses.weighed`). constants: the last of these, by
    which it is not differentiated. statistics: of (input, weight, bias, arguments), to be differentiated.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        constants: Values,
        arguments: LinearArguments,
        statistics: Callable[..., RowStats],
    ):
        self.function, self.constants, self.arguments = function, constants, arguments
        self.statistics = statistics
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        tensors = (*self.constants, *self.arguments.tensors())
        return [t._version for t in tensors if t is not None and not t.is_inference()]

    def check_unchanged(self) -> None:
        """Raise RuntimeError where a tensor was overwritten: it would be another loss's derivative."""
        if self._versions() != self.versions:
            raise RuntimeError(
                "tightrope: a target, or another tensor that a loss was called with, was modified in place "
                "before its backward with create_graph=True; expected it as it was"
            )


@dataclass(frozen=True)
class Sources:
    """What a chunked loss is differentiated by.

    of_rows: values of rows [N, ...] each, the scale of their losses first. theta: input [N, D],
    weight [V, D], bias [V] and temperature [N].
    """

    of_rows: Values
    theta: Values

    @classmethod
    def of(cls, flat: Values) -> Sources:
        return cls(tuple(flat[:-_THETA]), tuple(flat[-_THETA:]))

    def flat(self) -> Values:
        return *self.of_rows, *self.theta


class LossGradient(Function):
    """(recipe, upstream, summary, argmax, *gradients, *sources) -> the gradients times upstream, in the
    sources' dtypes.

    upstream: of the loss, 0-dimensional. gradients: for an upstream of 1, in the order of `Sources`; None
    where not wanted.
    """

    @staticmethod
    def forward(ctx, recipe, upstream, summary, argmax, *flat):
        gradients, sources = flat[: len(flat) // 2], flat[len(flat) // 2 :]
        ctx.recipe = recipe
        ctx.save_for_backward(upstream, summary, argmax, *sources)
        ctx.set_materialize_grads(False)
        # A new tensor even for an upstream of 1: that of another backward is not to be written to.
        return tuple(None if g is None else (g * upstream).to(s.dtype) for g, s in zip(gradients, sources))

    @staticmethod
    def backward(ctx, *along):
        upstream, summary, argmax, *flat = ctx.saved_tensors
        recipe, sources, along = ctx.recipe, Sources.of(flat), Sources.of(along)
        refuse_shared(recipe.arguments)
        recipe.check_unchanged()
        wanted = ctx.needs_input_grad[1], Sources.of(ctx.needs_input_grad[-len(flat) :])
        given = [d for d in along.flat() if d is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() or not all(map(has_values, (*given, upstream))):
            to_upstream, *rest = _with_graph(recipe, upstream, sources, along, wanted)
        else:
            to_upstream, *rest = _at_once(recipe, upstream, summary, argmax, sources, along, wanted)
        return None, to_upstream, None, None, *(None,) * len(flat), *rest


def _at_once(
    recipe: Recipe,
    upstream: Tensor,
    summary: Tensor,
    argmax: Tensor,
    sources: Sources,
    along: Sources,
    wanted: tuple[bool, Sources],
) -> Values:
    """The derivatives of upstream and of the sources, of those wanted, as numbers."""
    constant = (None,) * len(recipe.constants)
    *theta, temperature = sources.theta
    arguments = replace(recipe.arguments, temperature=temperature)
    loss = MovingLoss.of(
        recipe.function,
        upstream,
        argmax,
        arguments.valid,
        (*sources.of_rows, *recipe.constants),
        (*along.of_rows, *constant),
        (*wanted[1].of_rows, *(False for _ in constant)),
    )
    direction, needs = Direction(*along.theta), Needs(*wanted[1].theta)
    problem = tangent_ops.moving_problem(*theta, arguments)
    gradients = row_losses.curvature(problem, summary, loss, direction, needs, arguments.budget)
    return loss.to_scale, *loss.to_rows[: len(sources.of_rows)], *gradients.flat()


def gradients_by_statistics(
    recipe: Recipe, upstream: Tensor, sources: Sources, wanted: tuple[bool, ...]
) -> tuple[Values, Sources]:
    """The gradients of the loss with their graph, and what that graph begins with: views of the sources.

    Views, as one of the sources may follow from another, whose gradient is then not to be seen.
    """
    views = Sources.of(tuple(None if s is None else s.view_as(s) for s in sources.flat()))
    *theta, temperature = views.theta
    stats = recipe.statistics(*theta, replace(recipe.arguments, temperature=temperature))
    values = (*views.of_rows, *recipe.constants)
    total = weighed(recipe.function, stats, values, recipe.arguments.valid).sum()
    leaves = [s for s, want in zip(views.flat(), wanted) if want]
    found = iter(torch.autograd.grad(total, leaves, upstream, create_graph=True, materialize_grads=True))
    return tuple(next(found) if want else None for want in wanted), views


def _with_graph(
    recipe: Recipe, upstream: Tensor, sources: Sources, along: Sources, wanted: tuple[bool, Sources]
) -> Values:
    """As `_at_once`, as far as the graph goes that is recorded."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        scale = upstream.view_as(upstream)
        asked = tuple(d is not None for d in along.flat())
        gradients, views = gradients_by_statistics(recipe, scale, sources, asked)
        pairs = [(g, d) for g, d in zip(gradients, along.flat()) if g is not None and g.requires_grad]
        flags = wanted[0], *wanted[1].flat()
        leaves = [x for x, want in zip((scale, *views.flat()), flags) if want]
        found = [None] * len(leaves)
        if pairs:
            outputs, directions = zip(*pairs)
            found = torch.autograd.grad(outputs, leaves, directions, create_graph=graph, allow_unused=True)
    found = iter(found)
    return tuple(next(found) if want else None for want in flags)
