"""A chunk's gradient G beside its part of low rank, ``E = G - basis^T along``, and products with it.

On a CPU the columns that were drawn are gathered, some at a time. On a device nobody knows on the host how
many there are: a pass is for a number of columns that the shapes fix, there are as many passes as all columns
would take, and what was not drawn costs a pass nothing but its start (`Backend.draws`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .gemm import multiply
from .plan import spans
from .problem import LinearProblem
from .sampling import Draw

# Columns that are gathered at a time: in a CPU's cache, with the rows of the head that are theirs.
_GATHERED = 2048
# Passes of a device, each for so many columns; and what their rows are padded to (`ops.drawn_columns`).
_PASSES = 4
_MULTIPLE = 128


@dataclass(frozen=True)
class Residual:
    """The gradient of a chunk of n rows without its part of low rank."""

    problem: LinearProblem
    hidden: Tensor  # [n, D]
    memory: Tensor  # flat: the gradients of all tiles (`LinearProblem.place`)
    basis: Tensor  # [r, n]
    along: Tensor  # [r, V]

    @cached_property
    def factor(self) -> Tensor:
        """The hidden states as several products take them."""
        return self.problem.gradient_factor(self.hidden)

    def columns(self, index: Tensor, factor: Tensor) -> Tensor:
        """Some columns, each times a factor [m], as rows [m, n] of an operand of GEMMs."""
        rows = self.basis.shape[1]
        gradient = self.problem.place(self.memory, rows, self.problem.columns)
        part = gradient.t().index_select(0, index)
        return part.addmm_(self.along[:, index].t(), self.basis, alpha=-1).mul_(factor.unsqueeze(-1))

    def add_products(self, draw: Draw, to_hidden: Tensor | None, to_weight: Tensor | None) -> None:
        """Add the products of the drawn columns, over their chances, to the gradients wanted.

        to_hidden: [n, D]. to_weight: [V, D].
        """
        problem, rounds = self.problem, self.problem.rounds
        for start, stop in spans(draw.index.numel(), _GATHERED):
            index, inverse = draw.index[start:stop], draw.inverse[start:stop].to(self.along.dtype)
            part = self.columns(index, inverse)
            if to_hidden is not None:
                head = problem.head_rows(index)
                multiply(part.t(), head, to_hidden, rows="k", accumulate=True, rounds=rounds)
            if to_weight is not None:
                product = part.new_empty(len(part), self.hidden.shape[1])
                multiply(part, self.factor, product, rows="m", rounds=rounds)
                to_weight.index_add_(0, index, product)


class DeviceResidual(Residual):
    """The same where no value may be looked at."""

    def columns(self, index: Tensor, factor: Tensor) -> Tensor:
        part = self._empty(len(index))
        count = torch.full((), len(index), dtype=torch.int64, device=index.device)
        self._gather(index, count, factor, 0, part)
        return part[:, : self.basis.shape[1]]

    def add_products(self, draw: Draw, to_hidden: Tensor | None, to_weight: Tensor | None) -> None:
        problem, backend = self.problem, self.problem.backend
        most = _padded(-(-problem.columns // _PASSES))
        part, drawn = self._empty(most), (draw.index, draw.drawn)
        factor = draw.inverse.to(self.along.dtype)
        for first in range(0, problem.columns, most):
            self._gather(*drawn, factor, first, part)
            if to_hidden is not None:
                backend.drawn_by_head(part, problem.weight, *drawn, first, to_hidden)
            if to_weight is not None:
                backend.drawn_by_hidden(part, self.hidden, *drawn, first, to_weight)

    def _empty(self, columns: int) -> Tensor:
        return self.basis.new_empty(columns, _padded(self.basis.shape[1]), dtype=self.problem.operand)

    def _gather(self, index: Tensor, count: Tensor, factor: Tensor, first: int, part: Tensor) -> None:
        tile = self.problem.adjacent(self.basis.shape[1])
        backend = self.problem.backend
        backend.drawn_columns(self.memory, tile, index, count, factor, self.along, self.basis, first, part)


def _padded(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE
