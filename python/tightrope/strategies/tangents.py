"""Second order: directional derivatives of the statistics, and of their gradients.

A direction of hidden states and head gives one of the logits, ``vh W^T + h vW^T``, made a tile at a time
beside the logits. Its sums give the derivative of a row's statistics, these that of its coefficients, and the
derivative Gdot of the logits' gradient G follows, as a form of row scalars again. Then
``dh = Gdot W + G vW`` and ``dW = Gdot^T h + G^T vh``.

Where the workspace holds the logits of chunks of good size, logits and direction of a chunk stay in memory
between the two sweeps: seven GEMMs where hidden states and head move. Else the vocabulary goes by in tiles,
twice, and the logits are made again: ten. The direction takes as much memory as the logits, beside them, so
together they may take more than the workspace: GEMMs of half as many rows are slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import Arguments, SideArguments, group
from ..backends.ops import to_raw_gradient
from ..backends.second import to_logits_tangent, to_raw_gradient_tangent
from ..coefficients import coefficient_tangent, row_coefficients
from ..statistics import StatGrads, empty_sums, norm_rows, norm_tangent_rows, summarise_tangent
from . import plan
from .gemm import multiply
from .problem import LinearProblem, LogitsProblem
from .products import Gradients, Needs
from .scored import Chunk
from .streaming import largest, placed, tiled_spans
from .workspace import borrow


@group
class Direction(Arguments):
    """Where hidden states [N, D], head [V, D], bias [V] and temperatures [N] move; None: nowhere."""

    input_tangent: Tensor | None = None
    weight_tangent: Tensor | None = None
    bias_tangent: Tensor | None = None
    temperature_tangent: Tensor | None = None


@dataclass(frozen=True)
class Upstream:
    """The upstream gradients of every row's statistics, [N] each, and where they move."""

    grads: StatGrads
    moved: StatGrads

    def __call__(self, where: slice | Tensor, *_: Tensor) -> Upstream:
        """Those of some rows, whatever their statistics."""
        return Upstream(
            *(StatGrads(*(None if g is None else g[where] for g in x)) for x in (self.grads, self.moved))
        )

    def coefficients(self, summary: Tensor, tangent: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """The coefficients of rows, [7 or 14, n], and their derivative."""
        coef = row_coefficients(summary, self.grads, vocab_size)
        moved = coefficient_tangent(summary, tangent, self.grads)
        if any(g is not None for g in self.moved):
            moved = moved + row_coefficients(summary, self.moved, vocab_size)
        return coef, moved


# A tile of the head, its logits and their gradients have a direction beside them, and all take turns. So a
# tile is as wide as one of so many times the rows is elsewhere.
_IN_CACHE = 4
# Of the workspace, for a chunk's logits; as much again is for their direction.
_SHARE = 0.75
# (which rows, their summary [SUMMARY, n], its derivative) -> the upstream gradients of their statistics.
UpstreamOf = Callable[[slice | Tensor, Tensor, Tensor], Upstream]
# A value, and its derivative along a direction where it has one.
Pair = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Moving:
    """A chunk of rows and where they move."""

    problem: LinearProblem | LogitsProblem
    chunk: Chunk
    norm: Tensor  # [2, n]: maximum and log of the sum; with sets [4, n], of the rest and of the set
    sides: SideArguments
    temperature_tangent: Tensor | None  # [n, 1]

    @classmethod
    def of(
        cls,
        problem: LinearProblem | LogitsProblem,
        chunk: Chunk,
        summary: Tensor,
        temperature_tangent: Tensor | None,
    ) -> Moving:
        """summary: of all rows; temperature_tangent: of all rows [N], or None."""
        norm = norm_rows(summary[:, chunk.where])
        form = problem.form(chunk, norm, norm)
        if temperature_tangent is not None:
            temperature_tangent = temperature_tangent[chunk.where].to(problem.dtype).unsqueeze(-1)
        return cls(problem, chunk, form.norm, form.sides, temperature_tangent)

    def new_sums(self) -> Tensor:
        problem = self.problem
        return empty_sums(self.chunk.size, problem.sets is not None, problem.dtype, problem.device)

    def summary_tangent(self, sums: Tensor, summary: Tensor) -> Tensor:
        """The derivative of the summary of these rows; zeros for rows that do not count."""
        tangent = summarise_tangent(sums, summary, self.problem.vocab_size)
        active = self.chunk.active
        return tangent if active is None else tangent.masked_fill(~active, 0.0)

    def tempered(self, z: Tensor, tangent: Tensor) -> Tensor:
        """The direction of raw values as the row primitives take it; of tempered logits z, in place."""
        chunk, problem = self.chunk, self.problem
        if chunk.temperature is None:
            return tangent
        moved = to_logits_tangent(tangent, z * chunk.temperature, problem.transform)
        if self.temperature_tangent is not None:
            moved = moved - z * self.temperature_tangent
        return tangent.copy_(moved / chunk.temperature)

    def add_sums(self, scored: Tensor, tangent: Tensor, sums: Tensor, tile: tuple[int, int]) -> None:
        problem = self.problem
        arguments = (*self.sides.flat(), *problem.tile_arguments(self.chunk, tile))
        problem.backend.row_tangent(scored, tangent, sums, self.norm, problem.offset + tile[0], *arguments)

    def gradients(
        self,
        scored: Tensor,
        tangent: Tensor,
        out: Tensor | None,
        out_tangent: Tensor,
        form: Form,
        tile: tuple[int, int],
    ) -> None:
        """Write the gradient of raw logits to out, and its derivative to out_tangent.

        They may be what is scored and its tangent. out may be None where rows have no temperatures.
        """
        chunk, problem = self.chunk, self.problem
        arguments = (*self.sides.flat(), *problem.tile_arguments(chunk, tile))
        given = scored, tangent
        if chunk.temperature is not None:
            given = scored.clone(), tangent.clone()
            out = torch.empty_like(scored) if out is None else out
        problem.backend.row_grad_tangent(
            *given,
            out,
            out_tangent,
            self.norm,
            form.norm_tangent,
            form.coef,
            form.coef_tangent,
            problem.offset + tile[0],
            *arguments,
        )
        if chunk.temperature is not None:
            self._cool(*given, out, out_tangent, form.to_temperature)

    def _cool(
        self, z: Tensor, z_tangent: Tensor, grad: Tensor, grad_tangent: Tensor, to_rows: Tensor | None
    ) -> None:
        """dloss/dz of tempered logits and its derivative to those of raw values, in place.

        Adds to the derivative of the gradient of temperatures [n].
        """
        t, moved = self.chunk.temperature, self.temperature_tangent
        possible = z != -torch.inf
        z, z_tangent = z.masked_fill(~possible, 0.0), z_tangent.masked_fill(~possible, 0.0)
        cooler = 0.0 if moved is None else moved / t  # of log temperature
        if to_rows is not None:
            to_rows -= ((grad_tangent * z + grad * (z_tangent - z * cooler)) / t).sum(-1)
        grad_tangent.sub_(grad * cooler).div_(t)
        grad.div_(t)
        y, y_tangent = z * t, z_tangent * t + (0.0 if moved is None else z * moved)
        transform = self.problem.transform
        to_raw_gradient_tangent(grad, grad_tangent, y, y_tangent, transform)
        to_raw_gradient(grad, y, transform)


@dataclass(frozen=True)
class Form:
    """What the gradients of a chunk's logits and their derivatives are made of, beside these."""

    norm_tangent: Tensor  # [1 or 2, n]
    coef: Tensor  # [7 or 14, n]
    coef_tangent: Tensor
    to_temperature: Tensor | None  # [n]: the derivative of the gradient of temperatures, which is added to

    @classmethod
    def of(cls, upstream: UpstreamOf, moving: Moving, summary: Tensor, tangent: Tensor, needs: Needs) -> Form:
        """Of the chunk of rows that moves; the others of all rows."""
        where, problem = moving.chunk.where, moving.problem
        summary, tangent = summary[:, where], tangent[:, where]
        coef, moved = upstream(where, summary, tangent).coefficients(summary, tangent, problem.vocab_size)
        to_rows = summary.new_zeros(moving.chunk.size) if needs.temperature_grad else None
        return cls(norm_tangent_rows(tangent).contiguous(), coef, moved, to_rows)


class _Linear:
    """A linear problem along a direction: logits, and the products of their gradients."""

    def __init__(
        self, problem: LinearProblem, summary: Tensor, direction: Direction, needs: Needs | None = None
    ):
        self.problem, self.summary, self.direction = problem, summary, direction
        along_both = direction.input_tangent is not None, direction.weight_tangent is not None
        # Whether any product takes the gradient of the logits itself.
        self.takes_gradient = needs is not None and (
            (needs.weight_grad and along_both[0]) or (needs.input_grad and along_both[1])
        )

    def moving(self, start: int, stop: int) -> Moving:
        chunk = self.problem.chunk(start, stop, self.summary)
        return Moving.of(self.problem, chunk, self.summary, self.direction.temperature_tangent)

    def hidden(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """The chunk's hidden states [n, D], and where they move."""
        moved = self.direction.input_tangent
        if moved is not None:
            moved = self.problem.operands(moved[chunk.where], chunk.active)
        return self.problem.hidden(chunk), moved

    def head(self, tile: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The tile's rows of the head [T, D], and where they move."""
        moved = self.direction.weight_tangent
        if moved is not None:
            moved = moved[slice(*tile)].to(self.problem.operand)
        return self.problem.head(*tile), moved

    def logits(
        self, moving: Moving, hidden: Pair, head: Pair, memory: tuple[Tensor, Tensor], tile: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """A tile of logits and their direction, as the row primitives take them, in flat memory each."""
        problem, chunk = self.problem, moving.chunk
        scored = problem.raw_logits(hidden[0], memory[0], chunk, tile, head[0])
        tangent = problem.place(memory[1], chunk.size, head[0].shape[0])
        started = hidden[1] is not None
        if started:
            problem.product(hidden[1], head[0], tangent)
        if head[1] is not None:
            problem.product(hidden[0], head[1], tangent, accumulate=started)
        elif not started:
            tangent.zero_()
        if self.direction.bias_tangent is not None:
            tangent += self.direction.bias_tangent[slice(*tile)].to(problem.dtype)
        return scored, moving.tempered(scored, tangent)

    def gradients(
        self, moving: Moving, scored: Tensor, tangent: Tensor, form: Form, tile: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor]:
        """The gradient of a tile's raw logits, if it is of use, and its derivative: in place, as operands."""
        out = scored if self.takes_gradient else None
        moving.gradients(scored, tangent, out, tangent, form, tile)
        operand = self.problem.operand
        return None if out is None else out.to(operand), tangent.to(operand)


def _to_hidden(grads: Pair, head: Pair, out: Tensor, accumulate: bool) -> None:
    """``out = Gdot W + G vW`` of a tile, or added to it. grads: (G, Gdot); head: (W, vW)."""
    multiply(grads[1], head[0], out, rows="m", accumulate=accumulate)
    if head[1] is not None:
        multiply(grads[0], head[1], out, rows="m", accumulate=True)


def _to_head(grads: Pair, hidden: Pair, out: Tensor, accumulate: bool) -> None:
    """``out = Gdot^T h + G^T vh`` of a chunk, or added to it. grads: (G, Gdot); hidden: (h, vh)."""
    multiply(grads[1].t(), hidden[0], out, rows="k", accumulate=accumulate)
    if hidden[1] is not None:
        multiply(grads[0].t(), hidden[1], out, rows="k", accumulate=True)


def tangent(problem: LinearProblem, summary: Tensor, direction: Direction, workspace: int) -> Tensor:
    """The derivative [SUMMARY, N] of every row's summary; zeros for ignored rows."""
    problem.check_topk()
    linear, out = _Linear(problem, summary, direction), torch.zeros_like(summary)
    tiles, spans = tiled_spans(problem, workspace)
    with borrow(2 * largest(tiles, spans), problem.dtype, problem.device) as memory:
        for start, stop in spans:
            moving = linear.moving(start, stop)
            hidden, sums = linear.hidden(moving.chunk), moving.new_sums()
            for tile in tiles:
                pair = linear.logits(moving, hidden, linear.head(tile), memory.tensor_split(2), tile)
                moving.add_sums(*pair, sums, tile)
            where = moving.chunk.where
            out[:, where] = moving.summary_tangent(sums, summary[:, where])
    return out


def holds_chunks(rows: int, columns: int, dtype: torch.dtype, workspace: int, device: torch.device) -> bool:
    """Whether the workspace holds the logits of chunks of good size."""
    return plan.choose_strategy(rows, columns, dtype.itemsize, workspace, device) == "chunked"


def curvature(
    problem: LinearProblem,
    summary: Tensor,
    upstream: UpstreamOf,
    direction: Direction,
    needs: Needs,
    workspace: int,
) -> tuple[Gradients, Tensor]:
    """The derivatives of the gradients, in the tensors' dtypes, and of the summary, along a direction."""
    problem.check_topk()
    held = holds_chunks(problem.rows.count, problem.columns, problem.dtype, workspace, problem.device)
    by = _by_chunks if held else _by_tiles
    return by(_Linear(problem, summary, direction, needs), upstream, needs, workspace)


def _by_chunks(
    linear: _Linear, upstream: UpstreamOf, needs: Needs, workspace: int
) -> tuple[Gradients, Tensor]:
    problem, summary, dtype = linear.problem, linear.summary, linear.problem.dtype
    share = int(_SHARE * workspace)
    spans = plan.tiled_chunk_spans(
        problem.rows.count, 1, problem.columns, dtype, problem.operand, share, problem.device
    )
    sums, out = Gradients.unwritten(problem, needs, len(spans)), torch.zeros_like(summary)
    half = max((stop - start for start, stop in spans), default=0) * problem.columns
    with borrow(2 * half, dtype, problem.device) as memory:
        for start, stop in spans:
            moving = linear.moving(start, stop)
            chunk, row_sums = moving.chunk, moving.new_sums()
            where, hidden, pairs = chunk.where, linear.hidden(chunk), []
            tiles = problem.tiles(_IN_CACHE * chunk.size)
            for tile in tiles:
                parts = memory[chunk.size * tile[0] : half], memory[half + chunk.size * tile[0] :]
                pairs.append(linear.logits(moving, hidden, linear.head(tile), parts, tile))
                moving.add_sums(*pairs[-1], row_sums, tile)
            out[:, where] = moving.summary_tangent(row_sums, summary[:, where])
            form = Form.of(upstream, moving, summary, out, needs)
            hidden_grad = torch.empty_like(hidden[0], dtype=dtype) if needs.input_grad else None
            for pair, tile in zip(pairs, tiles):
                grads = linear.gradients(moving, *pair, form, tile)
                if hidden_grad is not None:
                    _to_hidden(grads, linear.head(tile), hidden_grad, accumulate=tile[0] > 0)
                if needs.weight_grad:
                    _to_head(grads, hidden, sums.to_weight[slice(*tile)], accumulate=not chunk.first)
                if needs.bias_grad:
                    sums.to_bias[slice(*tile)] += grads[1].sum(0, dtype=dtype)
            if hidden_grad is not None:
                sums.to_input[where] = hidden_grad
            if needs.temperature_grad:
                sums.to_temperature[where] = form.to_temperature
    return sums.rounded(problem), out


def _by_tiles(
    linear: _Linear, upstream: UpstreamOf, needs: Needs, workspace: int
) -> tuple[Gradients, Tensor]:
    problem, summary, dtype = linear.problem, linear.summary, linear.problem.dtype
    out = tangent(problem, summary, linear.direction, workspace)
    tiles, spans = tiled_spans(problem, workspace)
    rows, width = problem.rows.count, problem.input.shape[1]
    to_input = summary.new_zeros(rows, width) if needs.input_grad else None
    make = torch.empty_like if spans else torch.zeros_like  # without a row nothing is written to it
    to_weight = to_bias = to_rows = None
    if needs.weight_grad:
        to_weight = make(problem.weight, memory_format=torch.contiguous_format)
    if needs.bias_grad:
        to_bias = torch.zeros_like(problem.bias)
    all_rows = [linear.moving(*span) for span in spans]
    forms = [Form.of(upstream, moving, summary, out, needs) for moving in all_rows]
    with borrow(2 * largest(tiles, spans), dtype, problem.device) as memory:
        for tile in tiles if spans else ():
            head = linear.head(tile)
            weight_sum = torch.empty_like(head[0], dtype=dtype) if needs.weight_grad else None
            bias_sum = summary.new_zeros(head[0].shape[0])
            for moving, form, (start, stop) in zip(all_rows, forms, spans):
                hidden = linear.hidden(moving.chunk)
                pair = linear.logits(moving, hidden, head, memory.tensor_split(2), tile)
                grads = linear.gradients(moving, *pair, form, tile)
                if to_input is not None:
                    _to_hidden(grads, head, to_input[start:stop], accumulate=tile[0] > 0)
                if weight_sum is not None:
                    _to_head(grads, hidden, weight_sum, accumulate=start > 0)
                bias_sum += grads[1].sum(0, dtype=dtype)
            for whole, part in ((to_weight, weight_sum), (to_bias, bias_sum)):
                if whole is not None:
                    whole[slice(*tile)] = part
    if needs.temperature_grad:
        to_rows = torch.cat([form.to_temperature for form in forms] or [summary.new_zeros(0)])
    gradients = Gradients(
        placed(to_input, problem, problem.input),
        to_weight,
        to_bias,
        placed(to_rows, problem, problem.temperature),
    )
    return gradients, out
