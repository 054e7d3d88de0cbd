"""A fused model beside the same one unfused, on one batch: for whoever would rather see than believe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .fuse import fuse
from .handle import Handle
from .objective import Objective

# A gradient that is smaller than this part of the model's largest is measured against that: a bias of keys,
# whose gradient is nothing but rounding, has no digit to compare.
FLOOR = 1e-3


class Differences(NamedTuple):
    """Between a fused model and the same one unfused, each relative to the largest entry of the latter.

    Where that is less than 1e-3 of the model's largest gradient, it is relative to this.
    """

    loss: float
    gradients: dict[str, float]  #: by the names of the parameters that have one
    materialized: list[str]  #: what made the logits; empty where the loss was fused

    @property
    def largest(self) -> float:
        return max(self.loss, *self.gradients.values())


def verify(model: nn.Module, batch: Mapping[str, Any]) -> Differences:
    """Compare the loss and the gradients of cross-entropy, fused and not.

    Both runs start from the same state of the random generators, in the mode, training or not, that the model
    is in. A model that is not fused is fused for the length of the call. Gradients that it holds stay.

    Args:
        model: what :func:`fuse` takes, fused or not.
        batch: keyword arguments of its forward, with labels.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fuse` and the model's calls.
    """
    fused = Handle.find(model)
    handle = fuse(model) if fused is None else fused
    seen, handle.materialized = handle.materialized, []
    try:
        with handle.suspended():
            expected = _loss_and_gradients(model, batch, keep_generators=True)
        with handle.suspended(Objective(0.0, None, {})):
            got = _loss_and_gradients(model, batch, keep_generators=False)
        materialized = handle.materialized
    finally:
        handle.materialized = seen
        if fused is None:
            handle.restore()
    floor = FLOOR * max((g.abs().max() for g in expected[1].values()), default=torch.tensor(0.0))
    gradients = {
        name: _difference(got[1].get(name), expected[1].get(name), floor)
        for name in sorted(expected[1].keys() | got[1].keys())
    }
    return Differences(_difference(got[0], expected[0], floor), gradients, materialized)


def _loss_and_gradients(
    model: nn.Module, batch: Mapping[str, Any], keep_generators: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    devices = {p.device for p in parameters.values()} - {torch.device("cpu")}
    with torch.random.fork_rng(devices=devices, enabled=keep_generators):
        output = model(**batch)
        loss = output["loss"] if isinstance(output, dict) else output[0]
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(parameters, gradients) if g is not None}


def _difference(got: Tensor | None, expected: Tensor | None, floor: Tensor) -> float:
    """The largest; a gradient that only one of them has is 0 in the other."""
    if got is None or expected is None:
        got, expected = (0.0 if x is None else x for x in (got, expected))
    difference = torch.as_tensor(got - expected)
    scale = torch.as_tensor(expected, device=difference.device).abs().max().clamp(min=floor)
    return float(difference.abs().max() / scale) if scale else float(difference.abs().max())
