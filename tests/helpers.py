"""What the tests share: how a problem is built, run through a function, and judged.

A :class:`Problem` holds tensors that get gradients (``leaves``), a target and options. ``evaluate``
runs any function of the library, or its namesake in ``tightrope.reference``, on fresh copies of the
leaves and returns the loss and every gradient by name, so that a comparison is one loop over a
dictionary. The truth is always the reference in float64 on the exactly upcast inputs. Where float32
cannot be expected to be near it (hostile data), the yardstick is the error that the same formula
makes in plain float32 PyTorch: ``assert_no_worse``.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tightrope
from tightrope import backends, reference

ROOT = Path(__file__).resolve().parents[1]
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
_FOUND = {row["backend"] for row in backends.describe() if row["available"]}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in _FOUND, reason=f"backend {name} is not built"))
    for name in ("cpu", "eager")
]
STRATEGIES = ["chunked", "streaming"]
RUN_ONLY = {"workspace_mb", "backend", "strategy", "skip_ignored"}  # change no value
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half an ulp, relative
SMALLEST = {torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # half of the smallest subnormal
EPS32 = 2.0**-23


@dataclass
class Problem:
    """``leaves`` ("input", "weight", "bias", "balance", "row_weight", ...) get gradients."""

    leaves: dict[str, Tensor]
    target: object = None
    options: dict = field(default_factory=dict)

    def but(self, **options) -> Problem:
        return Problem(self.leaves, self.target, {**self.options, **options})

    def raw_logits(self, dtype=torch.float64) -> Tensor:
        """The logits before scale and softcap, or the input itself if there is no weight."""
        leaves = {name: leaf.detach().to(dtype) for name, leaf in self.leaves.items()}
        if "weight" not in leaves:
            return leaves["input"]
        return reference.logits(leaves["input"], leaves["weight"], leaves.get("bias"))


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def rand(*shape, seed=0, dtype=torch.float32) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def class_indices(shape, vocab, *, seed=0, ignored=0.0, ignore_index=-100) -> Tensor:
    target = torch.randint(vocab, shape, generator=generator(seed))
    if not ignored:
        return target
    dropped = torch.rand(shape, generator=generator(seed + 1)) < ignored
    return target.masked_fill(dropped, ignore_index)


def linear_problem(
    *lead, vocab=37, width=8, seed=0, dtype=torch.float32, bias=True, spread=2.0, ignored=0.0, **options
) -> Problem:
    """Hidden states and a head whose logits have a standard deviation of ``spread``."""
    leaves = {
        "input": randn(*lead, width, seed=seed, dtype=dtype),
        "weight": (randn(vocab, width, seed=seed + 1) * spread / width**0.5).to(dtype),
    }
    if bias:
        leaves["bias"] = randn(vocab, seed=seed + 2, dtype=dtype)
    target = class_indices(lead, vocab, seed=seed + 3, ignored=ignored)
    return Problem(leaves, target, options)


def top_k(shape, vocab, *, k=3, seed=0, dtype=torch.float32) -> tightrope.TopKTarget:
    """``k`` entries a row, some of them twice (they add up); probabilities that sum to at most one."""
    indices = torch.randint(vocab, (*shape, k), generator=generator(seed))
    probs = rand(*shape, k, seed=seed + 1)
    return tightrope.TopKTarget(indices, (probs / (probs.sum(-1, keepdim=True) + 0.25)).to(dtype))


def dense(target, vocab, dtype=torch.float64, **options) -> Tensor:
    """Any target as rows of probabilities."""
    return reference.dense_target(plain(target), vocab, dtype=dtype, **options)[0]


def plain(target):
    """A target as the reference takes it: top-k as a bare tuple."""
    if isinstance(target, tightrope.TopKTarget):
        return (target.indices, target.probs)
    return target


def upstream_of(loss: Tensor) -> Tensor:
    """An upstream gradient that is never 1, differs from row to row and is exact in every dtype."""
    steps = torch.arange(loss.numel(), dtype=loss.dtype, device=loss.device) % 7
    return ((steps + 5) / 8).reshape(loss.shape)


def evaluate(function, problem: Problem, dtype=None, **options) -> dict[str, Tensor]:
    """Loss and gradients by name: {"loss": ..., "input": ..., "weight": ..., ...}."""
    target, options = problem.target, {**problem.options, **options}
    if function.__module__.startswith(reference.__name__):
        options = {name: value for name, value in options.items() if name not in RUN_ONLY}
        target = plain(target)
    leaves = {
        name: leaf.detach().to(dtype or leaf.dtype).requires_grad_() for name, leaf in problem.leaves.items()
    }
    first = [leaves[name] for name in ("input", "weight") if name in leaves]
    rest = {name: leaf for name, leaf in leaves.items() if name not in ("input", "weight")}
    loss = function(*first, target, **rest, **options)
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream_of(loss))
    return {"loss": loss.detach(), **dict(zip(leaves, grads))}


def function_of(problem: Problem, module=tightrope):
    """The function that takes these leaves, of the library or of the reference."""
    linear = "weight" in problem.leaves
    return getattr(module, "linear_reality_creativity_loss" if linear else "reality_creativity_loss")


def oracle(problem: Problem, dtype=torch.float64) -> dict[str, Tensor]:
    return evaluate(function_of(problem, reference), problem, dtype)


def ours(problem: Problem, **options) -> dict[str, Tensor]:
    return evaluate(function_of(problem), problem, **options)


def present(stats) -> dict[str, Tensor]:
    """The fields of statistics that are there, by name."""
    return {name: value for name, value in stats._asdict().items() if value is not None}


def paired(b: Tensor) -> Tensor:
    """[n, k] as the pairs of its transpose, [k / 2, n, 2]."""
    return b.unflatten(1, (-1, 2)).transpose(0, 1).contiguous()


def deviation(actual: Tensor, exact: Tensor) -> Tensor:
    """``|actual - exact|`` in float64; equal infinities do not deviate, NaN does."""
    actual, exact = actual.detach().double(), exact.detach().double()
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)} is not {tuple(exact.shape)}"
    return torch.where(actual == exact, 0.0, (actual - exact).abs())


def assert_within(actual: Tensor, exact: Tensor, rtol: float, floor: float = 0.0, what="") -> None:
    """Norm-wise: ``|actual - exact| <= rtol |exact| + floor``."""
    error = deviation(actual, exact).norm().item()
    size = exact.detach().double().norm().item()
    assert error <= rtol * size + floor, f"{what}: error {error:.3e} of {size:.3e}, allowed {rtol:g}"


def assert_rounded_once(actual: Tensor, exact: Tensor, floor: float, what="") -> None:
    """Element by element: what float32 arithmetic and one rounding to the dtype explain."""
    if not actual.numel():
        return
    exact = exact.detach().double()
    allowed = 1.001 * ROUNDING[actual.dtype] * exact.abs() + SMALLEST[actual.dtype] + floor
    excess = (deviation(actual, exact) / allowed.clamp_min(1e-300)).max().item()
    assert excess <= 1, f"{what}: {excess:.3g} times the error of one rounding to {actual.dtype}"


def assert_no_worse(actual: Tensor, exact: Tensor, rough: Tensor, floor: float, what="") -> None:
    """At most four times the largest error of plain float32 PyTorch (``rough``), plus ``floor``."""
    error, usual = (deviation(x, exact).max().item() for x in (actual, rough))
    assert error <= 4 * usual + floor, (
        f"{what}: error {error:.3e}, plain float32 PyTorch {usual:.3e}, floor {floor:.3e}"
    )


def assert_representable(
    actual: Tensor, exact: Tensor, rtol: float, floor: float | Tensor = 0.0, what="", largest=None
) -> None:
    """Element by element: right where the dtype can hold it, else the infinity of its sign; never a new NaN.

    largest: of the arithmetic, where it is not that of the dtype of ``actual``.
    """
    limit = torch.finfo(actual.dtype).max if largest is None else largest
    actual, exact = actual.detach().double(), exact.detach().double()
    near = deviation(actual, exact) <= rtol * exact.abs() + floor
    edge = (1 - rtol) * limit
    beyond = (exact.abs() >= edge) & (actual.abs() >= edge) & (actual.sign() == exact.sign())
    wrong = ~(near | beyond | exact.isnan())
    assert not wrong.any(), f"{what}: {actual[wrong][:4].tolist()} for {exact[wrong][:4].tolist()}"


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"


def child_environment(**changes: str) -> dict[str, str]:
    """An environment in which a child Python imports this very package and these helpers."""
    package = str(Path(tightrope.__file__).resolve().parents[1])
    path = os.pathsep.join([package, str(Path(__file__).parent), *sys.path])
    return {**os.environ, "PYTHONPATH": path, **changes}
