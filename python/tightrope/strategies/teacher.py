"""A target that is another head's softmax: its tiles are made when their turn comes.

A teacher is scored as the student is, by a `LinearProblem` of its own over the same rows and the same part
of the vocabulary. One pass over its logits gives what normalises them; after that a tile of its logits
becomes a tile of its distribution, which goes to the same row primitives as a tile of a dense target. Where
the drivers keep a chunk's logits between their passes they keep the teacher's beside them, and it is scored
once; else its logits are made for each pass.

The mixture of Jensen-Shannon needs the student's probabilities as well, before the pass that takes the
statistics. So there a frozen student is scored beside the teacher, in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arguments import TileArguments
from ..backends.ops import to_logits
from ..statistics import SUMMARY, named, summarise, teacher_norm
from ..targets import Target
from .gemm import multiply

if TYPE_CHECKING:
    from ..distributed.exchange import Step
    from .problem import LinearProblem, LogitsProblem
    from .scored import Chunk

# Of a log ratio: what is beyond is nothing in a sum of probabilities, and e^x is finite in every dtype.
_FAR = 80.0
_Tile = tuple[int, int]


@dataclass
class _Head:
    """A head whose distributions of a chunk of rows a tile is made of. norm [2, n]: as `norm_rows` has it."""

    problem: LinearProblem
    chunk: Chunk
    hidden: Tensor
    norm: Tensor | None = None

    @classmethod
    def of(cls, problem: LinearProblem, span: tuple[int, int], norm: Tensor | None) -> _Head:
        chunk = problem.chunk(*span)
        return cls(problem, chunk, problem.hidden(chunk), norm)

    def spread(self, step: Step) -> _Head:
        """The same of all rows that are scored here, where ranks have rows of their own."""
        norm = None if self.norm is None else step.publish(self.norm)
        return _Head(self.problem, *step.spread(self.problem, self.chunk), norm)

    def raw(self, tile: _Tile, out: Tensor | None = None) -> Tensor:
        """A tile of raw logits, whose rows lie one after another, as those of dense targets."""
        problem = self.problem
        if out is None:
            shape = self.chunk.size, tile[1] - tile[0]
            out = torch.empty(shape, dtype=problem.dtype, device=problem.device)
        multiply(self.hidden, problem.head(*tile).t(), out, rows="m")
        return problem.tempered(out, self.chunk, tile)

    def log_probs(self, raw: Tensor, tile: _Tile) -> Tensor:
        """Of a tile of raw logits, in their place."""
        problem, z = self.problem, raw
        if self.chunk.temperature is None:
            z = to_logits(raw, problem.head_bias(*tile), problem.transform)
        return torch.sub(z, self.norm[0].unsqueeze(-1), out=raw).sub_(self.norm[1].unsqueeze(-1))

    def measure(self, step: Step, raws: Iterable[tuple[Tensor, _Tile]]) -> dict[str, Tensor]:
        """The statistics of this rank's rows by their names, from all tiles of raw logits; sets the norm."""
        problem = self.problem
        partial, best = problem.new_partial(self.chunk.size)
        for raw, tile in raws:
            problem.row_stats(raw, partial, best, self.chunk, tile)
        return self._measured(step, partial, best)

    def measure_fused(self, step: Step) -> dict[str, Tensor]:
        """The same where the backend makes logits and statistics at once."""
        problem = self.problem
        partial, best = problem.new_partial(self.chunk.size)
        problem.stream_stats(self.hidden, partial, best, self.chunk, (0, problem.columns))
        return self._measured(step, partial, best)

    def _measured(self, step: Step, partial: Tensor, best: Tensor) -> dict[str, Tensor]:
        found = named(summarise(step.collect(partial, best)[0]))
        norm = torch.stack([found["max"], found["log_sum"]])
        self.norm = norm if step.alone else step.publish(norm)
        return found


