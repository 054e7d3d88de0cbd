"""What a row is scored against: class indices, a whole distribution, or its top-k entries.

The drivers cut a target along with the rows and the vocabulary. A dense target is never copied whole:
a tile of it is taken, gathered and converted when its turn comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .ambient import may_read
from .arguments import TargetArguments, TeacherArguments, group

if TYPE_CHECKING:
    from .strategies.teacher import TeacherRows

# (a distribution, its sums over the classes that are here [2, ...]) -> those over all classes.
OverRanks = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
_PIECE = 2**20  # elements of a dense target that are squared at a time


# Stands for an ignored entry of a top-k target: it falls in no tile of the vocabulary.
NO_CLASS = -(2**62)


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


@dataclass(frozen=True, eq=False)
class TeacherTarget:
    """The distribution that another head gives each token: a teacher's, of the same vocabulary.

    ``b = softmax(z)`` with ``z = softcap * tanh(u / softcap)``, ``u = logit_scale * (hidden @ weight.T +
    bias)``; a teacher at temperature T is ``logit_scale=1 / T`` where it has no softcap. Its tiles are made
    when their turn comes, in the dtype of the arithmetic, so it takes no ``N x V`` memory. It is a constant:
    no gradient goes to its tensors, whether they require one or not.

    Args:
        hidden: the teacher's hidden states ``(..., D)``, with a D of its own and the tokens of the student's.
            With ``shift`` they belong to the target, as a dense target does; at the same position as the
            student's they are for the same next token, and shift is 0.
        weight: its vocabulary head ``(V, D)``. Where ranks hold the vocabulary together, the rank's own rows,
            cut as the student's head is.
        bias: ``(V)``, or None.
        logit_scale, softcap: of the teacher's logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    logit_scale: float = 1.0
    softcap: float | None = None


@group
class Target(TeacherArguments, TargetArguments):
    """The target of every row, of one kind at most. Row i of dense and topk_* belongs to row i - shift.

    With class_weight [V] the target is ``class_weight * ((1 - smoothing) b + smoothing / V)``. The tiles of a
    teacher come from elsewhere (`strategies.teacher`).
    """

    shift: int = 0
    class_weight: Tensor | None = None
    smoothing: float = 0.0

    @property
    def is_given(self) -> bool:
        return any(t is not None for t in (self.index, self.topk_index)) or self.is_wide

    @property
    def is_wide(self) -> bool:
        """Whether a mass for each entry is given, or made of a teacher's."""
        return self.dense is not None or self.teacher_weight is not None

    @property
    def is_dense(self) -> bool:
        """Whether what a tile of the vocabulary is scored against is a mass for each entry."""
        return self.is_wide or self.class_weight is not None

    def check_range(self, valid: Tensor | None, vocab_size: int) -> None:
        """Raise IndexError for a class outside [0, V) in a row that counts.

        On a GPU that would wait for the device: there it is done under TIGHTROPE_DEBUG=1 only, and such a
        row's loss is NaN otherwise.
        """
        for name, indices in (("target", self.index), ("target.indices", self.topk_index)):
            if indices is None or not may_read(indices):
                continue
            wrong = out_of_range(indices, vocab_size)
            if valid is not None and indices is self.index:
                wrong &= valid
            elif valid is not None:
                wrong[: self.shift] = False
                wrong[self.shift :] &= valid[: max(len(valid) - self.shift, 0)].unsqueeze(-1)
            refuse_classes(name, indices, wrong, vocab_size)

    def in_order(self) -> Target:
        """The same target, with the classes of a top-k target ascending."""
        if self.topk_index is None:
            return self
        topk_index, order = self.topk_index.sort(dim=-1, stable=True)
        return replace(self, topk_index=topk_index, topk_prob=self.topk_prob.gather(-1, order))

    def chunk(
        self, start: int, stop: int, rows: Tensor | None, dtype: torch.dtype, offset: int
    ) -> TargetChunk:
        """The targets of rows ``rows[start:stop]``, or of ``start:stop`` where rows is None.

        offset: the class of the first entry that is here.
        """
        index = topk_index = topk_prob = dense = None
        source: slice | Tensor = slice(start, stop)
        if rows is not None:
            source = rows[start:stop] + self.shift
        elif self.shift and (self.topk_index is not None or self.dense is not None):
            wide = self.topk_index if self.dense is None else self.dense
            # Rows that shift past the end have no target; they are masked, so any row will do.
            source = torch.arange(start, stop, device=wide.device) + self.shift
            source = source.clamp_(max=math.prod(wide.shape[:-1]) - 1)
        if self.index is not None:
            index = self.index[start:stop] if rows is None else self.index[rows[start:stop]]
        if self.topk_index is not None:
            topk_index = self.topk_index[source].contiguous()
            topk_prob = self.topk_prob[source].to(dtype).contiguous()
        if self.dense is not None:
            dense = DenseRows(self.dense, source)
        blend = None
        if self.class_weight is not None:
            blend = self.class_weight.to(dtype), self.smoothing
            if index is not None:
                topk_index, index = index.unsqueeze(-1), None
                topk_prob = torch.ones_like(topk_index, dtype=dtype)
        return TargetChunk(index, dense, topk_index, topk_prob, stop - start, dtype, blend, offset)


