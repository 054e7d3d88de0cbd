"""Tile configurations of the kernels, by architecture: one table, with the reason for each row.

They were chosen from compiled code (``benchmarks/aot_report.py``: no spills, shared memory within the limit,
the most tensor-core work for each issued instruction) and not from timings. TIGHTROPE_AUTOTUNE=1 times the
`neighbours` of a streaming configuration when its kernel first meets a shape, and keeps the fastest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class StreamConfig:
    block_m: int  # rows in a tile
    block_n: int  # entries of the vocabulary in a tile
    block_k: int  # hidden dimensions in a step
    warps: int
    stages: int  # steps of the GEMM that are loaded ahead
    pieces: int = 4  # that the epilogue takes a tile in: 1, 2 or 4
    descriptors: bool = False  # tensor descriptors (TMA) instead of pointers
    group: int = 8  # row blocks that share a piece of the head in the second-level cache
    precision: str = "ieee"  # of float32 products, a name of tl.dot's

    @property
    def constants(self) -> dict[str, object]:
        """What a streaming kernel is compiled with, by the names of its parameters."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP": self.group,
            "PIECES": self.pieces,
            "DESCRIPTORS": self.descriptors,
            "PRECISION": self.precision,
            "TOPK_BLOCK": STREAM_TOPK_BLOCK,
        }

    @property
    def options(self) -> dict[str, int]:
        """The compiler's own."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Architecture:
    shared_memory: int  # bytes that one program may have
    segments: int  # of the vocabulary in stream_stats: one for each processor, for 16 rows to fill it
    half: StreamConfig  # bfloat16 and float16
    single: StreamConfig  # float32
    # By kernel, kind of target and bytes of an element, where the epilogue holds more.
    special: dict[tuple[str, str, int], StreamConfig] = field(default_factory=dict)
    # Where rows are not loaded in whole vectors, which takes registers for single elements.
    half_unaligned: StreamConfig = StreamConfig(64, 64, 32, 8, 3, pieces=2)
    single_unaligned: StreamConfig = StreamConfig(64, 32, 16, 8, 3, pieces=1, precision="tf32x3")
    drawn_half: StreamConfig = StreamConfig(128, 128, 64, 8, 3)
    drawn_single: StreamConfig = StreamConfig(128, 64, 32, 8, 3, precision="tf32x3")

    def stream(self, kernel: str, kind: str, itemsize: int) -> StreamConfig:
        """The configuration of a streaming kernel for a kind of target."""
        return self.special.get((kernel, kind, itemsize), self.half if itemsize == 2 else self.single)

    def drawn(self, itemsize: int, aligned: bool) -> StreamConfig:
        """The configuration of the products with drawn columns. aligned: other rows come in whole vectors."""
        if itemsize == 8:
            return DRAWN_DOUBLE
        if itemsize == 4:
            return self.drawn_single if aligned else self.single_unaligned
        return self.drawn_half if aligned else DRAWN_UNALIGNED

    def unaligned(self, itemsize: int) -> StreamConfig:
        """The configuration for operands whose rows are not loaded in whole vectors."""
        return self.half_unaligned if itemsize == 2 else self.single_unaligned


# float64 is for checks, not for work.
DRAWN_DOUBLE = StreamConfig(32, 32, 16, 4, 2)
# Of bfloat16; with steps of 32, as the others take them, sm_100 spills a few bytes.
DRAWN_UNALIGNED = StreamConfig(64, 64, 64, 8, 3)
# float32 products on NVIDIA: three tensor-core products of the operands' two tf32 parts, added up outside of
# the tensor cores in float32 (docs/gpu.md). What splits the operands takes registers.
_SINGLE = StreamConfig(128, 64, 32, 8, 3, pieces=2, descriptors=True, precision="tf32x3")
# Dense targets of rows that do not start at whole vectors (V 50257) are loaded entry by entry.
_DENSE = StreamConfig(64, 64, 64, 8, 4, pieces=2, descriptors=True)
# Small tiles, so that small problems have several of them.
_TINY = StreamConfig(32, 32, 32, 4, 1, pieces=2, group=2)
ARCHITECTURES = {
    # mma.sync spreads the rows of a 128 x 128 tile over twice the threads' registers: it spills.
    "sm_80": Architecture(
        166912,
        108,
        StreamConfig(128, 64, 64, 8, 3, pieces=2),
        StreamConfig(128, 64, 16, 8, 3, pieces=2, precision="tf32x3"),
        special={
            ("stream_stats", "dense", 2): StreamConfig(64, 64, 32, 8, 4, pieces=2),
            ("stream_stats", "topk", 2): StreamConfig(64, 64, 32, 8, 4, pieces=2),
            # In two pieces, statistics of a dense target need a few registers more than there are;
            ("stream_stats", "dense", 4): StreamConfig(128, 64, 16, 8, 3, pieces=4, precision="tf32x3"),
        },
        # and so here.
        half_unaligned=StreamConfig(64, 64, 32, 8, 3, pieces=4),
    ),
    # Descriptors leave addresses to the copy engine: 184 registers, with pointers 255. 128 x 256 spills.
    "sm_90": Architecture(
        232448,
        132,
        StreamConfig(128, 128, 64, 8, 3, descriptors=True),
        _SINGLE,
        special={
            ("stream_stats", "dense", 2): _DENSE,
            ("stream_stats", "topk", 2): replace(_DENSE, block_m=128),
            ("stream_stats", "dense", 4): replace(_SINGLE, block_m=64),
            ("stream_grad", "dense", 2): replace(_DENSE, block_m=128),
        },
    ),
    # The accumulators stand in tensor memory, so most targets have room beside them. Those of float32 do not.
    "sm_100": Architecture(
        232448,
        148,
        StreamConfig(128, 128, 64, 8, 3, descriptors=True),
        replace(_SINGLE, block_m=64, pieces=1),
        special={
            ("stream_stats", "dense", 2): _DENSE,
            # Of float32, those that the assembler holds to few registers, and spills a few bytes.
            ("stream_stats", "none", 4): replace(_SINGLE, block_m=64, pieces=4),
            ("stream_stats", "topk", 4): _SINGLE,
        },
        single_unaligned=StreamConfig(64, 32, 32, 8, 3, pieces=1, precision="tf32x3"),
    ),
    # 512 registers a thread, and 64 KiB of shared memory, which two stages fill.
    # It has matrix instructions for float32 itself.
    "gfx942": Architecture(
        65536,
        304,
        StreamConfig(128, 128, 64, 8, 2, pieces=2),
        StreamConfig(64, 64, 16, 8, 3, pieces=2),
        special={("stream_stats", "dense", 2): StreamConfig(64, 128, 64, 8, 2, pieces=2)},
        single_unaligned=StreamConfig(64, 32, 16, 8, 3, pieces=1),
        drawn_single=StreamConfig(64, 64, 16, 8, 3),
    ),
    "interpreter": Architecture(2**30, 4, *(_TINY,) * 2, {}, *(_TINY,) * 4),
}

# Row kernels: columns in a block, and blocks in the segment of a row that one program takes. They are bound
# by memory; a thread holds 16 logits of a block, and 16 rows of 150,000 make 160 programs.
ROW_BLOCK = 4096
ROW_BLOCKS = 4
# Of row_sides, which holds the logits of both sides: with 16 to a thread some variants spill.
SIDES_BLOCK = 2048
SIDES_BLOCKS = 8
# Columns in a program of row_grad and row_grad_tangent: with 16 to a thread the assembler spills a few bytes
# in some variants.
GRAD_BLOCK = 2048
# With a set each entry has its own coefficients: 8 to a thread spill a few bytes on sm_80.
SET_GRAD_BLOCK = 1024
# Of row_tangent, which keeps up to 14 sums for each column of a block: one for each lane and side.
TANGENT_BLOCK = 1024
TANGENT_BLOCKS = 16
# Of row_grad_sums: columns of a block, and the rows that one program adds up. A thread holds four columns of
# a row and of its sums; of 32 rows the parts of the sums are a tenth of the bytes of the gradient.
SUMS_BLOCK = 1024
SUMS_ROWS = 32
# Of drawn_columns, columns by rows: addresses of 64 bits take most of the registers.
DRAWN_BLOCK = 16
DRAWN_ROWS = 64
ROW_WARPS = 8
# Top-k entries of a row that are looked at together; of the many rows of a streaming tile, fewer.
TOPK_BLOCK = 64
STREAM_TOPK_BLOCK = 8
# Statistics of a merge that are held at a time: parts times rows.
MERGE_TILE = 1024


def architecture_name(backend: str, arch: int | str) -> str:
    """The row of the table for a Triton target. Relatives of a listed one use its row."""
    if backend == "hip":
        return "gfx942"
    number = int(arch)
    return "sm_100" if 100 <= number < 120 else "sm_90" if number == 90 else "sm_80"


def autotuning() -> bool:
    return os.environ.get("TIGHTROPE_AUTOTUNE") == "1"


def neighbours(config: StreamConfig) -> list[StreamConfig]:
    """What autotuning tries: itself first, and others that give the same bits.

    Tile, step and warps decide the order of sums, so they stay.
    """
    found = [config]
    for stages in (config.stages, config.stages + 1, max(2, config.stages - 1)):
        for group in (config.group, 4, 8, 16):
            found.append(replace(config, stages=stages, group=group))
    return list(dict.fromkeys(found))
