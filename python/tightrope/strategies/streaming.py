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
from .chunked import Plan, Reductions, chunk_gradients, side_by_side
from .gemm import headroom, multiply
from .problem import LinearProblem
from .products import Gradients, Needs
from .sampled import Sampler
from .scored import Chunk, Form
from .workspace import borrow

Spans = list[tuple[int, int]]


def _forward_spans(problem: LinearProblem, workspace: int) -> tuple[Spans, Spans]:
    """(tiles of the vocabulary, spans of rows) that a forward pass goes by."""
    rows, columns = problem.rows.count, problem.columns
    if not problem.exchange.alone:
        return problem.tiles(rows), _agreed_spans(problem, workspace)
    if not problem.streams:
        return tiled_spans(problem, workspace)
    if not problem.target.is_dense:
        return [(0, columns)], plan.spans(rows, rows)
    tiles = plan.spans(columns, plan.DENSE_TILE, multiple=16)
    return tiles, plan.spans(rows, plan.chunk_rows(rows, plan.DENSE_TILE, problem.dtype.itemsize, workspace))


def tiled_spans(problem: LinearProblem, workspace: int) -> tuple[Spans, Spans]:
    """(tiles of the vocabulary, spans of rows) such that one of these by one of those fits the workspace."""
    rows, tiles = problem.rows.count, problem.tiles(problem.rows.count)
    width = max((stop - start for start, stop in tiles), default=0)
    block = plan.chunk_rows(rows, max(width, 1), problem.dtype.itemsize, workspace)
    block = min(block, plan.sizes(problem.device).streaming_rows)
    return tiles, plan.spans(rows, block, plan.ROW_MULTIPLE)


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


def largest(tiles: Spans, spans: Spans) -> int:
    """Elements of a tile of logits of a span of rows, at most."""
    return max((b - a for a, b in tiles), default=0) * max((b - a for a, b in spans), default=0)


def statistics(problem: LinearProblem, workspace: int) -> tuple[Tensor, Tensor]:
    """Summary [SUMMARY, N] and argmax [N] of every row; zeros and -1 for ignored rows."""
    if not problem.streams:
        problem.check_topk()
    summary, argmax = problem.empty_summary()
    tiles, spans = _forward_spans(problem, workspace)
    if problem.streams:
        problem = replace(problem, target=problem.target.in_order())
    # Of a set the logits are made once more.
    bare = problem.streams or (problem.scores_products and problem.sets is None)
    elements = 0 if bare else largest(tiles, spans) * problem.exchange.owners
    with borrow(elements, problem.dtype, summary.device) as flat:
        for start, stop in spans:
            own = problem.chunk(start, stop)
            chunk, hidden = own.step.spread(problem, own)
            if problem.teacher is not None:
                chunk.target.dense.measure(own.step, tiles)
            partial, best = problem.new_partial(chunk.size)
            factor = problem.factor(hidden)
            if problem.streams:
                for tile in tiles:
                    problem.stream_stats(hidden, partial, best, chunk, tile)
            else:
                problem.logit_stats(factor, flat, partial, best, chunk, tiles, kept=False)
            # The logits are gone by then, and made once more.
            again = ((problem.raw_logits(factor, flat, chunk, tile), tile) for tile in tiles)
            of_rows = problem.summarise(partial, best, own, chunk, again)
            summary[:, own.where], argmax[own.where] = of_rows
    return summary, argmax


def gradients(
    problem: LinearProblem, summary: Tensor, coef: Tensor, needs: Needs, workspace: int
) -> Gradients:
    """The gradients, in the tensors' dtypes, from the coefficients [7 or 14, N] of every row."""
    if problem.exchange.owners > 1 or Sampler.serves(problem, needs):
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
        weight_sums = problem.weight.new_empty(
            (largest(tiles, [(0, 1)]), problem.weight.shape[1]), dtype=dtype
        )
    bias_grad = torch.zeros_like(problem.bias) if needs.bias_grad else None
    hidden_sum = None
    if needs.input_grad:
        hidden_sum = problem.input.new_zeros((rows.count, problem.input.shape[1]), dtype=dtype)
    chunks = [problem.chunk(start, stop, summary) for start, stop in blocks]
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
    with borrow(largest(tiles, blocks) * problem.exchange.owners, flat_dtype, problem.device) as flat:
        for tile in tiles if blocks else ():
            head, place = problem.gradient_head(*tile), slice(*tile)
            weight_sum = None
            if needs.weight_grad:
                weight_sum = weight_sums[: len(head)] if rounds else weight_grad[place]
            bias_sum = head.new_zeros(head.shape[0], dtype=dtype) if needs.bias_grad else None
            for i, (chunk, (start, stop)) in enumerate(zip(chunks, blocks)):
                hidden = kept[i] if kept else problem.hidden(chunk)
                grad = _gradient(problem, hidden, head, flat, forms[i], chunk, tile)
                if hidden_sum is not None:
                    part, add = hidden_sum[start:stop], tile[0] > 0
                    multiply(grad, head, part, rows="m", accumulate=add, rounds=problem.rounds)
                if weight_sum is not None:
                    factor = problem.gradient_factor(hidden)
                    multiply(grad.t(), factor, weight_sum, rows="k", accumulate=i > 0, rounds=problem.rounds)
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
    to_input = placed(hidden_sum, problem, problem.input)
    return Gradients(to_input, weight_grad, bias_grad, placed(to_rows, problem, problem.temperature))


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
    """`gradients`, with the rows in chunks: no more than a chunk of other ranks' rows is here, or columns are
    drawn for each chunk.
    """
    how = Plan.of(problem, workspace, fusible=False)
    sums = Gradients.unwritten(problem, needs, len(how.chunks))
    norm, reductions, sampler = norm_rows(summary), Reductions(sums), Sampler.of(problem, needs, sums)
    with borrow(how.elements, problem.dtype, problem.device) as memory:
        for start, stop in how.chunks:
            own = problem.chunk(start, stop, summary)
            chunk, hidden = own.step.spread(problem, own)
            factor = problem.factor(hidden)
            for tile in problem.gradient_tiles(chunk.size):
                problem.raw_logits(factor, memory[chunk.size * tile[0] :], chunk, tile)
            of_rows = norm[:, own.where], coef[:, own.where].contiguous()
            chunk_gradients(problem, own, chunk, hidden, memory, *of_rows, reductions, sampler)
        reductions.finish()
    if sampler is not None:
        sampler.finish()
    return sums.rounded(problem)


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
    raw = problem.raw_logits(problem.factor(hidden), flat, chunk, tile, head)
    return problem.row_grad(raw, form, chunk, tile)


def placed(sums: Tensor | None, problem: LinearProblem, like: Tensor | None) -> Tensor | None:
    """The gradient of the rows that count, rounded once and put where they stand among all rows."""
    if sums is None:
        return None
    sums = sums.to(like.dtype)
    if problem.rows.kept is None:
        return sums
    whole = torch.zeros_like(like, memory_format=torch.contiguous_format)
    return whole.index_copy_(0, problem.rows.kept, sums)
