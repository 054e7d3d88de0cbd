"""The chunked strategy: rows go by in chunks, and the gradients are made in the forward pass.

Per chunk, over tiles of the vocabulary: one GEMM makes a tile of logits in the workspace and its statistics
are taken while it is in cache; then, with the statistics whole and the loss's upstream gradients known, each
tile becomes its gradient in place and goes into two GEMMs. Three GEMMs in all. The workspace holds a chunk's
logits; dW is summed in float32 over the chunks and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
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
    problem: LinearProblem, upstream: Upstream, needs: Needs, workspace: int
) -> ChunkedResult:
    """The loss of every row and the gradients of their weighted sum, in one sweep over the rows.

    workspace: bytes for a chunk's logits.
    """
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

    # Beside the logits, a tile of their gradients where that is narrower.
    narrow = 0 if problem.operand == dtype else min(vocab_size, plan.sizes(device).tile) // 2
    size = plan.chunk_rows(rows.count, vocab_size + narrow, dtype.itemsize, workspace)
    size = min(size, plan.sizes(device).max_chunk_rows)
    chunks = plan.spans(rows.count, size, plan.ROW_MULTIPLE)
    size = max((stop - start for start, stop in chunks), default=0)
    with borrow(size * vocab_size, dtype, device) as flat:
        for start, stop in chunks:
            chunk = rows.chunk(start, stop, problem.target, dtype)
            hidden = problem.hidden(chunk)
            logits, norm, grads = _forward(problem, upstream, chunk, flat, hidden, result)
            coef = row_coefficients(norm, grads, vocab_size)
            _backward(problem, chunk, logits, hidden, norm[:2].contiguous(), coef, result)
    if needs.weight and not chunks:
        result.weight.zero_()
    return result


def _forward(problem, upstream, chunk, flat, hidden, result) -> tuple[list[Tensor], Tensor, StatGrads]:
    """Fill the workspace with the chunk's logits; record statistics and loss.

    Gives the logits of each tile, the summary, and the upstream gradients of the statistics.
    """
    logits = []
    partial, argmax = problem.new_partial(chunk.size)
    for tile in problem.tiles:
        raw = problem.raw_logits(hidden, problem.head(*tile), flat[chunk.size * tile[0] :])
        problem.row_stats(raw, partial, argmax, chunk, tile)
        logits.append(raw)
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
    return logits, summary, grads


def _backward(problem, chunk, logits, hidden, norm, coef, result) -> None:
    """Turn the chunk's logits into their gradient, tile by tile, and add it to what is wanted."""
    in_place = isinstance(chunk.where, slice)
    first = chunk.start == 0
    coef, undo = headroom(coef, problem.operand)
    if result.input is not None:
        hidden_grad = result.input[chunk.where] if in_place else torch.empty_like(hidden, dtype=problem.dtype)
    for tile, raw in zip(problem.tiles, logits):
        grad = problem.row_grad(raw, norm, coef, chunk, tile)
        if result.input is not None:
            multiply(grad, problem.head(*tile), hidden_grad, accumulate=tile[0] > 0)
        if result.weight is not None:
            part = result.weight[tile[0] : tile[1]]
            multiply(grad.t(), hidden, part, accumulate=not first, scale=undo)
        if result.bias is not None:
            bias_grad = grad.sum(0, dtype=problem.dtype)
            result.bias[tile[0] : tile[1]] += bias_grad if undo is None else bias_grad * undo
    if result.input is not None:
        if undo is not None:
            hidden_grad *= undo
        if not in_place:
            result.input[chunk.where] = hidden_grad
