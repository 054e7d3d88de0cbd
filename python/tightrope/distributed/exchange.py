"""How a chunk of rows goes through the ranks that hold the vocabulary together.

The drivers know four moments of a chunk, each of them one collective or none: `spread` brings the rows that
this rank's part of the vocabulary is scored with, `collect` brings the statistics of all parts to where the
row's loss is taken, `publish` brings what the loss made of them back, and `reduce` sums the gradients of the
hidden states. With replicated rows every rank takes every row's loss, from the same bits; with sharded ones
each row has one rank that owns it. A step is a chunk's span together with what of it each rank has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arguments import ShardArguments
from ..statistics import merge, merge_argmax, merge_sides
from ..targets import DenseRows
from . import collectives

if TYPE_CHECKING:
    import torch.distributed as dist

    from ..strategies.problem import LinearProblem
    from ..strategies.scored import Chunk

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Step:
    """A chunk of rows of a process that holds all of the vocabulary: nothing travels."""

    alone = True

    def spread(self, problem: LinearProblem, own: Chunk) -> tuple[Chunk, Tensor]:
        """The chunk to be scored with what is here of the vocabulary, and its hidden states [m, D]."""
        return own, problem.hidden(own)

    def collect(self, partial: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics [11, n], [n] of this rank's rows over all of the vocabulary, from [11, m], [m]."""
        return partial, argmax

    def collect_sides(self, sides: Tensor) -> Tensor:
        """The same of the sides [6, m]."""
        return sides

    def publish(self, values: Tensor) -> Tensor:
        """Values [k, m] of all rows that are scored here, from those of this rank's rows [k, n]."""
        return values

    def reduce(self, sums: Tensor) -> Reduction:
        """The sum over all parts of the vocabulary, for this rank's rows [n, D], from sums [m, D]."""
        raise NotImplementedError  # there is one part


class Reduction:
    """A sum that travels: ``result()`` waits for it."""

    def __init__(self, parts: Tensor, group: dist.ProcessGroup, rows: int, gathered: bool):
        self.under_way = collectives.Exchanged(parts, group, wait=False)
        self.group, self.rows, self.gathered = group, rows, gathered

    def result(self) -> Tensor:
        total = collectives.sum_in_order(self.under_way.result())
        if self.gathered:
            total = collectives.gather(total, self.group).flatten(0, 1)
        return total[: self.rows]


def _joined(partial: Tensor, argmax: Tensor) -> Tensor:
    """[11, m] and [m] as [12, m]: the index is carried as bits."""
    return torch.cat([partial, argmax.to(_INTEGERS[partial.dtype]).view(partial.dtype).unsqueeze(0)])


