"""The losses as modules: the functions of `functional`, with the options fixed at construction."""

from __future__ import annotations

from torch import Tensor, nn

from . import validation
from .functional import linear_reality_creativity_loss, reality_creativity_loss
from .statistics import RowStats
from .targets import TopKTarget


class _Loss(nn.Module):
    """Holds options; checks those that need no tensors; shows in its repr those that were given."""

    def __init__(self, options: dict[str, object], defaults: dict[str, object]):
        super().__init__()
        for name in options:
            if name not in defaults:
                raise TypeError(
                    f"{type(self).__name__}: got option {name!r}, expected one of {', '.join(defaults)}"
                )
        self.options = options
        given = {**defaults, **options}
        validation.loss_terms(
            *(given[k] for k in ("reality", "creativity", "label_smoothing", "z_loss", "logit_l2"))
        )
        validation.transform(given["logit_scale"], given["softcap"])
        if not isinstance(given["balance"], Tensor):
            validation.number("balance", given["balance"], low=0.0, high=1.0)
        if given["normalizer"] is not None:
            validation.normalizer(given["normalizer"])
        validation.choice("reduction", given["reduction"], validation.REDUCTIONS)
        validation.integer("ignore_index", given["ignore_index"])
        validation.integer("shift", given["shift"], low=0)
        validation.run_options(
            *(given.get(k) for k in ("backend", "workspace_mb", "strategy", "skip_ignored"))
        )
        validation.flag("return_stats", given["return_stats"], (True, False))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


# What a call may give or replace: tensors of the batch at hand.
_PER_CALL = ("balance", "row_weight", "normalizer")


class LinearRealityCreativityLoss(_Loss):
    """:func:`tightrope.linear_reality_creativity_loss` as a module without parameters.

    Args:
        options: the function's keyword options. ``balance``, ``row_weight`` and ``normalizer`` may also be
            given, or replaced, at each call.

    Raises:
        TypeError, ValueError: an option is unknown, or not as the function expects.
    """

    def __init__(self, **options):
        super().__init__(options, linear_reality_creativity_loss.__kwdefaults__)

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor | TopKTarget,
        bias: Tensor | None = None,
        **per_call,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """Shapes as in the function; ``per_call`` are balance, row_weight, normalizer."""
        return linear_reality_creativity_loss(input, weight, target, bias, **_merged(self, per_call))


class RealityCreativityLoss(_Loss):
    """:func:`tightrope.reality_creativity_loss` as a module without parameters.

    Args and Raises: as :class:`LinearRealityCreativityLoss`, with that function's options.
    """

    def __init__(self, **options):
        super().__init__(options, reality_creativity_loss.__kwdefaults__)

    def forward(
        self, logits: Tensor, target: Tensor | TopKTarget, **per_call
    ) -> Tensor | tuple[Tensor, RowStats]:
        """Shapes as in the function; ``per_call`` are balance, row_weight, normalizer."""
        return reality_creativity_loss(logits, target, **_merged(self, per_call))


def _merged(module: _Loss, per_call: dict[str, object]) -> dict[str, object]:
    for name in per_call:
        if name not in _PER_CALL:
            raise TypeError(f"forward: got option {name!r}, expected one of {', '.join(_PER_CALL)}")
    return {**module.options, **per_call}
