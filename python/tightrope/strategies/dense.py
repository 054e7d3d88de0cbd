"""The driver for logits that exist already: rows go by in chunks, and only their gradient is new memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..statistics import norm_rows
from . import plan
from .problem import LogitsProblem
from .products import Needs
from .scored import Chunk
from .tangents import Direction, Form, Moving, UpstreamOf


def chunks(problem: LogitsProblem, summary: Tensor | None = None) -> Iterator[tuple[Chunk, Tensor]]:
    """Chunks of rows, each with its logits, of unit stride along the vocabulary.

    summary: of all rows, where it is known.
    """
    for start, stop in plan.logits_spans(problem.rows.total, problem.widest, problem.device):
        logits = problem.logits[start:stop, : problem.columns]
        chunk = problem.chunk(start, stop, summary)
        yield chunk, logits if logits.stride(1) == 1 or problem.columns == 1 else logits.contiguous()


def statistics(problem: LogitsProblem) -> tuple[Tensor, Tensor]:
    """Summary [SUMMARY, N] and argmax [N] of every row; zeros and -1 for ignored rows."""
    problem.check_topk()
    summary, argmax = problem.empty_summary()
    for chunk, logits in chunks(problem):
        partial, best = problem.new_partial(chunk.size)
        tile = (0, problem.columns)
        if problem.teacher is not None:
            memory = partial.new_empty(chunk.size * problem.columns)
            chunk.target.dense.measure(chunk.step, [tile], memory)
        scored = problem.tempered(logits, chunk, tile)
        problem.row_stats(scored, partial, best, chunk, tile)
        of_rows = problem.summarise(partial, best, chunk, chunk, [(scored, tile)])
        summary[:, chunk.where], argmax[chunk.where] = of_rows
    return summary, argmax


def gradient(problem: LogitsProblem, summary: Tensor, coef: Tensor, to_temperature: Tensor | None) -> Tensor:
    """Gradient of the logits [N, V], from the coefficients [7 or 14, N] of every row.

    to_temperature [N] or None: where that of the temperatures is added.
    """
    out = torch.empty_like(problem.logits, memory_format=torch.contiguous_format)
    out[:, problem.columns :] = 0.0  # padding
    for chunk, logits in chunks(problem, summary):
        where = chunk.where
        to_rows = None if to_temperature is None else to_temperature[where]
        norm = norm_rows(summary[:, where])
        form = problem.form(chunk, norm, coef[:, where].contiguous(), to_rows)
        problem.row_grad(logits, out[where, : problem.columns], form, chunk)
    if to_temperature is not None and not problem.exchange.alone:
        total = problem.exchange.step(0, problem.rows.total).reduce(to_temperature.unsqueeze(-1)).result()
        to_temperature.copy_(total.squeeze(-1))
    return out


def _moving(
    problem: LogitsProblem, summary: Tensor, direction: Direction
) -> Iterator[tuple[Moving, Tensor, Tensor]]:
    """Chunks of rows, each with its logits and their direction as the row primitives take them."""
    for chunk, logits in chunks(problem, summary):
        tile, moved = (0, problem.columns), direction.input_tangent
        scored = problem.tempered(logits, chunk, tile)
        if moved is None:
            tangent = torch.zeros_like(scored)
        else:
            moved = moved[chunk.where, : problem.columns]
            tangent = torch.empty_like(scored).copy_(moved)
        moving = Moving.of(problem, chunk, summary, direction.temperature_tangent)
        yield moving, scored, moving.tempered(scored, tangent)


def tangent(problem: LogitsProblem, summary: Tensor, direction: Direction) -> Tensor:
    """The derivative [SUMMARY, N] of every row's summary; zeros for ignored rows."""
    out = torch.zeros_like(summary)
    for moving, scored, moved in _moving(problem, summary, direction):
        _add_tangent(moving, scored, moved, summary, out)
    return out


def _add_tangent(moving: Moving, scored: Tensor, moved: Tensor, summary: Tensor, out: Tensor) -> None:
    where, sums = moving.chunk.where, moving.new_sums()
    moving.add_sums(scored, moved, sums, (0, moving.problem.columns))
    out[:, where] = moving.summary_tangent(sums, summary[:, where])


def curvature(
    problem: LogitsProblem,
    summary: Tensor,
    upstream: UpstreamOf,
    direction: Direction,
    needs: Needs,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The derivatives of the gradients of logits [N, V] and temperature [N], and that of the summary."""
    out, tile = torch.zeros_like(summary), (0, problem.columns)
    to_logits = torch.empty_like(problem.logits, memory_format=torch.contiguous_format)
    to_logits[:, problem.columns :] = 0.0  # padding
    to_temperature = summary.new_zeros(problem.rows.total) if needs.temperature_grad else None
    for moving, scored, moved in _moving(problem, summary, direction):
        where = moving.chunk.where
        _add_tangent(moving, scored, moved, summary, out)
        form = Form.of(upstream, moving, summary, out, needs)
        moving.gradients(scored, moved, None, moved, form, tile)
        to_logits[where, : problem.columns] = moved
        if to_temperature is not None:
            to_temperature[where] = form.to_temperature
    return to_logits, to_temperature, out