class TeacherRows:
    """The target's tiles of a chunk of rows, as `DenseRows` gives those of a dense target.

    form: as `TeacherArguments` has it. smoothing: of b, where the form is its logarithm. student: with a
    mixture.
    """

    def __init__(self, teacher: _Head, student: _Head | None, form: str, smoothing: float):
        self.teacher, self.student = teacher, student
        self.form, self.smoothing = form, smoothing
        self.memory: Tensor | None = None  # flat, where the tiles of the chunk are kept
        self.found: dict[str, Tensor] = {}  # statistics of this rank's rows, once measured
        self.divergence: Tensor | None = None  # KL(b || m) of these, with a mixture

    @classmethod
    def of(
        cls, problem: LinearProblem | LogitsProblem, span: tuple[int, int], summary: Tensor | None
    ) -> TeacherRows:
        """Of a span of a problem's rows. summary: theirs, where it is known; else they are measured first."""
        form, student = problem.target.teacher_form, None
        norm = None if summary is None else teacher_norm(summary)
        if form == "mixture":
            frozen = replace(problem, target=Target(), sets=None, teacher=None)
            student = _Head.of(frozen, span, None if summary is None else summary[:2])
        return cls(_Head.of(problem.teacher, span, norm), student, form, problem.target.smoothing)

    def spread(self, step: Step) -> TeacherRows:
        """The same of all rows that are scored here, where ranks have rows of their own."""
        student = None if self.student is None else self.student.spread(step)
        return TeacherRows(self.teacher.spread(step), student, self.form, self.smoothing)

    def measure(self, step: Step, tiles: Iterable[_Tile], memory: Tensor | None = None) -> None:
        """Find what tiles are normalised by, and the statistics; in flat memory, if any, the tiles stay."""
        tiles, mixed = list(tiles), self.student is not None
        kept = None if mixed else memory
        heads = [self.teacher] if self.student is None else [self.student, self.teacher]
        for head in heads:
            if kept is None and head.problem.streams:
                self.found = head.measure_fused(step)
            else:
                raws = ((head.raw(tile, self._place(kept, tile)), tile) for tile in tiles)
                self.found = head.measure(step, raws)
        if mixed:
            self._mix(step, tiles, memory)
        elif memory is not None:
            for tile in tiles:
                self._formed(self._place(memory, tile), tile)
        self.memory = memory

    def keep(self, memory: Tensor) -> None:
        """Flat memory has the tiles already."""
        self.memory = memory

    def completed(self, summary: Tensor) -> Tensor:
        """The summary of this rank's rows with the statistics of the teacher."""
        if self.divergence is not None:
            place = SUMMARY.index("target_log_prob")
            summary = torch.cat([summary[:place], -self.divergence.unsqueeze(0), summary[place + 1 :]])
        own = (self.found[name] for name in ("max", "log_sum", "entropy", "collision"))
        return torch.cat([summary, torch.stack(list(own))])

    def tile(self, start: int, stop: int) -> Tensor:
        """Entries ``start:stop`` of those that are here, [n, stop - start]."""
        tile = start, stop
        if self.memory is not None:
            return self._place(self.memory, tile)
        if self.student is not None:
            return self._mixed(tile)[0]
        return self._formed(self.teacher.raw(tile), tile)

    def _place(self, memory: Tensor | None, tile: _Tile) -> Tensor | None:
        if memory is None:
            return None
        rows, width = self.teacher.chunk.size, tile[1] - tile[0]
        return memory[rows * tile[0] :][: rows * width].view(rows, width)

    def _formed(self, raw: Tensor, tile: _Tile) -> Tensor:
        """A teacher's raw logits to what a tile of the target is, in place."""
        log_b = self.teacher.log_probs(raw, tile)
        if self.form == "mass":
            return log_b.exp_()
        if self.smoothing:
            keep = math.log1p(-self.smoothing) if self.smoothing < 1.0 else -math.inf
            share = math.log(self.smoothing / self.teacher.problem.vocab_size)
            return torch.logaddexp(log_b.add_(keep), torch.full_like(log_b[:1, :1], share), out=log_b)
        # Where the student too gives an impossible entry nothing, 0 * -inf would be NaN.
        return log_b.clamp_(min=torch.finfo(log_b.dtype).min)

    def _mixed(self, tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
        """(log p - log m, log b - log m, log b) of a tile, by the ratio of p to b: precise where it is 1."""
        ratio = self.student.log_probs(self.student.raw(tile), tile)
        log_b = self.teacher.log_probs(self.teacher.raw(tile), tile)
        # Where both are 0, any.
        ratio = ratio.sub_(log_b).nan_to_num_(0.0, _FAR, -_FAR).clamp_(-_FAR, _FAR)
        # log m - log p = log((1 + b / p) / 2)
        of_student, of_teacher = ((0.5 * torch.expm1(x)).log1p_().neg_() for x in (-ratio, ratio))
        return of_student, of_teacher, log_b

    def _mix(self, step: Step, tiles: list[_Tile], memory: Tensor | None) -> None:
        """Find KL(b || m), once both are normalised."""
        head = self.teacher
        problem, chunk = head.problem, head.chunk
        partial, best = problem.new_partial(chunk.size)
        for tile in tiles:
            of_student, of_teacher, log_b = self._mixed(tile)
            arguments = TileArguments(dense=of_teacher, active=chunk.active).flat()
            problem.backend.row_stats(log_b, partial, best, problem.offset + tile[0], *arguments)
            if memory is not None:
                self._place(memory, tile).copy_(of_student)
        self.divergence = named(summarise(step.collect(partial, best)[0]))["target_prob"]
