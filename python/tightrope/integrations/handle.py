"""What a fused model holds: its objective, its statistics, and the one call that is under way."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation
from ..modules import shown
from ..statistics import RowStats
from .classes import KINDS, Fused, FusedModel, become
from .deferred import DeferredLogits
from .lazy import LazyLogits, Materialized, unwrapped
from .objective import Objective, Request


class Handle:
    """What `fuse` returns: the balance, the statistics and the way back of a fused model.

    A copy of the model has a handle of its own, ``Handle.of(copy)``.
    """

    def __init__(self, model: nn.Module, objective: Objective):
        self.model = model
        #: Statistics of the last loss, detached, in the shape of the tokens that the model's cross-entropy
        #: was given (mostly ``[B * S]``); zeros, and argmax -1, for ignored tokens. None before the first.
        self.stats: RowStats | None = None
        #: The labels of that loss, in the same shape, as the model shifted them.
        self.target: Tensor | None = None
        #: What made the logits of a training step, in all calls so far: names of operations.
        self.materialized: list[str] = []
        self._objective = objective
        self._call: _Call | None = None
        self._suspended = False
        self._observers: list[Callable[[RowStats, Tensor], object]] = []

    @staticmethod
    def of(model: nn.Module) -> Handle:
        """The handle of a fused model, or of a model that has one inside.

        Raises:
            ValueError: it is not fused.
        """
        handle = Handle.find(model)
        if handle is None:
            raise ValueError(f"model: got {type(model).__name__}, expected a fused one")
        return handle

    @staticmethod
    def find(model: nn.Module) -> Handle | None:
        """As ``of``; None where the model is not fused."""
        return next((m._tightrope for m in model.modules() if isinstance(m, FusedModel)), None)

    @property
    def balance(self) -> Tensor:
        """In [0, 1]; 0-dimensional, or one for each token of a batch. A number may be assigned."""
        return self._objective.balance

    @balance.setter
    def balance(self, value: float | Tensor) -> None:
        self._objective.balance = value

    def subscribe(self, observer: Callable[[RowStats, Tensor], object]) -> None:
        """Have ``observer(stats, target)`` called after each loss. Copies and pickles have no observers."""
        self._observers.append(observer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_observers": []}

    def restore(self) -> None:
        """Make the model what it was before `fuse`.

        Raises:
            RuntimeError: the class of the model or of its head has been changed since, as fully_shard does.
        """
        fused = [module for module in self.model.modules() if isinstance(module, Fused)]
        for module in fused:
            if type(module).__bases__[0] not in KINDS:
                raise RuntimeError(
                    f"restore: got a {type(module).__name__} whose class was changed after fuse, expected it "
                    "as fuse left it"
                )
        for module in fused:
            become(module, type(module).__bases__[1])
            del module._tightrope

    @contextlib.contextmanager
    def suspended(self, objective: Objective | None = None) -> Iterator[None]:
        """For a while, the model as it was; or with another objective."""
        before = self._objective
        self._suspended, self._objective = objective is None, objective or before
        try:
            yield
        finally:
            self._suspended, self._objective = False, before

    def __repr__(self) -> str:
        return f"Handle({type(self.model).__name__}, balance={shown(self.balance)})"

    def __deepcopy__(self, memo: dict) -> Handle:
        return self  # PEFT copies a head alone; that of a copied model is made by the model

    def _run(self, function: Callable, labels_at: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A forward of the model; with labels, one whose head defers its logits."""
        if self._call is not None or self._suspended:
            return function(*args, **kwargs)
        balance = kwargs.pop("balance", None)
        by_position = args[labels_at] if len(args) > labels_at else None
        if kwargs.get("labels", by_position) is None and kwargs.get("shift_labels") is None:
            if balance is not None:
                raise ValueError("balance: got one without labels, expected labels too")
            if self.model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                _refuse_lost_labels()
            return function(*args, **kwargs)
        if kwargs.get("num_items_in_batch") is not None:
            kwargs["num_items_in_batch"] = _never_zero(kwargs["num_items_in_batch"])
        self._call = call = _Call(self, self._objective.for_one_call(balance))
        try:
            output = function(*args, **kwargs)
        finally:
            self._call = None
            call.records.clear()
        call.close()
        return _outside(output)


