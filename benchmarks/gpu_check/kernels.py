"""A small run of every kernel, for tools that watch kernels: compute-sanitizer, ncu.

    python -m gpu_check.kernels [PART PARTS]

Each call launches a kernel on a few rows of an odd vocabulary, in the forms that a launch can ask for. No
product of the vendor's library is among them: a tool takes minutes for those, and finds nothing of ours.
PART, from 0: of so many parts this one alone, every PARTS-th call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import islice, product

import torch
from torch import Tensor

from tightrope import backends
from tightrope.arguments import SideArguments, TileArguments
from tightrope.losses import RealityCreativity
from tightrope.statistics import empty_partial, empty_sides, empty_sums

ROWS, VOCAB, WIDTH = 7, 9001, 72
DEVICE = "cuda"
KINDS = ("none", "index", "dense", "topk")
DTYPES = (torch.bfloat16, torch.float32)


def _target(kind: str, bias: bool) -> tuple:
    """The flat `TileArguments` of a kind of target; with bias, of the general form of a kernel."""
    named: dict[str, object] = {}
    if kind == "index":
        named["index"] = torch.arange(ROWS, device=DEVICE) * (VOCAB // ROWS)
    elif kind == "dense":
        named["dense"] = torch.full((ROWS, VOCAB), 1 / VOCAB, device=DEVICE)
    elif kind == "topk":
        named["topk_index"] = torch.arange(ROWS * 4, device=DEVICE).view(ROWS, 4) * (VOCAB // ROWS // 4)
        named["topk_prob"] = torch.full((ROWS, 4), 0.25, device=DEVICE)
    if bias:
        named |= {"bias": torch.zeros(VOCAB, device=DEVICE), "softcap": 30.0}
        named["active"] = torch.arange(ROWS, device=DEVICE) % 3 > 0
    return TileArguments(**named).flat()


def _norm_and_coef(sides: int) -> tuple[Tensor, Tensor]:
    return torch.ones(2 * sides, ROWS, device=DEVICE), torch.full((7 * sides, ROWS), 0.1, device=DEVICE)


def _sets() -> dict[str, tuple]:
    """The flat `SideArguments` of each kind of set."""
    return {
        "min-p": SideArguments(torch.zeros(ROWS, device=DEVICE), None).flat(),
        "listed": SideArguments(None, torch.arange(ROWS * 5, device=DEVICE).view(ROWS, 5)).flat(),
    }


def rows(name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """The row kernels of a backend: what a launch is called, and the launch."""
    backend, sets = backends.BACKENDS[name], _sets()
    for dtype, kind, general in product(DTYPES, KINDS, (False, True)):
        logits = torch.linspace(-9, 9, ROWS * VOCAB, device=DEVICE).view(ROWS, VOCAB).to(dtype)
        tail = _target(kind, general)
        partial, argmax = empty_partial(ROWS, torch.float32, logits.device)
        form = f"{str(dtype)[6:]} {kind}{' general' if general else ''}"
        norm, coef = _norm_and_coef(1)
        none = SideArguments().flat()

        def stats(logits=logits, partial=partial, argmax=argmax, tail=tail):
            backend.row_stats(logits, partial, argmax, 0, *tail)

        def grad(logits=logits, norm=norm, coef=coef, which=none, tail=tail):
            backend.row_grad(logits, torch.zeros_like(logits), norm, coef, 0, *which, *tail)

        yield f"row_stats {form}", stats
        yield f"row_grad {form}", grad
        if name == "cuda" and kind != "none":
            weight = torch.ones(ROWS, device=DEVICE)
            upstream = RealityCreativity(VOCAB).upstream(0.3 * weight, weight)

            def both(logits=logits, partial=partial, argmax=argmax, upstream=upstream, tail=tail):
                out = torch.zeros_like(logits)
                backend.row_loss_grad(logits.clone(), out, partial, argmax, upstream, *tail)

            yield f"row_loss_grad {form}", both
        for word, which in sets.items():
            sides = empty_sides(ROWS, torch.float32, logits.device)
            wide = _norm_and_coef(2)

            def of_sides(logits=logits, sides=sides, which=which, tail=tail):
                backend.row_sides(logits, sides, 0, *which, *tail)

            def sided(logits=logits, wide=wide, which=which, tail=tail):
                backend.row_grad(logits, torch.zeros_like(logits), *wide, 0, *which, *tail)

            yield f"row_sides {form} {word}", of_sides
            yield f"row_grad {form} {word}", sided


def streams() -> Iterator[tuple[str, Callable[[], None]]]:
    """The streaming kernels; of rows in whole vectors, and not."""
    backend = backends.BACKENDS["triton"]
    for dtype, kind, width in product(DTYPES, KINDS, (WIDTH, WIDTH + 1)):
        hidden = torch.linspace(-1, 1, ROWS * width, device=DEVICE).view(ROWS, width).to(dtype)
        weight = torch.linspace(-1, 1, VOCAB * width, device=DEVICE).view(VOCAB, width).to(dtype)
        partial, argmax = empty_partial(ROWS, torch.float32, hidden.device)
        tail, (norm, coef) = _target(kind, True), _norm_and_coef(1)
        form = f"{str(dtype)[6:]} {kind} D {width}"

        def stats(hidden=hidden, weight=weight, partial=partial, argmax=argmax, tail=tail):
            backend.stream_stats(hidden, weight, partial, argmax, 0, *tail)

        def grad(hidden=hidden, weight=weight, norm=norm, coef=coef, tail=tail):
            out = torch.zeros(ROWS, VOCAB, dtype=hidden.dtype, device=DEVICE)
            backend.stream_grad(hidden, weight, out, norm, coef, 0, *tail)

        yield f"stream_stats {form}", stats
        yield f"stream_grad {form}", grad


def tangents() -> Iterator[tuple[str, Callable[[], None]]]:
    """The row kernels of second order, whose logits and direction are float32."""
    backend = backends.BACKENDS["triton"]
    for kind, (word, which) in product(KINDS, {"": SideArguments().flat(), **_sets()}.items()):
        logits = torch.linspace(-9, 9, ROWS * VOCAB, device=DEVICE).view(ROWS, VOCAB)
        sides = 2 if word else 1
        sums = empty_sums(ROWS, bool(word), logits.dtype, logits.device)
        tail, (norm, coef) = _target(kind, True), _norm_and_coef(sides)

        def stats(logits=logits, sums=sums, norm=norm, which=which, tail=tail):
            backend.row_tangent(logits, logits.flip(0), sums, norm, 0, *which, *tail)

        def grad(logits=logits, norm=norm, coef=coef, which=which, tail=tail):
            given, outs = (logits.clone(), logits.flip(0)), (norm[::2].clone(), coef, coef.clone())
            backend.row_grad_tangent(*given, *given, norm, *outs, 0, *which, *tail)

        yield f"row_tangent {kind} {word}", stats
        yield f"row_grad_tangent {kind} {word}", grad


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for name in ("cuda", "triton"):
        if backends.BACKENDS[name].serves(torch.device(DEVICE), asked=True):
            for call, launch in rows(name):
                yield f"{name} {call}", launch
    if backends.BACKENDS["triton"].serves(torch.device(DEVICE), asked=True):
        yield from streams()
        yield from tangents()


def main(part: int = 0, parts: int = 1) -> None:
    count = 0
    for name, launch in islice(calls(), part, None, parts):
        print(name, flush=True)  # what ran last, if a tool ends the program
        launch()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        count += 1
    sys.exit(None if count else "no kernel of ours is here")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
