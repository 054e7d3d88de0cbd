"""The GEMMs of the drivers, given to the library that runs them fastest.

PyTorch multiplies float32 matrices on an x86 CPU with MKL, which on AMD processors with AVX512 stays with its
AVX2 kernels. There the products are the CPU extension's own. Without it they go through oneDNN, which PyTorch
ships too. For each shape that it meets that keeps 0.6 MiB, so it is shown few: rows are cut, and filled up
with zeros, to one of 30 sizes.

On CUDA products of bfloat16 and float16 matrices go to float32 as they are, and so do those of bfloat16 on a
CPU that has instructions for it, by the CPU extension; elsewhere a GEMM rounds its result to the operands'
dtype, so there they are converted first.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .. import backends
from .plan import ONEDNN_ROWS, ROW_MULTIPLE, filled_rows, spans

# Elements of a oneDNN product, which has no form that writes to a given output: so that what is copied out of
# it is still in cache, and its memory is not fresh from the system each time.
_PRODUCT = 2**20


def multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    rows: Literal["m", "k", "n"],
    accumulate: bool = False,
    scale: Tensor | None = None,
    rounds: bool = False,
) -> Tensor:
    """``out = a @ b``, or ``out += a @ b``, for a [m, k], b [k, n], out [m, n]; out is not read otherwise.

    b may be what `packed` made of it. a and b have the dtype of out, or a narrower one. scale
    (0-dimensional) multiplies the product. rows: which size counts rows of a batch, and so may be another in
    each call. rounds: a may be rounded to the dtype of b, which lies along n as out does, where products of
    such are fast.
    """
    if scale is not None:
        made = multiply(a, b, torch.empty_like(out), rows=rows, rounds=rounds).mul_(scale)
        return _put(made, out, accumulate)
    if a.dtype != out.dtype and widens(a.device, a.dtype):
        return torch.addmm(out, a, b, beta=int(accumulate), out_dtype=out.dtype, out=out)
    a = a.to(out.dtype)
    if rounds and b.dtype == torch.bfloat16 and out.dtype == torch.float32 and multiplies_pairs(b.device):
        torch.ops.tightrope.pair_product(a, packed(b, rounds), out, accumulate)
        return out
    if a.device.type == "cpu" and a.dtype == torch.float32 and a.numel() and b.numel():
        if _prefers_own():
            return _by_own(a, b, out, accumulate)
        if _prefers_onednn():
            _by_onednn(a, b.to(a.dtype), out, accumulate, rows)
            return out
    # With beta = 0 a GEMM overwrites its output without reading it.
    return torch.addmm(out, a, b.to(a.dtype), beta=int(accumulate), out=out)


def packed(b: Tensor, rounds: bool = False) -> Tensor:
    """b [k, n] as `multiply` takes it best where that meets it more than once. rounds: as there."""
    if rounds and b.dim() == 2 and b.dtype == torch.bfloat16 and multiplies_pairs(b.device):
        filled = -(-b.shape[0] // backends.PAIR_MULTIPLE) * backends.PAIR_MULTIPLE
        made = b.new_empty(filled // 2, b.shape[1], 2)
        torch.ops.tightrope.pairs(b, made)
        return made
    if not b.numel() or not owns_products(b.device, b.dtype):
        return b
    made = b.new_empty(-(-b.shape[1] // backends.PANEL), b.shape[0], backends.PANEL)
    torch.ops.tightrope.panels(b, made)
    return made


def _by_own(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    if out.shape[1] > 1 and out.stride(1) != 1:
        _by_own(b.t().to(out.dtype), a.t(), out.t(), accumulate)
    else:
        torch.ops.tightrope.product(a, b if b.dtype == torch.bfloat16 else b.to(out.dtype), out, accumulate)
    return out


def _by_onednn(a: Tensor, b: Tensor, out: Tensor, accumulate: bool, rows: str) -> None:
    count = {"m": a.shape[0], "k": b.shape[0], "n": b.shape[1]}[rows]
    most = min(ONEDNN_ROWS, _most_m(b.shape[1])) if rows == "m" else ONEDNN_ROWS
    for start, stop in spans(count, most, ROW_MULTIPLE):
        part = slice(start, stop)
        if rows == "m":
            _linear(_padded(a[part], 0), b.t(), out[part], accumulate)
        elif rows == "n":
            _linear(a, _padded(b.t()[part], 0), out[:, part], accumulate)
        else:
            _linear(_padded(a[:, part], 1), _padded(b[part], 0).t(), out, accumulate or start > 0)


def _linear(x: Tensor, weight: Tensor, out: Tensor, accumulate: bool) -> None:
    """x [m, k] times the transpose of weight [n, k]; what out has no place for is dropped."""
    most = _most_m(weight.shape[0])
    for start, stop in spans(x.shape[0], most, most):
        # What torch.compile calls for a linear layer.
        product = torch.ops.mkldnn._linear_pointwise(x[start:stop], weight, None, "none", [], "")
        place = out[start:stop]
        _put(product[: place.shape[0], : place.shape[1]], place, accumulate)


def _most_m(n: int) -> int:
    """The most rows of a oneDNN product [m, n]: a power of two, so that there are few."""
    most = max(_PRODUCT // n, 1)
    return 1 << most.bit_length() >> 1


def _padded(x: Tensor, dim: int) -> Tensor:
    """x with zeros after the rows that lie along dim, up to the next size that oneDNN is shown."""
    rows = x.shape[dim]
    extra = filled_rows(rows) - rows
    if extra == 0:
        return x
    shape = list(x.shape)
    shape[dim] += extra
    padded = x.new_empty(shape)
    padded.narrow(dim, 0, rows).copy_(x)
    padded.narrow(dim, rows, extra).zero_()
    return padded


def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype have a float32 result without a copy of the operands."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return dtype in (torch.bfloat16, torch.float16) and hasattr(torch.ops.aten.addmm, "dtype_out")


def result_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for tensors of these: float64 where any of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def operand_dtype(input: torch.dtype, weight: torch.dtype, result: torch.dtype, exact: bool) -> torch.dtype:
    """The dtype of what goes into GEMMs: the tensors' own where products of such are exact in float32."""
    own = input == weight and result == torch.float32
    return input if own and exact else result


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


def _put(product: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    return out.add_(product) if accumulate else out.copy_(product)


def multiplies_pairs(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices have a float32 result there, by the CPU extension."""
    return device.type == "cpu" and backends.BACKENDS["cpu"].pair_product is not None


def has_onednn() -> bool:
    """Whether this PyTorch has the oneDNN product that `multiply` calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def owns_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of such matrices are the CPU extension's own."""
    return device.type == "cpu" and dtype == torch.float32 and _prefers_own()


@functools.cache
def _prefers_own() -> bool:
    return backends.PANEL is not None and _mkl_stays_behind()


@functools.cache
def _prefers_onednn() -> bool:
    return has_onednn() and _mkl_stays_behind()


def _mkl_stays_behind() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
