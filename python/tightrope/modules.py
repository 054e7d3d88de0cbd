"""The losses as modules: the functions of `functional` and `logits`, with the options fixed at construction.

Options that are tensors belong to the module: a Parameter (a balance that is learned) is one of its
parameters, another tensor (class weights) a buffer, so that ``.to()``, optimizers and state dicts find them.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from . import validation
from .distributed.layout import VocabParallel, check_vocab_parallel
from .functional import linear_reality_creativity_loss
from .logits import reality_creativity_loss
from .statistics import RowStats
from .support import Classes, MinP
from .targets import TeacherTarget, TopKTarget

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import (
        BackendName,
        Creativity,
        Integer,
        LinearLossOptions,
        LogitsLossOptions,
        Number,
        Reality,
        Reduction,
        Strategy,
    )

# What a call gives: a Tensor, or with return_stats the pair. For type checkers.
Result = TypeVar("Result")
_Pair = tuple[Tensor, RowStats]


class _Loss(nn.Module, Generic[Result]):
    """Holds options; checks those that need no tensors; shows in its repr those that were given."""

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        given = inspect.signature(type(self).__init__).parameters
        self._shown = [name for name, value in options.items() if value is not given[name].default]
        self._options = {}
        for name, value in options.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                self._options[name] = value
        check_options(options)

    def _merged(self, **per_call: object) -> dict[str, Any]:
        """The function's options: those of the module, and what a call gives in their place."""
        tensors = {**self._parameters, **self._buffers}
        return {**self._options, **tensors, **{k: v for k, v in per_call.items() if v is not None}}

    def extra_repr(self) -> str:
        held = self._merged()
        return ", ".join(f"{name}={shown(held[name])}" for name in self._shown)


def check_options(options: dict[str, Any]) -> None:
    """Raise where an option of a loss that needs no tensors is not as the function expects it."""
    terms = ("reality", "creativity", "label_smoothing", "z_loss", "logit_l2")
    family = validation.loss_terms(1, *(options[name] for name in terms))
    if isinstance(options["class_weight"], Tensor):
        weight = options["class_weight"]
        validation.class_weight(weight, weight.numel(), weight.device, family.reality)
    temperature = options["temperature"]
    number = 1.0 if isinstance(temperature, Tensor) else temperature
    validation.transform(options["logit_scale"], options["softcap"], torch.float32, number)
    if not isinstance(options["support"], Classes):
        validation.support(options["support"], torch.Size(), torch.device("cpu"), "input")
    if not isinstance(options["balance"], Tensor):
        validation.number("balance", options["balance"], low=0.0, high=1.0)
    validation.normalizer(options["normalizer"])
    validation.choice("reduction", options["reduction"], validation.REDUCTIONS)
    validation.integer("ignore_index", options["ignore_index"])
    validation.integer("shift", options["shift"], low=0)
    run = ("workspace_mb", "strategy", "skip_ignored")
    validation.run_options(options["backend"], *(options.get(name) for name in run))
    validation.gradient_noise(options.get("gradient_noise", 0.0))
    validation.flag("return_stats", options["return_stats"], (True, False))
    check_vocab_parallel(options.get("vocab_parallel"))


