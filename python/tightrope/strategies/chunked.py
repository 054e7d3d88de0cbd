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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..coefficients import row_coefficients
from ..distributed.exchange import Reduction
from ..statistics import RowStats, StatGrads, norm_rows, row_stats
from ..targets import Target
from . import plan
from .gemm import headroom, multiply
from .problem import LinearProblem
from .products import Gradients, Needs, Tile, multiply_tiles
from .sampled import Sampler, in_full
from .scored import Chunk, ColumnSums
from .workspace import borrow

# (statistics of a chunk's rows, the chunk) -> (loss of each row [n], upstream gradients of the statistics,
# gradients of the loss's per-row arguments, [n, ...] each). Gradients include the weight of the row.
Upstream = Callable[[RowStats, Chunk], tuple[Tensor, StatGrads, tuple[Tensor | None, ...]]]
# The upstream gradients of some rows' statistics as functions of these: [UPSTREAM, n] (`RowUpstream`).
Ahead = Callable[[slice | Tensor], Tensor]


def side_by_side(hidden_grad: Tensor | None, to_rows: Tensor | None) -> Tensor | None:
    """Gradients of hidden states [m, D] and of temperatures [m], of those that are wanted, as one to send."""
    if hidden_grad is None or to_rows is None:
        return hidden_grad if to_rows is None else to_rows.unsqueeze(-1)
    return torch.cat([hidden_grad, to_rows.unsqueeze(-1)], -1)


