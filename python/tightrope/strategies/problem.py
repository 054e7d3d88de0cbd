"""What both drivers are given, cut into the pieces that they work on.

Where a GEMM of low-precision operands cannot give float32, pieces are converted to the dtype of the
arithmetic as their turn comes, so hidden states and heads are never copied whole: a bfloat16 GEMM would round
the logits, and without native instructions it runs hundreds of times slower than float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..arguments import NoiseArguments
from . import plan
from .gemm import multiply, operand_dtype, owns_products, packed, result_dtype, widens
from .scored import Chunk, ColumnSums, Form, Scored


@dataclass(frozen=True)
class LinearProblem(Scored):
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

    def gradient_tiles(self, rows: int) -> list[tuple[int, int]]:
        """Spans of the vocabulary whose gradients are made, and multiplied, one at a time.

        All of it, where products are our own: they fetch ahead what they meet, so it need not be in cache,
        and what Python takes between two tiles is saved. Tile by tile where a tile takes memory.
        """
        if not self.goes_whole or self.rounds or not owns_products(self.device, self.operand):
            return self.tiles(rows)
        return [(0, self.columns)] if self.columns else []

    @cached_property
    def goes_whole(self) -> bool:
        """Whether no part of the vocabulary takes memory beside its logits, and these lie entry by entry."""
        as_it_is = self.pairs or self.weight.dtype == self.operand
        plain = self.temperature is None and self.teacher is None and not self.target.is_dense
        return as_it_is and plain and not self.by_rows

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

    def logit_stats(
        self,
        factor: Tensor,
        memory: Tensor,
        partial: Tensor,
        argmax: Tensor,
        chunk: Chunk,
        tiles: list[tuple[int, int]],
        *,
        kept: bool,
    ) -> None:
        """Merge the statistics of a chunk's logits, made by the `factor` of its hidden states.

        kept: they go to flat memory, one tile after the other; else a tile at a time to its front, which
        `scores_products` does without.
        """
        if self.scores_products and chunk.size:
            out = self.place(memory, chunk.size, self.columns).t() if kept else None
            head, arguments = self.weight[: self.columns], self.tile_arguments(chunk, (0, self.columns))
            self.backend.product_stats(head, factor, out, partial, argmax, self.offset, *arguments)
            return
        for tile in tiles:
            place = memory[chunk.size * tile[0] :] if kept else memory
            raw = self.raw_logits(factor, place, chunk, tile)
            self.row_stats(raw, partial, argmax, chunk, tile)

    @cached_property
    def scores_products(self) -> bool:
        """Whether the backend takes statistics of logits as it makes them."""
        own = self.pairs or owns_products(self.device, self.operand)
        adjacent = self.weight.shape[1] == 1 or self.weight.stride(1) == 1
        fits = self.goes_whole and self.weight.numel() > 0 and adjacent
        return own and fits and self.backend.product_stats is not None

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
class LogitsProblem(Scored):
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
