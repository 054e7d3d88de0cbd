"""The two gradient products, tile by tile, and what they add to.

A tile of the gradients of a chunk's logits goes into one GEMM with its tile of the head, for the gradient of
the hidden states, and into one with the hidden states, for that of the head.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..arguments import Arguments, group
from .gemm import multiply
from .problem import LinearProblem
from .scored import Chunk

Tile = tuple[int, int]


@group
class Needs(Arguments):
    """Which gradients are wanted; the others cost no GEMM and no memory."""

    input_grad: bool
    weight_grad: bool
    bias_grad: bool
    temperature_grad: bool = False


@group
class Gradients(Arguments):
    """The gradients of input [N, D], weight [V, D], bias [V] and temperature [N], or None.

    In the dtype of the arithmetic.
    """

    to_input: Tensor | None
    to_weight: Tensor | None
    to_bias: Tensor | None
    to_temperature: Tensor | None

    @classmethod
    def unwritten(cls, problem: LinearProblem, needs: Needs, chunks: int) -> Gradients:
        """Memory for those that are wanted: zeros where no chunk writes first."""
        like = {"dtype": problem.dtype, "device": problem.device}
        # Rows that are gathered out keep the zeros.
        make = torch.empty if problem.rows.kept is None else torch.zeros
        to_input = make(problem.input.shape, **like) if needs.input_grad else None
        make = torch.empty if chunks else torch.zeros
        to_weight = make(problem.weight.shape, **like) if needs.weight_grad else None
        if to_weight is not None:
            to_weight[problem.columns :] = 0.0  # padding
        to_bias = torch.zeros(problem.weight.shape[0], **like) if needs.bias_grad else None
        to_temperature = torch.zeros(problem.rows.total, **like) if needs.temperature_grad else None
        return cls(to_input, to_weight, to_bias, to_temperature)

    def rounded(self, problem: LinearProblem) -> Gradients:
        """In the dtypes of the tensors that they are of."""
        sources = (problem.input, problem.weight, problem.bias, problem.temperature)
        return Gradients(*(None if s is None else s.to(t.dtype) for s, t in zip(self.flat(), sources)))


def multiply_tiles(
    problem: LinearProblem,
    chunk: Chunk,
    hidden: Tensor,
    grads: Iterable[tuple[Tile, Tensor]],
    undo: Tensor | None,
    gradients: Gradients,
) -> Tensor | None:
    """Add what the gradients of the chunk's logits, each of a tile, contribute to the gradients wanted.

    undo: what undoes the scale of grads, if they have one. Where the vocabulary is shared by ranks the
    gradient of the hidden states is not put in its place yet: it is given, [m, D].
    """
    to_input, to_weight, to_bias, _ = gradients.flat()
    in_place = chunk.step.alone and isinstance(chunk.where, slice)
    if to_input is not None:
        make = torch.empty_like if problem.columns else torch.zeros_like
        hidden_grad = to_input[chunk.where] if in_place else make(hidden, dtype=problem.dtype)
    factor = None if to_weight is None else problem.gradient_factor(hidden)
    multiplied = to_input is not None or to_weight is not None
    for tile, grad in grads:
        if multiplied:
            grad = grad.to(problem.operand)
        if to_input is not None:
            head = problem.gradient_head(*tile)
            add = tile[0] > 0
            multiply(grad, head, hidden_grad, rows="m", accumulate=add, rounds=problem.rounds)
        if to_weight is not None:
            part = to_weight[tile[0] : tile[1]]
            how = {"accumulate": not chunk.first, "scale": undo, "rounds": problem.rounds}
            multiply(grad.t(), factor, part, rows="k", **how)
        if to_bias is not None:
            bias_grad = grad.sum(0, dtype=problem.dtype)
            to_bias[tile[0] : tile[1]] += bias_grad if undo is None else bias_grad * undo
    if to_input is None:
        return None
    if undo is not None:
        hidden_grad *= undo
    if chunk.step.alone and not in_place:
        to_input[chunk.where] = hidden_grad
    return hidden_grad
