"""What both drivers are given, cut into the pieces that they work on.

Where a GEMM of low-precision operands cannot give float32, pieces are converted to the dtype of the
arithmetic as their turn comes, so hidden states and heads are never copied whole: a bfloat16 GEMM would round
the logits, and without native instructions it runs hundreds of times slower than float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..arguments import NoiseArguments, SideArguments, TileArguments, Transform
from ..backends import Backend
from ..backends.ops import to_logits, to_raw_gradient
from ..distributed.exchange import Exchange, Step
from ..statistics import (
    empty_partial,
    empty_sides,
    summarise,
    summarise_sides,
    summary_rows,
)
from ..support import RowSets
from ..targets import Target, TargetChunk, out_of_range
from . import plan
from .gemm import multiply, operand_dtype, packed, result_dtype, widens
from .teacher import TeacherRows


@dataclass(frozen=True)
class Chunk:
    """A chunk of rows: where they stand among all rows, their targets, and which of them count."""

    first: bool  # of all chunks
    size: int
    where: slice | Tensor  # into tensors of all N rows
    target: TargetChunk
    active: Tensor | None  # [size] bool; None: all
    sets: RowSets | None
    temperature: Tensor | None  # [size, 1]
    step: Step


@dataclass(frozen=True)
class Rows:
    """Which of the N rows are worked on. Exactly one of `kept` and `active` is set where any row is ignored.

    kept: [n] int64, the rows that count, ascending: only these are gathered and computed.
    active: [N] bool: every row goes through the GEMMs, and those that do not count are masked.
    """

    total: int
    kept: Tensor | None
    active: Tensor | None

    @classmethod
    def of(cls, total: int, valid: Tensor | None, skip: bool) -> Rows:
        if valid is None:
            return cls(total, None, None)
        if not skip:
            return cls(total, None, valid)
        kept = valid.nonzero().squeeze(-1)
        return cls(total, None if kept.numel() == total else kept, None)

    @property
    def count(self) -> int:
        return self.total if self.kept is None else self.kept.numel()

    def where(self, start: int, stop: int) -> slice | Tensor:
        """Where those that are worked on stand among all."""
        return slice(start, stop) if self.kept is None else self.kept[start:stop]


@dataclass(frozen=True)
class Form:
    """What the gradients of a chunk's logits are made of, beside the logits."""

    norm: Tensor  # [2, n]: maximum and log of the sum; with sets [4, n], of the rest and of the set
    coef: Tensor  # [7, n], or [14, n]
    sides: SideArguments
    to_temperature: Tensor | None  # [n]: the gradient of temperatures, which is added to


@dataclass(frozen=True)
class ColumnSums:
    """What is wanted of the columns of a chunk's gradient, beside the gradient (`ops.column_sums`)."""

    along: Tensor  # [r, n]
    scale: float | Tensor
    sums: Tensor  # [r + 1, V]: written

    def of(self, start: int, stop: int) -> tuple[Tensor, float | Tensor, Tensor]:
        """Those of a tile, as the primitives take them."""
        return self.along, self.scale, self.sums[:, start:stop]


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """What the two kinds of problem share: a chunk's targets and statistics, and what row kernels take."""

    target: Target
    rows: Rows
    transform: Transform
    sets: RowSets | None
    temperature: Tensor | None  # [N]
    backend: Backend
    vocab_size: int  # of the whole vocabulary
    offset: int  # the class of the first entry that is here
    columns: int  # classes that are here
    widest: int  # the same of the rank that has most: what agreed sizes follow from
    exchange: Exchange
    teacher: LinearProblem | None = None  # whose distributions are the target

    def chunk(self, start: int, stop: int, summary: Tensor | None = None) -> Chunk:
        """Rows start:stop of those that are worked on.

        summary [SUMMARY, N]: of all rows, where it is known; else a teacher is to be measured first.
        """
        rows, first, step = self.rows, start == 0, self.exchange.step(start, stop)
        whole = start, stop
        start, stop = self.exchange.own(start, stop)
        where = rows.where(start, stop)
        target = self.target.chunk(start, stop, rows.kept, self.dtype, self.offset)
        if self.teacher is not None:
            known = None if summary is None else summary[:, where]
            target = replace(target, dense=TeacherRows.of(self, whole, known))
        return Chunk(
            first,
            stop - start,
            where,
            target,
            None if rows.active is None else rows.active[start:stop],
            None if self.sets is None else self.sets.chunk(where),
            None if self.temperature is None else self.temperature[where].unsqueeze(-1),
            step,
        )

    def check_topk(self) -> None:
        """Raise ValueError where the backend's row primitives take fewer entries of a top-k target."""
        entries, most = self.target.topk_index, self.backend.max_topk
        if entries is not None and not self.target.is_dense and most is not None and entries.shape[-1] > most:
            raise ValueError(
                f"target: got {entries.shape[-1]} top-k entries a token, expected at most {most} with the "
                f'row kernels of backend "{self.backend.name}"; a dense target or another backend takes more'
            )

    def empty_summary(self) -> tuple[Tensor, Tensor]:
        """Summary [SUMMARY, N] and argmax [N] of rows none of which counts."""
        total, device = self.rows.total, self.device
        count = summary_rows(self.sets is not None, self.teacher is not None)
        summary = torch.zeros(count, total, dtype=self.dtype, device=device)
        return summary, torch.full((total,), -1, dtype=torch.int64, device=device)

    def tile_arguments(self, chunk: Chunk, tile: tuple[int, int]) -> tuple:
        """The flat `TileArguments` of a chunk of rows and a tile of the vocabulary."""
        target, active = chunk.target.tile(*tile), chunk.active
        if chunk.temperature is not None:  # `tempered` has made logits of them
            return TileArguments(**vars(target), active=active).flat()
        bias = self.head_bias(*tile)
        return TileArguments(**vars(target), **vars(self.transform), bias=bias, active=active).flat()

    def head_bias(self, start: int, stop: int) -> Tensor | None:
        return None

    def tempered(self, raw: Tensor, chunk: Chunk, tile: tuple[int, int]) -> Tensor:
        """Raw values as the row primitives take them; where each row has a temperature, its logits."""
        if chunk.temperature is None:
            return raw
        return to_logits(raw, self.head_bias(*tile), self.transform) / chunk.temperature

    def cooled(self, z: Tensor, grad: Tensor, chunk: Chunk, to_temperature: Tensor | None) -> Tensor:
        """dloss/dz of tempered logits to dloss/draw, in place; adds to the gradient of temperatures [n]."""
        if to_temperature is not None:
            product = torch.where(grad == 0, 0.0, grad * z)
            to_temperature -= (product / chunk.temperature).sum(-1)
        return to_raw_gradient(grad.div_(chunk.temperature), z * chunk.temperature, self.transform)

    def row_stats(
        self, raw: Tensor, partial: Tensor, argmax: Tensor, chunk: Chunk, tile: tuple[int, int]
    ) -> None:
        offset = self.offset + tile[0]
        self.backend.row_stats(raw, partial, argmax, offset, *self.tile_arguments(chunk, tile))

    def row_sides(
        self, raw: Tensor, sides: Tensor, which: SideArguments, chunk: Chunk, tile: tuple[int, int]
    ) -> None:
        arguments = self.tile_arguments(chunk, tile)
        self.backend.row_sides(raw, sides, self.offset + tile[0], *which.flat(), *arguments)

    def scored_grad(
        self,
        scored: Tensor,
        out: Tensor,
        form: Form,
        chunk: Chunk,
        tile: tuple[int, int],
        sums: ColumnSums | None = None,
    ) -> None:
        """Write the gradient with respect to what the row primitives take to out, which it may be."""
        rows, offset = (form.norm, form.coef), self.offset + tile[0]
        arguments = (offset, *form.sides.flat(), *self.tile_arguments(chunk, tile))
        if sums is None:
            self.backend.row_grad(scored, out, *rows, *arguments)
        else:
            self.backend.row_grad_sums(scored, out, *rows, *sums.of(*tile), *arguments)

    def new_partial(self, rows: int) -> tuple[Tensor, Tensor]:
        return empty_partial(rows, self.dtype, self.device)

    def new_sides(self, chunk: Chunk) -> Tensor:
        """Sides of which nothing is seen yet; NaN where a set names a class out of range."""
        sides = empty_sides(chunk.size, self.dtype, self.device)
        if chunk.sets.classes is not None:
            lost = out_of_range(chunk.sets.classes, self.vocab_size).any(-1)
            sides[0].masked_fill_(lost, torch.nan)
        return sides

    def form(self, chunk: Chunk, norm: Tensor, coef: Tensor, to_temperature: Tensor | None = None) -> Form:
        """From `norm_rows` and coefficients of a chunk."""
        if chunk.sets is None:
            return Form(norm.contiguous(), coef, SideArguments(), to_temperature)
        return Form(norm[1:].contiguous(), coef, chunk.sets.sides(norm[0]), to_temperature)

    def summarise(
        self,
        partial: Tensor,
        argmax: Tensor,
        own: Chunk,
        chunk: Chunk,
        again: Iterable[tuple[Tensor, tuple[int, int]]] = (),
    ) -> tuple[Tensor, Tensor]:
        """Summary and argmax of the own rows of a chunk; zeros and -1 for rows that do not count.

        partial, argmax: of all rows that are scored here. again: what row_stats was given, tile by tile, and
        the tiles. Taken only where there is a set, which may be named by the maximum of the row.
        """
        partial, argmax = own.step.collect(partial, argmax)
        summary = summarise(partial, target_must_occur=own.target.index is not None)
        if own.sets is not None:
            maximum = own.step.publish(partial[:1])[0] if own.sets.classes is None else partial[0]
            sides, which = self.new_sides(chunk), chunk.sets.sides(maximum)
            for raw, tile in again:
                self.row_sides(raw, sides, which, chunk, tile)
            summary = torch.cat([summary, summarise_sides(own.step.collect_sides(sides))])
        if self.teacher is not None:
            summary = chunk.target.dense.completed(summary)
        return summary if own.active is None else summary.masked_fill(~own.active, 0.0), argmax


