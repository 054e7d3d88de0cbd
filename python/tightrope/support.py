"""Sets of classes: whose mass and entropy a caller asks for, by ``support=``.

The entropy of a whole vocabulary is raised most cheaply by noise; that of the plausible classes leaves the
others where the data put them (docs/mathematics.md). The same concept gives what replayed sampling,
distillation with a tail and unlikelihood ask for: the mass inside and outside of a set, each precise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .ambient import may_read
from .arguments import SetArguments, SideArguments
from .targets import NO_CLASS, out_of_range, refuse_classes


@dataclass(frozen=True)
class MinP:
    """The classes with ``p_j >= x * max p``: what min-p sampling keeps.

    Found anew in each call, from the logits of that call, and not differentiated through. The most likely
    class is always among them.

    Args:
        x: in (0, 1].
    """

    x: float


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes that each token names.

    Args:
        indices: ``(..., K)`` integers in ``[0, V)``. Repeated ones count once, entries equal to
            ``ignore_index`` not at all, so a set may be empty. With ``shift`` they belong to the target: as
            those of a :class:`TopKTarget` they stand at the position that is predicted.
    """

    indices: Tensor


# Of creativity="support_entropy".
DEFAULT = MinP(0.02)


@dataclass(frozen=True)
class RowSets:
    """The set of each of N rows, as the drivers cut it along with the rows."""

    min_p: float
    classes: Tensor | None  # [N, K] int64, ascending

    @classmethod
    def of(cls, arguments: SetArguments) -> RowSets | None:
        """The sets that an operator is told of, or None where it is told of none."""
        if not arguments.min_p and arguments.classes is None:
            return None
        return cls(arguments.min_p, arguments.classes)

    def check_range(self, valid: Tensor | None, vocab_size: int) -> None:
        """Raise IndexError for a class outside [0, V) in a row that counts, where it can be looked at."""
        if self.classes is not None and may_read(self.classes):
            wrong = out_of_range(self.classes, vocab_size)
            if valid is not None:
                wrong &= valid.unsqueeze(-1)
            refuse_classes("support.indices", self.classes, wrong, vocab_size)

    def chunk(self, where: slice | Tensor) -> RowSets:
        """The sets of some rows."""
        return self if self.classes is None else replace(self, classes=self.classes[where].contiguous())

    def sides(self, maximum: Tensor) -> SideArguments:
        """What tells the entries of the sets, from the largest logit of each row [n]."""
        if self.classes is not None:
            return SideArguments(classes=self.classes)
        return SideArguments(threshold=maximum + math.log(self.min_p))


def ascending(indices: Tensor, ignore_index: int) -> Tensor:
    """Checked indices (..., K) as int64 in ascending order, those that are ignored as NO_CLASS."""
    indices = indices.long()
    return torch.where(indices == ignore_index, NO_CLASS, indices).sort(-1).values
