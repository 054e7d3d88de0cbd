"""Gradients from some of the columns: without bias, and with no more noise than the caller allows.

Two of the three GEMMs of a chunk multiply with its gradient G: a few heavy columns and a rest that is little
but for a part of rank one or two. That part is multiplied as what it is, heavy columns are multiplied
exactly, and of the others some are drawn (`sampling`): a few per cent of the columns in all. Logits,
statistics and losses are exact, and so are the gradients of bias and temperature.

Per chunk: the gradients of all tiles, with the sums over each column while the tile is in cache; a pilot; the
draw; two thin GEMMs for each of the gradients that may be noisy. The part of low rank takes a sweep over the
head and over its gradient, whatever its rank, so that of several chunks waits and is done at once.

Where sampling would not pay, or its noise is not known, the products are made in full: of flat gradients, of
those with a term in the logits themselves (``logit_l2``), whose columns are all alike, and of rows that are
not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import NoiseArguments
from ..coefficients import RowCoefficients
from .gemm import multiply
from .plan import spans
from .problem import Chunk, ColumnSums, Form, LinearProblem
from .products import Gradients, Needs, Tile, multiply_tiles
from .sampling import Columns, Draw, Pilot, importance

# Columns that are gathered at a time: in a CPU's cache, with the rows of the head that are theirs.
_GATHERED = 2048
# Chunks whose parts of low rank wait for each other: a number of the size of V a chunk is kept.
_WAITING = 16
# Where no less noise is asked for, bfloat16 operands are multiplied as they are: what rounding their gradients
# adds, 2^-8 of an entry at most, is lost in it.
_ROUNDED = 2.0**-8


@dataclass(frozen=True)
class LowRank:
    """The part of a chunk's gradient that lies in the span of a few row vectors: ``basis^T along``."""

    basis: Tensor  # [r, n], orthonormal rows
    along: Tensor  # [r, V]
    hidden: Tensor  # [r, D]: the basis times the hidden states
    into: Tensor | None  # what the chunk adds to the gradient of the hidden states is added to
    where: slice | Tensor  # these rows of it


@dataclass(frozen=True)
class Scaled:
    """A chunk's gradient G [n, V], and what it is multiplied by where it is squared: near 1, none is lost."""

    gradient: Tensor
    scale: float

    def columns(self, index: Tensor) -> Tensor:
        """Some of the columns, scaled, as rows [m, n]."""
        return self.gradient.t().index_select(0, index).mul_(self.scale)


