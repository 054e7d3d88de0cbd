"""The GEMMs of the drivers, given to the library that runs them fastest.

PyTorch multiplies float32 matrices on an x86 CPU with MKL, which on AMD processors with AVX512 stays with its
AVX2 kernels: 205 GFLOP/s on two cores where oneDNN, which PyTorch ships too, reaches 480. There the product
goes through oneDNN. It computes in float32 as well and gives the same bits each time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """``out = a @ b``, or ``out += a @ b``, for a [m, k], b [k, n], out [m, n]; out is not read otherwise."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and _prefers_onednn():
        # What torch.compile calls for a linear layer: x [m, k] and weight [n, k] -> x @ weight.T.
        product = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return out.add_(product) if accumulate else out.copy_(product)
    # With beta = 0 a GEMM overwrites its output without reading it.
    return torch.addmm(out, a, b, beta=int(accumulate), out=out)


@functools.cache
def _prefers_onednn() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
