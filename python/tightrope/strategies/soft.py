"""Gradients of soft targets: of a distribution that requires grad, or of the probabilities of a top-k target.

The statistics of a target are linear in it, so the gradient of a mass at an entry is

    dloss/db_j = g_target_logit z_j + g_target_prob p_j + g_target_log_prob log p_j

which needs the logits once more, a tile at a time, and no other product. A distribution is N x V as it is
given, and so is its gradient; of a top-k target nothing is larger than the target.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.ops import to_logits
from ..statistics import StatGrads
from . import dense
from .problem import LinearProblem, LogitsProblem
from .scored import Chunk
from .streaming import largest, tiled_spans
from .workspace import borrow

# The statistics that a target has a part in.
OF_TARGET = ("target_logit", "target_prob", "target_log_prob")


def slopes(grads: StatGrads, like: Tensor) -> Tensor:
    """The upstream gradients of the statistics of the target [3, N]; like: a summary."""
    found = [getattr(grads, name) for name in OF_TARGET]
    return torch.stack([torch.zeros_like(like[0]) if g is None else g for g in found])


def of_linear(problem: LinearProblem, summary: Tensor, slopes: Tensor, workspace: int) -> Tensor:
    """The gradient of the distribution (..., V), or of top-k probabilities [N, K], in its dtype."""
    out, add = _output(problem, summary, slopes)
    tiles, spans = tiled_spans(problem, workspace)
    with borrow(largest(tiles, spans), problem.dtype, problem.device) as memory:
        for start, stop in spans:
            chunk = problem.chunk(start, stop)
            factor = problem.factor(problem.hidden(chunk))
            for tile in tiles:
                add(problem.raw_logits(factor, memory, chunk, tile), chunk, tile)
    return out


def of_logits(problem: LogitsProblem, summary: Tensor, slopes: Tensor) -> Tensor:
    """The same where the logits are given."""
    out, add = _output(problem, summary, slopes)
    tile = (0, problem.columns)
    for chunk, logits in dense.chunks(problem):
        add(problem.tempered(logits, chunk, tile), chunk, tile)
    return out


def _output(
    problem: LinearProblem | LogitsProblem, summary: Tensor, slopes: Tensor
) -> tuple[Tensor, Callable[[Tensor, Chunk, tuple[int, int]], None]]:
    """(zeros for the gradient, what writes that of a tile of scored logits to it)."""
    target = problem.target
    given = target.topk_prob if target.dense is None else target.dense
    out = torch.zeros_like(given, memory_format=torch.contiguous_format)
    rows = out.view(-1, out.shape[-1])

    def add(scored: Tensor, chunk: Chunk, tile: tuple[int, int]) -> None:
        z = scored
        if chunk.temperature is None:
            z = to_logits(scored, problem.head_bias(*tile), problem.transform)
        log_p = (z - summary[0, chunk.where, None]) - summary[1, chunk.where, None]
        gradient = torch.zeros_like(z)
        for slope, values in zip(slopes[:, chunk.where].unsqueeze(-1), (z, log_p.exp(), log_p)):
            # Skipped where it is not asked for: an impossible entry has z = -inf.
            gradient += torch.where(slope == 0, 0.0, slope * values)
        if target.class_weight is not None:
            gradient *= (1.0 - target.smoothing) * target.class_weight[slice(*tile)].to(z.dtype)
        source, kept = _source(problem, chunk)
        gradient = gradient[kept]
        if target.dense is not None:
            rows[source, slice(*tile)] = gradient.to(out.dtype)
            return
        columns = target.topk_index[source]
        inside = (columns >= tile[0]) & (columns < tile[1])
        at = gradient.gather(-1, (columns - tile[0]).masked_fill(~inside, 0))
        rows[source] = torch.where(inside, at.to(out.dtype), rows[source])

    return out, add


def _source(problem: LinearProblem | LogitsProblem, chunk: Chunk) -> tuple[Tensor, Tensor | slice]:
    """(rows of the target that a chunk's rows are scored against, which of the chunk's rows count)."""
    where = chunk.where
    if isinstance(where, slice):
        where = torch.arange(where.start, where.stop, device=problem.device)
    source = where + problem.target.shift
    return (source, slice(None)) if chunk.active is None else (source[chunk.active], chunk.active)
