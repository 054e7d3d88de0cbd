"""One training step's loss on the CPU, forward and backward, against the floor of three bare GEMMs.

Times are medians of rounds in which the candidates take turns, so that all see the same machine; read
the ratios, the milliseconds are this machine's. The floor is three `torch.mm` of the step's shapes into
fresh outputs: the logits, dh and dW. Memory is the growth of the resident set over a first step, in a
process of its own, less the gradients that the step returns.

    python benchmarks/cpu_step.py [--rounds 7] [--rows 1024] [--dim 768] [--vocab 50257] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tightrope
from tightrope import backends
from tightrope.cli.probe import eager_loss, peak_bytes

BALANCE = 0.1
IGNORED = 0.7


class Step:
    """The tensors of a step, and the candidates that compute it."""

    def __init__(self, rows: int, dim: int, vocab: int):
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(rows, dim, generator=generator).requires_grad_()
        self.weight = (torch.randn(vocab, dim, generator=generator) * dim**-0.5).requires_grad_()
        self.target = torch.randint(vocab, (rows,), generator=generator)
        ignored = torch.rand(rows, generator=generator) < IGNORED
        self.partly_ignored = self.target.masked_fill(ignored, -100)
        self.frozen = self.weight.detach()
        self.low = [t.detach().bfloat16().requires_grad_() for t in (self.hidden, self.weight)]
        self.compiled_loss = torch.compile(eager_loss)

    def gemms(self) -> None:
        with torch.no_grad():
            logits = torch.mm(self.hidden, self.frozen.t())
            torch.mm(logits, self.frozen)
            torch.mm(logits.t(), self.hidden)

    def ours(self, target=None, weight=None, **options) -> None:
        self._step(
            lambda h, w, y, balance: tightrope.linear_reality_creativity_loss(
                h, w, y, balance=balance, **options
            ),
            self.hidden,
            self.weight if weight is None else weight,
            self.target if target is None else target,
        )

    def bfloat16(self) -> None:
        hidden, weight = self.low
        self._step(
            lambda h, w, y, balance: tightrope.linear_reality_creativity_loss(h, w, y, balance=balance),
            hidden,
            weight,
            self.target,
        )

    def eager(self) -> None:
        self._step(eager_loss, self.hidden, self.weight, self.target)

    def compiled(self) -> None:
        self._step(self.compiled_loss, self.hidden, self.weight, self.target)

    @staticmethod
    def _step(loss_fn, hidden, weight, target) -> None:
        hidden.grad = weight.grad = None
        loss_fn(hidden, weight, target, BALANCE).backward()

    def candidates(self) -> dict[str, Callable[[], None]]:
        return {
            "three bare GEMMs": self.gemms,
            "tightrope": self.ours,
            "tightrope, streaming": lambda: self.ours(strategy="streaming"),
            "tightrope, 70 % ignored": lambda: self.ours(target=self.partly_ignored),
            "tightrope, frozen head": lambda: self.ours(weight=self.frozen),
            "tightrope, bfloat16": self.bfloat16,
            "eager PyTorch": self.eager,
            "torch.compile": self.compiled,
        }


def timed(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every candidate, the candidates taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for step in candidates.values():
        step()
    for done in range(rounds):
        for name, step in candidates.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
        print(f"  round {done + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def _memory(shape: tuple[int, int, int], name: str, queue) -> None:
    Step(8, shape[1], 64).candidates()[name]()  # loads code, starts threads, makes the GEMM's own buffers
    step = Step(*shape)
    gradients = step.hidden.nbytes + step.weight.nbytes
    queue.put(peak_bytes(step.candidates()[name]) - gradients)


def memory_mb(shape: tuple[int, int, int], name: str) -> float:
    """Peak MB (10^6 bytes) beyond inputs and returned gradients, of a first step in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_memory, args=(shape, name, queue))
    child.start()
    peak = queue.get(timeout=600)
    child.join()
    return peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    shape = (args.rows, args.dim, args.vocab)
    loaded = next(b["detail"] for b in backends.describe() if b["backend"] == "cpu")
    print(
        f"N {args.rows}, D {args.dim}, V {args.vocab}, float32, balance {BALANCE}; "
        f"torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, {loaded}"
    )
    seconds = timed(Step(*shape).candidates(), args.rounds)
    floor = statistics.median(seconds["three bare GEMMs"])
    ours = statistics.median(seconds["tightrope"])
    print(f"{'':26}{'ms':>8}{'spread':>9}{'x GEMMs':>9}{'x ours':>8}")
    rows = []
    for name, samples in seconds.items():
        median = statistics.median(samples)
        spread = (max(samples) - min(samples)) / median
        rows.append(
            {
                "name": name,
                "ms": 1e3 * median,
                "spread": spread,
                "x_gemms": median / floor,
                "x_ours": median / ours,
            }
        )
        print(f"{name:26}{1e3 * median:8.0f}{spread:9.0%}{median / floor:9.2f}{median / ours:8.2f}")
    memory = {}
    for factor in (1, 4):
        for name in ("tightrope", "tightrope, streaming", "eager PyTorch")[: 3 if factor == 1 else 2]:
            larger = (args.rows * factor, *shape[1:])
            memory[f"{name}, N {larger[0]}"] = peak = memory_mb(larger, name)
            print(f"memory beyond the gradients, {name}, N {larger[0]}: {peak:.0f} MB")
    if args.json:
        args.json.write_text(json.dumps({"shape": shape, "times": rows, "memory_mb": memory}, indent=1))


if __name__ == "__main__":
    main()
