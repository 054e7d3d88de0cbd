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

from ..arguments import Arguments, group
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


@group
class Needs(Arguments):
    """Which gradients are wanted; the others cost no GEMM and no memory."""

    input_grad: bool
    weight_grad: bool
    bias_grad: bool
    temperature_grad: bool = False


@group
class Gradients(Arguments):
    """The gradients of input [N, D], weight [V, D], bias [V] and temperature [N], or None.

    In the dtype of the arithmetic.
    """

    to_input: Tensor | None
    to_weight: Tensor | None
    to_bias: Tensor | None
    to_temperature: Tensor | None

    @classmethod
    def unwritten(cls, problem: LinearProblem, needs: Needs, chunks: int) -> Gradients:
        """Memory for those that are wanted: zeros where no chunk writes first."""
        like = {"dtype": problem.dtype, "device": problem.device}
        # Rows that are gathered out keep the zeros.
        make = torch.empty if problem.rows.kept is None else torch.zeros
        to_input = make(problem.input.shape, **like) if needs.input_grad else None
        make = torch.empty if chunks else torch.zeros
        to_weight = make(problem.weight.shape, **like) if needs.weight_grad else None
        to_bias = torch.zeros(problem.vocab_size, **like) if needs.bias_grad else None
        to_temperature = torch.zeros(problem.rows.total, **like) if needs.temperature_grad else None
        return cls(to_input, to_weight, to_bias, to_temperature)


class Record:
    """What the loop finds out about every row."""

    def __init__(self, problem: LinearProblem):
        total = problem.rows.total
        self.row_loss = torch.zeros(total, dtype=problem.dtype, device=problem.device)  # 0 for ignored rows
        self.summary, self.argmax = problem.empty_summary()  # [SUMMARY, N] and [N]
        self.args: tuple[Tensor | None, ...] = ()  # gradients of the loss's per-row arguments, [N, ...] each

    def add(self, chunk: Chunk, summary: Tensor, argmax: Tensor, upstream: Upstream) -> StatGrads:
        """Put in a chunk's statistics, its loss and the gradients of the loss's arguments.

        Gives the upstream gradients of the statistics.
        """
        row_loss, grads, args = upstream(row_stats(summary, argmax), chunk)
        if chunk.active is not None:
            row_loss = row_loss.masked_fill(~chunk.active, 0.0)
        self.row_loss[chunk.where] = row_loss
        self.summary[:, chunk.where] = summary
        self.argmax[chunk.where] = argmax
        if not self.args:
            self.args = tuple(
                None if a is None else a.new_zeros(self.row_loss.shape + a.shape[1:]) for a in args
            )
        for whole, part in zip(self.args, args):
            if part is not None:
                if chunk.active is not None:
                    part = part.masked_fill(~chunk.active.view(-1, *(1,) * (part.dim() - 1)), 0.0)
                whole[chunk.where] = part
        return grads


