"""The driver for logits that exist already: rows go by in chunks, and only their gradient is new memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import plan
from .problem import Chunk, LogitsProblem


def _chunks(problem: LogitsProblem) -> Iterator[tuple[Chunk, Tensor]]:
    """Chunks of rows, each with its logits, of unit stride along the vocabulary."""
    vocab_size = problem.logits.shape[1]
    for start, stop in plan.spans(
        problem.rows.total, max(1, plan.sizes(problem.device).dense_logits // vocab_size)
    ):
        logits = problem.logits[start:stop]
        chunk = problem.rows.chunk(start, stop, problem.target, problem.dtype)
        yield chunk, logits if logits.stride(1) == 1 or vocab_size == 1 else logits.contiguous()


def statistics(problem: LogitsProblem) -> tuple[Tensor, Tensor]:
    """Summary [SUMMARY, N] and argmax [N] of every row; zeros and -1 for ignored rows."""
    problem.check_topk()
    summary, argmax = problem.empty_summary()
    for chunk, logits in _chunks(problem):
        partial, best = problem.new_partial(chunk.size)
        arguments = problem.tile_arguments(chunk, (0, logits.shape[1]))
        problem.backend.row_stats(logits, partial, best, 0, *arguments)
        summary[:, chunk.where] = problem.summarise(partial, chunk)
        argmax[chunk.where] = best
    return summary, argmax


def gradient(problem: LogitsProblem, summary: Tensor, coef: Tensor) -> Tensor:
    """Gradient of the logits [N, V], from the coefficients [7, N] of every row."""
    out = torch.empty_like(problem.logits, memory_format=torch.contiguous_format)
    for chunk, logits in _chunks(problem):
        norm = summary[:2, chunk.where].contiguous()
        part = coef[:, chunk.where].contiguous()
        arguments = problem.tile_arguments(chunk, (0, logits.shape[1]))
        problem.backend.row_grad(logits, out[chunk.where], norm, part, 0, *arguments)
    return out
