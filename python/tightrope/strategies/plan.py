"""How much goes by at a time: tiles of the vocabulary, chunks of rows, and which strategy that allows.

The figures behind the constants are in docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    tile: int  # entries of the vocabulary in a tile, at least
    tile_logits: int  # with few rows a tile is wider, up to so many logits,
    widest_tile: int  # or so many entries;
    tile_head: int  # or so many elements of the head, where that is converted tile by tile
    streaming_rows: int  # that share one pass over a tile in the streaming strategy without fused kernels
    min_chunk_rows: int  # below this, dW's traffic costs the chunked strategy more than a fourth GEMM
    max_chunk_rows: int  # above this, a tile of a chunk's logits has left the cache before it is scored
    workspace_mb: float  # the default
    dense_logits: int  # logits that are converted or made contiguous at a time, where logits are given


# A tile of logits is scored while it is in a CPU's cache, and its GEMM runs up to 1.5 times faster on such
# tiles of the head than on the whole of it. A GPU wants large GEMMs; what is made for each tile there (a
# low-precision gradient, a float32 tile of dW) bounds them. docs/gpu.md has the figures of the GPU.
CPU = Sizes(
    tile=1024,
    tile_logits=2**19,
    widest_tile=16384,
    tile_head=2**22,
    streaming_rows=1024,
    min_chunk_rows=64,
    max_chunk_rows=512,
    workspace_mb=72.0,
    dense_logits=2**22,
)
# A tile there is larger than any cache, whatever the rows.
GPU = Sizes(
    tile=16384,
    tile_logits=0,
    widest_tile=16384,
    tile_head=0,
    streaming_rows=8192,
    min_chunk_rows=1024,
    max_chunk_rows=2**16,
    workspace_mb=1024.0,
    dense_logits=2**26,
)
# Rows of a chunk come in whole vectors of the widest instruction set, two at a time.
ROW_MULTIPLE = 32
# oneDNN keeps memory for each shape that it meets (`gemm`), so it is shown few: so many rows at a time, and
# up to so many rows a multiple of these.
ONEDNN_ROWS = 1024
_ROW_STEPS = ((1, 1), (4, 4), (128, 16), (512, 32), (ONEDNN_ROWS, 64))
# Whole rows of logits begin at multiples of this: 128 bytes of float32, for GEMMs and kernels of any V.
ROW_STRIDE = 32
# Entries of a dense target that the fused kernels take at a time: it is converted in pieces.
DENSE_TILE = 8192
# A tile of gradients from the fused kernels is this wide at least, and a multiple of it.
STREAM_STEP = 256


def sizes(device: torch.device) -> Sizes:
    return CPU if device.type == "cpu" else GPU


def tile_width(rows: int, device: torch.device, converted: int = 0) -> int:
    """Entries of the vocabulary in a tile. With few rows the cost of a tile is that of starting on it.

    One width for all numbers of rows that `filled_rows` makes one: few shapes go to a GEMM.
    converted: D, where the tile of the head is converted, and its gradient rounded, which takes memory.
    """
    own = sizes(device)
    widest = min(own.widest_tile, own.tile_head // converted) if converted else own.widest_tile
    return max(own.tile, min(own.tile_logits // max(filled_rows(rows), 1), widest))


def filled_rows(rows: int) -> int:
    """How many rows so many are filled up to where a GEMM is to meet few shapes."""
    step = next((step for most, step in _ROW_STEPS if rows <= most), 1)
    return -(-rows // step) * step


def workspace_bytes(workspace_mb: float | None, device: torch.device) -> int:
    return int((sizes(device).workspace_mb if workspace_mb is None else workspace_mb) * 2**20)


def spans(total: int, most: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut ``range(total)`` into the fewest, even spans of at most ``most``, in a multiple where it fits."""
    if total <= most:
        return [(0, total)] if total else []
    most = max(most - most % multiple, 1) if most >= multiple else max(most, 1)
    even = -(-total // -(-total // most))
    size = min(-(-even // multiple) * multiple, most)
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def chunk_rows(rows: int, vocab_size: int, itemsize: int, workspace: int) -> int:
    """Rows whose logits fit the workspace, at least one."""
    return max(1, min(rows, workspace // (vocab_size * itemsize)))


def chunk_spans(
    rows: int, owners: int, row: int, itemsize: int, workspace: int, device: torch.device
) -> list[tuple[int, int]]:
    """Spans of rows that the chunked strategy goes by: so many elements of the workspace a row.

    rows: of the rank that has most, where so many owners have rows of their own in a span.
    """
    size = min(chunk_rows(rows * owners, row, itemsize, workspace), sizes(device).max_chunk_rows)
    return spans(rows, max(size // owners, 1), ROW_MULTIPLE)


def tiled_chunk_spans(
    rows: int,
    owners: int,
    entries: int,
    dtype: torch.dtype,
    operand: torch.dtype,
    workspace: int,
    device: torch.device,
) -> list[tuple[int, int]]:
    """The same where a chunk's logits, of so many entries, go by tile by tile.

    dtype: of the arithmetic. operand: of what goes into GEMMs.
    """
    # Beside the logits, a tile of their gradients where that is narrower.
    tile = min(entries, tile_width(rows * owners, device))
    narrow = 0 if operand == dtype else tile // 2
    return chunk_spans(rows, owners, entries + narrow, dtype.itemsize, workspace, device)


def streaming_spans(
    rows: int, owners: int, entries: int, itemsize: int, workspace: int, device: torch.device
) -> list[tuple[int, int]]:
    """Spans of rows that share a tile of the vocabulary, for ranks of which none has more entries of it."""
    together = rows * owners
    width = min(tile_width(together, device), entries)
    block = chunk_rows(together, max(width, 1), itemsize, workspace)
    block = min(block, sizes(device).streaming_rows)
    return spans(rows, max(block // owners, 1), ROW_MULTIPLE)


def logits_spans(rows: int, entries: int, device: torch.device) -> list[tuple[int, int]]:
    """Spans of rows of logits that exist already."""
    return spans(rows, max(1, sizes(device).dense_logits // entries))


def stream_width(rows: int, vocab_size: int, itemsize: int, workspace: int, most: int) -> int:
    """Entries of the vocabulary whose gradients [rows, width] fit the workspace."""
    width = workspace // (max(rows, 1) * itemsize) // STREAM_STEP * STREAM_STEP
    return min(max(width, STREAM_STEP), most, vocab_size)


def choose_strategy(rows: int, vocab_size: int, itemsize: int, workspace: int, device: torch.device) -> str:
    """Chunked (three GEMMs) where the workspace holds chunks of good size, else streaming (four).

    ``rows`` counts ignored rows too, so that the choice needs nothing from the device.
    """
    capacity = workspace // (vocab_size * itemsize)
    # In this order the rows, which may be a symbol, are seldom looked at.
    enough = capacity >= sizes(device).min_chunk_rows or max(capacity, 1) >= rows
    return "chunked" if enough else "streaming"
