"""Tensors that stand for the logits of a fused model: those that it made, and those in its outputs.

`Materialized` are logits that a forward needed, because of what it does to them: subclasses of tensors carry
on through all operations, so that their cross-entropy is Tightrope's still. `LazyLogits` stand in a model's
outputs: to Trainer and others a tensor of the right shape, whose entries nobody has asked for yet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Materialized(Tensor):
    """Logits that were made, and what follows from them: their cross-entropy is Tightrope's loss still.

    ``in_order``: whether their tokens are surely in the model's order, as a balance for each token needs.
    """

    @staticmethod
    def of(logits: Tensor, call) -> Materialized:
        logits = logits.as_subclass(Materialized)
        logits._call, logits.in_order = call, True
        return logits

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        call = next((x._call for x in _leaves((args, *kwargs.values())) if isinstance(x, Materialized)), None)
        if function is F.cross_entropy and call is not None:
            bound = _CROSS_ENTROPY.bind(*args, **kwargs)
            with torch._C.DisableTorchFunctionSubclass():
                return call.loss_of_logits(**bound.arguments)
        result = super().__torch_function__(function, types, args, kwargs)
        in_order = _keeps_order(function, args)
        for value in _leaves(result):
            if isinstance(value, Materialized):
                value._call = call
                value.in_order = in_order and value.shape[-1:] == args[0].shape[-1:]
        return result

    def __iter__(self):
        return iter(self.unbind())


_CROSS_ENTROPY = inspect.signature(F.cross_entropy)

# What leaves tokens where they are, or in the same order in another shape; all else is not trusted to.
_IN_ORDER = {
    *("float", "double", "to", "type", "type_as", "contiguous", "clone", "view", "reshape", "flatten"),
    *("squeeze", "unsqueeze", "tanh", "clamp", "masked_fill", "mul", "div", "add", "sub", "true_divide"),
    *("__mul__", "__rmul__", "__truediv__", "__add__", "__radd__", "__sub__"),
}


def _keeps_order(function: Callable, args: tuple) -> bool:
    return (
        getattr(function, "__name__", "") in _IN_ORDER
        and len(args) > 0
        and isinstance(args[0], Materialized)
        and args[0].in_order
    )


class LazyLogits(Tensor):
    """The logits in a fused model's outputs: made, without a warning, when they are first read."""

    @staticmethod
    def __new__(cls, deferred, detached: bool = False):
        return Tensor._make_wrapper_subclass(
            cls, deferred.shape, dtype=deferred.dtype, device=deferred.device
        )

    def __init__(self, deferred, detached: bool = False):
        self._deferred, self._detached = deferred, detached

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _KNOWN_UNMADE:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function in (Tensor.detach, torch.detach):
            return LazyLogits(args[0]._deferred, detached=True)
        dtype = _copied(function, args, kwargs)
        if dtype is not None and args[0]._deferred._logits is None:
            deferred = args[0]._deferred
            with torch.set_grad_enabled(deferred._grad):
                copy = deferred._next(lambda x: function(x, *args[1:]), _dtype=dtype)
            return LazyLogits(copy, args[0]._detached or not torch.is_grad_enabled())
        return _of_made(function, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        # What C++ does to a tensor without asking Python first.
        return _of_made(function, args, kwargs or {})


def _copied(function: Callable, args: tuple, kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype of what is a copy, as accelerate, DDP and FSDP make of all outputs; None of what is not."""
    if kwargs:
        return None
    if function is Tensor.float:
        return torch.float32
    if function is Tensor.clone:
        return args[0].dtype
    of_dtype = function is Tensor.to and len(args) == 2 and isinstance(args[1], torch.dtype)
    return args[1] if of_dtype else None


def _of_made(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    def made(value):
        if not isinstance(value, LazyLogits):
            return value
        logits = unwrapped(value._deferred.materialize())
        return logits.detach() if value._detached else logits

    return function(*each(made, args), **{key: each(made, value) for key, value in kwargs.items()})


_KNOWN_UNMADE = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.ndimension),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout")),
    *(
        getattr(Tensor, name).__get__
        for name in ("requires_grad", "grad_fn", "is_leaf", "is_sparse", "is_meta")
    ),
}


def unwrapped(value: Tensor) -> Tensor:
    return value.as_subclass(Tensor) if isinstance(value, Materialized) else value


def _leaves(value: Any) -> Iterator[Any]:
    """What is in lists and tuples."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def each(change: Callable[[Any], Any], value: Any) -> Any:
    """``change`` of a value, and of those in a list or tuple: ``torch.cat([logits, more])``."""
    if isinstance(value, (list, tuple)):
        return type(value)(each(change, item) for item in value)
    return change(value)