class Reductions:
    """Gradients of chunks' rows that are summed over the ranks while the next chunk is worked on."""

    def __init__(self, gradients: Gradients):
        self.gradients = gradients
        self.under_way: tuple[Reduction, slice | Tensor] | None = None

    def add(self, own: Chunk, hidden_grad: Tensor | None, to_rows: Tensor | None) -> None:
        """Those of hidden states [m, D] and of temperatures [m] of all rows that are scored here."""
        sums = side_by_side(hidden_grad, to_rows)
        if sums is not None:
            reduction = own.step.reduce(sums)
            self.finish()
            self.under_way = reduction, own.where

    def finish(self) -> None:
        if self.under_way is None:
            return
        (reduction, where), self.under_way = self.under_way, None
        total = reduction.result()
        to_input, _, _, to_temperature = self.gradients.flat()
        if to_input is not None:
            to_input[where] = total[:, : to_input.shape[1]]
        if to_temperature is not None:
            to_temperature[where] = total[:, -1]


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
        if not chunk.size:  # other ranks have rows in it
            return StatGrads()
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
    rows: int  # of a chunk, at most, those of all ranks together
    stride: int  # elements between two rows of logits
    fused: bool  # a chunk goes by one launch
    taught: bool = False  # the tiles of a teacher stand behind the logits

    @property
    def elements(self) -> int:
        """Elements of the memory for a chunk's logits, and for a teacher's."""
        return self.rows * self.stride * (2 if self.taught else 1)

    @classmethod
    def of(cls, problem: LinearProblem, workspace: int, fusible: bool) -> Plan:
        """workspace: bytes for a chunk's logits. fusible: the loss can go by one launch."""
        exchange, entries, dtype = problem.exchange, problem.widest, problem.dtype
        rows, owners = exchange.most_rows(problem.rows.count), exchange.owners

        def most(spans: list[tuple[int, int]]) -> int:
            return max((stop - start for start, stop in spans), default=0) * owners

        if fusible:
            stride = -(-entries // plan.ROW_STRIDE) * plan.ROW_STRIDE
            whole = plan.chunk_spans(rows, owners, stride, dtype.itemsize, workspace, problem.device)
            if whole and problem.fuses(whole[0][1]):
                return cls(whole, most(whole), stride, True)
        spans = plan.tiled_chunk_spans(
            rows, owners, entries, dtype, problem.operand, workspace, problem.device
        )
        return cls(spans, most(spans), problem.columns, False, problem.teacher is not None)


def of_teacher(memory: Tensor) -> Tensor:
    """The part of a chunk's memory that has a teacher's tiles."""
    return memory[memory.numel() // 2 :]


def loss_and_gradients(
    problem: LinearProblem, upstream: Upstream, needs: Needs, workspace: int, ahead: Ahead | None = None
) -> tuple[Record, Gradients, Tensor]:
    """The loss of every row and the gradients of their weighted sum, in one sweep over the rows.

    And what came of sampling, [3] (`Sampler.report`). workspace: bytes for a chunk's logits. ahead: the
    gradients that upstream gives, for a fused kernel.
    """
    problem.check_topk()
    how = Plan.of(problem, workspace, fusible=ahead is not None and not Sampler.serves(problem, needs))
    record, gradients = Record(problem), Gradients.unwritten(problem, needs, len(how.chunks))
    reductions, sampler = Reductions(gradients), Sampler.of(problem, needs, gradients)
    with borrow(how.elements, problem.dtype, problem.device) as memory:
        if how.fused:
            every, summary, argmax = _fused(problem, how, memory, ahead, gradients)
            record.add(every, summary, argmax, upstream)
            return record, gradients, in_full(problem)
        for start, stop in how.chunks:
            own = problem.chunk(start, stop)
            chunk, hidden = own.step.spread(problem, own)
            summary, argmax = chunk_statistics(problem, own, chunk, hidden, memory)
            stat_grads = record.add(own, summary, argmax, upstream)
            coef = row_coefficients(summary, stat_grads, problem.vocab_size)
            chunk_gradients(
                problem, own, chunk, hidden, memory, norm_rows(summary), coef, reductions, sampler
            )
        reductions.finish()
    return record, gradients, in_full(problem) if sampler is None else sampler.report()


def _fused(
    problem: LinearProblem, how: Plan, memory: Tensor, ahead: Ahead, gradients: Gradients
) -> tuple[Chunk, Tensor, Tensor]:
    """Add what every chunk contributes to the gradients; gives all rows as a chunk, their summary and argmax.

    A chunk is three products and one launch. What is a number a row is made once for all of them: a launch
    for some thousand rows takes a GPU as long as one for all.
    """
    # The statistics of all rows need no copy of a top-k target's entries.
    whole = problem if problem.target.topk_index is None else replace(problem, target=Target())
    every = whole.chunk(0, problem.rows.count)
    upstream, partials = ahead(every.where), []
    for start, stop in how.chunks:
        chunk = problem.chunk(start, stop)
        hidden = problem.hidden(chunk)
        logits = memory[: chunk.size * how.stride].view(chunk.size, how.stride)[:, : problem.columns]
        tiles = problem.wide_tiles(chunk.size)
        for tile in tiles:
            multiply(hidden, problem.head(*tile).t(), logits[:, tile[0] : tile[1]], rows="m")
        partial = problem.new_partial(chunk.size)
        grad = problem.row_loss_grad(logits, *partial, upstream[:, start:stop].contiguous(), chunk)
        partials.append(partial)
        parts = ((tile, grad[:, tile[0] : tile[1]]) for tile in tiles)
        multiply_tiles(problem, chunk, hidden, parts, None, gradients)
    partial, argmax = (torch.cat(parts, -1) for parts in zip(*partials))
    return every, *problem.summarise(partial, argmax, every, every)


def chunk_statistics(
    problem: LinearProblem, own: Chunk, chunk: Chunk, hidden: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill the memory with a chunk's logits, tile by tile; gives summary [SUMMARY, n] and argmax [n].

    own: the part of the chunk that is this rank's, whose statistics are given.
    """
    partial, argmax = problem.new_partial(chunk.size)
    tiles = problem.tiles(chunk.size)
    if problem.teacher is not None:
        chunk.target.dense.measure(own.step, tiles, of_teacher(memory))
    problem.logit_stats(problem.factor(hidden), memory, partial, argmax, chunk, tiles, kept=True)
    again = (
        (problem.place(memory[chunk.size * tile[0] :], chunk.size, tile[1] - tile[0]), tile) for tile in tiles
    )
    return problem.summarise(partial, argmax, own, chunk, again)


def chunk_gradients(
    problem: LinearProblem,
    own: Chunk,
    chunk: Chunk,
    hidden: Tensor,
    memory: Tensor,
    norm: Tensor,
    coef: Tensor,
    reductions: Reductions,
    sampler: Sampler | None = None,
) -> None:
    """Add what a chunk contributes to the gradients; memory holds its logits, and is overwritten.

    norm [2 or 5, n] (`norm_rows`) and coef are of the own rows.
    """
    gradients = reductions.gradients
    to_rows = None if gradients.to_temperature is None else coef.new_zeros(chunk.size)
    if not own.step.alone:
        norm, coef = own.step.publish(torch.cat([norm, coef])).split([len(norm), len(coef)])
    coef, undo = headroom(coef, problem.operand)
    form = problem.form(chunk, norm, coef, to_rows)

    def made(sums: ColumnSums | None = None) -> Iterable[tuple[Tile, Tensor]]:
        for tile in problem.gradient_tiles(chunk.size):
            raw = problem.place(memory[chunk.size * tile[0] :], chunk.size, tile[1] - tile[0])
            yield tile, problem.row_grad(raw, form, chunk, tile, sums)

    if sampler is None:
        hidden_grad = multiply_tiles(problem, chunk, hidden, made(), undo, gradients)
    else:
        hidden_grad = sampler.multiply(chunk, hidden, memory, form, made)
    if to_rows is not None and undo is not None:
        to_rows *= undo
    if not own.step.alone:
        reductions.add(own, hidden_grad, to_rows)
    elif to_rows is not None:
        gradients.to_temperature[own.where] = to_rows
