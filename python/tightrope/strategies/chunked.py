"""The chunked strategy: rows go by in chunks, and the gradients are made in the forward pass.

Per chunk, over tiles of the vocabulary: one GEMM makes a tile of logits in the workspace and its statistics
are taken while it is in cache; then, with the statistics whole and the loss's upstream gradients known, each
tile becomes its gradient in place and goes into two GEMMs. Three GEMMs in all. The workspace holds a chunk's
logits; dW is summed in float32 over the chunks and rounded once.

Where the loss can name its upstream gradients before the statistics are known, and the backend says so, one
launch over whole rows makes statistics and gradient, and each logit is read once (`Backend.fuses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..coefficients import row_coefficients
from ..statistics import RowStats, StatGrads, row_stats
from . import plan
from .gemm import headroom, multiply
from .problem import Chunk, LinearProblem
from .workspace import borrow

# (statistics of a chunk's rows, the chunk) -> (loss of each row [n], upstream gradients of the statistics,
# gradients of the loss's per-row arguments, [n, ...] each). Gradients include the weight of the row.
Upstream = Callable[[RowStats, Chunk], tuple[Tensor, StatGrads, tuple[Tensor | None, ...]]]
# The upstream gradients of a chunk's statistics as functions of these: [UPSTREAM, n] (`RowUpstream`).
Ahead = Callable[[Chunk], Tensor]


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted; the others cost no GEMM and no memory."""

    input: bool
    weight: bool
    bias: bool


@dataclass
class ChunkedResult:
    row_loss: Tensor  # [N], 0 for ignored rows
    summary: Tensor  # [SUMMARY, N]
    argmax: Tensor  # [N]
    input: Tensor | None  # [N, D]; gradients are in the dtype of the arithmetic
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    args: tuple[Tensor | None, ...]  # [N, ...] each


def loss_and_gradients(
    problem: LinearProblem, upstream: Upstream, needs: Needs, workspace: int, ahead: Ahead | None = None
) -> ChunkedResult:
    """The loss of every row and the gradients of their weighted sum, in one sweep over the rows.

    workspace: bytes for a chunk's logits. ahead: the gradients that upstream gives, for a fused kernel.
    """
    problem.check_topk()
    dtype, device = problem.dtype, problem.input.device
    rows, vocab_size = problem.rows, problem.vocab_size
    summary, argmax = problem.empty_summary()
    result = ChunkedResult(
        torch.zeros(rows.total, dtype=dtype, device=device), summary, argmax, None, None, None, ()
    )
    if needs.input:
        # Rows that are gathered out keep the zeros.
        make = torch.empty if rows.kept is None else torch.zeros
        result.input = make(problem.input.shape, dtype=dtype, device=device)
    if needs.weight:
        result.weight = torch.empty(problem.weight.shape, dtype=dtype, device=device)
    if needs.bias:
        result.bias = torch.zeros(vocab_size, dtype=dtype, device=device)

    chunks, stride, fused = _plan(problem, workspace, ahead is not None)
    size = max((stop - start for start, stop in chunks), default=0)
    with borrow(size * stride, dtype, device) as flat:
        for start, stop in chunks:
            chunk = rows.chunk(start, stop, problem.target, dtype)
            hidden = problem.hidden(chunk)
            if fused:
                logits = flat[: chunk.size * stride].view(chunk.size, stride)[:, :vocab_size]
                grads, undo = _fused(problem, upstream, ahead(chunk), chunk, logits, hidden, result), None
            else:
                logits, norm, coef = _forward(problem, upstream, chunk, flat, hidden, result)
                coef, undo = headroom(coef, problem.operand)
                tiles = zip(problem.tiles(chunk.size), logits)
                grads = (problem.row_grad(raw, norm, coef, chunk, tile) for tile, raw in tiles)
            _backward(problem, chunk, grads, undo, hidden, result)
    if needs.weight and not chunks:
        result.weight.zero_()
    return result


