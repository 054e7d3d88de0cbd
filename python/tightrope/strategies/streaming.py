"""The streaming strategy: the vocabulary goes by in tiles, and no more than a tile of logits exists.

Forward: one GEMM, with the statistics of each tile merged into those of its rows. Backward: the tile's
logits are made again, become their gradient, and go into two GEMMs, four in all. Each tile of dW is summed
over all rows in float32 and written once. This is also how rows alone are scored: evaluation, and any loss
whose upstream gradients arrive only with the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import plan
from .chunked import Needs
from .gemm import multiply
from .problem import LinearProblem
from .workspace import borrow


def _blocks(problem: LinearProblem, workspace: int) -> tuple[list[tuple[int, int]], int]:
    """Blocks of rows whose tile of logits fits the workspace, and the elements of the largest."""
    width = max((stop - start for start, stop in problem.tiles), default=0)
    rows = plan.chunk_rows(problem.rows.count, max(width, 1), problem.dtype.itemsize, workspace)
    blocks = plan.spans(problem.rows.count, min(rows, plan.STREAMING_ROWS), plan.ROW_MULTIPLE)
    return blocks, max((stop - start for start, stop in blocks), default=0) * width


def statistics(problem: LinearProblem, workspace: int) -> tuple[Tensor, Tensor]:
    """Summary [SUMMARY, N] and argmax [N] of every row; zeros and -1 for ignored rows."""
    summary, argmax = problem.empty_summary()
    blocks, elements = _blocks(problem, workspace)
    with borrow(elements, problem.dtype, summary.device) as flat:
        for start, stop in blocks:
            chunk = problem.rows.chunk(start, stop, problem.target, problem.dtype)
            hidden = problem.hidden(chunk)
            partial, best = problem.new_partial(chunk.size)
            for tile in problem.tiles:
                raw = problem.raw_logits(hidden, problem.head(*tile), flat)
                problem.row_stats(raw, partial, best, chunk, tile)
            summary[:, chunk.where] = problem.summarise(partial, chunk)
            argmax[chunk.where] = best
    return summary, argmax


def gradients(
    problem: LinearProblem, summary: Tensor, coef: Tensor, needs: Needs, workspace: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input [N, D], weight [V, D] and bias [V] from the coefficients [7, N] of every row."""
    dtype, rows = problem.dtype, problem.rows
    blocks, elements = _blocks(problem, workspace)
    weight_grad = (
        torch.empty_like(problem.weight, memory_format=torch.contiguous_format) if needs.weight else None
    )
    bias_grad = torch.zeros_like(problem.bias) if needs.bias else None
    hidden_sum = (
        problem.input.new_zeros((rows.count, problem.input.shape[1]), dtype=dtype) if needs.input else None
    )
    chunks = [rows.chunk(start, stop, problem.target, dtype) for start, stop in blocks]
    norms = [summary[:2, chunk.where].contiguous() for chunk in chunks]
    coefs = [coef[:, chunk.where].contiguous() for chunk in chunks]
    with borrow(elements, dtype, problem.input.device) as flat:
        for tile in problem.tiles:
            head = problem.head(*tile)
            weight_sum = torch.zeros_like(head) if needs.weight else None
            bias_sum = head.new_zeros(head.shape[0])
            for chunk, (start, stop), norm, block_coef in zip(chunks, blocks, norms, coefs):
                hidden = problem.hidden(chunk)
                raw = problem.raw_logits(hidden, head, flat)
                problem.row_grad(raw, norm, block_coef, chunk, tile)
                if hidden_sum is not None:
                    multiply(raw, head, hidden_sum[start:stop], accumulate=tile[0] > 0)
                if weight_sum is not None:
                    multiply(raw.t(), hidden, weight_sum, accumulate=start > 0)
                if needs.bias:
                    bias_sum += raw.sum(0)
            if weight_grad is not None:
                weight_grad[tile[0] : tile[1]] = weight_sum
            if bias_grad is not None:
                bias_grad[tile[0] : tile[1]] = bias_sum
    return _place(hidden_sum, problem), weight_grad, bias_grad


def _place(hidden_sum: Tensor | None, problem: LinearProblem) -> Tensor | None:
    """The gradient of the rows that count, rounded once and put where they stand among all rows."""
    if hidden_sum is None:
        return None
    hidden_sum = hidden_sum.to(problem.input.dtype)
    if problem.rows.kept is None:
        return hidden_sum
    return torch.zeros_like(problem.input, memory_format=torch.contiguous_format).index_copy_(
        0, problem.rows.kept, hidden_sum
    )
