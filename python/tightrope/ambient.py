"""What the surroundings of a call allow: whether values can be looked at, and which transforms are on.

A tensor may stand for values that are not there: under a trace, as a fake or meta tensor, or as one of a
batch that torch.func or a batched backward holds. Nothing may then depend on its values.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds values that Python can look at."""
    return not (
        torch.compiler.is_compiling()
        or tensor.device.type == "meta"
        or isinstance(tensor, FakeTensor)
        or get_proxy_mode() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or torch._C._functorch.is_legacy_batchedtensor(tensor)  # of is_grads_batched
    )


def may_read(values: Tensor) -> bool:
    """Whether looking at values costs no wait for a device, or TIGHTROPE_DEBUG=1 asks for it."""
    return has_values(values) and (values.device.type == "cpu" or os.environ.get("TIGHTROPE_DEBUG") == "1")


def transformed() -> bool:
    """Whether a transform of torch.func, or forward mode, is on."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable() -> bool:
    """Whether what a backward gives must be differentiable itself."""
    return transformed() or (torch.is_grad_enabled() and not torch.compiler.is_compiling())
