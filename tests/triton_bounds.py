"""An out-of-bounds checker for Triton kernels under the interpreter.

Every live lane of every load and store must be an element of one of the tensors that the kernel was given: in
its extent, and, for a view of wider rows, not in the gap between them. A kernel on a GPU would read or
overwrite whatever lies there and mostly say nothing.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor


class OutOfBounds(AssertionError):
    pass


def _tensors(values):
    for value in values:
        if isinstance(value, TensorDescriptor):
            yield value.base
        elif isinstance(value, torch.Tensor):
            yield value


def _elements_of(tensor: torch.Tensor, addresses: np.ndarray) -> np.ndarray:
    """Which addresses are elements of the tensor."""
    offset = addresses.astype(np.int64) - tensor.data_ptr()
    inside = (offset >= 0) & (offset % tensor.element_size() == 0)
    offset = offset // tensor.element_size()
    # Strides from the largest down give each dimension's index; what is left over lies in a gap.
    order = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
    for dim in order:
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if size == 0:
            return np.zeros_like(inside)
        if size == 1 or stride == 0:
            continue
        index = np.minimum(offset // stride, size - 1)
        offset = offset - index * stride
    return inside & (offset == 0)


@contextmanager
def checked_bounds():
    """Check every access of the kernels that run inside; gives a dict of how many lanes were looked at."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, prepare = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    known: list[torch.Tensor] = []
    counted = {"loads": 0, "stores": 0}

    def check(pointers, mask, what):
        live = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[live]
        counted[what] += addresses.size
        left = np.ones(addresses.shape, bool)
        for tensor in known:
            left &= ~_elements_of(tensor, addresses)
        if left.any():
            raise OutOfBounds(f"{left.sum()} of {left.size} {what} lie in no argument of the kernel")

    def checked_load(self, ptrs, mask, *rest, **options):
        check(ptrs, mask, "loads")
        return load(self, ptrs, mask, *rest, **options)

    def checked_store(self, ptrs, value, mask, *rest, **options):
        check(ptrs, mask, "stores")
        return store(self, ptrs, value, mask, *rest, **options)

    def recorded(self, args, kwargs):
        host, named = prepare(self, args, kwargs)
        known[:] = [*_tensors(host), *_tensors(named.values())]
        return host, named

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor._init_args_hst = recorded
    try:
        yield counted
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor._init_args_hst = prepare
