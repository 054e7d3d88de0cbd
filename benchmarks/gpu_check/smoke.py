"""Ten public calls on the GPU against the reference in float64 on the CPU: does it work at all.

    python -m gpu_check.smoke

A call is a line of `CALLS`: what it is given, and how the reference says the same. All are small, and have
what the kernels find hard: peaked rows, V off a tile, rows that are ignored.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import tightrope
from tightrope import reference

from .record import record

ROWS, WIDTH, VOCAB = 300, 256, 5003
# Errors that are allowed, relative in the Euclidean norm: of the loss, and of the gradients.
ALLOWED = {torch.bfloat16: (1e-4, 2e-2), torch.float32: (2e-5, 1e-4)}


@dataclass(frozen=True)
class Call:
    """loss: (module, leaves, target, options) -> a scalar, for `tightrope` and for `reference` alike.

    options: of both. ours: of `tightrope` alone. target: a kind of `_target`.
    """

    name: str
    loss: Callable
    dtype: torch.dtype = torch.bfloat16
    target: str = "index"
    bias: bool = False
    options: dict = field(default_factory=dict)
    ours: dict = field(default_factory=dict)


def _linear(module, leaves, target, options):
    hidden, weight, *bias = leaves
    return module.linear_reality_creativity_loss(hidden, weight, target, *bias, **options)


def _logits(module, leaves, target, options):
    hidden, weight = leaves
    logits = hidden @ weight.T
    # The reference's logits are not rounded to half precision, so neither are these.
    return module.reality_creativity_loss(logits, target, **options)


def _statistics(module, leaves, target, options):
    hidden, weight = leaves
    if module is reference:
        b, _ = reference.dense_target(target, VOCAB, dtype=hidden.dtype)
        stats = reference.row_stats(hidden @ weight.T, b)
    else:
        stats = module.linear_vocab_stats(hidden, weight, target, **options)
    return (stats.target_log_prob - 0.1 * stats.entropy + stats.lse * stats.collision).sum()


def _focal(module, leaves, target, options):
    hidden, weight = leaves

    def focal(stats):
        cross_entropy = stats.lse - stats.target_logit
        return (1 - (-cross_entropy).exp()) ** 2 * cross_entropy

    if module is reference:
        b, _ = reference.dense_target(target, VOCAB, dtype=hidden.dtype)
        return focal(reference.row_stats(hidden @ weight.T, b)).mean()
    return module.linear_vocab_loss(hidden, weight, target, focal, **options)


_EVERYTHING = {"balance": 0.3, "softcap": 30.0, "z_loss": 1e-3, "label_smoothing": 0.1, "logit_l2": 1e-5}
_SQUARED = {"balance": 0.4, "reality": "squared_error", "creativity": "collision"}
CHUNKED, STREAMING = {"strategy": "chunked"}, {"strategy": "streaming"}
CALLS = (
    Call("chunked", _linear, options={"balance": 0.1}, ours=CHUNKED),
    Call("streaming", _linear, options={"balance": 0.1}, ours=STREAMING),
    Call("chunked, every term", _linear, torch.float32, bias=True, options=_EVERYTHING, ours=CHUNKED),
    Call("streaming, every term", _linear, torch.float32, bias=True, options=_EVERYTHING, ours=STREAMING),
    Call("several chunks, squared error", _linear, options=_SQUARED, ours=CHUNKED | {"workspace_mb": 2}),
    Call("top-k target", _linear, target="topk", options={"balance": 0.1}, ours=STREAMING),
    Call("ignored rows", _linear, target="ignored", options={"balance": 0.1}),
    Call("statistics and their gradients", _statistics),
    Call("a loss of one's own", _focal, torch.float32),
    Call(
        "logits, a set of classes",
        _logits,
        torch.float32,
        options={"balance": 0.2, "creativity": "support_entropy", "support": 0.02},
        ours={"support": tightrope.MinP(0.02)},
    ),
)


def tensors(call: Call) -> tuple[list[Tensor], object]:
    """Leaves and target on the CPU, in the call's dtype; every eighth row is peaked."""
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=make)
    hidden[::8] *= 10
    weight = torch.randn(VOCAB, WIDTH, generator=make) * 2 / WIDTH**0.5
    bias = torch.randn(VOCAB, generator=make)
    leaves = [hidden, weight, bias] if call.bias else [hidden, weight]
    return [leaf.to(call.dtype) for leaf in leaves], _target(call.target, make)


def _target(kind: str, make: torch.Generator):
    index = torch.randint(VOCAB, (ROWS,), generator=make)
    if kind == "ignored":
        index[::3] = -100
    if kind == "topk":
        probs = torch.rand(ROWS, 16, generator=make)
        indices = torch.randint(VOCAB, (ROWS, 16), generator=make)
        return tightrope.TopKTarget(indices, probs / probs.sum(-1, keepdim=True))
    return index


def errors(call: Call, device: str) -> list[float]:
    """Of the loss and of the gradient of each leaf, against float64."""
    given, target = tensors(call)
    results = []
    for module, place, dtype in ((tightrope, device, call.dtype), (reference, "cpu", torch.float64)):
        leaves = [t.to(place, dtype).requires_grad_() for t in given]
        there = type(target)(*(t.to(place) for t in target)) if call.target == "topk" else target.to(place)
        options = call.options | (call.ours if module is tightrope else {})
        loss = call.loss(module, leaves, there, options)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    return [
        ((ours.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
        for ours, exact in zip(*results)
    ]


def check(call: Call, device: str) -> dict:
    """The record of a call."""
    try:
        loss, *gradients = errors(call, device)
    except Exception as error:  # of a kernel that does not compile or launch: anything
        traceback.print_exc()
        return {"name": call.name, "ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    of_loss, of_gradients = ALLOWED[call.dtype]
    # Not the other way round: a NaN is not within any bound.
    ok = loss <= of_loss and all(error <= of_gradients for error in gradients)
    return {"name": call.name, "ok": ok, "loss_error": loss, "gradient_error": max(gradients)}


def main() -> None:
    for call in CALLS:
        record(**check(call, "cuda"))


if __name__ == "__main__":
    main()
