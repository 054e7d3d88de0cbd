"""A sum of losses of rows along a direction, all of it in one sweep over the vocabulary.

A loss of the statistics has, beside hidden states and head, values of its rows: weights, a balance, a user's
arguments. Where all of these move, the derivative of its gradient needs that of the upstream gradients of the
statistics, which follows from the statistics' own. Chunk by chunk that is known as soon as logits and
direction are made: so the loss is differentiated there, by PyTorch on the chunk's rows, and no second sweep
brings back what its curvature sends to the statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import RealityCreativity
from ..statistics import FLOATING, RowStats, StatGrads, row_stats
from . import tangents
from .ops import exact_products
from .own import evaluate
from .problem import LinearProblem
from .products import Gradients, Needs
from .tangents import Direction, Upstream


@dataclass(frozen=True)
class BuiltIn:
    """The built-in losses, of (balance [N], target_square [N] or None)."""

    family: RealityCreativity

    def __call__(self, stats: RowStats, balance: Tensor, target_square: Tensor | None) -> Tensor:
        return self.family(stats, balance, target_square)


@dataclass(frozen=True)
class Own:
    """A user's loss, of its row_args."""

    loss_fn: Callable[..., Tensor]
    has_target: bool

    def __call__(self, stats: RowStats, *row_args: Tensor) -> Tensor:
        return evaluate(self.loss_fn, stats, row_args, self.has_target)


def weighed(
    function: BuiltIn | Own, stats: RowStats, of_rows: tuple[Tensor | None, ...], valid: Tensor | None
) -> Tensor:
    """What each row adds to the sum [n]. of_rows: their scale [n], and the loss's other values."""
    scale, *others = of_rows
    loss = function(stats, *others)
    if valid is not None:
        loss = torch.where(valid, loss, 0.0)
    return scale * loss


@dataclass(frozen=True)
class MovingLoss:
    """``scale * sum(weighed(...))`` where its rows' values move, as the drivers take their `UpstreamOf`.

    Each call adds what these rows contribute to the derivatives of the gradients: of the rows' values, that
    are wanted, and of the scale.
    """

    function: BuiltIn | Own
    scale: Tensor  # 0-dimensional
    argmax: Tensor  # [N]
    valid: Tensor | None  # [N] bool; None: all
    of_rows: tuple[Tensor | None, ...]  # [N, ...] each
    moved: tuple[Tensor | None, ...]  # their direction; None: they rest
    to_rows: tuple[Tensor | None, ...]  # [N, ...] each, zeros at first; None: not wanted
    to_scale: Tensor  # 0-dimensional, 0 at first

    @classmethod
    def of(cls, function, scale, argmax, valid, of_rows, moved, wanted: tuple[bool, ...]) -> MovingLoss:
        to_rows = tuple(torch.zeros_like(x) if want else None for x, want in zip(of_rows, wanted))
        return cls(function, scale, argmax, valid, of_rows, moved, to_rows, torch.zeros_like(scale))

    def __call__(self, where: slice | Tensor, summary: Tensor, tangent: Tensor) -> Upstream:
        stats, along = row_stats(summary, self.argmax[where]), row_stats(tangent, None)
        valid = None if self.valid is None else self.valid[where]
        names = [name for name in FLOATING if getattr(stats, name) is not None]
        rows = [None if x is None else x.detach()[where] for x in self.of_rows]
        moving = [i for i, x in enumerate(rows) if x is not None and x.is_floating_point()]
        leaves = [*(getattr(stats, name).detach() for name in names), *(rows[i] for i in moving)]
        direction = [getattr(along, name) for name in names]
        direction += [None if self.moved[i] is None else self.moved[i][where] for i in moving]
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_()
            given = stats._replace(**dict(zip(names, leaves)))
            first = _gradients(weighed(self.function, given, tuple(rows), valid).sum(), leaves, valid)
            parts = [g * d for g, d in zip(first, direction) if g is not None and d is not None]
            change = sum((part.sum() for part in parts), start=torch.zeros_like(self.scale))
            second = _gradients(change, leaves, valid)
        self.to_scale.add_(change.detach())
        for i, value in zip(moving, second[len(names) :]):
            if self.to_rows[i] is not None and value is not None:
                self.to_rows[i][where] = value * self.scale
        grads, moved = (
            StatGrads(**{n: None if g is None else g.detach() * self.scale for n, g in zip(names, of_stats)})
            for of_stats in (first, second)
        )
        return Upstream(grads, moved)


def _gradients(total: Tensor, leaves: list[Tensor], valid: Tensor | None) -> list[Tensor | None]:
    """Of a total by values of rows [n, ...], with their graph; 0 where a row does not count, not NaN."""
    if not total.requires_grad:
        return [None] * len(leaves)
    found = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    if valid is None:
        return list(found)
    return [None if g is None else g.masked_fill(~valid.view(-1, *(1,) * (g.dim() - 1)), 0.0) for g in found]


def curvature(
    problem: LinearProblem,
    summary: Tensor,
    loss: MovingLoss,
    direction: Direction,
    needs: Needs,
    workspace: int,
) -> Gradients:
    """The derivatives of the gradients of a loss along a direction, in the tensors' dtypes.

    loss: gets those of its rows' values and scale.
    """
    with exact_products(problem.device):
        gradients, _ = tangents.curvature(problem, summary, loss, direction, needs, workspace)
    return gradients
