"""Matrix products of low-precision operands into float32.

On CUDA ``torch.mm(..., out_dtype=torch.float32)`` takes bfloat16 and float16 operands as they are, and its
result is that of float32 arithmetic on them. Elsewhere the operands are converted: other devices' GEMMs round
the result to the operands' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype have a float32 result without a copy of the operands."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return dtype in HALF and hasattr(torch.ops.aten.mm, "dtype_out")


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b`` in the dtype of ``out``, which is that of a and b, or float32."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if widens(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool, scale: Tensor | None = None) -> Tensor:
    """``out = scale (a @ b)``, or ``out += ...``; with accumulate False ``out`` is not read."""
    if scale is not None:
        product = mm(a, b, torch.empty_like(out)).mul_(scale)
        return out.add_(product) if accumulate else out.copy_(product)
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=int(accumulate), out=out)
    if widens(a.device, a.dtype):
        return torch.addmm(out, a, b, beta=int(accumulate), out_dtype=out.dtype, out=out)
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(accumulate), out=out)


def headroom(coef: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(coefficients, what undoes their scale) for gradients of a dtype.

    A mean over thousands of tokens makes gradients that float16 flushes to zero. A power of two that brings
    the largest coefficient near 1 loses nothing. It stays on the device.
    """
    if dtype != torch.float16 or coef.numel() == 0:
        return coef, None
    largest = coef.abs().amax()
    usable = largest.isfinite() & (largest > 0)
    exponent = torch.frexp(torch.where(usable, largest, 1.0)).exponent
    one = torch.ones_like(largest)
    return torch.ldexp(coef, -exponent), torch.ldexp(one, exponent)