class _Call:
    """One forward of a fused model: it computes its losses, and is told what makes its logits."""

    def __init__(self, handle: Handle, balance: Tensor):
        self.balance = balance
        self.open = True
        #: What came of its heads' records, in order. Emptied when it ends, as they know it too.
        self.records: list[DeferredLogits] = []
        self._handle, self._has_loss = handle, False

    def defer(self, head: nn.Linear, hidden: Tensor) -> DeferredLogits:
        """The record of ``head(hidden)``."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        balance = None
        if self.balance.dim():
            tokens = hidden.shape[:-1]
            balance = validation.balance(self.balance.to(hidden.device), tokens, hidden.device)
            balance = balance.expand(tokens).unsqueeze(-1)
        return DeferredLogits(self, head, hidden, head.out_features, dtype, balance)

    def loss(self, head: nn.Linear, hidden: Tensor, request: Request) -> Tensor:
        result = head(hidden, request=request)
        if not (isinstance(result, tuple) and isinstance(result[-1], RowStats)):
            raise RuntimeError(
                f"fuse: got {type(result).__name__} from the head, expected a loss and its statistics: a "
                "forward hook on the head changes what it gives, and would change logits that are not made"
            )
        return self._keep(result, request.target)

    def loss_of_logits(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **others: Any,
    ) -> Tensor:
        """As ``F.cross_entropy``: logits ``(N, V)``, or ``(N, V, ...)`` with classes second."""
        known = all(value is None for value in others.values())
        known = known and target.dim() == input.dim() - 1 > 0 and not target.is_floating_point()
        if not known:
            return F.cross_entropy(
                input,
                target,
                weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                **others,
            )
        if self.balance.dim() and not input.in_order:
            raise ValueError(
                "balance: got one for each token, expected a number: this model makes its logits, and it "
                "cannot be told which of them is which token's"
            )
        request = Request(
            target,
            slice(0, input.shape[1]),
            None,
            1.0,
            None,
            self.balance,
            weight,
            ignore_index,
            reduction,
            label_smoothing,
        )
        return self._keep(self._handle._objective.of_logits(input.movedim(1, -1), request), target)

    def _keep(self, result: tuple[Tensor, RowStats], target: Tensor) -> Tensor:
        loss, self._handle.stats = result
        self._handle.target = target
        self._has_loss = True
        for observer in self._handle._observers:
            observer(self._handle.stats, target)
        return loss

    def materializes(self, reason: str | None) -> None:
        """Logits are made because of the operation ``reason``; None: because someone reads them."""
        seen = self._handle.materialized
        if reason is None or not self.open or reason in seen:
            return
        seen.append(reason)
        _warn(
            f"tightrope: {type(self._handle.model).__name__} makes its N x V logits, because of {reason}: "
            "the loss is right, but not fused"
        )

    def close(self) -> None:
        """The forward has ended. A loss that is not ours is an error, but where it is the same."""
        self.open = False
        if self._has_loss:
            return
        model = self._handle.model
        problem = (
            f"fuse: got a forward of {type(model).__name__} that calls no cross-entropy of what its head "
            f"{type(model.get_output_embeddings()).__name__} gave, expected one"
        )
        if not self._handle._objective.plain:
            raise RuntimeError(f"{problem}: its loss is its own, without the balance or the options of fuse")
        if "loss" not in self._handle.materialized:
            self._handle.materialized.append("loss")
            _warn(f"{problem}: its loss is its own, and not fused")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


# A compiler warns when it traces, where a warning would break its graph. This is what
# torch.compiler.assume_constant_result does, without loading the compiler, which takes half a second.
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _never_zero(count: float | Tensor) -> float | Tensor:
    """1 in place of 0, by which the model would divide a loss of 0."""
    if isinstance(count, Tensor):
        return torch.where(count == 0, 1, count)
    return count or 1


def _refuse_lost_labels() -> None:
    """An error where transformers' Trainer called, and has kept the labels for a loss of its own."""
    trainer = sys.modules.get("transformers.trainer")
    frame = sys._getframe(1) if trainer is not None else None
    while frame is not None:
        if frame.f_code is trainer.Trainer.compute_loss.__code__ and frame.f_locals.get("labels") is not None:
            raise RuntimeError(
                "fuse: got a forward without labels, expected them: Trainer takes them away where it has "
                "label_smoothing_factor or compute_loss_func. Give fuse label_smoothing= or loss_fn= instead"
            )
        frame = frame.f_back


def _outside(output: Any) -> Any:
    """A model's output with tensors in place of records."""
    if isinstance(output, DeferredLogits):
        if torch.compiler.is_compiling():
            return output if torch.is_grad_enabled() else output.materialize()
        return LazyLogits(output)
    if isinstance(output, Materialized):
        return unwrapped(output)
    if isinstance(output, dict):
        for name, value in output.items():
            if isinstance(value, (DeferredLogits, Materialized, dict, tuple)):
                output[name] = _outside(value)
    elif type(output) in (tuple, list):
        return type(output)(_outside(value) for value in output)
    return output
