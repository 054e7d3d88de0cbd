"""Collectives and their bytes as they are made, whoever makes them: torch's own counter has no bytes.

Bytes are those that a rank gets from the others, as `tightrope.distributed.estimate` counts them. For sums
they are those of a ring.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operator -> (name, place of the argument that each rank gives, bytes got for each of these, from P ranks).
_GATHERED = "all_gather", lambda ranks: ranks - 1
_SCATTERED = "reduce_scatter", lambda ranks: (ranks - 1) / ranks
_REDUCED = "all_reduce", lambda ranks: 2 * (ranks - 1) / ranks
_EXCHANGED = "all_to_all", lambda ranks: (ranks - 1) / ranks
_SENT = "broadcast", lambda ranks: 1
_COLLECTIVES = {
    "c10d::_allgather_base_": (*_GATHERED, 1),
    "c10d::_reduce_scatter_base_": (*_SCATTERED, 1),
    "c10d::allreduce_": (*_REDUCED, 0),
    "c10d::alltoall_base_": (*_EXCHANGED, 1),
    "c10d::broadcast_": (*_SENT, 0),
    "_c10d_functional::all_gather_into_tensor": (*_GATHERED, 0),
    "_c10d_functional::reduce_scatter_tensor": (*_SCATTERED, 0),
    "_c10d_functional::all_reduce": (*_REDUCED, 0),
    "_c10d_functional::all_reduce_": (*_REDUCED, 0),
    "_c10d_functional::all_to_all_single": (*_EXCHANGED, 0),
    "_c10d_functional::broadcast": (*_SENT, 0),
}
_SILENT = {"c10d::barrier", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


class Traffic(TorchDispatchMode):
    """Counts while it is entered: ``calls`` and ``bytes`` by the name of the collective."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks = ranks
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it is made of comes by next
        operator = func._schema.name
        if operator.split("::")[0] in ("c10d", "_c10d_functional") and operator not in _SILENT:
            self._count(operator, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple) -> None:
        if operator not in _COLLECTIVES:
            raise NotImplementedError(f"traffic: got {operator}, expected one of {', '.join(_COLLECTIVES)}")
        name, share, place = _COLLECTIVES[operator]
        given = args[place]
        tensors = [given] if isinstance(given, Tensor) else given
        self.calls[name] += 1
        self.bytes[name] += round(share(self.ranks) * sum(t.numel() * t.itemsize for t in tensors))
