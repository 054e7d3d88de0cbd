"""The streaming strategy: the vocabulary goes by in tiles, and no more than a tile of logits exists.

Forward: one GEMM, with the statistics of each tile merged into those of its rows; where the backend fuses
the two, no logits exist at all. Backward: the tile's logits are made again, become their gradient, and go
into two GEMMs, four in all. Each tile of dW is summed over all rows in float32 and written once. This is also
how rows alone are scored: evaluation, and any loss whose upstream gradients arrive only with the backward.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..statistics import norm_rows
from . import plan
from .chunked import Gradients, Needs, Plan, Reductions, chunk_gradients, side_by_side
from .gemm import headroom, multiply
from .problem import Chunk, Form, LinearProblem
from .workspace import borrow

Spans = list[tuple[int, int]]


def _forward_spans(problem: LinearProblem, workspace: int) -> tuple[Spans, Spans]:
    """(tiles of the vocabulary, spans of rows) that a forward pass goes by."""
    rows, columns = problem.rows.count, problem.columns
    if not problem.exchange.alone:
        return problem.tiles(rows), _agreed_spans(problem, workspace)
    if not problem.streams:
        tiles = problem.tiles(rows)
        width = max((stop - start for start, stop in tiles), default=0)
        block = plan.chunk_rows(rows, max(width, 1), problem.dtype.itemsize, workspace)
        block = min(block, plan.sizes(problem.device).streaming_rows)
        return tiles, plan.spans(rows, block, plan.ROW_MULTIPLE)
    if not problem.target.is_dense:
        return [(0, columns)], plan.spans(rows, rows)
    tiles = plan.spans(columns, plan.DENSE_TILE, multiple=16)
    return tiles, plan.spans(rows, plan.chunk_rows(rows, plan.DENSE_TILE, problem.dtype.itemsize, workspace))


def _agreed_spans(problem: LinearProblem, workspace: int) -> Spans:
    """Spans of rows that are the same on every rank, whatever it has of the vocabulary."""
    exchange, itemsize = problem.exchange, problem.dtype.itemsize
    most = exchange.most_rows(problem.rows.count)
    return plan.streaming_spans(most, exchange.owners, problem.widest, itemsize, workspace, problem.device)


def _backward_spans(problem: LinearProblem, workspace: int) -> tuple[Spans, Spans]:
    """The same for a backward pass, whose tile of gradients [rows, width] is the workspace."""
    if not problem.streams:
        return _forward_spans(problem, workspace)
    rows, columns, itemsize = problem.rows.count, problem.columns, problem.operand.itemsize
    if problem.target.is_dense:
        itemsize += problem.dtype.itemsize
    most = plan.tile_width(rows, problem.device)
    width = plan.stream_width(rows, columns, itemsize, workspace, most)
    blocks = plan.spans(rows, plan.chunk_rows(rows, max(width, 1), itemsize, workspace))
    return plan.spans(columns, width, multiple=min(plan.STREAM_STEP, max(width, 1))), blocks


def _largest(tiles: Spans, rows: int) -> int:
    return max((b - a for a, b in tiles), default=0) * rows


def _most_rows(problem: LinearProblem, spans: Spans) -> int:
    """Rows that are scored here at a time, at most."""
    return max((b - a for a, b in spans), default=0) * problem.exchange.owners


def statistics(problem: LinearProblem, workspace: int) -> tuple[Tensor, Tensor]:
    """Summary [SUMMARY, N] and argmax [N] of every row; zeros and -1 for ignored rows."""
    if not problem.streams:
        problem.check_topk()
    summary, argmax = problem.empty_summary()
    tiles, spans = _forward_spans(problem, workspace)
    if problem.streams:
        problem = replace(problem, target=problem.target.in_order())
    elements = 0 if problem.streams else _largest(tiles, _most_rows(problem, spans))
    with borrow(elements, problem.dtype, summary.device) as flat:
        for start, stop in spans:
            own = problem.chunk(start, stop)
            chunk, hidden = own.step.spread(problem, own)
            partial, best = problem.new_partial(chunk.size)
            for tile in tiles:
                if problem.streams:
                    problem.stream_stats(hidden, partial, best, chunk, tile)
                    continue
                raw = problem.raw_logits(hidden, problem.head(*tile), flat, chunk, tile)
                problem.row_stats(raw, partial, best, chunk, tile)
            # The logits are gone by then, and made once more.
            again = (
                (problem.raw_logits(hidden, problem.head(*tile), flat, chunk, tile), tile) for tile in tiles
            )
            of_rows = problem.summarise(partial, best, own, chunk, again)
            summary[:, own.where], argmax[own.where] = of_rows
    return summary, argmax


def gradients(
    problem: LinearProblem, summary: Tensor, coef: Tensor, needs: Needs, workspace: int
) -> Gradients:
    """The gradients, in the tensors' dtypes, from the coefficients [7 or 14, N] of every row."""
    if problem.exchange.owners > 1:
        return _by_chunks(problem, summary, coef, needs, workspace)
    dtype, rows = problem.dtype, problem.rows
    tiles, blocks = _backward_spans(problem, workspace)
    if problem.streams:
        problem = replace(problem, target=problem.target.in_order())
    norm = norm_rows(summary)
    coef, undo = headroom(coef, problem.operand)
    weight_grad = None
    if needs.weight_grad:
        # Without a row nothing is written to it.
        make = torch.empty_like if blocks else torch.zeros_like
        weight_grad = make(problem.weight, memory_format=torch.contiguous_format)
        weight_grad[problem.columns :] = 0.0  # padding
    # Where dW is not rounded it is summed where it is to stand; else all tiles have one memory.
    rounds = problem.weight.dtype != dtype
    weight_sums = None
    if needs.weight_grad and rounds:
        weight_sums = problem.weight.new_empty((_largest(tiles, 1), problem.weight.shape[1]), dtype=dtype)
    bias_grad = torch.zeros_like(problem.bias) if needs.bias_grad else None
    hidden_sum = None
    if needs.input_grad:
        hidden_sum = problem.input.new_zeros((rows.count, problem.input.shape[1]), dtype=dtype)
    chunks = [problem.chunk(start, stop) for start, stop in blocks]
    to_rows = summary.new_zeros(rows.count) if needs.temperature_grad else None
    forms = [
        problem.form(
            chunk,
            norm[:, chunk.where],
            coef[:, chunk.where].contiguous(),
            None if to_rows is None else to_rows[start:stop],
        )
        for chunk, (start, stop) in zip(chunks, blocks)
    ]
    # Kept where that takes at most a copy of the input in its own dtype; else converted for each tile.
    kept = [problem.hidden(chunk) for chunk in chunks] if problem.streams else None
    flat_dtype = problem.operand if problem.streams else dtype
    with borrow(_largest(tiles, _most_rows(problem, blocks)), flat_dtype, problem.device) as flat:
        for tile in tiles if blocks else ():
            head, place = problem.head(*tile), slice(*tile)
            weight_sum = None
            if needs.weight_grad:
                weight_sum = weight_sums[: len(head)] if rounds else weight_grad[place]
            bias_sum = head.new_zeros(head.shape[0], dtype=dtype) if needs.bias_grad else None
            for i, (chunk, (start, stop)) in enumerate(zip(chunks, blocks)):
                hidden = kept[i] if kept else problem.hidden(chunk)
                grad = _gradient(problem, hidden, head, flat, forms[i], chunk, tile)
                if hidden_sum is not None:
                    multiply(grad, head, hidden_sum[start:stop], rows="m", accumulate=tile[0] > 0)
                if weight_sum is not None:
                    multiply(grad.t(), hidden, weight_sum, rows="k", accumulate=i > 0)
                if needs.bias_grad:
                    bias_sum += grad.sum(0, dtype=dtype)
            if undo is not None:
                for part in (weight_sum, bias_sum):
                    if part is not None:
                        part *= undo
            if needs.weight_grad and rounds:
                weight_grad[place] = weight_sum
            if needs.bias_grad:
                bias_grad[place] = bias_sum
    for sums in (hidden_sum, to_rows):
        if sums is not None and undo is not None:
            sums *= undo
    hidden_sum, to_rows = _over_ranks(problem, hidden_sum, to_rows)
    to_input = _place(hidden_sum, problem, problem.input)
    return Gradients(to_input, weight_grad, bias_grad, _place(to_rows, problem, problem.temperature))


