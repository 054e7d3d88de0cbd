"""What a row is scored against: class indices, a whole distribution, or its top-k entries.

The drivers cut a target along with the rows and the vocabulary. A dense target is never copied whole:
a tile of it is taken, gathered and converted when its turn comes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import TargetArguments, group

_PIECE = 2**22


# Stands for an ignored entry of a top-k target: it falls in no tile of the vocabulary.
NO_CLASS = -(2**62)


def may_read(values: Tensor) -> bool:
    """Whether looking at values costs no wait for a device, or TIGHTROPE_DEBUG=1 asks for it."""
    return values.device.type == "cpu" or os.environ.get("TIGHTROPE_DEBUG") == "1"


class TopKTarget(NamedTuple):
    """A sparse target distribution: the k entries of each token that carry mass.

    K is at most 2048 where the CUDA C++ row kernels serve; more is a ValueError there.

    Args:
        indices: ``(..., K)`` integers in ``[0, V)``. An entry equal to ``ignore_index`` carries nothing; a
            token whose entries are all ignored is an ignored token. A repeated index adds up.
        probs: ``(..., K)`` floating point. They need not sum to one.
    """

    indices: Tensor
    probs: Tensor


@group
class Target(TargetArguments):
    """The target of every row, of one kind at most. Row i of dense and topk_* belongs to row i - shift."""

    shift: int = 0

    def check_range(self, valid: Tensor | None, vocab_size: int) -> None:
        """Raise IndexError for a class outside [0, V) in a row that counts.

        On a GPU that would wait for the device: there it is done under TIGHTROPE_DEBUG=1 only, and such a
        row's loss is NaN otherwise.
        """
        for name, indices in (("target", self.index), ("target.indices", self.topk_index)):
            if indices is None or not may_read(indices):
                continue
            wrong = (indices >= vocab_size) | ((indices < 0) & (indices != NO_CLASS))
            if valid is not None and self.index is not None:
                wrong &= valid
            if wrong.any():
                raise IndexError(
                    f"{name}: got class {indices[wrong][0].item()}, expected ignore_index or a class in "
                    f"[0, {vocab_size})"
                )

    def in_order(self) -> Target:
        """The same target, with the classes of a top-k target ascending."""
        if self.topk_index is None:
            return self
        topk_index, order = self.topk_index.sort(dim=-1, stable=True)
        return replace(self, topk_index=topk_index, topk_prob=self.topk_prob.gather(-1, order))

    def chunk(self, start: int, stop: int, rows: Tensor | None, dtype: torch.dtype) -> TargetChunk:
        """The targets of rows ``rows[start:stop]``, or of ``start:stop`` where rows is None."""
        index = topk_index = topk_prob = None
        source: slice | Tensor = slice(start, stop)
        if rows is not None:
            source = rows[start:stop] + self.shift
        elif self.shift and self.index is None:
            wide = self.topk_index if self.dense is None else self.dense
            # Rows that shift past the end have no target; they are masked, so any row will do.
            source = torch.arange(start, stop, device=wide.device) + self.shift
            source = source.clamp_(max=wide.shape[0] - 1)
        if self.index is not None:
            index = self.index[start:stop] if rows is None else self.index[rows[start:stop]]
        if self.topk_index is not None:
            topk_index = self.topk_index[source].contiguous()
            topk_prob = self.topk_prob[source].to(dtype).contiguous()
        return TargetChunk(index, self.dense, topk_index, topk_prob, source, dtype)


@dataclass(frozen=True)
class TargetChunk:
    """The targets of a chunk of rows."""

    index: Tensor | None
    dense: Tensor | None
    topk_index: Tensor | None
    topk_prob: Tensor | None
    source: slice | Tensor
    dtype: torch.dtype

    def tile(self, start: int, stop: int) -> TargetArguments:
        """The part that concerns entries ``start:stop`` of the vocabulary; indices stay global."""
        dense = None
        if self.dense is not None:
            dense = self.dense[:, start:stop][self.source].to(self.dtype)
            if dense.stride(-1) != 1 and dense.shape[-1] > 1:
                dense = dense.contiguous()
        return TargetArguments(self.index, dense, self.topk_index, self.topk_prob)


def smoothed_square(
    target: Tensor | TopKTarget, vocab_size: int, label_smoothing: float, dtype: torch.dtype
) -> Tensor:
    """|b|^2 of each token's smoothed target, (...). ``probs`` of ignored entries must be 0 already."""
    if isinstance(target, TopKTarget):
        probs = target.probs.to(dtype)
        mass, square = probs.sum(-1), _combine_duplicates(target.indices, probs).square().sum(-1)
    elif target.is_floating_point():
        # In pieces, so that no second N x V tensor is made.
        rows = target.reshape(-1, vocab_size).split(max(1, _PIECE // vocab_size))
        mass = torch.cat([part.sum(-1, dtype=dtype) for part in rows]).view(target.shape[:-1])
        square = torch.cat([part.to(dtype).square().sum(-1) for part in rows]).view(target.shape[:-1])
    else:
        mass = square = torch.ones(target.shape, dtype=dtype, device=target.device)
    keep, share = 1.0 - label_smoothing, label_smoothing / vocab_size
    return keep * keep * square + 2.0 * keep * share * mass + share * label_smoothing


def _combine_duplicates(indices: Tensor, probs: Tensor) -> Tensor:
    """Probabilities (..., K) with those of equal indices of a token added up into one place."""
    indices, order = indices.sort(-1)
    group = torch.zeros_like(indices)
    group[..., 1:] = (indices[..., 1:] != indices[..., :-1]).cumsum(-1)
    return torch.zeros_like(probs).scatter_add(-1, group, probs.gather(-1, order))