def _plan(problem: LinearProblem, workspace: int, fusible: bool) -> tuple[list[tuple[int, int]], int, bool]:
    """(chunks of the rows, elements between two rows of logits, whether a chunk goes by one launch)."""
    count, vocab_size, dtype = problem.rows.count, problem.vocab_size, problem.dtype
    sizes = plan.sizes(problem.device)

    def chunks(row: int) -> list[tuple[int, int]]:
        size = plan.chunk_rows(count, row, dtype.itemsize, workspace)
        return plan.spans(count, min(size, sizes.max_chunk_rows), plan.ROW_MULTIPLE)

    if fusible:
        stride = -(-vocab_size // plan.ROW_STRIDE) * plan.ROW_STRIDE
        whole = chunks(stride)
        if whole and problem.fuses(whole[0][1]):
            return whole, stride, True
    # Beside the logits, a tile of their gradients where that is narrower.
    narrow = 0 if problem.operand == dtype else min(vocab_size, plan.tile_width(count, problem.device)) // 2
    return chunks(vocab_size + narrow), vocab_size, False


def _fused(problem, upstream, ahead, chunk, logits, hidden, result) -> Iterable[Tensor]:
    """Fill logits [n, V], record statistics and loss; gives the gradients of each tile."""
    for tile in problem.tiles(chunk.size):
        multiply(hidden, problem.head(*tile).t(), logits[:, tile[0] : tile[1]], rows="m")
    partial, argmax = problem.new_partial(chunk.size)
    gradient = problem.row_loss_grad(logits, partial, argmax, ahead, chunk)
    _record(problem, upstream, chunk, partial, argmax, result)
    return (gradient[:, start:stop] for start, stop in problem.tiles(chunk.size))


def _forward(problem, upstream, chunk, flat, hidden, result) -> tuple[list[Tensor], Tensor, Tensor]:
    """Fill the workspace with the chunk's logits; record statistics and loss.

    Gives the logits of each tile, and of each row the maximum and log-sum [2, n] and the coefficients [7, n].
    """
    logits = []
    partial, argmax = problem.new_partial(chunk.size)
    for tile in problem.tiles(chunk.size):
        raw = problem.raw_logits(hidden, problem.head(*tile), flat[chunk.size * tile[0] :])
        problem.row_stats(raw, partial, argmax, chunk, tile)
        logits.append(raw)
    summary, grads = _record(problem, upstream, chunk, partial, argmax, result)
    return logits, summary[:2].contiguous(), row_coefficients(summary, grads, problem.vocab_size)


def _record(problem, upstream, chunk, partial, argmax, result) -> tuple[Tensor, StatGrads]:
    """Put the chunk's statistics, loss and gradients of the loss's arguments among those of all rows.

    Gives the summary and the upstream gradients of the statistics.
    """
    summary = problem.summarise(partial, chunk)
    row_loss, grads, args = upstream(row_stats(summary, argmax), chunk)
    if chunk.active is not None:
        row_loss = row_loss.masked_fill(~chunk.active, 0.0)
    result.row_loss[chunk.where] = row_loss
    result.summary[:, chunk.where] = summary
    result.argmax[chunk.where] = argmax
    if not result.args:
        result.args = tuple(
            None if a is None else a.new_zeros(result.row_loss.shape + a.shape[1:]) for a in args
        )
    for whole, part in zip(result.args, args):
        if part is not None:
            if chunk.active is not None:
                part = part.masked_fill(~chunk.active.view(-1, *(1,) * (part.dim() - 1)), 0.0)
            whole[chunk.where] = part
    return summary, grads


def _backward(problem, chunk, grads, undo, hidden, result) -> None:
    """Add what the gradients of the chunk's logits, tile by tile, contribute to the gradients wanted.

    undo: what undoes the scale of grads, if they have one.
    """
    in_place = isinstance(chunk.where, slice)
    first = chunk.start == 0
    if result.input is not None:
        hidden_grad = result.input[chunk.where] if in_place else torch.empty_like(hidden, dtype=problem.dtype)
    for tile, grad in zip(problem.tiles(chunk.size), grads):
        if result.input is not None:
            multiply(grad, problem.head(*tile), hidden_grad, rows="m", accumulate=tile[0] > 0)
        if result.weight is not None:
            part = result.weight[tile[0] : tile[1]]
            multiply(grad.t(), hidden, part, rows="k", accumulate=not first, scale=undo)
        if result.bias is not None:
            bias_grad = grad.sum(0, dtype=problem.dtype)
            result.bias[tile[0] : tile[1]] += bias_grad if undo is None else bias_grad * undo
    if result.input is not None:
        if undo is not None:
            hidden_grad *= undo
        if not in_place:
            result.input[chunk.where] = hidden_grad
