"""A chunk of rows, and what the two kinds of problem share: statistics and gradients of logits, tile by tile.

The row kernels take logits of a tile and flat arguments; here these are made of the chunk's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arguments import SideArguments, TileArguments, Transform
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
from .teacher import TeacherRows

if TYPE_CHECKING:
    from .problem import LinearProblem


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
class Scored:
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
