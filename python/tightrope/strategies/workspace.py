"""Scratch memory that outlives a call.

A CPU pays a page fault for every 4 KiB of fresh memory: about 0.1 s for 150 MB, beside GEMMs that take one
second. So one buffer is kept between calls and lent out. A call that finds it lent (another thread, or a
user's loss that calls this library) allocates its own. Other devices' allocators cache already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_idle: list[Tensor] = []  # at most one; list.pop and list.append are atomic


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
        buffer = torch.empty(size, dtype=torch.uint8)
    try:
        yield buffer[:size].view(dtype)
    finally:
        if not _idle:
            _idle.append(buffer)


def release() -> None:
    """Free the buffer that is kept between calls."""
    _idle.clear()
