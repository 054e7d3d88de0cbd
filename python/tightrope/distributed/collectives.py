"""What travels between ranks: bytes, in equal parts, in an order that all of them know.

All traffic of a call is one of two collectives, an all-gather or an all-to-all of parts of one size, whose
number and size depend on agreed numbers alone. Sums are ours, in rank order and in the dtype of the
arithmetic, so that they have the same bits on every rank and backend, and are rounded once; a ring's
all-reduce would move as many bytes. Tensors travel as bytes: not every backend knows every dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..ambient import may_read


def group_of(name: str) -> dist.ProcessGroup:
    # Here, as not every build of torch has it.
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def over_ranks(value: Tensor, group: str) -> Tensor:
    """The sum over the ranks of a group, in rank order, on each of them; also in a compiled graph."""
    # Not in place: compiled by torch 2.11, a Function whose result was has a gradient of zero.
    return functools.reduce(torch.add, _gather_small(value, group).unbind())


def same_on_ranks(value: Tensor, group: str) -> Tensor:
    """The value, where all ranks have the same one; else an error, or NaN where it cannot be looked at."""
    values = _gather_small(value, group)
    alike = (values == values[0]).all(0) | values.isnan().all(0)
    if may_read(alike) and not alike.all():
        raise RuntimeError(
            f"vocab_parallel: got losses that are multiplied by {values.flatten().tolist()} on the ranks of "
            'rows="sharded", expected one number: their gradients were made together in the forward pass; '
            'give the weights as row_weight or normalizer, or take strategy="streaming"'
        )
    return torch.where(alike, value, torch.nan)


def _gather_small(value: Tensor, group: str) -> Tensor:
    """The value of each rank, [P, ...]."""
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives

        return _functional_collectives.all_gather_tensor(value.unsqueeze(0), 0, group)
    return gather(value, group_of(group))


def gather(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The value of each rank, [P, ...], of one shape and dtype everywhere."""
    value = value.contiguous()
    size = group.size()
    out = value.new_empty((size, *value.shape))
    if size == 1 or not value.numel():
        return out.copy_(value)
    # The name since torch 2.13, which warns of the older one.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(_bytes(out), _bytes(value), group=group)
    return out


class Exchanged:
    """An all-to-all under way: ``result()`` waits for it."""

    def __init__(self, parts: Tensor, group: dist.ProcessGroup, wait: bool):
        self.sent = parts.contiguous()  # kept until it has been sent
        self.out, self.work = self.sent, None
        if group.size() > 1 and parts.numel():
            self.out = torch.empty_like(self.sent)
            out, sent = _bytes(self.out), _bytes(self.sent)
            self.work = dist.all_to_all_single(out, sent, group=group, async_op=not wait)

    def result(self) -> Tensor:
        """Part i is what rank i had for this one, [P, ...]."""
        if self.work is not None:
            self.work.wait()
        return self.out


def exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Part i [P, ...] goes to rank i; gives what each rank had for this one, [P, ...]."""
    return Exchanged(parts, group, wait=True).result()


def sum_in_order(parts: Tensor) -> Tensor:
    """The sum over the first dimension, from the first on."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def pack(values: Sequence[Tensor], rows: int) -> Tensor:
    """Tensors [n, ...] of at most so many rows, side by side as bytes [rows, B]; zeros below them."""
    flat = [_rows_of_bytes(value) for value in values]
    packed = torch.zeros(rows, sum(part.shape[1] for part in flat), dtype=torch.uint8, device=flat[0].device)
    at = 0
    for part in flat:
        packed[: part.shape[0], at : at + part.shape[1]] = part
        at += part.shape[1]
    return packed


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """From bytes [m, B] the tensors [m, ...] that `pack` was given, by their dtypes and shapes."""
    values, at = [], 0
    for value in like:
        width = _row_bytes(value)
        part = packed[:, at : at + width]
        # A single row is contiguous wherever it begins, but a wider dtype begins at its multiples.
        part = part.clone(memory_format=torch.contiguous_format) if at else part
        values.append(part.reshape(-1).view(value.dtype).view(packed.shape[0], *value.shape[1:]))
        at += width
    return values


def _row_bytes(value: Tensor) -> int:
    return math.prod(value.shape[1:]) * value.dtype.itemsize


def _rows_of_bytes(value: Tensor) -> Tensor:
    flat = value.detach().reshape(value.shape[0], _row_bytes(value) // value.dtype.itemsize)
    return flat.contiguous().view(torch.uint8)


def _bytes(value: Tensor) -> Tensor:
    return value.view(-1).view(torch.uint8)
