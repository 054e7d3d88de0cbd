"""Scratch memory that outlives a call.

A CPU pays a page fault for every 4 KiB of fresh memory: about 0.1 s for 150 MB, beside GEMMs that take one
second. So one buffer is kept between calls and lent out. A call that finds it lent (another thread, or a
user's loss that calls this library) allocates its own. Other devices' allocators cache already.

What a GEMM allocates for a tile is smaller and freed at once, and glibc, until it has seen larger blocks
freed, gives such memory back to the system each time. So it is shown one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_idle: list[Tensor] = []  # at most one; list.pop and list.append are atomic
# Blocks up to the largest that was freed, but for ones of 32 MiB and more, stay with the process (mallopt(3),
# M_MMAP_THRESHOLD). Its memory is never touched, so it costs nothing.
_LARGEST_KEPT = 31 * 2**20


@contextmanager
def borrow(elements: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """A flat, uninitialised tensor of ``elements``, for the length of the ``with`` block."""
    if device.type != "cpu":
        yield torch.empty(elements, dtype=dtype, device=device)
        return
    size = elements * dtype.itemsize
    try:
        buffer = _idle.pop()
    except IndexError:
        buffer = None
    if buffer is None or buffer.numel() < size:
        buffer = None  # free the smaller one first
        torch.empty(_LARGEST_KEPT, dtype=torch.uint8, device=device)
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
    try:
        yield buffer[:size].view(dtype)
    finally:
        if not _idle:
            _idle.append(buffer)


def release() -> None:
    """Free the buffer that is kept between calls."""
    _idle.clear()
