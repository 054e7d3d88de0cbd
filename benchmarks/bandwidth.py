"""How near the CUDA row kernels come to the speed of the memory: a fraction of a device-to-device copy.

A copy of the logits reads and writes each byte once, which is what the fused kernel does; the statistics
read, and the gradient reads and writes; with a set of classes (`MinP(0.02)`) as without. From float32 logits,
as the chunked strategy has them, the gradient is bfloat16 too. Each kernel's bytes (docs/cuda.md) over its
time is given as a fraction of the copy's. Medians of rounds in which the kernels take turns, after a warm-up,
timed with CUDA events; the logits are larger than any L2.

    python benchmarks/bandwidth.py [--rounds 20] [--megabytes 1024] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tightrope import backends
from tightrope.losses import RealityCreativity
from tightrope.statistics import empty_partial, empty_sides

VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)
DTYPES = (torch.bfloat16, torch.float32)


def candidates(rows: int, vocab: int, dtype: torch.dtype) -> dict[str, tuple[int, Callable[[], None]]]:
    """Bytes moved, and the call, by name."""
    ops = torch.ops.tightrope
    logits = torch.randn(rows, vocab, device="cuda").to(dtype)
    out = torch.empty_like(logits)
    target = torch.randint(vocab, (rows,), device="cuda")
    tail = (target, None, None, None, None, None, 1.0, None)
    partial, argmax = empty_partial(rows, torch.float32, logits.device)
    norm, coef = torch.ones(2, rows, device="cuda"), torch.rand(7, rows, device="cuda")
    upstream = RealityCreativity(vocab).upstream(
        torch.full((rows,), 0.3, device="cuda"), torch.ones(rows, device="cuda")
    )
    # As of MinP(0.02).
    threshold = logits.amax(-1).float() - 3.9
    sides, of_sides = empty_sides(rows, torch.float32, logits.device), (threshold, None)
    norms, coefs = torch.ones(4, rows, device="cuda"), torch.rand(14, rows, device="cuda")
    once = logits.numel() * logits.element_size()

    def apart(out: torch.Tensor) -> None:
        ops.row_stats(logits, partial, argmax, 0, *tail)
        ops.row_grad(logits, out, norm, coef, 0, None, None, *tail)

    def fused(out: torch.Tensor) -> None:
        ops.row_loss_grad(logits, out, partial, argmax, upstream, *tail)

    calls = {
        "copy": (2 * once, lambda: out.copy_(logits)),
        "row_stats": (once, lambda: ops.row_stats(logits, partial, argmax, 0, *tail)),
        "row_grad": (2 * once, lambda: ops.row_grad(logits, out, norm, coef, 0, None, None, *tail)),
        "row_sides": (once, lambda: ops.row_sides(logits, sides, 0, *of_sides, *tail)),
        "row_grad, two sides": (
            2 * once,
            lambda: ops.row_grad(logits, out, norms, coefs, 0, *of_sides, *tail),
        ),
        "row_stats + row_grad": (3 * once, lambda: apart(out)),
        "row_loss_grad": (2 * once, lambda: fused(out)),
    }
    if dtype == torch.float32:
        narrow = torch.empty_like(logits, dtype=torch.bfloat16)
        calls["both, to bfloat16"] = (2 * once + once // 2, lambda: apart(narrow))
        calls["fused, to bfloat16"] = (once + once // 2, lambda: fused(narrow))
    return calls


def milliseconds(call: Callable[[], None]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def measure(rows: int, vocab: int, dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    calls = candidates(rows, vocab, dtype)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 3):
        for name, (_, call) in calls.items():
            elapsed = milliseconds(call)
            if i >= 3:
                times[name].append(elapsed)
    speed = {name: moved / statistics.median(times[name]) for name, (moved, _) in calls.items()}
    return [
        {
            "kernel": name,
            "dtype": str(dtype).removeprefix("torch."),
            "rows": rows,
            "vocab": vocab,
            "ms": statistics.median(times[name]),
            "gb_per_s": speed[name] / 1e6,
            "of_copy": speed[name] / speed["copy"],
        }
        for name in calls
    ]


def line(result: dict[str, object]) -> str:
    """A result of `measure`, as it is printed."""
    return (
        f"{result['dtype']:>9} V {result['vocab']:>7} x {result['rows']:>6}  {result['kernel']:<21}"
        f"{result['ms']:8.3f} ms {result['gb_per_s']:8.0f} GB/s {result['of_copy']:6.2f} of copy"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=1024, help="of logits")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cuda = next(row for row in backends.describe() if row["backend"] == "cuda")
    if not torch.cuda.is_available() or not cuda["available"]:
        sys.exit(f"bandwidth: needs a CUDA device and the CUDA extension ({cuda['detail']})")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {cuda['detail']}")
    results = []
    for dtype in DTYPES:
        for vocab in VOCABULARIES:
            rows = args.megabytes * 2**20 // (vocab * dtype.itemsize)
            for result in measure(rows, vocab, dtype, args.rounds):
                results.append(result)
                print(line(result))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
