"""The loss that a fused model trains on, of its head and of logits that a model has made itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import validation
from ..functional import linear_reality_creativity_loss, linear_vocab_loss
from ..head import known_options
from ..logits import reality_creativity_loss, vocab_loss
from ..modules import check_options
from ..statistics import RowStats

# What the model's own code says, by what it does to its logits and by how it calls its cross-entropy.
_MODELS_OWN = (
    *("balance", "logit_scale", "softcap", "reduction", "normalizer", "ignore_index", "shift"),
    *("row_weight", "row_args", "return_stats"),
)
# Of the head's product, which logits that exist do not have.
_OF_PRODUCTS = ("workspace_mb", "strategy", "skip_ignored", "gradient_noise")


_BESIDE_LOSS_FN = "balance: got one beside loss_fn, expected none: a loss of your own has its own balance"


class Request:
    """A loss that is asked of a head: beside the hidden states, all that it needs.

    Neither a tuple nor a dataclass: FSDP casts what it finds in those to the dtype of its products.

    Args:
        columns: of the vocabulary.
        bias: added to the head's own.
        scale, cap: the logits are ``scale u``, or ``cap tanh(scale u)``.
        balance: of all tokens, or one for each.
        target, weight, ignore_index, reduction, label_smoothing: of ``F.cross_entropy``.
    """

    def __init__(
        self,
        target: Tensor,
        columns: slice,
        bias: Tensor | None,
        scale: float,
        cap: float | None,
        balance: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ):
        self.target, self.columns, self.bias = target, columns, bias
        self.scale, self.cap, self.balance, self.weight = scale, cap, balance, weight
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing = label_smoothing

    def on(self, device: torch.device) -> Request:
        """With its tensors on the device to which a hook may have moved the hidden states."""

        def here(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        # Each by itself: torch.compile of torch 2.11 makes nothing of vars().
        return Request(
            target=here(self.target),
            columns=self.columns,
            bias=here(self.bias),
            scale=self.scale,
            cap=self.cap,
            balance=here(self.balance),
            weight=here(self.weight),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class Objective:
    """A balance, or a loss of one's own, and the options of the loss.

    Args:
        balance: as `tightrope.linear_reality_creativity_loss`'s: a number, or a tensor for each token.
        loss_fn: as `tightrope.linear_vocab_loss`'s, or None.
        options: of the one or the other.
    """

    def __init__(self, balance: float | Tensor, loss_fn: Callable | None, options: dict[str, Any]):
        known = known_options(loss_fn)
        for name in options:
            if name in _MODELS_OWN:
                raise TypeError(
                    f"fuse: got {name}, which the model's own forward says, expected it not given"
                )
            if name not in known:
                usable = ", ".join(sorted(set(known) - set(_MODELS_OWN)))
                raise TypeError(f"fuse: got an unknown option {name}, expected one of {usable}")
        check_options({**known_options(None), **options})
        if loss_fn is not None:
            validation.loss_function(loss_fn, (), torch.Size(), torch.device("cpu"))
        self.loss_fn, self.options = loss_fn, options
        self.balance = balance

    @property
    def balance(self) -> Tensor:
        return self._balance

    @balance.setter
    def balance(self, value: float | Tensor) -> None:
        value = as_tensor(value)
        value = validation.balance(value, value.shape, value.device)
        if self.loss_fn is not None and (value.numel() != 1 or value.item()):
            raise ValueError(_BESIDE_LOSS_FN)
        self._balance = value

    def for_one_call(self, balance: float | Tensor | None) -> Tensor:
        """The balance of a call that was given one, or None."""
        if balance is None:
            return self._balance
        if self.loss_fn is not None:
            raise ValueError(_BESIDE_LOSS_FN)
        return as_tensor(balance)

    @property
    def plain(self) -> bool:
        """Whether it is nothing but cross-entropy, as the model's own loss is."""
        options = known_options(None)
        changes = [
            name
            for name, value in self.options.items()
            if isinstance(value, Tensor) or value != options[name]
        ]
        terms = set(changes) - {*_OF_PRODUCTS, "backend", "support", "creativity", "vocab_parallel"}
        return self.loss_fn is None and not terms and not bool(self._balance.any())

    def of_head(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, request: Request
    ) -> tuple[Tensor, RowStats]:
        """Of hidden states ``[N, D]`` and a head ``[V, D]``."""
        request = request.on(hidden.device)
        kind = hidden.device.type
        if kind != "cpu" and torch.is_autocast_enabled(kind):
            # As the model's own product would. A CPU multiplies float32 as fast, so there it stays exact.
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        weight = weight if _is_all(request.columns, weight) else weight[request.columns]
        if bias is not None and bias.shape[0] != weight.shape[0]:
            bias = bias[request.columns]
        if request.bias is not None:
            bias = request.bias if bias is None else bias + request.bias.to(bias.dtype)
        scale, cap = request.scale, request.cap
        transform = {"logit_scale": scale if cap is None else scale * cap, "softcap": cap}
        options = {**self._asked(request), **transform}
        if self.loss_fn is not None:
            return linear_vocab_loss(hidden, weight, request.target, self.loss_fn, bias, **options)
        options["balance"] = _balance_of(request)
        return linear_reality_creativity_loss(hidden, weight, request.target, bias, **options)

    def of_logits(self, logits: Tensor, request: Request) -> tuple[Tensor, RowStats]:
        """Of logits ``[N, V]``."""
        request = request.on(logits.device)
        options = {name: value for name, value in self._asked(request).items() if name not in _OF_PRODUCTS}
        if self.loss_fn is not None:
            return vocab_loss(logits, request.target, self.loss_fn, **options)
        options["balance"] = _balance_of(request)
        return reality_creativity_loss(logits, request.target, **options)

    def _asked(self, request: Request) -> dict[str, Any]:
        """The options, with what the model's call of its cross-entropy asks for."""
        options = {
            **self.options,
            "ignore_index": request.ignore_index,
            "reduction": request.reduction,
            "return_stats": True,
        }
        if request.label_smoothing:
            options["label_smoothing"] = request.label_smoothing
        if request.weight is not None:
            options["class_weight"] = request.weight
        return options


def as_tensor(balance: float | Tensor) -> Tensor:
    """A number as a tensor, so that a compiled graph is good for every value of it."""
    if isinstance(balance, Tensor):
        return balance
    if not torch.compiler.is_compiling():
        validation.number("balance", balance, low=0.0, high=1.0)
    return torch.full((), balance, dtype=torch.float64)


def _is_all(columns: slice, weight: Tensor) -> bool:
    return columns.start == 0 and columns.stop == weight.shape[0]


def _balance_of(request: Request) -> Tensor:
    """In the shape of the target: the model may have flattened its tokens."""
    balance = request.balance
    if balance.dim() == 0:
        return balance
    if balance.numel() != request.target.numel():
        raise ValueError(
            f"balance: got shape {list(balance.shape)}, expected one for each of the "
            f"{request.target.numel()} tokens that the model's loss counts"
        )
    return balance.reshape(request.target.shape)
