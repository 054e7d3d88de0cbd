"""The vocabulary head of a model as a module that also is its loss.

A head that is called as a module is gathered before its forward and reduced after its backward by whatever
wraps it: FSDP, DDP, tensor parallel. A function that is handed ``head.weight`` goes past all of them. So the
loss is the head's own forward, with a target; in everything else this is an nn.Linear.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import validation
from .functional import linear_reality_creativity_loss, linear_vocab_loss
from .modules import check_options, shown
from .statistics import RowStats
from .targets import TeacherTarget, TopKTarget

_POSITIONAL = ("input", "weight", "target", "loss_fn", "bias")


def _options_of(function) -> dict[str, Any]:
    """The defaults of a loss's options."""
    parameters = inspect.signature(function).parameters
    return {name: p.default for name, p in parameters.items() if name not in _POSITIONAL}


_BUILT_IN = _options_of(linear_reality_creativity_loss)
_OWN = _options_of(linear_vocab_loss)


def known_options(loss_fn: object) -> dict[str, Any]:
    """The options of the loss that there is with and without a ``loss_fn``, and their defaults."""
    return _BUILT_IN if loss_fn is None else _OWN


class LMHead(nn.Linear):
    """An ``nn.Linear`` whose forward with a target is the loss: ``head(h)`` logits, ``head(h, target)`` loss.

    The loss is :func:`tightrope.linear_reality_creativity_loss` or, with the option ``loss_fn``,
    :func:`tightrope.linear_vocab_loss`. Parameters and state dict are those of an ``nn.Linear``. Outside its
    forward a sharded weight is a ValueError in every loss.

    - ``fully_shard``: as a unit of its own or as part of the root, with one all-gather and one
      reduce-scatter a step. Gradients are the mean over ranks, as in DDP: the mean over all tokens is
      ``normalizer=tightrope.distributed.token_count(targets, group) / world_size``. Its mixed precision
      casts all floating tensors among a call's arguments, a normalizer too: pass ``.item()`` of that, or give
      the policy ``cast_forward_inputs=False``.
    - ``parallelize_module``: ``ColwiseParallel(output_layouts=Replicate())``, as a loss is one number, which
      its default, ``Shard(-1)``, cannot cut: that is for calls without a target. It takes one tensor, so no
      ``return_stats``. Targets are the same on all ranks.

    Args:
        in_features: D, the size of the hidden states.
        out_features: V, the size of the vocabulary.
        bias: whether there is one.
        device, dtype: of the parameters.
        loss_options: keyword options of the loss, but for ``return_stats``. Tensors among them are buffers
            that no state dict has, so ``to_empty()`` leaves them without values.

    Raises:
        TypeError, ValueError: an option is unknown, or not as the loss expects; or is a tensor that requires
            grad, which would be a parameter that an ``nn.Linear`` does not have: pass such a one to a call.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **loss_options: Any,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        known = known_options(loss_options.get("loss_fn"))
        if "return_stats" in loss_options:  # a type checker knows what a call gives by the call alone
            raise TypeError("return_stats: got it as an option of LMHead, expected it at each call")
        for name in loss_options:
            if name not in known and name != "loss_fn":
                raise TypeError(f"LMHead: got an unknown option {name}, expected one of {', '.join(known)}")
        check_options({**_BUILT_IN, **loss_options})
        if known is _OWN:
            validation.loss_function(loss_options["loss_fn"], (), torch.Size(), torch.device("cpu"))
        self._constants: dict[str, Any] = {}
        self._tensors: list[str] = []  # among the buffers
        for name, value in loss_options.items():
            if not isinstance(value, Tensor):
                self._constants[name] = value
            elif value.requires_grad:
                raise ValueError(
                    f"{name}: got a tensor that requires grad, expected one that does not: the head has the "
                    "parameters of an nn.Linear; pass it at each call"
                )
            else:
                self._tensors.append(name)
                self.register_buffer(name, value, persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **loss_options: Any) -> LMHead:
        """A head with the very same parameters, so that what they are tied to stays tied."""
        if not isinstance(linear, nn.Linear) or type(linear).forward not in (nn.Linear.forward, cls.forward):
            raise TypeError(
                f"linear: got {type(linear).__name__}, expected nn.Linear, or a subclass with its forward"
            )
        size, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        head = cls(*size, has_bias, device="meta", dtype=linear.weight.dtype, **loss_options)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(
        self, input: Tensor, target: Tensor | TopKTarget | TeacherTarget | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, RowStats]:
        """Logits ``(..., V)`` of hidden states ``(..., D)``; with a target the loss.

        options: as of the loss; they stand in the place of those of the head.
        """
        if target is None:
            if options:
                raise TypeError(
                    f"target: got None with {', '.join(options)}, expected a target, or no options"
                )
            return super().forward(input)
        options = {**self._loss_options(), **options}
        loss_fn = options.pop("loss_fn", None)
        if loss_fn is None:
            return linear_reality_creativity_loss(input, self.weight, target, self.bias, **options)
        return linear_vocab_loss(input, self.weight, target, loss_fn, self.bias, **options)

    @overload
    def __call__(
        self,
        input: Tensor,
        target: Tensor | TopKTarget | TeacherTarget,
        *,
        return_stats: Literal[True],
        **options: Any,
    ) -> tuple[Tensor, RowStats]: ...
    @overload
    def __call__(
        self, input: Tensor, target: Tensor | TopKTarget | TeacherTarget | None = None, **options: Any
    ) -> Tensor: ...
    def __call__(
        self, input: Tensor, target: Tensor | TopKTarget | TeacherTarget | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, RowStats]:
        # By name: of positional arguments the hook of ColwiseParallel hands on the first, and drops others.
        if target is not None:
            options["target"] = target
        return super().__call__(input, **options)

    def extra_repr(self) -> str:
        given = self._loss_options().items()
        return ", ".join([super().extra_repr(), *(f"{name}={shown(value)}" for name, value in given)])

    def _loss_options(self) -> dict[str, Any]:
        return {**self._constants, **{name: getattr(self, name) for name in self._tensors}}
