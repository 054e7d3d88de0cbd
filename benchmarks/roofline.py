"""FLOPs, bytes and the least time of each strategy on each chip, from published rates.

A phase (a GEMM, a pass over rows) takes at least its FLOPs over the peak rate and at least its bytes over the
memory bandwidth, and phases follow each other. Real GEMMs reach 60 to 85 % of the peak, and a row pass 85 to
90 % of the bandwidth, so these are floors and not forecasts. Pieces of W and of h are counted once for each
time a phase reads them from memory; what the second-level cache must deliver is in `flop_per_l2_byte`
of the report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tightrope.strategies import plan


@dataclass(frozen=True)
class Chip:
    name: str
    tera_bf16: float  # dense tensor-core TFLOP/s
    tera_fp32: float  # of products of float32: a third of the tf32 rate on NVIDIA, three of which make one
    bandwidth: float  # TB/s
    processors: int
    gigahertz: float  # boost clock
    issue_cycles: int = 1  # that a scheduler is busy with one vector instruction

    def flops_per_cycle(self, dtype: str) -> float:
        """Of one processor."""
        tera = self.tera_fp32 if dtype == "fp32" else self.tera_bf16
        return tera * 1e3 / (self.processors * self.gigahertz)


# As published by the vendors.
CHIPS = {
    "sm_80": Chip("A100 SXM 80 GB", 312, 52, 2.039, 108, 1.41),
    "sm_90": Chip("H100 SXM", 989.4, 164.9, 3.35, 132, 1.83),
    "sm_100": Chip("B200", 2250, 375, 8.0, 148, 1.85),
    "gfx942": Chip("MI300X", 1307.4, 163.4, 5.3, 304, 2.1, issue_cycles=4),
}
# N, D, V
SHAPES = ((8192, 4096, 128256), (8192, 4096, 151936), (16384, 2048, 248320))
ITEM = 2  # bfloat16


@dataclass(frozen=True)
class Phase:
    """FLOPs of products, bytes read, and bytes of the result, where what is summed into counts twice."""

    name: str
    flops: float
    read: float
    result: float


def chunk_count(n: int, v: int, fused: bool = False, workspace_mb: float | None = None) -> int:
    """Chunks that n rows go by in."""
    # Gradients of a tile that are narrower than its logits; fused, they stand where those were.
    narrow = 0 if fused else plan.GPU.tile // 2
    return math.ceil(n / plan.chunk_rows(n, v + narrow, 4, plan.workspace_bytes(workspace_mb, plan_device())))


def phases(strategy: str, n: int, d: int, v: int, frozen: bool = False) -> list[Phase]:
    """What a training step's loss does. strategy: "chunked", "fused" (chunked, in one launch) or "streaming".

    frozen: without a gradient of the head.
    """
    gemm = 2.0 * n * d * v
    head, hidden, logits = v * d * ITEM, n * d * ITEM, n * v
    if strategy in ("chunked", "fused"):
        chunks = chunk_count(n, v, strategy == "fused")
        once, twice = ("row_loss_grad",), ("row_stats", "row_grad")
        rows = [
            Phase(name, 0, 4 * logits, 0 if name == "row_stats" else ITEM * logits)
            for name in (once if strategy == "fused" else twice)
        ]
        found = [
            Phase("logits", gemm, chunks * head + hidden, 4 * logits),
            *rows,
            Phase("dh", gemm, ITEM * logits + chunks * head, 4 * n * d),
            # Every chunk but the first reads the float32 sum as well; it is rounded at the end.
            Phase("dW", gemm, ITEM * logits + hidden, (2 * chunks - 1) * 4 * v * d),
        ]
    else:
        width = plan.stream_width(n, v, ITEM, plan.workspace_bytes(None, plan_device()), plan.GPU.tile)
        tiles = math.ceil(v / width)
        found = [
            Phase("stream_stats", gemm, head + hidden, 0),
            Phase("stream_grad", gemm, head + tiles * hidden, ITEM * logits),
            Phase("dh", gemm, ITEM * logits + head, (2 * tiles - 1) * 4 * n * d),
            Phase("dW", gemm, ITEM * logits + tiles * hidden, 4 * v * d),
        ]
    rounded = n * d
    if frozen:
        found = [phase for phase in found if phase.name != "dW"]
    else:
        rounded += v * d
    return [*found, Phase("round", 0, 4 * rounded, ITEM * rounded)]


def plan_device():
    import torch

    return torch.device("cuda")


def table() -> list[dict]:
    rows = []
    for n, d, v in SHAPES:
        for arch, chip in CHIPS.items():
            bare = 3 * 2.0 * n * d * v / (chip.tera_bf16 * 1e9)
            for strategy in ("chunked", "fused", "streaming"):
                parts = {}
                steps = phases(strategy, n, d, v)
                for step in steps:
                    compute = step.flops / (chip.tera_bf16 * 1e9)
                    memory = (step.read + step.result) / (chip.bandwidth * 1e9)
                    parts[step.name] = (max(compute, memory), "memory" if memory > compute else "compute")
                total = sum(time for time, _ in parts.values())
                rows.append(
                    {
                        "n": n,
                        "d": d,
                        "v": v,
                        "arch": arch,
                        "chip": chip.name,
                        "strategy": strategy,
                        "teraflop": round(sum(s.flops for s in steps) / 1e12, 2),
                        "gigabytes": round(sum(s.read + s.result for s in steps) / 1e9, 2),
                        "floor_ms": round(total, 2),
                        "three_gemms_ms": round(bare, 2),
                        "phases": {name: {"ms": round(t, 3), "bound": b} for name, (t, b) in parts.items()},
                    }
                )
    return rows


def print_table(rows: list[dict]) -> None:
    print("Floors on paper, bfloat16, ms (m: bound by memory, else by tensor cores)")
    for row in rows:
        phases_text = "  ".join(
            f"{name} {part['ms']:.2f}{'m' if part['bound'] == 'memory' else ''}"
            for name, part in row["phases"].items()
        )
        print(
            f"N {row['n']} D {row['d']} V {row['v']}  {row['chip']:<15} {row['strategy']:<10}"
            f"{row['teraflop']:>7} TFLOP {row['gigabytes']:>7} GB  floor {row['floor_ms']:>7} "
            f"(three GEMMs {row['three_gemms_ms']})  {phases_text}"
        )