@dataclass(frozen=True)
class Plan:
    """How the rows go by."""

    chunks: list[tuple[int, int]]
    stride: int  # elements between two rows of logits
    fused: bool  # a chunk goes by one launch

    @property
    def elements(self) -> int:
        """Elements of the memory for a chunk's logits."""
        return max((stop - start for start, stop in self.chunks), default=0) * self.stride

    @classmethod
    def of(cls, problem: LinearProblem, workspace: int, fusible: bool) -> Plan:
        """workspace: bytes for a chunk's logits. fusible: the loss can go by one launch."""
        count, vocab_size, dtype = problem.rows.count, problem.vocab_size, problem.dtype
        sizes = plan.sizes(problem.device)

        def chunks(row: int) -> list[tuple[int, int]]:
            size = plan.chunk_rows(count, row, dtype.itemsize, workspace)
            return plan.spans(count, min(size, sizes.max_chunk_rows), plan.ROW_MULTIPLE)

        if fusible:
            stride = -(-vocab_size // plan.ROW_STRIDE) * plan.ROW_STRIDE
            whole = chunks(stride)
            if whole and problem.fuses(whole[0][1]):
                return cls(whole, stride, True)
        # Beside the logits, a tile of their gradients where that is narrower.
        narrow = (
            0 if problem.operand == dtype else min(vocab_size, plan.tile_width(count, problem.device)) // 2
        )
        return cls(chunks(vocab_size + narrow), vocab_size, False)


def loss_and_gradients(
    problem: LinearProblem, upstream: Upstream, needs: Needs, workspace: int, ahead: Ahead
) -> tuple[Record, Gradients]:
    """The loss of every row and the gradients of their weighted sum, in one sweep over the rows.

    workspace: bytes for a chunk's logits. ahead: the gradients that upstream gives, for a fused kernel.
    """
    problem.check_topk()
    how = Plan.of(problem, workspace, fusible=True)
    record, gradients = Record(problem), Gradients.unwritten(problem, needs, len(how.chunks))
    with borrow(how.elements, problem.dtype, problem.device) as memory:
        for start, stop in how.chunks:
            chunk = problem.chunk(start, stop)
            hidden = problem.hidden(chunk)
            if how.fused:
                logits = memory[: chunk.size * how.stride].view(chunk.size, how.stride)
                logits = logits[:, : problem.vocab_size]
                summary, argmax, grads = _fused(problem, chunk, hidden, logits, ahead(chunk))
                record.add(chunk, summary, argmax, upstream)
                _multiply(problem, chunk, hidden, grads, None, gradients)
                continue
            summary, argmax = chunk_statistics(problem, chunk, hidden, memory)
            stat_grads = record.add(chunk, summary, argmax, upstream)
            coef = row_coefficients(summary, stat_grads, problem.vocab_size)
            chunk_gradients(problem, chunk, hidden, memory, summary, coef, gradients)
    return record, gradients


def _fused(
    problem: LinearProblem, chunk: Chunk, hidden: Tensor, logits: Tensor, ahead: Tensor
) -> tuple[Tensor, Tensor, Iterable[Tensor]]:
    """Summary and argmax of a chunk and the gradients of each tile, by way of logits [n, V]."""
    tiles = problem.tiles(chunk.size)
    for tile in tiles:
        multiply(hidden, problem.head(*tile).t(), logits[:, tile[0] : tile[1]], rows="m")
    partial, argmax = problem.new_partial(chunk.size)
    gradient = problem.row_loss_grad(logits, partial, argmax, ahead, chunk)
    return problem.summarise(partial, chunk), argmax, (gradient[:, start:stop] for start, stop in tiles)


def chunk_statistics(
    problem: LinearProblem, chunk: Chunk, hidden: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill the memory with a chunk's logits, tile by tile; gives summary [SUMMARY, n] and argmax [n]."""
    partial, argmax = problem.new_partial(chunk.size)
    tiles = problem.tiles(chunk.size)
    for tile in tiles:
        part = memory[chunk.size * tile[0] :]
        raw = problem.raw_logits(hidden, problem.head(*tile), part, chunk, tile)
        problem.row_stats(raw, partial, argmax, chunk, tile)
    again = (
        (problem.place(memory[chunk.size * tile[0] :], chunk.size, tile[1] - tile[0]), tile) for tile in tiles
    )
    return problem.summarise(partial, chunk, again), argmax


def chunk_gradients(
    problem: LinearProblem,
    chunk: Chunk,
    hidden: Tensor,
    memory: Tensor,
    summary: Tensor,
    coef: Tensor,
    gradients: Gradients,
) -> None:
    """Add what a chunk contributes to the gradients; memory holds its logits, and is overwritten."""
    coef, undo = headroom(coef, problem.operand)
    to_rows = None if gradients.to_temperature is None else summary.new_zeros(chunk.size)
    form = problem.form(chunk, summary, coef, to_rows)

    def gradient(tile: tuple[int, int]) -> Tensor:
        raw = problem.place(memory[chunk.size * tile[0] :], chunk.size, tile[1] - tile[0])
        return problem.row_grad(raw, form, chunk, tile)

    grads = map(gradient, problem.tiles(chunk.size))
    _multiply(problem, chunk, hidden, grads, undo, gradients)
    if to_rows is not None:
        gradients.to_temperature[chunk.where] = to_rows if undo is None else to_rows * undo


def _multiply(
    problem: LinearProblem,
    chunk: Chunk,
    hidden: Tensor,
    grads: Iterable[Tensor],
    undo: Tensor | None,
    gradients: Gradients,
) -> None:
    """Add what the gradients of the chunk's logits, tile by tile, contribute to the gradients wanted.

    undo: what undoes the scale of grads, if they have one.
    """
    to_input, to_weight, to_bias, _ = gradients.flat()
    in_place = isinstance(chunk.where, slice)
    first = chunk.start == 0
    if to_input is not None:
        hidden_grad = to_input[chunk.where] if in_place else torch.empty_like(hidden, dtype=problem.dtype)
    for tile, grad in zip(problem.tiles(chunk.size), grads):
        if to_input is not None:
            multiply(grad, problem.head(*tile), hidden_grad, rows="m", accumulate=tile[0] > 0)
        if to_weight is not None:
            part = to_weight[tile[0] : tile[1]]
            multiply(grad.t(), hidden, part, rows="k", accumulate=not first, scale=undo)
        if to_bias is not None:
            bias_grad = grad.sum(0, dtype=problem.dtype)
            to_bias[tile[0] : tile[1]] += bias_grad if undo is None else bias_grad * undo
    if to_input is not None:
        if undo is not None:
            hidden_grad *= undo
        if not in_place:
            to_input[chunk.where] = hidden_grad
