"""vmap of the Functions of `derivatives`: a batch of calls as one call of more rows, wherever it can be one.

A row's statistics depend on that row alone, so the batch dimension joins the rows. It cannot where each of
the batch has a head of its own, or wants a gradient of the head of its own (per-sample gradients: a sum over
its own rows): there the calls are made one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from .arguments import LogitsArguments

# What a tensor's rows are, by where these stand; what is not named belongs to no row.
ROWS = "rows"  # the first dimension
COLUMNS = "columns"  # the last one: fields of rows
TOKENS = "tokens"  # all but the last, together
SHARED = "shared"  # none: of all rows
_OF_ARGUMENTS = {
    **dict.fromkeys(("index", "topk_index", "topk_prob", "valid", "classes", "temperature"), ROWS),
    "teacher_input": ROWS,
    "dense": TOKENS,
    **dict.fromkeys(("class_weight", "teacher_weight", "teacher_bias"), SHARED),
}
# Of (input, weight, bias, temperature), a direction of them, or their gradients.
THETA = (ROWS, SHARED, SHARED, ROWS)


def of_values(arguments: type[LogitsArguments]) -> tuple[str | None, ...]:
    """Of (input, weight, bias, *arguments)."""
    return *THETA[:3], *(_OF_ARGUMENTS.get(name) for name in arguments._names)


def batched(
    function: type[Function],
    size: int,
    dims: Sequence,
    given: Sequence,
    kinds: Sequence[str | None],
    out_kinds: Sequence[str],
    wanted: Sequence[bool] | None = None,
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """What a vmap rule gives: outputs of the function, and where their batch dimensions are.

    size: of the batch. dims: of each of the given arguments the batch dimension, or None. kinds, out_kinds:
    of arguments and outputs. wanted: which of the outputs are made; None: all.
    """
    moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(given, _flat(dims))]
    has_batch = [dim is not None for dim in _flat(dims)]
    wanted = wanted or (True,) * len(out_kinds)
    alone = any(kind == SHARED and own for kind, own in zip(kinds, has_batch))
    if alone or any(kind == SHARED and want for kind, want in zip(out_kinds, wanted)):
        calls = [
            _several(function.apply(*(x[i] if own else x for x, own in zip(moved, has_batch))))
            for i in range(size)
        ]
        outputs = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*calls))
        return outputs, tuple(None if out is None else 0 for out in outputs)
    joined = [_joined(x, own, size, kind) for x, own, kind in zip(moved, has_batch, kinds)]
    outputs = _several(function.apply(*joined))
    apart = tuple(None if x is None else _apart(x, size, kind) for x, kind in zip(outputs, out_kinds))
    places = tuple(
        None if x is None else x.dim() - 2 if kind == COLUMNS else 0 for x, kind in zip(apart, out_kinds)
    )
    return apart, places


def _several(outputs: Tensor | tuple) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _flat(dims: Sequence) -> list[int | None]:
    """Of an argument that is a tuple of numbers no dimension is a batch."""
    return [None if isinstance(dim, tuple) else dim for dim in dims]


def _joined(x: object, own: bool, size: int, kind: str | None) -> object:
    """An argument of all calls; its batch dimension is the first, where it has its own."""
    if not isinstance(x, Tensor) or kind in (None, SHARED):
        return x
    if not own:
        x = x.expand(size, *x.shape)
    if kind == COLUMNS:
        return x.movedim(0, -2).flatten(-2)
    return x if kind == TOKENS else x.flatten(0, 1)


def _apart(x: Tensor, size: int, kind: str) -> Tensor:
    """An output of all calls, its rows as (batch, rows)."""
    if kind == TOKENS:  # it has the batch's dimension still
        return x
    at = x.dim() - 1 if kind == COLUMNS else 0
    return x.unflatten(at, (size, x.shape[at] // size))
