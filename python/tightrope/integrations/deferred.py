"""What a fused model's head returns in place of logits: a record of what the model then does to them.

A causal language model scales, caps, slices and reshapes its logits and hands them to a cross-entropy. All of
that can be said of its hidden states and of the rows of its head. So the record, `DeferredLogits`, holds
those, and two numbers for the transform; ``F.cross_entropy`` of it is Tightrope's loss. Whatever it cannot
say makes the logits, through the head itself, and goes on with them: `Materialized`, a tensor whose
``F.cross_entropy`` is the same loss of logits that exist. After the model's forward what is left of a record
in its outputs is `LazyLogits`, a tensor that makes the logits when someone looks at it.

The record is no tensor, as a compiler follows plain Python objects more surely than subclasses of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lazy import Materialized, each
from .objective import Request


class DeferredLogits:
    """Logits ``(..., V)`` that are not there yet. See the module's text.

    Args:
        call: the forward of a fused model, which computes losses and is told what makes logits.
        head: the module whose call gives the logits of hidden states, or a loss of them.
        hidden: ``(..., D)``.
        width: V.
        dtype: what the head would give.
        balance: a balance for each token, ``(..., 1)``, or None.
    """

    def __init__(self, call, head, hidden: Tensor, width: int, dtype: torch.dtype, balance: Tensor | None):
        self._call, self._head, self._hidden = call, head, hidden
        self._columns, self._dtype = slice(0, width), dtype
        self._scale, self._cap, self._bias = 1.0, None, None
        self._balance = balance
        self._parent: DeferredLogits | None = None
        self._again: Callable[[Tensor], Tensor] | None = None  # from the parent's logits to these
        self._logits: Materialized | None = None
        self._grad, kind = torch.is_grad_enabled(), hidden.device.type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self._weight = self._weight_now()

    def _next(self, again: Callable[[Tensor], Tensor], **changes: Any) -> DeferredLogits | Tensor:
        if self._logits is not None or torch.is_grad_enabled() != self._grad:
            return again(self.materialize("no_grad"))  # which may have been written to
        after = DeferredLogits(self._call, self._head, self._hidden, 0, self._dtype, self._balance)
        for name in ("_columns", "_scale", "_cap", "_bias"):
            setattr(after, name, getattr(self, name))
        for name, value in changes.items():
            setattr(after, name, value)
        after._parent, after._again = self, again
        if self._call.open:
            self._call.records.append(after)
        return after

    def _moved(self, move: Callable[[Tensor], Tensor], again: Callable[[Tensor], Tensor], **changes: Any):
        """With ``move`` done to the leading dimensions of all that belongs to tokens."""
        balance = None if self._balance is None else move(self._balance)
        return self._next(again, _hidden=move(self._hidden), _balance=balance, **changes)

    def materialize(self, reason: str | None = None) -> Tensor:
        """The logits, by way of those that these came of, so that who writes to one writes to all.

        reason: the operation that needs them; None where they were asked for.
        """
        if self._logits is None and self._parent is None:
            weight, version = self._weight_now()
            if weight == self._weight[0] and version != self._weight[1]:
                raise RuntimeError(
                    "logits: got a head whose weight was written to since the model's call, expected the "
                    "logits of its output to be read before the optimizer's step"
                )
            self._call.materializes(reason)
            with torch.set_grad_enabled(self._grad), torch.autocast(*self._autocast):
                logits = getattr(self._head, "logits", self._head)(self._hidden)  # which may be restored
                self._logits = Materialized.of(logits, self._call) if self._call.open else logits
            for record in self._call.records:  # before a write, that views see and copies do not
                record._follow()
        elif self._logits is None:
            self._parent.materialize(reason)
            self._follow()
        return self._logits

    def _weight_now(self) -> tuple[int, int]:
        """Which the head's weight is, and how often it was written to, where that is known."""
        if torch.compiler.is_compiling() or self._head.weight.is_inference():
            return 0, 0
        return id(self._head.weight), self._head.weight._version

    def _follow(self) -> None:
        if self._logits is None and self._parent._logits is not None:
            with torch.set_grad_enabled(self._grad):
                self._logits = self._again(self._parent._logits)

    # What stays in the record.

    def float(self):
        return self.to(torch.float32)

    def double(self):
        return self.to(torch.float64)

    def to(self, *args, **kwargs):
        dtype = self._dtype
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (Tensor, DeferredLogits)):
                dtype = value.dtype
        return self._next(lambda x: x.to(*args, **kwargs), _dtype=dtype)

    type_as = to

    def contiguous(self, **kwargs):
        return self._next(lambda x: x.contiguous(**kwargs))

    def __mul__(self, other):
        factor = _number(other)
        if factor is None or (self._cap is not None and factor <= 0):
            return self.materialize("*") * other
        if self._cap is None:
            return self._next(lambda x: x * other, _scale=self._scale * factor)
        return self._next(lambda x: x * other, _cap=self._cap * factor)

    __rmul__ = mul = multiply = __mul__

    def __truediv__(self, other):
        divisor = _number(other)
        if not divisor or (self._cap is not None and divisor < 0):
            return self.materialize("/") / other
        if self._cap is None:
            return self._next(lambda x: x / other, _scale=self._scale / divisor)
        return self._next(lambda x: x / other, _cap=self._cap / divisor)

    def div(self, other, *, rounding_mode=None):
        if rounding_mode is not None:
            return self.materialize("div").div(other, rounding_mode=rounding_mode)
        return self / other

    divide = true_divide = div

    def tanh(self):
        if self._cap is not None:
            return self.materialize("tanh").tanh()
        return self._next(torch.tanh, _cap=1.0)

    def __add__(self, other):
        """A bias (V) or (1, V), as T5's and BART's relatives add theirs, stays; all else does not."""
        width = self._width
        is_bias = isinstance(other, Tensor) and other.numel() == width == other.shape[-1]
        if not is_bias or self._cap is not None or not self._scale or other.dim() > self.dim():
            return self.materialize("+") + other
        bias = other.reshape(width) / self._scale
        return self._next(lambda x: x + other, _bias=bias if self._bias is None else self._bias + bias)

    __radd__ = __add__

    def add(self, other, *, alpha=1):
        return self + (other if alpha == 1 else other * alpha)

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        last = _of_last(index, self.dim())
        if last is None:
            return self._moved(lambda x: x[index], lambda x: x[index])
        if not isinstance(last, slice) or last.step not in (None, 1):
            return self.materialize("[]")[index]
        start, stop, _ = last.indices(self._width)
        first = self._columns.start
        lead = (*index[:-1], slice(None))
        return self._moved(
            lambda x: x[lead],
            lambda x: x[index],
            _columns=slice(first + start, first + max(start, stop)),
            _bias=None if self._bias is None else self._bias[last],
        )

    def reshape(self, *shape, **named):
        shape = shape or tuple(named.values())
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if isinstance(shape, torch.dtype):
            return self.materialize("view").view(shape)
        shape = list(shape)
        lead = math.prod(shape[:-1])
        whole = math.prod(self.shape[:-1])
        if shape[-1] != self._width and not (shape[-1] == -1 and lead == whole):
            return self.materialize("reshape").reshape(shape)
        return self._moved(lambda x: x.reshape(*shape[:-1], x.shape[-1]), lambda x: x.reshape(shape))

    view = reshape

    def flatten(self, start_dim=0, end_dim=-1):
        start, end = (d % self.dim() for d in (start_dim, end_dim))
        if end >= self.dim() - 1 > start:
            return self.materialize("flatten").flatten(start, end)
        return self._moved(lambda x: x.flatten(start, end), lambda x: x.flatten(start, end))

    def transpose(self, dim0, dim1):
        first, second = (d % self.dim() for d in (dim0, dim1))
        if self.dim() - 1 in (first, second):
            return self.materialize("transpose").transpose(first, second)
        return self._moved(lambda x: x.transpose(first, second), lambda x: x.transpose(first, second))

    def unsqueeze(self, dim):
        place = dim % (self.dim() + 1)
        if place == self.dim():
            return self.materialize("unsqueeze").unsqueeze(dim)
        return self._moved(lambda x: x.unsqueeze(place), lambda x: x.unsqueeze(place))

    def squeeze(self, dim=None):
        if not isinstance(dim, int) or dim % self.dim() == self.dim() - 1:
            return self.materialize("squeeze").squeeze(*(() if dim is None else (dim,)))
        place = dim % self.dim()
        return self._moved(lambda x: x.squeeze(place), lambda x: x.squeeze(place))

    def cross_entropy(
        self,
        target,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
    ):
        """``F.cross_entropy`` of these logits: the model's loss, where Tightrope's stands in its place."""
        by_index = isinstance(target, Tensor) and not target.is_floating_point() and self.dim() == 2
        constant = torch.is_grad_enabled() and not self._grad
        if (
            self._logits is not None
            or constant
            or not by_index
            or size_average is not None
            or reduce is not None
        ):
            old = {"size_average": size_average, "reduce": reduce}
            return F.cross_entropy(
                self.materialize("cross_entropy"),
                target,
                weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                **{name: value for name, value in old.items() if value is not None},
            )
        request = Request(
            target.to(self._hidden.device),
            self._columns,
            self._bias,
            self._scale,
            self._cap,
            self._call.balance if self._balance is None else self._balance.squeeze(-1),
            weight,
            ignore_index,
            reduction,
            label_smoothing,
        )
        return self._call.loss(self._head, self._hidden, request).to(target.device)

    # What is known of the logits without them.

    @property
    def _width(self) -> int:
        return self._columns.stop - self._columns.start

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._width))

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self._hidden.dim()

    ndim = property(dim)

    def numel(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    def is_floating_point(self) -> bool:
        return True

    def is_contiguous(self, **kwargs) -> bool:
        return True

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={list(self.shape)}, dtype={self.dtype})"

    # Everything else is done to the logits.

    def __getattr__(self, name: str):
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"'DeferredLogits' object has no attribute '{name}'")
        return getattr(self.materialize(name), name)

    __hash__ = object.__hash__
    __array_priority__ = 1000  # numpy's numbers leave a product with it to it, as with a tensor

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = _RULES.get(function)
        if rule is not None:
            if function in _COMMUTE and len(args) > 1 and not isinstance(args[0], DeferredLogits):
                args = (args[1], args[0], *args[2:])
            if args and isinstance(args[0], DeferredLogits):
                return rule(*args, **kwargs)
            if isinstance(kwargs.get("input"), DeferredLogits):
                return rule(kwargs.pop("input"), *args, **kwargs)
        name = getattr(function, "__name__", str(function))

        def made(value):
            return value.materialize(name) if isinstance(value, DeferredLogits) else value

        return function(*each(made, args), **{key: each(made, value) for key, value in kwargs.items()})


