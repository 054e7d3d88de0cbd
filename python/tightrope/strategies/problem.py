"""What both drivers are given, cut into the pieces that they work on.

Where a GEMM of low-precision operands cannot give float32, pieces are converted to the dtype of the
arithmetic as their turn comes, so hidden states and heads are never copied whole: a bfloat16 GEMM would round
the logits, and without native instructions it runs hundreds of times slower than float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..arguments import TileArguments, Transform
from ..backends import Backend
from ..statistics import SUMMARY, empty_partial, summarise
from ..targets import Target, TargetChunk
from . import plan
from .gemm import multiply, widens


@dataclass(frozen=True)
class Chunk:
    """A chunk of rows: where they stand among all rows, their targets, and which of them count."""

    start: int  # among the rows that are worked on
    size: int
    where: slice | Tensor  # into tensors of all N rows
    target: TargetChunk
    active: Tensor | None  # [size] bool; None: all


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

    def chunk(self, start: int, stop: int, target: Target, dtype: torch.dtype) -> Chunk:
        where = slice(start, stop) if self.kept is None else self.kept[start:stop]
        active = None if self.active is None else self.active[start:stop]
        return Chunk(start, stop - start, where, target.chunk(start, stop, self.kept, dtype), active)


class _Scored:
    """What the two kinds of problem share: how a chunk's statistics end, and what row kernels cannot take."""

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
        summary = torch.zeros(len(SUMMARY), total, dtype=self.dtype, device=device)
        return summary, torch.full((total,), -1, dtype=torch.int64, device=device)

    def tile_arguments(self, chunk: Chunk, tile: tuple[int, int], bias: Tensor | None = None) -> tuple:
        """The flat `TileArguments` of a chunk of rows and a tile of the vocabulary."""
        parts = {**vars(chunk.target.tile(*tile)), **vars(self.transform)}
        return TileArguments(**parts, bias=bias, active=chunk.active).flat()

    def new_partial(self, rows: int) -> tuple[Tensor, Tensor]:
        return empty_partial(rows, self.dtype, self.device)

    def summarise(self, partial: Tensor, chunk: Chunk) -> Tensor:
        """Partial statistics of a chunk to its summary; zeros for rows that do not count."""
        summary = summarise(partial, target_must_occur=chunk.target.index is not None)
        return summary if chunk.active is None else summary.masked_fill(~chunk.active, 0.0)


@dataclass(frozen=True)
class LinearProblem(_Scored):
    """Hidden states [N, D] under a vocabulary head [V, D] with bias [V], and a target for each row."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Target
    rows: Rows
    transform: Transform
    backend: Backend

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float64 where any of the tensors is, else float32."""
        return arithmetic_dtype(self.input, self.weight, self.bias)

    @cached_property
    def streams(self) -> bool:
        """Whether the backend has kernels that make logits and use them at once, for these dtypes."""
        return self.dtype == torch.float32 and self.backend.serves_stream(self.input, self.weight)

    @cached_property
    def operand(self) -> torch.dtype:
        """The dtype of what goes into GEMMs: the tensors' own where that can give float32."""
        own = self.input.dtype == self.weight.dtype and self.dtype == torch.float32
        exact = self.streams or widens(self.device, self.input.dtype)
        return self.input.dtype if own and exact else self.dtype

    @property
    def device(self) -> torch.device:
        return self.input.device

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def tiles(self, rows: int) -> list[tuple[int, int]]:
        """Spans of the vocabulary that go by one at a time, for so many rows."""
        converted = self.weight.shape[1] if self.weight.dtype != self.operand else 0
        return plan.spans(self.vocab_size, plan.tile_width(rows, self.device, converted), multiple=16)

    def hidden(self, chunk: Chunk) -> Tensor:
        """The chunk's hidden states [size, D]; zeros where a row does not count: no NaN leaks from it."""
        hidden = self.input[chunk.where].to(self.operand)
        return hidden if chunk.active is None else hidden.masked_fill(~chunk.active.unsqueeze(-1), 0.0)

    def head(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of the head, [T, D]."""
        return self.weight[start:stop].to(self.operand)

    def head_bias(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start:stop].to(self.dtype).contiguous()

    def place(self, memory: Tensor, rows: int, entries: int) -> Tensor:
        """The first elements of flat memory, as logits of so many rows and entries."""
        if self.device.type == "cpu":
            # Transposed, their GEMM is 5 to 25 % faster with MKL; the row kernels take either layout.
            return memory[: rows * entries].view(entries, rows).t()
        return memory[: rows * entries].view(rows, entries)

    def raw_logits(self, hidden: Tensor, head: Tensor, memory: Tensor) -> Tensor:
        """``hidden @ head.T`` [n, T], in its place in flat memory."""
        raw = self.place(memory, hidden.shape[0], head.shape[0])
        if self.device.type == "cpu":
            multiply(head, hidden.t(), raw.t(), rows="n")
        else:
            multiply(hidden, head.t(), raw, rows="m")
        return raw

    def row_stats(
        self, raw: Tensor, partial: Tensor, argmax: Tensor, chunk: Chunk, tile: tuple[int, int]
    ) -> None:
        self.backend.row_stats(raw, partial, argmax, tile[0], *self._arguments(chunk, tile))

    def row_grad(
        self, raw: Tensor, norm: Tensor, coef: Tensor, chunk: Chunk, tile: tuple[int, int]
    ) -> Tensor:
        """Gradient with respect to the raw logits, as a GEMM's operand: in place where dtypes allow."""
        narrow = self.operand != raw.dtype and self.backend.narrows
        out = torch.empty_like(raw, dtype=self.operand) if narrow else raw
        self.backend.row_grad(raw, out, norm, coef, tile[0], *self._arguments(chunk, tile))
        return out.to(self.operand)

    def fuses(self, rows: int) -> bool:
        """Whether `row_loss_grad` is the better way for chunks of so many rows.

        Not for a dense target, which goes by tile by tile because a chunk of it would be converted whole; nor
        where gradients become float16, whose scale is found from the coefficients (`headroom`).
        """
        if self.target.is_dense or self.operand == torch.float16:
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
        arguments = self._arguments(chunk, (0, self.vocab_size))
        self.backend.row_loss_grad(raw, out, partial, argmax, upstream, *arguments)
        return out

    def stream_stats(
        self, hidden: Tensor, partial: Tensor, argmax: Tensor, chunk: Chunk, tile: tuple[int, int]
    ) -> None:
        arguments = self._arguments(chunk, tile)
        self.backend.stream_stats(hidden, self.head(*tile), partial, argmax, tile[0], *arguments)

    def stream_grad(
        self, hidden: Tensor, out: Tensor, norm: Tensor, coef: Tensor, chunk: Chunk, tile: tuple[int, int]
    ) -> None:
        arguments = self._arguments(chunk, tile)
        self.backend.stream_grad(hidden, self.head(*tile), out, norm, coef, tile[0], *arguments)

    def _arguments(self, chunk: Chunk, tile: tuple[int, int]) -> tuple:
        return self.tile_arguments(chunk, tile, self.head_bias(*tile))


@dataclass(frozen=True)
class LogitsProblem(_Scored):
    """Logits [N, V] and a target for each row. Ignored rows are masked, which costs no GEMM."""

    logits: Tensor
    target: Target
    rows: Rows
    transform: Transform
    backend: Backend

    @property
    def dtype(self) -> torch.dtype:
        return arithmetic_dtype(self.logits)

    @property
    def device(self) -> torch.device:
        return self.logits.device


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32
