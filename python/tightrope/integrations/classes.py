"""The classes that `fuse` gives to a model and to its head, made of those that they have.

A class of its own, rather than a method bound to an instance, survives copies and pickles, and leaves the
signature of forward, the name that goes into a saved configuration and ``isinstance`` as they were. A head
that is called answers before its hooks do: while its model defers there is nothing to gather for.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import full_weight
from ..distributed.joint import is_dtensor
from .lazy import Materialized


class Fused:
    """A module whose class `fuse` has changed; its ``_tightrope`` is the `Handle`.

    Without annotations: transformers evaluates those of every class of models.
    """

    def __reduce_ex__(self, protocol):
        # The class is made at run time: what a pickle can name is the class that it was made of.
        kind, base = _made_of(type(self))
        return _rebuild, (kind, base), self.__dict__


class FusedModel(Fused):
    def __call__(self, *args, **kwargs):
        return self._tightrope._run(super().__call__, self._labels_at, args, kwargs)

    def __setattr__(self, name, value):
        if name == "forward" and is_ligers(value):
            raise RuntimeError(LIGER)
        super().__setattr__(name, value)

    def _replicate_for_data_parallel(self):
        raise RuntimeError("fuse: got a model under DataParallel, expected DistributedDataParallel")

    def __deepcopy__(self, memo):
        handle = memo[id(self._tightrope)] = copy.copy(self._tightrope)
        handle._objective, handle.materialized = copy.copy(handle._objective), []
        deeper = getattr(super(), "__deepcopy__", None)
        if deeper is not None:
            handle.model = deeper(memo)
        else:
            handle.model = memo[id(self)] = type(self).__new__(type(self))
            handle.model.__setstate__(copy.deepcopy(self.__dict__, memo))
        return handle.model


class FusedLinear(Fused):
    """An ``nn.Linear`` whose call gives a record while its model defers, and a loss where it is asked one."""

    def __call__(self, input, request=None):
        call = self._tightrope._call
        if request is not None:
            return super().__call__(input, request=request)
        if call is not None and is_linear(self):
            return call.defer(self, input)
        return _made(self, super().__call__(input), call)

    def forward(self, input, request=None):
        weight, bias = self.weight, self.bias
        if request is not None:
            return self._tightrope._objective.of_head(input, weight, bias, request)
        if is_dtensor(weight) and not is_dtensor(input):
            # Logits that are read after the model's forward, when FSDP has sharded its weights again.
            weight = full_weight(weight).to(input.dtype)
            bias = None if bias is None else full_weight(bias).to(input.dtype)
        return F.linear(input, weight, bias)

    def logits(self, hidden: Tensor) -> Tensor:
        return super().__call__(hidden)


class OtherHead(Fused):
    """A head that is no ``nn.Linear``, or one with a forward of its own: quantised, say."""

    def __call__(self, *args, **kwargs):
        return _made(self, super().__call__(*args, **kwargs), self._tightrope._call)


def _made(head: nn.Module, logits: Any, call: Any) -> Any:
    """What a head gave that makes its logits itself, in the course of a call or outside."""
    if call is None or not isinstance(logits, Tensor):
        return logits
    weight = getattr(head, "weight", None)
    of = "" if weight is None or _is_plain(weight) else f" of {type(weight).__name__}"
    under = "" if all(map(_gathers, head._forward_hooks.values())) else " under a forward hook"
    call.materializes(f"its head, a {type(head).__name__}{of}{under}")
    return Materialized.of(logits, call)


def _is_plain(weight: Tensor) -> bool:
    """Weights of other kinds (quantised ones) are multiplied in ways of their own."""
    return type(weight) in (Tensor, nn.Parameter) or is_dtensor(weight)


def is_linear(head: nn.Module) -> bool:
    """Whether a head does no more than multiply with its weight and add its bias, also as it is now."""
    if not isinstance(head, nn.Linear) or not _is_plain(head.weight):
        return False
    if not all(map(_gathers, head._forward_hooks.values())):
        return False
    # accelerate's hooks call what they found, which is kept under this name.
    own = head.__dict__.get("_old_forward", head.__dict__.get("forward"))
    forwards = (nn.Linear.forward, FusedLinear.forward)
    return type(head).forward in forwards and (own is None or getattr(own, "__func__", None) in forwards)


def _gathers(hook: object) -> bool:
    """Whether a forward hook is there for the weights; any other may be there for the logits."""
    hook = getattr(hook, "func", hook)  # of a partial
    return (getattr(hook, "__module__", None) or "").startswith(("torch.distributed.fsdp", "deepspeed"))


KINDS = (FusedModel, FusedLinear, OtherHead)


@functools.cache
def fused(kind: type, base: type) -> type:
    """The subclass of ``base`` with what ``kind`` changes, under the same name."""
    body: dict[str, Any] = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    if kind is FusedModel:

        @functools.wraps(base.forward)
        def forward(self, *args, **kwargs):
            if not isinstance(self, Fused):  # restored, when somebody had this method already
                return base.forward(self, *args, **kwargs)
            # A compiler cannot ask a function of torch for its module.
            patched = not torch.compiler.is_compiling() and any(
                map(is_ligers, (base.forward, F.cross_entropy))
            )
            if patched:
                raise RuntimeError(LIGER)
            return self._tightrope._run(functools.partial(base.forward, self), self._labels_at, args, kwargs)

        body["forward"] = forward
        body["_labels_at"] = list(inspect.signature(base.forward).parameters).index("labels") - 1
    return type(base.__name__, (kind, base), body)


def _made_of(fused: type) -> tuple[type, type]:
    return fused.__bases__[0], fused.__bases__[1]


def _rebuild(kind: type, base: type) -> nn.Module:
    made = fused(kind, base)
    return made.__new__(made)


def become(module: nn.Module, made: type) -> None:
    # Where accelerate has, or had, a hook in place of a forward, the class's own is kept on the instance.
    before = type(module).forward
    module.__class__ = made
    for name in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is before:
            module.__dict__[name] = types.MethodType(made.forward, module)


LIGER = (
    "fuse: got Liger's forward, or its cross-entropy, in a model, expected those of transformers and torch: "
    "train with use_liger_kernel=False (or have fused_linear_cross_entropy and cross_entropy False in "
    "liger_kernel_config)"
)


def is_ligers(function: object) -> bool:
    return getattr(function, "__module__", None) is not None and function.__module__.startswith(
        "liger_kernel"
    )