def out_of_range(indices: Tensor, vocab_size: int) -> Tensor:
    """Which classes are neither in [0, V) nor ignored."""
    return (indices >= vocab_size) | ((indices < 0) & (indices != NO_CLASS))


def refuse_classes(name: str, indices: Tensor, wrong: Tensor, vocab_size: int) -> None:
    """Raise IndexError where any of the indices is wrong."""
    if wrong.any():
        raise IndexError(
            f"{name}: got class {indices[wrong][0].item()}, expected ignore_index or a class in "
            f"[0, {vocab_size})"
        )


class DenseRows:
    """Some rows of a distribution (..., V), which is copied only as far as it is looked at.

    Leading dimensions that are not one run of memory (a slice of a longer sequence) are indexed as they are:
    to flatten them would copy all of it.
    """

    def __init__(self, dense: Tensor, source: slice | Tensor):
        flat = _flat_view(dense)
        if flat is not None:
            self.dense, self.at = flat, (source,)
        else:
            if isinstance(source, slice):
                source = torch.arange(source.start, source.stop, device=dense.device)
            self.dense, self.at = dense, _places(source, dense.shape[:-1])

    def tile(self, start: int, stop: int) -> Tensor:
        """Entries ``start:stop`` of the vocabulary, [rows, stop - start]; a view where it can be one."""
        return self.dense[..., start:stop][self.at]