def _over_ranks(
    problem: LinearProblem, hidden_sum: Tensor | None, to_rows: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of all rows' hidden states and temperatures, summed over the parts of the vocabulary."""
    nothing = hidden_sum is None and to_rows is None
    if problem.exchange.alone or nothing or not problem.rows.count:
        return hidden_sum, to_rows
    step = problem.exchange.step(0, problem.rows.count)
    total = step.reduce(side_by_side(hidden_sum, to_rows)).result()
    if hidden_sum is not None:
        hidden_sum = total[:, : hidden_sum.shape[1]]
    return hidden_sum, None if to_rows is None else total[:, -1]


def _by_chunks(
    problem: LinearProblem, summary: Tensor, coef: Tensor, needs: Needs, workspace: int
) -> Gradients:
    """`gradients`, with the rows in chunks, so that no more than a chunk of other ranks' rows is here."""
    how = Plan.of(problem, workspace, fusible=False)
    sums = Gradients.unwritten(problem, needs, len(how.chunks))
    norm, reductions = norm_rows(summary), Reductions(sums)
    with borrow(how.elements, problem.dtype, problem.device) as memory:
        for start, stop in how.chunks:
            own = problem.chunk(start, stop)
            chunk, hidden = own.step.spread(problem, own)
            for tile in problem.tiles(chunk.size):
                part = memory[chunk.size * tile[0] :]
                problem.raw_logits(hidden, problem.head(*tile), part, chunk, tile)
            of_rows = norm[:, own.where], coef[:, own.where]
            chunk_gradients(problem, own, chunk, hidden, memory, *of_rows, reductions)
        reductions.finish()
    sources = (problem.input, problem.weight, problem.bias, problem.temperature)
    return Gradients(*(None if s is None else s.to(t.dtype) for s, t in zip(sums.flat(), sources)))


def _gradient(
    problem: LinearProblem,
    hidden: Tensor,
    head: Tensor,
    flat: Tensor,
    form: Form,
    chunk: Chunk,
    tile: tuple[int, int],
) -> Tensor:
    """The gradient of a tile of logits, as an operand of GEMMs, by way of the scratch memory."""
    if problem.streams:
        out = flat[: chunk.size * head.shape[0]].view(chunk.size, -1)
        problem.stream_grad(hidden, out, form.norm, form.coef, chunk, tile)
        return out
    raw = problem.raw_logits(hidden, head, flat, chunk, tile)
    return problem.row_grad(raw, form, chunk, tile)


def _place(sums: Tensor | None, problem: LinearProblem, like: Tensor) -> Tensor | None:
    """The gradient of the rows that count, rounded once and put where they stand among all rows."""
    if sums is None:
        return None
    sums = sums.to(like.dtype)
    if problem.rows.kept is None:
        return sums
    whole = torch.zeros_like(like, memory_format=torch.contiguous_format)
    return whole.index_copy_(0, problem.rows.kept, sums)
