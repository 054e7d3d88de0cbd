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
        chunk = problem.chunk(start, stop)
        yield chunk, logits if logits.stride(1) == 1 or vocab_size == 1 else logits.contiguous()


def statistics(problem: LogitsProblem) -> tuple[Tensor, Tensor]:
    """Summary [SUMMARY, N] and argmax [N] of every row; zeros and -1 for ignored rows."""
    problem.check_topk()
    summary, argmax = problem.empty_summary()
    for chunk, logits in _chunks(problem):
        partial, best = problem.new_partial(chunk.size)
        tile = (0, problem.vocab_size)
        scored = problem.tempered(logits, chunk, tile)
        problem.row_stats(scored, partial, best, chunk, tile)
        summary[:, chunk.where] = problem.summarise(partial, chunk, [(scored, tile)])
        argmax[chunk.where] = best
    return summary, argmax


def gradient(problem: LogitsProblem, summary: Tensor, coef: Tensor, to_temperature: Tensor | None) -> Tensor:
    """Gradient of the logits [N, V], from the coefficients [7 or 14, N] of every row.

    to_temperature [N] or None: where that of the temperatures is added.
    """
    out = torch.empty_like(problem.logits, memory_format=torch.contiguous_format)
    for chunk, logits in _chunks(problem):
        where = chunk.where
        to_rows = None if to_temperature is None else to_temperature[where]
        form = problem.form(chunk, summary[:, where], coef[:, where].contiguous(), to_rows)
        problem.row_grad(logits, out[where], form, chunk)
    return out
