"""The streaming kernels beside the products that they hold, in turns: shares of cuBLAS's rate.

python -m gpu_check.rates
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from tightrope import backends
from tightrope.arguments import TileArguments
from tightrope.cli.bench.cases import Case
from tightrope.cli.bench.inputs import make_step
from tightrope.statistics import empty_partial
from tightrope.strategies import plan

from .entries import SHAPES
from .record import record

ROUNDS, WARM = 10, 2
WORKSPACE = plan.workspace_bytes(None, torch.device("cuda"))


def milliseconds(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def measure(case: Case) -> dict[str, float]:
    """Milliseconds of each kernel and of its product: medians of rounds in which they take turns."""
    backend, step = backends.BACKENDS["triton"], make_step(case)
    hidden, weight = step.hidden.detach(), step.weight.detach()
    tail = TileArguments(index=step.target).flat()
    partial, argmax = empty_partial(case.rows, torch.float32, hidden.device)
    norm, coef = torch.ones(2, case.rows, device="cuda"), torch.ones(7, case.rows, device="cuda")
    part = weight[: plan.stream_width(case.rows, case.vocab, 2, WORKSPACE, plan.GPU.tile)]
    out = torch.empty(case.rows, len(part), dtype=hidden.dtype, device="cuda")
    calls = {
        "stream_stats": lambda: backend.stream_stats(hidden, weight, partial, argmax, 0, *tail),
        "its GEMM": lambda: torch.mm(hidden, weight.t()),
        "stream_grad": lambda: backend.stream_grad(hidden, part, out, norm, coef, 0, *tail),
        "the GEMM of its tile": lambda: torch.mm(hidden, part.t()),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + WARM):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    return {name: statistics.median(found[WARM:]) for name, found in times.items()}


def main() -> None:
    for case in SHAPES:
        ms = measure(case)
        for kernel, gemm in (("stream_stats", "its GEMM"), ("stream_grad", "the GEMM of its tile")):
            share = ms[gemm] / ms[kernel]
            record(shape=case.name, name=kernel, ms=ms[kernel], gemm_ms=ms[gemm], share=share)


if __name__ == "__main__":
    main()
