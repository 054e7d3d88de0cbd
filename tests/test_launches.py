"""What the drivers ask of a device: how many kernels, products and passes, counted on a CPU by operators.

A GPU takes microseconds to start a kernel, whatever it does, and a pass over a head's gradient takes as long
as its bytes do. The operators of the drivers are opaque to who counts, so their drivers are called instead.
"""

from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tightrope
from helpers import class_indices, randn
from tightrope import autograd, backends
from tightrope.strategies import chunked, gemm, ops
from tightrope.strategies import products as of_tiles

ROWS, WIDTH, VOCAB = 96, 8, 1000
HEAD = (VOCAB, WIDTH)
BF16 = torch.bfloat16
# They make a tensor of memory that is there, or memory without a value.
NO_KERNEL = {
    *("view", "_unsafe_view", "as_strided", "slice", "select", "t", "transpose", "detach", "expand"),
    *("unsqueeze", "squeeze", "alias", "permute", "unbind", "split", "split_with_sizes"),
    *("empty", "empty_like", "new_empty", "empty_strided"),
}


class Launches(TorchDispatchMode):
    """Names of the operators that would be a kernel, and the shapes of the largest tensor of each."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name not in NO_KERNEL:
            tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
            self.names.append(name)
            self.shapes.append(max((tuple(t.shape) for t in tensors), key=lambda s: (len(s), s), default=()))
        return func(*args, **(kwargs or {}))


@contextmanager
def open_drivers():
    """The drivers without the operators around them."""
    names = ("linear_loss", "linear_stats", "linear_stats_backward")
    with patch.multiple(ops, **{name: getattr(ops, f"_{name}") for name in names}):
        yield


def one_launch(logits, out, partial, argmax, upstream, *rest):
    """In the place of the fused kernel: one operator."""
    out.zero_()


def leaves(dtype=torch.float32):
    hidden, weight = randn(ROWS, WIDTH).to(dtype), randn(*HEAD, seed=1).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), class_indices((ROWS,), VOCAB)


def fused_step(chunks):
    """Launches and products of a step by the fused chunked strategy, in so many chunks."""
    backend = replace(backends.BACKENDS["eager"], fuses=lambda *_: True, row_loss_grad=one_launch)
    workspace_mb = ROWS // chunks * 1024 * 4 / 2**20
    products, multiply = [], chunked.multiply

    def counted(*args, **kwargs):
        products.append(args)
        return multiply(*args, **kwargs)

    hidden, weight, target = leaves()
    with (
        patch.dict(backends.BACKENDS, eager=backend),
        patch.object(chunked, "multiply", counted),
        patch.object(of_tiles, "multiply", counted),
        patch.multiple(gemm, _prefers_own=lambda: False, _prefers_onednn=lambda: False),  # as on a device
        open_drivers(),
        Launches() as seen,
    ):
        tightrope.linear_reality_creativity_loss(
            hidden,
            weight,
            target,
            balance=0.1,
            backend="eager",
            strategy="chunked",
            workspace_mb=workspace_mb,
        )
    return len(seen.names), len(products)


@pytest.mark.usefixtures("one_thread", "small_tiles")
def test_a_fused_chunk_is_three_products_and_few_launches():
    """Fails if what is a number a row is made once a chunk, or products are cut into tiles for nothing."""
    (few, products_of_few), (many, products_of_many) = fused_step(1), fused_step(3)
    assert (products_of_few, products_of_many) == (3, 9)
    assert (many - few) / 2 <= 12


@pytest.mark.usefixtures("one_thread", "small_tiles")
def test_a_tile_of_the_backward_allocates_nothing_of_its_own():
    """Fails if memory is filled for each tile of the vocabulary for a gradient that nobody wants."""
    hidden, weight, target = leaves()
    with open_drivers():
        stats = tightrope.linear_vocab_stats(hidden, weight, target, backend="eager")
        with Launches() as seen:
            stats.lse.sum().backward()
    fills = sum(name in ("new_zeros", "zeros", "fill_", "zero_") for name in seen.names)
    tiles = -(-VOCAB // 128)
    assert fills < tiles


@pytest.mark.parametrize("keep_graph", [False, True])
def test_a_scaled_gradient_is_rounded_as_it_is_written(keep_graph):
    """Fails if an upstream gradient costs a GPU two passes over the head's gradient, or bits depend on it."""

    def step(at_once):
        hidden, weight, target = leaves(BF16)
        loss = tightrope.linear_reality_creativity_loss(
            hidden, weight, target, balance=0.1, strategy="chunked"
        )
        with patch.object(autograd, "_rounds_at_once", lambda gradient: at_once), Launches() as seen:
            grads = torch.autograd.grad(loss * 0.37, (hidden, weight), retain_graph=keep_graph)
        if keep_graph:
            again = torch.autograd.grad(loss * 0.37, (hidden, weight))
            assert all(torch.equal(a, b) for a, b in zip(grads, again))
        return grads, seen.shapes.count(HEAD)

    (expected, passes_apart), (grads, passes) = step(False), step(True)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))
    assert all(g.dtype == BF16 for g in grads)
    assert (passes_apart, passes) == (2, 1)
