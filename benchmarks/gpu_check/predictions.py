"""What an H100 should show, from bytes and FLOPs: said before anybody measured, to be held against it.

    python -m gpu_check.predictions       the table of docs/gpu.md

This file is their one definition; a test compares. A time is the sum over the phases of a step of its FLOPs
at the rate that cuBLAS reaches and its result's bytes at the memory's rate; operands are read while the
tensor cores work, and count where that takes longer. The three bare GEMMs are reckoned alike, and a
prediction is the ratio, so that a card that is slower in both is not a miss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from roofline import Phase
from tightrope.cli.bench.cases import Case

from .entries import ENTRIES, SHAPES, Entry, three_gemms

GEMM = 700e12  # FLOP/s of cuBLAS in bfloat16 on large matrices; the peak is 989e12
MEMORY = 3.35e12  # bytes/s
STREAM_SHARE = 0.6  # of GEMM, that kernels reach which make logits and use them at once
ROW_SHARE = 0.9  # of MEMORY, that passes over rows reach
# How far off a measurement may be: of ours, and of peers, whose bytes are counted from their sources alone.
OURS, PEERS = 0.15, 0.3


@dataclass(frozen=True)
class Prediction:
    """A number of the report, and where it should be.

    stage: that measures it. names: what its records are called there. field: of those records. low and high:
    what counts as held.
    """

    stage: str
    names: dict[str, object]
    field: str
    value: float
    low: float
    high: float

    @property
    def words(self) -> str:
        return ", ".join(str(name) for name in self.names.values())

    def measured(self, rows: Sequence[dict]) -> float | None:
        """The median of the records that it is about, None where there is none."""
        found = sorted(
            row[self.field]
            for row in rows
            if row.get(self.field) is not None and all(row.get(k) == v for k, v in self.names.items())
        )
        return found[len(found) // 2] if found else None

    def holds(self, measured: float) -> bool:
        return self.low <= measured <= self.high


def seconds(steps: Sequence[Phase]) -> float:
    """Of phases that follow each other."""
    return sum(map(_phase, steps))


def _phase(phase: Phase) -> float:
    if not phase.flops:
        return (phase.read + phase.result) / (ROW_SHARE * MEMORY)
    rate = GEMM * (STREAM_SHARE if phase.name.startswith("stream") else 1.0)
    return max(phase.flops / rate, phase.read / MEMORY) + phase.result / MEMORY


def times_gemms(entry: Entry, case: Case) -> float:
    """An entry's time at a shape, as a multiple of the three bare GEMMs."""
    return seconds(entry.phases(case)) / seconds(three_gemms(case))


def predictions() -> Iterator[Prediction]:
    """All of them, in the order of the report."""
    for case in SHAPES:
        for entry in ENTRIES:
            value, off = times_gemms(entry, case), OURS if entry.peer is None else PEERS
            names = {"shape": case.name, "name": entry.name}
            yield Prediction(
                f"speed {case.name}", names, "x_gemms", value, value * (1 - off), value * (1 + off)
            )
    for kernel in ("stream_stats", "stream_grad"):
        yield Prediction("kernels", {"name": kernel}, "share", STREAM_SHARE, 0.5, 0.75)
    for kernel in ("row_stats", "row_grad", "row_loss_grad", "fused, to bfloat16"):
        for dtype in ("bfloat16", "float32"):
            if kernel.startswith("fused") and dtype == "bfloat16":
                continue
            names = {"name": kernel, "dtype": dtype}
            yield Prediction("bandwidth", names, "of_copy", 1.0, 0.85, 1.15)


def table() -> str:
    """The times, as Markdown: an entry a line, a shape a column."""
    titles = [f"N {case.rows}, D {case.dim}, V {case.vocab}" for case in SHAPES]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(SHAPES) + 1) + "|"]
    floor = " | ".join(f"{1e3 * seconds(three_gemms(case)):.1f} ms" for case in SHAPES)
    lines.append(f"| three bare GEMMs | {floor} |")
    for entry in ENTRIES:
        cells = " | ".join(f"{times_gemms(entry, case):.2f}" for case in SHAPES)
        lines.append(f"| {entry.name} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