@dataclass(frozen=True)
class LinearProblem(_Scored):
    """Hidden states [N, D] under a vocabulary head [V, D] with bias [V], and a target for each row."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    noise: NoiseArguments = field(default_factory=NoiseArguments)
    widened: bool = False  # every operand is of the dtype of the arithmetic
    narrow: bool = False  # gradients of logits may be rounded to bfloat16 as operands
    arithmetic: torch.dtype | None = None  # a teacher's is the student's

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float64 where any of the tensors is, else float32."""
        return self.arithmetic or arithmetic_dtype(self.input, self.weight, self.bias)

    @cached_property
    def streams(self) -> bool:
        """Whether the backend has kernels that make logits and use them at once, for these arguments."""
        plain = self.dtype == torch.float32 and self.sets is None and self.temperature is None
        return plain and self.backend.serves_stream(self.input, self.weight)

    @cached_property
    def operand(self) -> torch.dtype:
        """The dtype of what goes into GEMMs: the tensors' own where that can give float32."""
        exact = not self.widened and (self.streams or widens(self.device, self.input.dtype))
        return operand_dtype(self.input.dtype, self.weight.dtype, self.dtype, exact)

    def in_arithmetic(self) -> LinearProblem:
        """The same, with every operand of a GEMM in the dtype of the arithmetic."""
        return replace(self, widened=True)

    @property
    def device(self) -> torch.device:
        return self.input.device

    def tiles(self, rows: int) -> list[tuple[int, int]]:
        """Spans of the vocabulary that go by one at a time, for so many rows."""
        converted = self.weight.shape[1] if self.weight.dtype != self.operand else 0
        return plan.spans(self.columns, plan.tile_width(rows, self.device, converted), multiple=16)

    def wide_tiles(self, rows: int) -> list[tuple[int, int]]:
        """The same where a tile needs no memory beside its logits: one, unless its head is converted."""
        return [(0, self.columns)] if self.weight.dtype == self.operand else self.tiles(rows)

    def hidden(self, chunk: Chunk) -> Tensor:
        """The chunk's hidden states [size, D]; zeros where a row does not count: no NaN leaks from it."""
        return self.operands(self.input[chunk.where], chunk.active)

    def operands(self, hidden: Tensor, active: Tensor | None) -> Tensor:
        hidden = hidden.to(self.operand)
        return hidden if active is None else hidden.masked_fill(~active.unsqueeze(-1), 0.0)

    def head(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of the head, [T, D]."""
        return self.weight[start:stop].to(self.operand)

    def gradient_head(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of the head, for products with gradients of logits: `multiply` converts them."""
        return self.weight[start:stop] if self.pairs else self.head(start, stop)

    def gradient_factor(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, D], for products with gradients of logits, of which there are several."""
        return packed(hidden.to(torch.bfloat16), rounds=True) if self.rounds else packed(hidden)

    def head_bias(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start:stop].to(self.dtype).contiguous()

    def place(self, memory: Tensor, rows: int, entries: int) -> Tensor:
        """The first elements of flat memory, as logits of so many rows and entries."""
        flat = memory[: rows * entries]
        return flat.view(rows, entries) if self.by_rows else flat.view(entries, rows).t()

    @cached_property
    def by_rows(self) -> bool:
        """Whether the entries of a row of logits are adjacent.

        Transposed, their GEMM is 5 to 25 % faster with MKL; the row kernels of a CPU take either layout.
        """
        return self.device.type != "cpu"

    def adjacent(self, rows: int) -> int:
        """Entries of a row that `place` lays out side by side where a chunk goes by tile by tile."""
        return self.tiles(rows)[0][1] if self.by_rows else 1

    def head_rows(self, index: Tensor) -> Tensor:
        """Some rows of the head, as `gradient_head`."""
        rows = self.weight.index_select(0, index)
        return rows if self.pairs else self.operands(rows, None)

    @cached_property
    def pairs(self) -> bool:
        """Whether logits are made of bfloat16 tensors as they are, in float32."""
        product, widths = self.backend.pair_product, (self.weight.shape[1], *self.weight.stride())
        fits = widths[0] % 2 == 0 and widths[0] > 0 and widths[2] == 1
        narrow = self.input.dtype == self.weight.dtype == torch.bfloat16 and self.dtype == torch.float32
        return product is not None and fits and narrow

    @cached_property
    def rounds(self) -> bool:
        """Whether gradients of logits are rounded to bfloat16 where they are multiplied."""
        return self.narrow and self.pairs

    def factor(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, D] as `raw_logits` takes them best where it meets them more than once."""
        if self.by_rows:
            return hidden
        if not self.pairs:
            across = packed(hidden.t())
            return across if across.dim() == 3 else hidden
        # Two bfloat16 are one int32, which is transposed faster. They were bfloat16 before they were float32.
        pairs = hidden.to(torch.bfloat16).contiguous().view(torch.int32).t()
        # To memory of its own: of one row the transpose counts as contiguous, whatever its strides.
        across = torch.empty(pairs.shape, dtype=torch.int32, device=hidden.device).copy_(pairs)
        return across.view(torch.bfloat16).unflatten(1, (-1, 2))

    def raw_logits(
        self,
        factor: Tensor,
        memory: Tensor,
        chunk: Chunk,
        tile: tuple[int, int],
        head: Tensor | None = None,
    ) -> Tensor:
        """``hidden @ head.T`` [n, T], in its place in flat memory; logits where rows have temperatures.

        head: that of the tile, where it is at hand.
        """
        raw = self.place(memory, chunk.size, tile[1] - tile[0])
        if factor.dim() == 3 and factor.dtype == torch.bfloat16:
            self.backend.pair_product(self.weight[tile[0] : tile[1]], factor, raw.t(), False)
        else:
            self.product(factor, self.head(*tile) if head is None else head, raw)
        return raw if chunk.temperature is None else raw.copy_(self.tempered(raw, chunk, tile))

    def product(self, hidden: Tensor, head: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """``hidden @ head.T`` to out [n, T], which `place` laid out, or added to it.

        hidden: [n, D], or what `packed` made of its transpose.
        """
        if self.by_rows:
            multiply(hidden, head.t(), out, rows="m", accumulate=accumulate)
        else:
            across = hidden if hidden.dim() == 3 else hidden.t()
            multiply(head, across, out.t(), rows="n", accumulate=accumulate)

    def row_grad(
        self,
        raw: Tensor,
        form: Form,
        chunk: Chunk,
        tile: tuple[int, int],
        sums: ColumnSums | None = None,
    ) -> Tensor:
        """Gradient with respect to the raw logits, as a GEMM's operand: in place where dtypes allow.

        sums: written too, and the gradient in place, in the dtype of the arithmetic.
        """
        z = None if chunk.temperature is None else raw.clone()
        narrow = self.operand != raw.dtype and self.backend.narrows and z is None and sums is None
        out = torch.empty_like(raw, dtype=self.operand) if narrow else raw
        self.scored_grad(raw, out, form, chunk, tile, sums if z is None else None)
        if z is not None:
            out = self.cooled(z, out, chunk, form.to_temperature)
            if sums is not None:
                self.backend.column_sums(out, *sums.of(*tile))
        return out.to(self.operand) if sums is None else out

    def fuses(self, rows: int) -> bool:
        """Whether `row_loss_grad` is the better way for chunks of so many rows.

        Not for a dense target, which goes by tile by tile because a chunk of it would be converted whole; nor
        where gradients become float16, whose scale is found from the coefficients (`headroom`).
        """
        if self.target.is_dense or self.operand == torch.float16:
            return False
        if self.sets is not None or self.temperature is not None or not self.exchange.alone:
            return False
        sparse = 1 if self.target.topk_index is None else self.target.topk_index.shape[-1]
        return self.backend.fuses(rows, self.vocab_size, sparse, self.dtype, self.device)

    def row_loss_grad(
        self, raw: Tensor, partial: Tensor, argmax: Tensor, upstream: Tensor, chunk: Chunk
    ) -> Tensor:
        """Statistics of whole rows of raw logits, into partial and argmax; gives the gradient, in place.

        It is a GEMM's operand: where that is narrower, a row's gradient has the front of the row's memory.
        """
        out = raw
        if self.operand != raw.dtype:
            shape, stride = (raw.shape[0], raw.stride(0)), (raw.stride(0), 1)
            out = raw.as_strided(shape, stride).view(self.operand)[:, : raw.shape[1]]
        arguments = self.tile_arguments(chunk, (0, self.columns))
        self.backend.row_loss_grad(raw, out, partial, argmax, upstream, *arguments)
        return out

    def stream_stats(
        self, hidden: Tensor, partial: Tensor, argmax: Tensor, chunk: Chunk, tile: tuple[int, int]
    ) -> None:
        arguments = self.tile_arguments(chunk, tile)
        offset = self.offset + tile[0]
        self.backend.stream_stats(hidden, self.head(*tile), partial, argmax, offset, *arguments)

    def stream_grad(
        self, hidden: Tensor, out: Tensor, norm: Tensor, coef: Tensor, chunk: Chunk, tile: tuple[int, int]
    ) -> None:
        arguments = self.tile_arguments(chunk, tile)
        offset = self.offset + tile[0]
        self.backend.stream_grad(hidden, self.head(*tile), out, norm, coef, offset, *arguments)


@dataclass(frozen=True)
class LogitsProblem(_Scored):
    """Logits [N, V] and a target for each row. Ignored rows are masked, which costs no GEMM."""

    logits: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return arithmetic_dtype(self.logits)

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def row_grad(self, logits: Tensor, out: Tensor, form: Form, chunk: Chunk) -> None:
        """Write the gradient with respect to logits that are not tempered to out."""
        tile = (0, self.columns)
        scored = self.tempered(logits, chunk, tile)
        grad = out if scored is logits else torch.empty_like(scored)
        self.scored_grad(scored, grad, form, chunk, tile)
        if grad is not out:
            out.copy_(self.cooled(scored, grad, chunk, form.to_temperature))


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    return result_dtype(*(t.dtype for t in tensors if t is not None))