def _merged(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of all parts of the vocabulary [P, 12, n] as one, [11, n] and [n]."""
    partials, bits = parts[:, :-1], parts[:, -1].contiguous()
    argmax = bits.view(_INTEGERS[bits.dtype]).long()
    return merge(*partials), merge_argmax(partials[:, 0], argmax)


@dataclass(frozen=True)
class Replicated(Step):
    """Every rank has the same rows: statistics are gathered, and merged everywhere alike."""

    alone = False
    group: dist.ProcessGroup

    def collect(self, partial: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
        return _merged(collectives.gather(_joined(partial, argmax), self.group))

    def collect_sides(self, sides: Tensor) -> Tensor:
        return merge_sides(*collectives.gather(sides, self.group))

    def reduce(self, sums: Tensor) -> Reduction:
        size, rows = self.group.size(), sums.shape[0]
        share = -(-rows // size)
        if share * size > rows:
            sums = torch.cat([sums, sums.new_zeros(share * size - rows, sums.shape[1])])
        return Reduction(sums.view(size, share, sums.shape[1]), self.group, rows, gathered=True)


@dataclass(frozen=True)
class Sharded(Step):
    """Each rank has rows of its own: these are gathered, and their statistics go back to their owner."""

    alone = False
    group: dist.ProcessGroup
    sizes: tuple[int, ...]  # rows of this step, of each rank
    layout: list[int] | None  # start and number of classes of each rank

    @cached_property
    def width(self) -> int:
        """Rows that each rank's part is filled up to."""
        return max(self.sizes)

    @cached_property
    def own(self) -> int:
        return self.sizes[self.group.rank()]

    def _whole(self, gathered: Tensor) -> Tensor:
        """[P, width, ...] without the filling, [m, ...]."""
        if min(self.sizes) == self.width:
            return gathered.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(gathered, self.sizes)])

    def _parts(self, values: Tensor) -> Tensor:
        """[k, m] with filling, cut by the owner of the row: [P, k, width]."""
        parts = values.new_zeros(len(self.sizes), values.shape[0], self.width)
        at = 0
        for part, size in zip(parts, self.sizes):
            part[:, :size] = values[:, at : at + size]
            at += size
        return parts

    def spread(self, problem: LinearProblem, own: Chunk) -> tuple[Chunk, Tensor]:
        target, sets = own.target, own.sets
        values = {
            "hidden": problem.input[own.where],
            "index": target.index,
            "topk_index": target.topk_index,
            "topk_prob": target.topk_prob,
            "active": own.active,
            "classes": None if sets is None else sets.classes,
            "temperature": own.temperature,
        }
        given = {name: value for name, value in values.items() if value is not None}
        packed = collectives.gather(collectives.pack(list(given.values()), self.width), self.group)
        all_rows = dict.fromkeys(values)
        all_rows.update(zip(given, collectives.unpack(self._whole(packed), list(given.values()))))
        rows = all_rows["hidden"].shape[0]
        dense = target.dense
        if isinstance(dense, DenseRows):
            dense = self._columns(dense, problem.columns)
        elif dense is not None:
            dense = dense.spread(self)
        target = replace(
            target, dense=dense, size=rows, **{k: all_rows[k] for k in ("index", "topk_index", "topk_prob")}
        )
        if all_rows["classes"] is not None:
            sets = replace(sets, classes=all_rows["classes"])
        active, temperature = all_rows["active"], all_rows["temperature"]
        chunk = replace(
            own,
            size=rows,
            where=slice(0, rows),
            target=target,
            active=active,
            sets=sets,
            temperature=temperature,
        )
        return chunk, problem.operands(all_rows["hidden"], active)

    def _columns(self, dense: DenseRows, columns: int) -> DenseRows:
        """This rank's classes of the distributions of all rows, from all classes of its own rows."""
        spans = list(zip(self.layout[::2], self.layout[1::2]))
        widest = max(size for _, size in spans)
        parts = None
        for i, (start, size) in enumerate(spans):
            tile = dense.tile(start, start + size)
            if parts is None:
                parts = tile.new_zeros(len(spans), self.width, widest)
            parts[i, : self.own, :size] = tile
        return DenseRows(self._whole(collectives.exchange(parts, self.group))[:, :columns], slice(None))

    def collect(self, partial: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
        parts = collectives.exchange(self._parts(_joined(partial, argmax)), self.group)
        return _merged(parts[:, :, : self.own])

    def collect_sides(self, sides: Tensor) -> Tensor:
        parts = collectives.exchange(self._parts(sides), self.group)
        return merge_sides(*parts[:, :, : self.own])

    def publish(self, values: Tensor) -> Tensor:
        own = values.new_zeros(self.width, values.shape[0])
        own[: self.own] = values.t()
        return self._whole(collectives.gather(own, self.group)).t().contiguous()

    def reduce(self, sums: Tensor) -> Reduction:
        parts = self._parts(sums.t()).transpose(1, 2)
        return Reduction(parts, self.group, self.own, gathered=False)


@dataclass(frozen=True)
class Exchange:
    """All steps of a call."""

    group: dist.ProcessGroup | None
    counts: tuple[int, ...] | None  # rows that are worked on, of each rank, where they have their own
    layout: list[int] | None

    @classmethod
    def of(cls, shard: ShardArguments, rows: int, device: torch.device) -> Exchange:
        """rows: that are worked on here."""
        if shard.group is None:
            return ALONE
        group, counts = collectives.group_of(shard.group), None
        if shard.sharded:
            counts = shard.counts
            if counts is None:  # in a compiled graph, which could not agree before
                counts = collectives.gather(torch.tensor([rows], device=device), group).flatten().tolist()
            counts = tuple(counts)
        return cls(group, counts, shard.layout)

    @property
    def owners(self) -> int:
        """How many ranks have rows of their own in a step."""
        return 1 if self.counts is None else len(self.counts)

    @property
    def alone(self) -> bool:
        """Whether all of the vocabulary is here."""
        return self.group is None or self.group.size() == 1

    def most_rows(self, rows: int) -> int:
        """What the steps' spans cut up: rows, or those of the rank that has most."""
        return rows if self.counts is None else max(self.counts)

    def own(self, start: int, stop: int) -> tuple[int, int]:
        """What of a span this rank has."""
        if self.counts is None:
            return start, stop
        count = self.counts[self.group.rank()]
        return min(start, count), min(stop, count)

    def step(self, start: int, stop: int) -> Step:
        if self.alone:
            return _STEP
        if self.counts is None:
            return Replicated(self.group)
        sizes = tuple(min(stop, count) - min(start, count) for count in self.counts)
        return Sharded(self.group, sizes, self.layout)


_STEP = Step()
ALONE = Exchange(None, None, None)
