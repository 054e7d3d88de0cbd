"""Small exchanges outside the drivers, as operators where a graph is compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ambient import may_read
from ..arguments import Signature
from ..backends.ops import define
from . import collectives


def _over_ranks(value: Tensor, group: str) -> Tensor:
    return collectives.sum_in_order(collectives.gather(value, collectives.group_of(group)))


def _same_on_ranks(value: Tensor, group: str) -> Tensor:
    values = collectives.gather(value, collectives.group_of(group))
    alike = (values == values[0]).all(0) | values.isnan().all(0)
    if may_read(alike) and not alike.all():
        raise RuntimeError(
            f"vocab_parallel: got losses that are multiplied by {values.flatten().tolist()} on the ranks of "
            'rows="sharded", expected one number: their gradients were made together in the forward pass; '
            'give the weights as row_weight or normalizer, or take strategy="streaming"'
        )
    return torch.where(alike, value, torch.nan)


for _name, _driver in (("over_ranks", _over_ranks), ("same_on_ranks", _same_on_ranks)):
    define(
        _name,
        Signature("Tensor value", "str group"),
        "Tensor",
        _driver,
        lambda value, group: torch.empty_like(value),
    )


def over_ranks(value: Tensor, group: str) -> Tensor:
    """The sum over the ranks of a group, in rank order, on each of them."""
    if torch.compiler.is_compiling():
        return torch.ops.tightrope.over_ranks(value, group)
    return _over_ranks(value, group)


def same_on_ranks(value: Tensor, group: str) -> Tensor:
    """The value, where all ranks have the same one; else an error, or NaN where it cannot be looked at."""
    if torch.compiler.is_compiling():
        return torch.ops.tightrope.same_on_ranks(value, group)
    return _same_on_ranks(value, group)