class Sampler:
    """Makes the gradients of a call from some of the columns, chunk after chunk."""

    def __init__(self, problem: LinearProblem, gradients: Gradients, noise: NoiseArguments):
        self.problem, self.noise = problem, noise
        least = min(x for x in (noise.input_noise, noise.weight_noise) if x)
        # What the thin products are made of.
        self.thin = replace(problem, narrow=problem.narrow or least >= _ROUNDED)
        # What is sampled, and what is made in full.
        to_input = gradients.to_input if noise.input_noise else None
        to_weight = gradients.to_weight if noise.weight_noise else None
        self.sampled = Gradients(to_input, to_weight, None, None)
        self.exact = Gradients(
            None if noise.input_noise else gradients.to_input,
            None if noise.weight_noise else gradients.to_weight,
            gradients.to_bias,
            None,
        )
        self.waiting: list[LowRank] = []
        self.heads = _norms(problem)
        self.entries = self.multiplied = 0.0  # of all chunks' gradients; in columns that were multiplied
        self.variance = [0.0, 0.0]  # of the gradients of input and weight
        self.scale = 1.0  # of the last chunk (`Scaled`)

    @staticmethod
    def serves(problem: LinearProblem, needs: Needs) -> bool:
        """As `samples`."""
        return samples(problem.noise, needs, problem.device, problem.operand, problem.dtype)

    @classmethod
    def of(cls, problem: LinearProblem, needs: Needs, gradients: Gradients) -> Sampler | None:
        """None where all gradients are exact."""
        return cls(problem, gradients, problem.noise) if cls.serves(problem, needs) else None

    def multiply(
        self,
        chunk: Chunk,
        hidden: Tensor,
        memory: Tensor,
        form: Form,
        made: Callable[[ColumnSums], Iterable[tuple[Tile, Tensor]]],
    ) -> Tensor | None:
        """As `multiply_tiles`. made: makes the gradients in memory, tile by tile, and their sums."""
        problem, tiles = self.problem, self.problem.tiles(chunk.size)
        basis, scale = _basis(form, chunk), _scale(form, chunk)
        self.scale = scale
        sums = form.norm.new_empty(len(basis) + 1, problem.columns)
        grads = made(ColumnSums(basis, scale, sums))
        exact_grad = multiply_tiles(problem, chunk, hidden, grads, None, self.exact)
        gradient = Scaled(problem.place(memory, chunk.size, problem.columns), scale)
        draw = None
        # What all columns have in equal measure has nothing that is light.
        if not RowCoefficients(*form.coef[: len(RowCoefficients._fields)]).logit.any():
            draw = self._draw(chunk, gradient, hidden, basis, sums)
        size = chunk.size * problem.columns
        self.entries += size
        if draw is None:
            self.multiplied += size
            again = ((tile, gradient.gradient[:, slice(*tile)]) for tile in tiles)
            full = multiply_tiles(problem, chunk, hidden, again, None, self.sampled)
            return exact_grad if full is None else full
        if self.sampled.to_weight is not None and chunk.first:
            self.sampled.to_weight[: problem.columns] = 0.0
        self.multiplied += chunk.size * draw.index.numel()
        self.variance[0] += draw.input_variance / scale**2
        self.variance[1] += draw.weight_variance / scale**2
        return self._multiply(chunk, hidden, gradient, draw, basis, sums[:-1] / scale, exact_grad)

    def _draw(
        self, chunk: Chunk, gradient: Scaled, hidden: Tensor, basis: Tensor, sums: Tensor
    ) -> Draw | None:
        """The columns to multiply; None for all."""
        along, factor = sums[:-1], self.thin.gradient_factor(hidden)
        columns = Columns.of(along, sums[-1], self.heads)
        for_input = self.sampled.to_input is not None
        pilot = Pilot.draw(columns.residual * columns.head if for_input else columns.residual)
        first = gradient.columns(pilot.index)
        to_input = to_weight = None
        gain = 0.0
        if for_input:
            weighed = first / pilot.chance.unsqueeze(-1).to(first.dtype)
            rows = self._head_rows(pilot.index)
            product = self._product(weighed.t(), rows, torch.empty_like(hidden), rows="k")
            sizes = (columns.size * columns.head)[pilot.index]
            to_input = self.noise.input_noise * pilot.norm_of_sum(product, sizes)
        if self.sampled.to_weight is not None:
            product = self._product(first, factor, hidden.new_empty(len(first), hidden.shape[1]), rows="m")
            # Of the sum over the chunks so far what this one adds to the square of its norm: so the noise of
            # all chunks is within bounds of the gradient of all, whether they add up or cancel.
            growth = product * (product + 2 * gradient.scale * self._so_far(chunk, pilot.index))
            growth = pilot.total(growth.sum(-1))
            to_weight = 0.0 if growth < 0 else self.noise.weight_noise * math.sqrt(growth)
            rest = product.addmm_(along[:, pilot.index].t(), basis @ hidden, alpha=-1)
            ratio = rest.double().square().sum(-1) / columns.residual[pilot.index].square()
            gain = math.sqrt(pilot.mean_of_random(ratio))
        if not all(x is None or x < math.inf for x in (to_input, to_weight)):
            return None
        return Draw.of(columns, pilot, importance(columns, to_input, to_weight, gain), gain)

    def _so_far(self, chunk: Chunk, index: Tensor) -> Tensor:
        """Some rows of the gradient of the head, as the chunks before this one have made it."""
        if chunk.first:
            return self.sampled.to_weight.new_zeros(())
        rows = self.sampled.to_weight.index_select(0, index)
        for part in self.waiting:
            rows.addmm_(part.along[:, index].t(), part.hidden)
        return rows

    def _multiply(
        self,
        chunk: Chunk,
        hidden: Tensor,
        gradient: Scaled,
        draw: Draw,
        basis: Tensor,
        along: Tensor,
        hidden_grad: Tensor | None,
    ) -> Tensor | None:
        to_input, to_weight, _, _ = self.sampled.flat()
        factor = None if to_weight is None else self.thin.gradient_factor(hidden)
        if to_input is not None:
            hidden_grad = torch.zeros_like(hidden)
        for start, stop in spans(draw.index.numel(), _GATHERED):
            index, inverse = draw.index[start:stop], draw.inverse[start:stop].to(along.dtype)
            part = gradient.gradient.t().index_select(0, index)
            part.addmm_(along[:, index].t(), basis, alpha=-1).mul_(inverse.unsqueeze(-1))
            if to_input is not None:
                rows = self._head_rows(index)
                self._product(part.t(), rows, hidden_grad, rows="k", accumulate=True)
            if to_weight is not None:
                product = hidden.new_empty(len(part), hidden.shape[1])
                self._product(part, factor, product, rows="m")
                to_weight.index_add_(0, index, product)
        into, where = hidden_grad, slice(None)
        if to_input is not None and chunk.step.alone:
            to_input[chunk.where] = hidden_grad
            into, where = to_input, chunk.where
        self.waiting.append(LowRank(basis, along, basis @ hidden, into, where))
        if not chunk.step.alone or len(self.waiting) == _WAITING:
            self.finish()
        return hidden_grad

    def finish(self) -> None:
        """Add the parts of low rank that wait."""
        if not self.waiting:
            return
        problem, (to_input, to_weight, _, _) = self.problem, self.sampled.flat()
        along = torch.cat([part.along for part in self.waiting])
        hidden = torch.cat([part.hidden for part in self.waiting])
        sums = torch.zeros_like(hidden)
        for start, stop in problem.tiles(len(along)):
            of_tile = along[:, start:stop]
            if to_input is not None:
                self._product(of_tile, problem.gradient_head(start, stop), sums, rows="m", accumulate=True)
            if to_weight is not None:
                multiply(of_tile.t(), hidden, to_weight[start:stop], rows="k", accumulate=True)
        if to_input is not None:
            ranks = [len(part.basis) for part in self.waiting]
            for part, of_part in zip(self.waiting, sums.split(ranks)):
                part.into[part.where] += part.basis.t() @ of_part
        self.waiting.clear()

    def report(self) -> Tensor:
        """[3], in the dtype of the arithmetic: what `RowStats` says of sampling."""
        self.finish()
        gradients = self.sampled.to_input, self.sampled.to_weight
        noise = [
            math.sqrt(variance) / norm
            if gradient is not None and variance and (norm := self._norm(gradient))
            else 0.0
            for variance, gradient in zip(self.variance, gradients)
        ]
        share = self.multiplied / self.entries if self.entries else 1.0
        return torch.tensor([share, *noise], dtype=self.problem.dtype)

    def _norm(self, gradient: Tensor) -> float:
        return math.sqrt(_squares(self.problem, gradient, self.scale).double().sum().item()) / self.scale

    def _product(self, *operands: Tensor, **how) -> Tensor:
        """As `multiply`."""
        return multiply(*operands, **how, rounds=self.thin.rounds)

    def _head_rows(self, index: Tensor) -> Tensor:
        """Some rows of the head, as gradients of logits are multiplied with them."""
        rows = self.problem.weight.index_select(0, index)
        return rows if self.problem.pairs else self.problem.operands(rows, None)


