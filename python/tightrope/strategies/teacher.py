"""A target that is another head's softmax: its tiles are made when their turn comes.

A teacher is scored as the student is, by a `LinearProblem` of its own over the same rows and the same part
of the vocabulary. One pass over its logits gives what normalises them; after that a tile of its logits
becomes a tile of its distribution, which goes to the same row primitives as a tile of a dense target. Where
the drivers keep a chunk's logits between their passes they keep the teacher's beside them, and it is scored
once; else its logits are made for each pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.ops import to_logits
from ..statistics import named, summarise
from .gemm import multiply

if TYPE_CHECKING:
    from ..distributed.exchange import Step
    from .problem import Chunk, LinearProblem


class TeacherRows:
    """The distributions of a chunk of rows, as `DenseRows` gives those of a dense target.

    form: as `TeacherArguments` has it. smoothing: of b, where the form is its logarithm. norm [2, n]: maximum
    and log of the sum of the rows' logits, where they are known.
    """

    def __init__(
        self,
        teacher: LinearProblem,
        chunk: Chunk,
        form: str,
        smoothing: float,
        norm: Tensor | None = None,
    ):
        self.teacher, self.chunk, self.norm = teacher, chunk, norm
        self.form, self.smoothing = form, smoothing
        self.hidden = teacher.hidden(chunk)
        self.summary: Tensor | None = None  # [TEACHER_SUMMARY, rows of this rank], once measured
        self.memory: Tensor | None = None  # flat, where the tiles of the chunk are kept

    def spread(self, step: Step) -> TeacherRows:
        """The same of all rows that are scored here, where ranks have rows of their own."""
        chunk, hidden = step.spread(self.teacher, self.chunk)
        norm = None if self.norm is None else step.publish(self.norm)
        spread = TeacherRows(self.teacher, self.chunk, self.form, self.smoothing, norm)
        spread.chunk, spread.hidden = chunk, hidden
        return spread

    def measure(self, step: Step, tiles: Iterable[tuple[int, int]], memory: Tensor | None = None) -> None:
        """Find the norm and the summary, in one pass; in flat memory, where some is given, the tiles stay."""
        teacher, tiles = self.teacher, list(tiles)
        partial, best = teacher.new_partial(self.chunk.size)
        if memory is None and teacher.streams:
            teacher.stream_stats(self.hidden, partial, best, self.chunk, (0, teacher.columns))
        else:
            for tile in tiles:
                raw = self._raw(tile, memory)
                teacher.row_stats(raw, partial, best, self.chunk, tile)
        s = named(summarise(step.collect(partial, best)[0]))
        norm = torch.stack([s["max"], s["log_sum"]])
        self.summary = torch.cat([norm, torch.stack([s["entropy"], s["collision"]])])
        self.norm = norm if step.alone else step.publish(norm)
        if memory is not None:
            for tile in tiles:
                self._normalise(self._place(memory, tile), tile)
            self.memory = memory

    def keep(self, memory: Tensor) -> None:
        """Flat memory has the tiles already."""
        self.memory = memory

    def tile(self, start: int, stop: int) -> Tensor:
        """Entries ``start:stop`` of those that are here, [n, stop - start]."""
        if self.memory is not None:
            return self._place(self.memory, (start, stop))
        return self._normalise(self._raw((start, stop), None), (start, stop))

    def _place(self, memory: Tensor, tile: tuple[int, int]) -> Tensor:
        rows, width = self.chunk.size, tile[1] - tile[0]
        return memory[rows * tile[0] :][: rows * width].view(rows, width)

    def _raw(self, tile: tuple[int, int], memory: Tensor | None) -> Tensor:
        """A tile of raw logits; rows lie one after another, as the row primitives take dense targets."""
        teacher, shape = self.teacher, (self.chunk.size, tile[1] - tile[0])
        if memory is None:
            out = torch.empty(shape, dtype=teacher.dtype, device=teacher.device)
        else:
            out = self._place(memory, tile)
        return multiply(self.hidden, teacher.head(*tile).t(), out, rows="m")

    def _normalise(self, raw: Tensor, tile: tuple[int, int]) -> Tensor:
        """Raw logits to what a tile of the target is, in place."""
        teacher = self.teacher
        z = to_logits(raw, teacher.head_bias(*tile), teacher.transform)
        log_b = torch.sub(z, self.norm[0].unsqueeze(-1), out=raw).sub_(self.norm[1].unsqueeze(-1))
        if self.form == "mass":
            return log_b.exp_()
        if self.smoothing:
            keep = math.log1p(-self.smoothing) if self.smoothing < 1.0 else -math.inf
            share = torch.full_like(log_b[:1, :1], math.log(self.smoothing / teacher.vocab_size))
            return torch.logaddexp(log_b.add_(keep), share, out=log_b)
        # Where the student too gives an impossible entry nothing, 0 * -inf would be NaN.
        return log_b.clamp_(min=torch.finfo(log_b.dtype).min)
