"""Tile configurations of the kernels, by architecture: one table, with the reason for each row.

They were chosen from compiled code (``benchmarks/aot_report.py``: no spills, shared memory within the limit,
the most tensor-core work for each issued instruction) and not from timings. TIGHTROPE_AUTOTUNE=1 times a few
neighbours of the streaming configurations when a kernel first meets a shape, and keeps the fastest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace


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


@dataclass(frozen=True)
class Architecture:
    shared_memory: int  # bytes that one program may have
    segments: int  # of the vocabulary in stream_stats: one for each processor, for 16 rows to fill it
    half: StreamConfig  # bfloat16 and float16
    single: StreamConfig  # float32
    half_dense: StreamConfig | None = None  # of stream_stats for dense targets, whose epilogue holds more
    single_dense: StreamConfig | None = None

    def stream(self, kernel: str, kind: str, itemsize: int) -> StreamConfig:
        """The configuration of a streaming kernel for a kind of target."""
        usual, dense = (self.half, self.half_dense) if itemsize == 2 else (self.single, self.single_dense)
        return dense if dense and kernel == "stream_stats" and kind == "dense" else usual


# IEEE float32 products are ordinary instructions on NVIDIA, whose operands fill the registers: small tiles,
# and smaller ones on sm_90 and sm_100, where the assembler settles on 128 registers and spills.
_SINGLE = StreamConfig(64, 64, 16, 8, 3, pieces=2)
_SINGLE_SMALL = StreamConfig(64, 32, 16, 8, 3, pieces=1)
ARCHITECTURES = {
    # mma.sync spreads the rows of a 128 x 128 tile over twice the threads' registers: it spills.
    "sm_80": Architecture(
        166912,
        108,
        StreamConfig(128, 64, 64, 8, 3, pieces=2),
        _SINGLE,
        half_dense=StreamConfig(128, 64, 32, 8, 4, pieces=2),
    ),
    # Descriptors leave addresses to the copy engine: 184 registers, with pointers 255. 128 x 256 spills.
    "sm_90": Architecture(
        232448,
        132,
        StreamConfig(128, 128, 64, 8, 3, descriptors=True),
        _SINGLE_SMALL,
        half_dense=StreamConfig(128, 64, 64, 8, 4, pieces=2, descriptors=True),
    ),
    # The accumulators stand in tensor memory, so all targets have room beside them.
    "sm_100": Architecture(232448, 148, StreamConfig(128, 128, 64, 8, 3, descriptors=True), _SINGLE_SMALL),
    # 512 registers a thread, and 64 KiB of shared memory, which two stages fill.
    "gfx942": Architecture(65536, 304, StreamConfig(128, 128, 64, 8, 2, pieces=2), _SINGLE),
    # Small tiles, so that small problems have several of them.
    "interpreter": Architecture(
        2**30,
        4,
        StreamConfig(32, 32, 32, 4, 1, pieces=2, group=2),
        StreamConfig(32, 32, 32, 4, 1, pieces=2, group=2),
    ),
}

# Row kernels: columns in a block, and blocks in the segment of a row that one program takes. They are bound
# by memory; a thread holds 16 logits of a block, and 16 rows of 150,000 make 160 programs.
ROW_BLOCK = 4096
ROW_BLOCKS = 4
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
    """What autotuning tries. The tile stays, so that a row's statistics stay what they are."""
    found = [config]
    for block_k in {config.block_k, max(16, config.block_k // 2)}:
        for stages in {config.stages, config.stages + 1, max(2, config.stages - 1)}:
            for group in (4, 8, 16):
                found.append(replace(config, block_k=block_k, stages=stages, group=group))
    return list(dict.fromkeys(found))