def samples(
    noise: NoiseArguments, needs: Needs, device: torch.device, operand: torch.dtype, result: torch.dtype
) -> bool:
    """Whether a wanted gradient may be noisy; not on a GPU, where a draw would have to be waited for.

    operand: of what goes into GEMMs. result: of the arithmetic.
    """
    noisy = (needs.input_grad and noise.input_noise) or (needs.weight_grad and noise.weight_noise)
    return bool(noisy) and device.type == "cpu" and operand == result


def in_full(problem: LinearProblem) -> Tensor:
    """`Sampler.report` of a call without one."""
    report = torch.zeros(3, dtype=problem.dtype, device=problem.device)
    if problem.noise.noisy:
        report[:1].fill_(1.0)
    return report


def _norms(problem: LinearProblem) -> Tensor:
    """The norms of the rows of the head [V]."""
    tiles = problem.tiles(1)
    parts = [_squares(problem, problem.head(*tile)) for tile in tiles]
    return torch.cat(parts).sqrt_() if parts else problem.weight.new_empty(0, dtype=problem.dtype)


def _squares(problem: LinearProblem, rows: Tensor, scale: float = 1.0) -> Tensor:
    """The squared norms of rows [m, D] times a scale, [m]."""
    rows = rows.contiguous()
    sums = rows.new_empty(1, len(rows))
    problem.backend.column_sums(rows.t(), rows.new_empty(0, rows.shape[1]), scale, sums)
    return sums[0]


def _counted(rows: Tensor, active: Tensor | None) -> Tensor:
    return rows if active is None else rows.masked_fill(~active, 0.0)


def _basis(form: Form, chunk: Chunk) -> Tensor:
    """Orthonormal row vectors [r, n] in whose span the light columns nearly lie.

    A light column is ``p_ij (a_i + ...) + s_i``: near to what each row has outside its largest entry, and to
    what all of its entries have alike (label smoothing).
    """
    coef = RowCoefficients(*form.coef[: len(RowCoefficients._fields)])
    outside = -torch.expm1(-form.norm[1])
    vectors = [coef.prob * outside]
    constant = _counted(coef.constant, chunk.active)
    if constant.any():
        vectors.append(constant)
    span = _counted(torch.stack(vectors), chunk.active)
    if chunk.temperature is not None:
        span = span / chunk.temperature.t()
    return torch.linalg.qr(span.t().double()).Q.t().to(span.dtype).contiguous()


def _scale(form: Form, chunk: Chunk) -> float:
    """A power of two that brings the largest coefficient near 1, so that no square is lost."""
    largest = _counted(form.coef, chunk.active).abs().amax().item()
    usable = 0 < largest < math.inf
    exponent = math.frexp(largest)[1] if usable else 0
    return math.ldexp(1.0, max(min(-exponent, 100), -100))