def _of_logits(name: str) -> Callable:
    """An operator, which Python looks for in the class alone."""

    def operator(self, *args):
        return getattr(self.materialize(name), name)(*args)

    return operator


for _name in (
    *("__setitem__", "__imul__", "__itruediv__", "__iadd__", "__isub__", "__ipow__"),
    *("__iter__", "__contains__"),
    *("__sub__", "__rsub__", "__rtruediv__", "__neg__", "__pow__", "__rpow__", "__matmul__", "__rmatmul__"),
    *("__floordiv__", "__mod__", "__abs__", "__bool__", "__float__", "__int__", "__array__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"),
):
    setattr(DeferredLogits, _name, _of_logits(_name))


def _number(value: object) -> float | None:
    """A factor that a record can hold, or None."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() > 1 or value.requires_grad or value.device.type != "cpu":
            return None
        if torch.compiler.is_compiling():  # its value is not known there
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _of_last(index: tuple, dims: int) -> object:
    """What an index says of the last dimension; None where it takes all of it."""
    taken = 0
    for item in index:
        if isinstance(item, Tensor) and item.dtype == torch.bool:
            taken += item.dim()
        elif item is not None and item is not Ellipsis and not isinstance(item, bool):
            taken += 1
    last = index[-1]
    reaches = taken == dims or (last is not Ellipsis and any(item is Ellipsis for item in index))
    if not reaches or last is None or (isinstance(last, slice) and last == slice(None)):
        return None
    return last


# The functions of torch that have a rule of the record's.
_RULES: dict[Callable, Callable] = {F.cross_entropy: DeferredLogits.cross_entropy}
_METHODS = (
    *("mul", "multiply", "div", "divide", "true_divide", "add", "tanh", "reshape", "flatten"),
    *("transpose", "unsqueeze", "squeeze"),
)
for _name in _METHODS:
    _RULES[getattr(torch, _name)] = _RULES[getattr(Tensor, _name)] = getattr(DeferredLogits, _name)
for _name in ("__mul__", "__rmul__", "__add__", "__radd__"):
    _RULES[getattr(Tensor, _name)] = getattr(DeferredLogits, _name)
_COMMUTE = {torch.mul, torch.multiply, torch.add, Tensor.mul, Tensor.multiply, Tensor.add} | {
    getattr(Tensor, name) for name in ("__mul__", "__rmul__", "__add__", "__radd__")
}
