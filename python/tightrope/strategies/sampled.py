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
not finite. A device decides that by itself: there all columns are drawn (`residual`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import NoiseArguments
from ..backends import Backend
from ..coefficients import RowCoefficients
from .gemm import headroom, multiply
from .problem import LinearProblem
from .products import Gradients, Needs, Tile, multiply_tiles
from .residual import DeviceResidual, Residual
from .sampling import PILOT_LEAST, Columns, Draw, Pilot, importance
from .scored import Chunk, ColumnSums, Form

# Chunks whose parts of low rank wait for each other: a number of the size of V a chunk is kept.
_WAITING = 16
# Where no less noise is asked for, bfloat16 operands are multiplied as they are: what rounding gradients
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


class Sampler:
    """Makes the gradients of a call from some of the columns, chunk after chunk."""

    def __init__(self, problem: LinearProblem, gradients: Gradients, noise: NoiseArguments):
        self.problem, self.noise = problem, noise
        self.reads = reads(problem.device)
        least = min(x for x in (noise.input_noise, noise.weight_noise) if x)
        # What the thin products are made of.
        self.thin = replace(problem, narrow=problem.narrow or least >= _ROUNDED)
        self.operand = torch.bfloat16 if self.thin.rounds else problem.operand
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
        self.entries = 0  # of all chunks' gradients
        wide = {"dtype": torch.float64, "device": problem.device}
        self.multiplied = torch.zeros((), **wide)  # entries of the columns that were
        self.variance = torch.zeros(2, **wide)  # of the gradients of input and weight
        self.weight_square = torch.zeros((), **wide)  # of the latter's norm, as the pilots estimate it
        self.scale = 1.0  # of the last chunk (`_scale`)

    @staticmethod
    def serves(problem: LinearProblem, needs: Needs) -> bool:
        """As `samples`."""
        place = problem.device, problem.operand, problem.dtype, problem.backend
        return samples(problem.noise, needs, *place, problem.widest)

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
        problem = self.problem
        basis, scale = _basis(form, chunk, self.reads), _scale(form, chunk, self.reads)
        self.scale = scale
        sums = form.norm.new_empty(len(basis) + 1, problem.columns)
        grads = made(ColumnSums(basis, scale, sums))
        exact_grad = multiply_tiles(problem, chunk, hidden, grads, None, self.exact)
        # What is taken out of the columns must be what products with it take.
        along = (sums[:-1] / scale).to(self.operand).to(problem.dtype)
        kind = Residual if self.reads else DeviceResidual
        residual = kind(self.thin, hidden, memory, basis, along)
        # What all columns have in equal measure has nothing that is light.
        dense = _counted(_coefficients(form).logit, chunk.active).any()
        draw = None
        if problem.columns and not (self.reads and dense):
            draw = self._draw(chunk, residual, sums, dense)
        size = chunk.size * problem.columns
        self.entries += size
        if draw is None:
            self.multiplied += size
            tiles = problem.gradient_tiles(chunk.size)
            again = (
                (tile, problem.place(memory[chunk.size * tile[0] :], chunk.size, tile[1] - tile[0]))
                for tile in tiles
            )
            full = multiply_tiles(problem, chunk, hidden, again, None, self.sampled)
            return exact_grad if full is None else full
        if self.sampled.to_weight is not None and chunk.first:
            self.sampled.to_weight[: problem.columns] = 0.0
        self.multiplied += chunk.size * (draw.index.numel() if draw.drawn is None else draw.drawn)
        self.variance += torch.stack([draw.input_variance, draw.weight_variance]) / scale**2
        if not self.reads:
            # Of a row that is not finite no more than its own products may be: nothing is taken out there.
            residual = replace(residual, along=along.masked_fill(draw.full, 0.0))
        return self._multiply(chunk, residual, draw, exact_grad)

    def _draw(self, chunk: Chunk, residual: Residual, sums: Tensor, dense: Tensor) -> Draw | None:
        """The columns to multiply; None for all."""
        hidden, basis, scale, rounds = residual.hidden, residual.basis, self.scale, self.thin.rounds
        columns = Columns.of(sums[:-1], sums[-1], self.heads)
        for_input, for_weight = (gradient is not None for gradient in self.sampled.flat()[:2])
        pilot = Pilot.draw(columns.residual * columns.head if for_input else columns.residual, self.reads)
        index, along = pilot.index, sums[:-1, pilot.index]
        # What the pilot's columns have beside their part of low rank, scaled.
        first = residual.columns(index, sums.new_ones(len(index)) * scale)
        to_input = to_weight = None
        gain = columns.head.new_zeros(())
        if for_input:
            inverse, rows = pilot.inverse.to(sums.dtype), self.thin.head_rows(index)
            weighed = (first * inverse.unsqueeze(-1)).to(first.dtype)
            product = multiply(weighed.t(), rows, sums.new_empty(hidden.shape), rows="k", rounds=rounds)
            product.addmm_(basis.t(), (along * inverse) @ rows.to(sums.dtype))
            sizes = (columns.size * columns.head)[index]
            to_input = self.noise.input_noise * pilot.norm_of_sum(product, sizes)
        if for_weight:
            product = sums.new_empty(len(first), hidden.shape[1])
            multiply(first, residual.factor, product, rows="m", rounds=rounds)
            ratio = product.double().square().sum(-1) / columns.residual[index].square()
            gain = pilot.mean_of_random(ratio).sqrt()
            product.addmm_(along.t(), basis @ hidden.to(sums.dtype))
            # Of the sum over the chunks so far what this one adds to the square of its norm: so the noise of
            # all chunks is within bounds of the gradient of all, whether they add up or cancel.
            growth = product * (product + 2 * scale * self._so_far(chunk, index))
            growth = pilot.total(growth.sum(-1))
            self.weight_square += growth / scale**2
            to_weight = self.noise.weight_noise * growth.clamp_min(0.0).sqrt()
        wanted = importance(columns, to_input, to_weight, gain)
        return Draw.of(columns, pilot, wanted, gain, dense, self.reads)

    def _so_far(self, chunk: Chunk, index: Tensor) -> Tensor:
        """Some rows of the gradient of the head, as the chunks before this one have made it."""
        if chunk.first:
            return self.sampled.to_weight.new_zeros(())
        rows = self.sampled.to_weight.index_select(0, index)
        for part in self.waiting:
            rows.addmm_(part.along[:, index].t(), part.hidden)
        return rows

    def _multiply(
        self, chunk: Chunk, residual: Residual, draw: Draw, hidden_grad: Tensor | None
    ) -> Tensor | None:
        hidden, (to_input, to_weight, _, _) = residual.hidden, self.sampled.flat()
        if to_input is not None:
            hidden_grad = to_input.new_zeros(hidden.shape)
        residual.add_products(draw, None if to_input is None else hidden_grad, to_weight)
        into, where = hidden_grad, slice(None)
        if to_input is not None and chunk.step.alone:
            to_input[chunk.where] = hidden_grad
            into, where = to_input, chunk.where
        basis, along = residual.basis, residual.along
        self.waiting.append(LowRank(basis, along, basis @ hidden.to(basis.dtype), into, where))
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
                operand = of_tile.to(self.operand)  # which it was rounded to
                head, rounds = problem.gradient_head(start, stop), self.thin.rounds
                multiply(operand, head, sums, rows="m", accumulate=True, rounds=rounds)
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
        squares = [self.variance.new_zeros(()) if g is None else self._square(g) for g in gradients]
        squares = torch.stack(squares)
        noise = torch.where((self.variance > 0) & (squares > 0), self.variance / squares, 0.0).sqrt()
        share = self.multiplied / self.entries if self.entries else torch.ones_like(self.multiplied)
        return torch.cat([share.unsqueeze(0), noise]).to(self.problem.dtype)

    def _square(self, gradient: Tensor) -> Tensor:
        """Of the norm of a gradient; of the head's, over which a device would take a sweep, the estimate."""
        if self.reads:
            squares = _squares(self.problem, gradient, self.scale)
        elif gradient is self.sampled.to_weight:
            return self.weight_square
        else:
            squares = torch.linalg.vector_norm(gradient * self.scale, dim=-1).square()
        return squares.double().sum() / self.scale**2


def reads(device: torch.device) -> bool:
    """Whether values may be looked at: those of other devices than a CPU would have to be waited for."""
    return device.type == "cpu"


def samples(
    noise: NoiseArguments,
    needs: Needs,
    device: torch.device,
    operand: torch.dtype,
    result: torch.dtype,
    backend: Backend,
    classes: int,
) -> bool:
    """Whether a wanted gradient may be noisy.

    operand: of what goes into GEMMs, where float16 has no room for what is divided by a chance. result: of
    the arithmetic. classes: of the rank that has most.
    """
    if not ((needs.input_grad and noise.input_noise) or (needs.weight_grad and noise.weight_noise)):
        return False
    if reads(device):
        return operand == result
    # Of fewer classes the pilot alone would be half of them.
    return backend.draws and operand != torch.float16 and classes >= 4 * PILOT_LEAST


def in_full(problem: LinearProblem) -> Tensor:
    """`Sampler.report` of a call without one."""
    report = torch.zeros(3, dtype=problem.dtype, device=problem.device)
    if problem.noise.noisy:
        report[:1].fill_(1.0)
    return report


def _norms(problem: LinearProblem) -> Tensor:
    """The norms of the rows of the head [V]."""
    if not reads(problem.device):
        return torch.linalg.vector_norm(problem.weight[: problem.columns], dim=-1, dtype=problem.dtype)
    parts = [_squares(problem, problem.head(*tile)) for tile in problem.tiles(1)]
    return torch.cat(parts).sqrt_() if parts else problem.weight.new_empty(0, dtype=problem.dtype)


def _squares(problem: LinearProblem, rows: Tensor, scale: float = 1.0) -> Tensor:
    """The squared norms of rows [m, D] times a scale, [m]."""
    rows = rows.contiguous()
    sums = rows.new_empty(1, len(rows))
    problem.backend.column_sums(rows.t(), rows.new_empty(0, rows.shape[1]), scale, sums)
    return sums[0]


def _coefficients(form: Form) -> RowCoefficients:
    return RowCoefficients(*form.coef[: len(RowCoefficients._fields)])


def _counted(rows: Tensor, active: Tensor | None) -> Tensor:
    return rows if active is None else rows.masked_fill(~active, 0.0)


def _basis(form: Form, chunk: Chunk, reads: bool) -> Tensor:
    """Orthonormal row vectors [r, n], or zeros, in whose span the light columns nearly lie.

    A light column is ``p_ij (a_i + ...) + s_i``: near to what each row has outside its largest entry, and to
    what all of its entries have alike (label smoothing).
    """
    coef = _coefficients(form)
    outside = -torch.expm1(-form.norm[1])
    constant = _counted(coef.constant, chunk.active)
    span = _counted(torch.stack([coef.prob * outside, constant]), chunk.active)
    if reads and not constant.any():
        span = span[:1]
    if chunk.temperature is not None:
        span = span / chunk.temperature.t()
    # Of a row that is not finite nothing is taken out.
    span = torch.where(span.isfinite().all(0), span, 0.0).double()
    found: list[Tensor] = []
    for vector in span:
        rest = vector
        for other in found * 2:  # once more for what rounding has left
            rest = rest - (other @ rest) * other
        size = rest.norm()
        found.append(torch.where(size > 1e-12 * vector.norm(), rest / size, 0.0))
    return torch.stack(found).to(form.norm.dtype)


def _scale(form: Form, chunk: Chunk, reads: bool) -> float | Tensor:
    """A power of two that brings the largest coefficient near 1, so that no square is lost."""
    undo = headroom(_counted(form.coef, chunk.active), torch.float16)[1]
    scale = undo.double().clamp(2.0**-100, 2.0**100).reciprocal()
    return scale.item() if reads else scale