def shown(value: object) -> str:
    """A number as one, a larger tensor by its shape."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.item():g}" if value.numel() == 1 else f"{type(value).__name__}{list(value.shape)}"


class LinearRealityCreativityLoss(_Loss[Result]):
    """:func:`tightrope.linear_reality_creativity_loss` as a module.

    Args:
        options: the function's keyword options. ``balance``, ``row_weight``, ``normalizer``, ``temperature``
            and ``support`` may also be given, or replaced, at each call. A Parameter becomes the module's,
            another tensor its buffer.

    Raises:
        TypeError, ValueError: an option is unknown, or not as the function expects.
    """

    @overload
    def __init__(
        self: LinearRealityCreativityLoss[Tensor],
        *,
        return_stats: Literal[False] = False,
        **options: Unpack[LinearLossOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: LinearRealityCreativityLoss[_Pair],
        *,
        return_stats: Literal[True],
        **options: Unpack[LinearLossOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: LinearRealityCreativityLoss[Tensor | _Pair],
        *,
        return_stats: bool,
        **options: Unpack[LinearLossOptions],
    ) -> None: ...
    def __init__(
        self,
        *,
        balance: Number | Tensor = 0.0,
        reality: Reality = "cross_entropy",
        creativity: Creativity = "entropy",
        ignore_index: Integer = -100,
        label_smoothing: Number = 0.0,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        logit_scale: Number = 1.0,
        softcap: Number | None = None,
        temperature: Number | Tensor = 1.0,
        support: MinP | Classes | None = None,
        z_loss: Number = 0.0,
        logit_l2: Number = 0.0,
        reduction: Reduction = "mean",
        normalizer: Number | Tensor | None = None,
        shift: Integer = 0,
        skip_ignored: bool | None = None,
        return_stats: bool = False,
        workspace_mb: Number | None = None,
        backend: BackendName | None = None,
        strategy: Strategy | None = None,
        gradient_noise: Number | tuple[Number, Number] = 0.0,
        vocab_parallel: VocabParallel | None = None,
    ):
        super().__init__({k: v for k, v in locals().items() if k not in ("self", "__class__")})

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor | TopKTarget | TeacherTarget,
        bias: Tensor | None = None,
        *,
        balance: Number | Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: Number | Tensor | None = None,
        temperature: Number | Tensor | None = None,
        support: MinP | Classes | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """Shapes as in the function; what is given here stands in the place of the module's own."""
        options = self._merged(
            balance=balance,
            row_weight=row_weight,
            normalizer=normalizer,
            temperature=temperature,
            support=support,
        )
        return linear_reality_creativity_loss(input, weight, target, bias, **options)

    if TYPE_CHECKING:  # nn.Module's own says nothing of arguments and result

        def __call__(
            self,
            input: Tensor,
            weight: Tensor,
            target: Tensor | TopKTarget | TeacherTarget,
            bias: Tensor | None = None,
            *,
            balance: Number | Tensor | None = None,
            row_weight: Tensor | None = None,
            normalizer: Number | Tensor | None = None,
            temperature: Number | Tensor | None = None,
            support: MinP | Classes | None = None,
        ) -> Result: ...


class RealityCreativityLoss(_Loss[Result]):
    """:func:`tightrope.reality_creativity_loss` as a module.

    Args and Raises: as :class:`LinearRealityCreativityLoss`, with that function's options.
    """

    @overload
    def __init__(
        self: RealityCreativityLoss[Tensor],
        *,
        return_stats: Literal[False] = False,
        **options: Unpack[LogitsLossOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: RealityCreativityLoss[_Pair],
        *,
        return_stats: Literal[True],
        **options: Unpack[LogitsLossOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: RealityCreativityLoss[Tensor | _Pair],
        *,
        return_stats: bool,
        **options: Unpack[LogitsLossOptions],
    ) -> None: ...
    def __init__(
        self,
        *,
        balance: Number | Tensor = 0.0,
        reality: Reality = "cross_entropy",
        creativity: Creativity = "entropy",
        ignore_index: Integer = -100,
        label_smoothing: Number = 0.0,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        logit_scale: Number = 1.0,
        softcap: Number | None = None,
        temperature: Number | Tensor = 1.0,
        support: MinP | Classes | None = None,
        z_loss: Number = 0.0,
        logit_l2: Number = 0.0,
        reduction: Reduction = "mean",
        normalizer: Number | Tensor | None = None,
        shift: Integer = 0,
        return_stats: bool = False,
        backend: BackendName | None = None,
        vocab_parallel: VocabParallel | None = None,
    ):
        super().__init__({k: v for k, v in locals().items() if k not in ("self", "__class__")})

    def forward(
        self,
        logits: Tensor,
        target: Tensor | TopKTarget | TeacherTarget,
        *,
        balance: Number | Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: Number | Tensor | None = None,
        temperature: Number | Tensor | None = None,
        support: MinP | Classes | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """Shapes as in the function; what is given here stands in the place of the module's own."""
        options = self._merged(
            balance=balance,
            row_weight=row_weight,
            normalizer=normalizer,
            temperature=temperature,
            support=support,
        )
        return reality_creativity_loss(logits, target, **options)

    if TYPE_CHECKING:  # nn.Module's own says nothing of arguments and result

        def __call__(
            self,
            logits: Tensor,
            target: Tensor | TopKTarget | TeacherTarget,
            *,
            balance: Number | Tensor | None = None,
            row_weight: Tensor | None = None,
            normalizer: Number | Tensor | None = None,
            temperature: Number | Tensor | None = None,
            support: MinP | Classes | None = None,
        ) -> Result: ...
