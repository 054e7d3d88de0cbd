"""How much goes by at a time: tiles of the vocabulary, chunks of rows, and which strategy that allows.

The figures behind the constants are in docs/performance.md.
"""

from __future__ import annotations

# Entries of the vocabulary in a tile. A tile of logits is scored while it is in cache, and a CPU's GEMM
# runs up to 1.5 times faster on such tiles of the head than on the whole of it.
TILE = 1024
# Rows that share one pass over a tile in the streaming strategy.
STREAMING_ROWS = 1024
# Rows of a chunk come in whole vectors of the widest instruction set, two at a time.
ROW_MULTIPLE = 32
# Below this many rows a chunk, reading and writing all of dW for each chunk costs more than the streaming
# strategy's fourth GEMM.
MIN_CHUNK_ROWS = 32
DEFAULT_WORKSPACE_MB = 72.0


def workspace_bytes(workspace_mb: float | None) -> int:
    return int((DEFAULT_WORKSPACE_MB if workspace_mb is None else workspace_mb) * 2**20)


def spans(total: int, most: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut ``range(total)`` into the fewest, even spans of at most ``most``, in a multiple where it fits."""
    if total == 0:
        return []
    most = max(most - most % multiple, 1) if most >= multiple else max(most, 1)
    even = -(-total // -(-total // most))
    size = min(-(-even // multiple) * multiple, most)
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def chunk_rows(rows: int, vocab_size: int, itemsize: int, workspace: int) -> int:
    """Rows whose logits fit the workspace, at least one."""
    return max(1, min(rows, workspace // (vocab_size * itemsize)))


def choose_strategy(rows: int, vocab_size: int, itemsize: int, workspace: int) -> str:
    """Chunked (three GEMMs) where the workspace holds chunks of good size, else streaming (four).

    ``rows`` counts ignored rows too, so that the choice needs nothing from the device.
    """
    enough = chunk_rows(rows, vocab_size, itemsize, workspace) >= min(rows, MIN_CHUNK_ROWS)
    return "chunked" if enough else "streaming"