def _places(rows: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Where rows stand along each dimension (torch.unravel_index takes 30 MB the first time)."""
    places = []
    for size in reversed(shape):
        places.append(rows % size)
        rows = rows // size
    return tuple(reversed(places))


def _flat_view(dense: Tensor) -> Tensor | None:
    """(..., V) as [N, V] without a copy, or None."""
    run = None  # elements that the dimensions so far span
    for size, stride in zip(reversed(dense.shape[:-1]), reversed(dense.stride()[:-1])):
        if size == 1:
            continue
        if run is not None and stride != run:
            return None
        run = size * stride
    return dense.reshape(math.prod(dense.shape[:-1]), dense.shape[-1])


@dataclass(frozen=True)
class TargetChunk:
    """The targets of a chunk of rows."""

    index: Tensor | None
    dense: DenseRows | TeacherRows | None
    topk_index: Tensor | None
    topk_prob: Tensor | None
    size: int
    dtype: torch.dtype
    blend: tuple[Tensor, float] | None  # class_weight [V], smoothing
    offset: int  # the class of the first entry that is here

    def tile(self, start: int, stop: int) -> TargetArguments:
        """The part that concerns entries ``start:stop`` of those that are here; indices stay global."""
        dense = None
        if self.dense is not None:
            dense = self.dense.tile(start, stop).to(self.dtype)
            if dense.stride(-1) != 1 and dense.shape[-1] > 1:
                dense = dense.contiguous()
        if self.blend is not None:
            return TargetArguments(dense=self._blended(dense, start + self.offset, stop + self.offset))
        return TargetArguments(self.index, dense, self.topk_index, self.topk_prob)

    def _blended(self, dense: Tensor | None, start: int, stop: int) -> Tensor:
        """``class_weight * ((1 - smoothing) b + smoothing / V)`` of classes start:stop."""
        class_weight, smoothing = self.blend
        vocab_size = class_weight.shape[0]
        if dense is not None:
            mass = (1.0 - smoothing) * dense
        else:
            mass = class_weight.new_zeros(self.size, stop - start)
            inside = (self.topk_index >= start) & (self.topk_index < stop)
            columns = (self.topk_index - start).masked_fill(~inside, 0)
            mass.scatter_add_(-1, columns, (1.0 - smoothing) * self.topk_prob.masked_fill(~inside, 0.0))
            # A class out of range, which only a GPU lets pass.
            lost = out_of_range(self.topk_index, vocab_size)
            mass.masked_fill_(lost.any(-1, keepdim=True), torch.nan)
        return mass.add_(smoothing / vocab_size).mul_(class_weight[start:stop])


def square_of_smoothed(
    square: Tensor, mass: Tensor | float, vocab_size: int, label_smoothing: float
) -> Tensor:
    """|b|^2 of a smoothed target, from that of the target as it is and from its mass."""
    keep, share = 1.0 - label_smoothing, label_smoothing / vocab_size
    return keep * keep * square + 2.0 * keep * share * mass + share * label_smoothing


def smoothed_square(
    target: Tensor | TopKTarget,
    vocab_size: int,
    label_smoothing: float,
    dtype: torch.dtype,
    over_ranks: OverRanks | None = None,
) -> Tensor:
    """|b|^2 of each token's smoothed target, (...). ``probs`` of ignored entries must be 0 already.

    over_ranks: gives sums over all classes of a distribution, where only some of them are here.
    """
    if isinstance(target, TopKTarget):
        probs = target.probs.to(dtype)
        mass, square = probs.sum(-1), _combine_duplicates(target.indices, probs).square().sum(-1)
    elif target.is_floating_point():

        def sums(dense: Tensor) -> Tensor:
            return _mass_and_square(dense, dtype)

        mass, square = sums(target) if over_ranks is None else over_ranks(target, sums)
    else:
        mass = square = torch.ones(target.shape, dtype=dtype, device=target.device)
    return square_of_smoothed(square, mass, vocab_size, label_smoothing)


def _mass_and_square(dense: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum and sum of squares of each row of a distribution (..., V), [2, ...].

    In pieces, so that no second N x V tensor is made.
    """
    count, entries = math.prod(dense.shape[:-1]), dense.shape[-1]
    size = max(1, _PIECE // max(entries, 1))
    sums = []
    for start in range(0, max(count, 1), size):
        part = DenseRows(dense, slice(start, min(start + size, count))).tile(0, entries).to(dtype)
        sums.append(torch.stack([part.sum(-1), part.square().sum(-1)]))
    return torch.cat(sums, -1).view(2, *dense.shape[:-1])


def _combine_duplicates(indices: Tensor, probs: Tensor) -> Tensor:
    """Probabilities (..., K) with those of equal indices of a token added up into one place."""
    indices, order = indices.sort(-1)
    group = torch.zeros_like(indices)
    group[..., 1:] = (indices[..., 1:] != indices[..., :-1]).cumsum(-1)
    return torch.zeros_like(probs).scatter_add(-1, group, probs.gather(-1, order))
