"""The Triton backend: launches kernels/ for the primitives whose contract is at the top of ``ops.py``.

`stream_stats` and `stream_grad` take hidden states [R, D] and a piece of the head [T, D], of one dtype
(float32, bfloat16 or float16), in the place of logits [R, T], and a top-k target sorted by class; the rest of
their contract is that of row_stats and row_grad. Nothing here waits for the device, but autotuning on
request. Imported when first used: under TRITON_INTERPRET=1 the kernels run on CPU tensors,
slowly, for tests and for people without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..arguments import SideArguments, TileArguments
from ..kernels import configs, rows, stream
from .ops import in_set

INTERPRETED = not isinstance(rows.row_stats, triton.JITFunction)
# Kinds of target, by the numbers of kernels/arithmetic.py.
KINDS = ("none", "index", "dense", "topk")
# The parts of stream_stats that exist at a time, in bytes.
_PARTS_BYTES = 2**26


@functools.cache
def architecture() -> configs.Architecture:
    """The table's row for the current device. Asked once: a process with unlike GPUs uses the first one's."""
    if INTERPRETED:
        return configs.ARCHITECTURES["interpreter"]
    target = triton.runtime.driver.active.get_current_target()
    return configs.ARCHITECTURES[configs.architecture_name(target.backend, target.arch)]


def _target(tile: TileArguments) -> tuple[int, Tensor | None, Tensor | None, int]:
    """Kind, target, probabilities and row stride, as the kernels take them."""
    if tile.dense is not None:
        return 2, tile.dense, None, tile.dense.stride(0)
    if tile.topk_index is not None:
        return 3, tile.topk_index, tile.topk_prob, tile.topk_index.shape[1]
    return (0, None, None, 0) if tile.index is None else (1, tile.index, None, 0)


def _members(logits: Tensor, offset: int, sides: SideArguments) -> tuple[int, Tensor | None, int]:
    """Kind of set, what tells its entries, and row stride, as the kernels take them."""
    if sides.threshold is not None:
        return 1, sides.threshold, 0
    if sides.classes is None:
        return 0, None, 0
    # Looking for each class in a list would take a program as many steps as the list is long.
    members = in_set(logits, offset, sides)
    return 2, members, members.stride(0)


def _part(tile: TileArguments, rows: slice) -> TileArguments:
    """The arguments of some of the rows."""
    per_row = ("index", "dense", "topk_index", "topk_prob", "active")
    given = {name: getattr(tile, name) for name in per_row}
    return replace(tile, **{name: None if t is None else t[rows] for name, t in given.items()})


def _by_rows(logits: Tensor) -> Tensor:
    """Logits of unit stride along the vocabulary, as all are on a GPU; on a CPU they may be transposed."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


@contextmanager
def _writable(out: Tensor, contiguous: bool = False) -> Iterator[Tensor]:
    """Where a kernel writes what is to stand in out: the interpreter truncates bfloat16."""
    truncated = INTERPRETED and out.dtype == torch.bfloat16
    if not truncated and (out.is_contiguous() if contiguous else _by_rows(out) is out):
        yield out
        return
    wide = torch.empty(out.shape, dtype=torch.float32 if truncated else out.dtype, device=out.device)
    yield wide
    out.copy_(wide)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _new_parts(splits: int, *wholes: Tensor) -> list[Tensor]:
    """Memory for so many parts of each."""
    return [w.new_empty(splits, *w.shape) for w in wholes]


def _merge(kernel, merged, known, active, *grid: int) -> None:
    """Merge parts [splits, ..., rows] of some tensors into what was known of them."""
    splits, count = merged[0].shape[0], merged[0].shape[-1]
    width = _power_of_two(splits)
    block = max(1, configs.MERGE_TILE // width)
    kernel[(triton.cdiv(count, block), *grid)](
        *merged, *known, active, count, splits, ROWS=block, SPLITS=width, num_warps=4
    )


def row_stats(logits, partial, argmax, offset, *arguments) -> None:
    """Merge the statistics of a tile of logits into partial and argmax."""
    count, columns = logits.shape
    if count == 0 or columns == 0:
        return
    logits = _by_rows(logits)
    splits = triton.cdiv(columns, configs.ROW_BLOCK * configs.ROW_BLOCKS)
    parts, best = _new_parts(splits, partial, argmax)
    tile = TileArguments(*arguments)
    kind, target, target_prob, target_stride = _target(tile)
    rows.row_stats[(count, splits)](
        logits,
        parts,
        best,
        target,
        target_prob,
        tile.bias,
        tile.active,
        count,
        columns,
        logits.stride(0),
        target_stride,
        offset,
        float(tile.logit_scale),
        tile.softcap or 0.0,
        TARGET=kind,
        CAPPED=tile.softcap is not None,
        BLOCK=configs.ROW_BLOCK,
        BLOCKS=configs.ROW_BLOCKS,
        TOPK_BLOCK=configs.TOPK_BLOCK,
        num_warps=configs.ROW_WARPS,
    )
    _merge(rows.merge_parts, (parts, best), (partial, argmax), tile.active)


def row_sides(logits, sides, offset, threshold, classes, *arguments) -> None:
    """Merge the statistics of the two sides of a tile into sides."""
    count, columns = logits.shape
    if count == 0 or columns == 0:
        return
    kind, members, members_stride = _members(logits, offset, SideArguments(threshold, classes))
    logits = _by_rows(logits)
    splits = triton.cdiv(columns, configs.SIDES_BLOCK * configs.SIDES_BLOCKS)
    (parts,) = _new_parts(splits, sides)
    tile = TileArguments(*arguments)
    rows.row_sides[(count, splits)](
        logits,
        parts,
        members,
        tile.bias,
        tile.active,
        count,
        columns,
        logits.stride(0),
        members_stride,
        float(tile.logit_scale),
        tile.softcap or 0.0,
        SET=kind,
        CAPPED=tile.softcap is not None,
        BLOCK=configs.SIDES_BLOCK,
        BLOCKS=configs.SIDES_BLOCKS,
        num_warps=configs.ROW_WARPS,
    )
    _merge(rows.merge_sides, (parts,), (sides,), tile.active, 2)


def row_grad(logits, out, norm, coef, offset, threshold, classes, *arguments) -> None:
    """Write dloss/dlogits of a tile to out, which may be the logits, or narrower."""
    count, columns = logits.shape
    if count == 0 or columns == 0:
        return
    tile = TileArguments(*arguments)
    which, members, members_stride = _members(logits, offset, SideArguments(threshold, classes))
    kind, target, target_prob, target_stride = _target(tile)
    logits = _by_rows(logits)
    block = configs.GRAD_BLOCK if members is None else configs.SET_GRAD_BLOCK
    with _writable(out) as out:
        rows.row_grad[(count, triton.cdiv(columns, block))](
            logits,
            out,
            norm,
            coef,
            members,
            target,
            target_prob,
            tile.bias,
            tile.active,
            count,
            columns,
            logits.stride(0),
            out.stride(0),
            members_stride,
            target_stride,
            offset,
            float(tile.logit_scale),
            tile.softcap or 0.0,
            SET=which,
            TARGET=kind,
            CAPPED=tile.softcap is not None,
            BLOCK=block,
            num_warps=configs.ROW_WARPS,
        )


def serves_stream(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the streaming kernels take these: of one dtype, and not float64, which goes by rows."""
    return hidden.dtype == weight.dtype and hidden.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _operands(kernel: str, kind: int, hidden: Tensor, weight: Tensor):
    """(configuration, hidden, weight): as the GEMM reads them, of unit stride along D."""
    if INTERPRETED and hidden.dtype == torch.bfloat16:
        # The interpreter's tl.dot multiplies the bit patterns of bfloat16.
        hidden, weight = hidden.float(), weight.float()
    hidden, weight = (t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous() for t in (hidden, weight))
    table, itemsize = architecture(), hidden.dtype.itemsize
    config = table.stream(kernel, KINDS[kind], itemsize)
    if not all(_aligned(t, 16 // itemsize if config.descriptors else 16) for t in (hidden, weight)):
        config = table.unaligned(itemsize)
    return config, hidden, weight


def _aligned(tensor: Tensor, multiple: int) -> bool:
    """Whether its rows are loaded in whole vectors: of some multiple of elements, and by 16 bytes."""
    width, stride = tensor.shape[1], tensor.stride(0)
    sizes_fit = width > 0 and stride > 0 and width % multiple == 0 and stride % multiple == 0
    return sizes_fit and tensor.data_ptr() % 16 == 0


# What autotuning chose, by kernel, constants and shape of the head; not by rows, so that it is done once.
_chosen: dict[tuple, configs.StreamConfig] = {}


def _milliseconds(run) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def _fastest(config: configs.StreamConfig, run) -> configs.StreamConfig:
    """The neighbour of a configuration for which run(it) takes the least time.

    A streaming kernel writes its outputs whole and reads none of them, so it may run any number of times.
    """

    def time(candidate) -> float:
        try:
            return _milliseconds(lambda: run(candidate))
        except triton.runtime.errors.OutOfResources:  # more stages than shared memory holds
            return float("inf")

    return min(configs.neighbours(config), key=time)


def _launch(kernel, config, programs, hidden, weight, *arguments, **meta) -> None:
    """Run a streaming kernel on operands that `_operands` gave."""
    if config.descriptors:
        hidden = TensorDescriptor.from_tensor(hidden, [config.block_m, config.block_k])
        weight = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k])

    def run(c: configs.StreamConfig) -> None:
        kernel[(programs,)](hidden, weight, *arguments, **meta, **c.constants, **c.options)

    if configs.autotuning() and not INTERPRETED:
        key = (kernel, config, *weight.shape, *meta.values())
        # Timing waits for the device, which a graph that is being captured forbids.
        if key not in _chosen and not torch.cuda.is_current_stream_capturing():
            _chosen[key] = _fastest(config, run)
        config = _chosen.get(key, config)
    run(config)


def _splits(columns: int, config: configs.StreamConfig) -> int:
    """How many segments the kernel cuts a vocabulary into: by the vocabulary alone, for batch invariance."""
    tiles = triton.cdiv(columns, config.block_n)
    return triton.cdiv(tiles, triton.cdiv(tiles, architecture().segments))


def stream_stats(hidden, weight, partial, argmax, offset, *arguments) -> None:
    """Merge the statistics of ``hidden @ weight.T`` into partial and argmax."""
    columns, width = weight.shape
    if hidden.shape[0] == 0 or columns == 0:
        return
    tile = TileArguments(*arguments)
    kind, target, target_prob, target_stride = _target(tile)
    config, hidden, weight = _operands("stream_stats", kind, hidden, weight)
    splits = _splits(columns, config)
    most = _PARTS_BYTES // (splits * 4 * (partial.shape[0] + 2)) // config.block_m * config.block_m
    most = max(most, config.block_m)
    if hidden.shape[0] > most:
        for start in range(0, hidden.shape[0], most):
            part = slice(start, start + most)
            known = partial[:, part].contiguous()
            stream_stats(hidden[part], weight, known, argmax[part], offset, *_part(tile, part).flat())
            partial[:, part] = known
        return
    count = hidden.shape[0]
    parts, best = _new_parts(splits, partial, argmax)
    _launch(
        stream.stream_stats,
        config,
        triton.cdiv(count, config.block_m) * splits,
        hidden,
        weight,
        parts,
        best,
        target,
        target_prob,
        tile.bias,
        count,
        columns,
        width,
        hidden.stride(0),
        weight.stride(0),
        target_stride,
        offset,
        float(tile.logit_scale),
        tile.softcap or 0.0,
        TARGET=kind,
        CAPPED=tile.softcap is not None,
        SEGMENTS=architecture().segments,
    )
    _merge(rows.merge_parts, (parts, best), (partial, argmax), tile.active)


def stream_grad(hidden, weight, out, norm, coef, offset, *arguments) -> None:
    """Write the gradient of the logits ``hidden @ weight.T`` to out [R, T]."""
    count, (columns, width) = hidden.shape[0], weight.shape
    if count == 0 or columns == 0:
        return
    tile = TileArguments(*arguments)
    kind, target, target_prob, target_stride = _target(tile)
    config, hidden, weight = _operands("stream_grad", kind, hidden, weight)
    with _writable(out, contiguous=True) as out:
        _launch(
            stream.stream_grad,
            config,
            triton.cdiv(count, config.block_m) * triton.cdiv(columns, config.block_n),
            hidden,
            weight,
            out,
            norm,
            coef,
            target,
            target_prob,
            tile.bias,
            tile.active,
            count,
            columns,
            width,
            hidden.stride(0),
            weight.stride(0),
            target_stride,
            offset,
            float(tile.logit_scale),
            tile.softcap or 0.0,
            TARGET=kind,
            CAPPED=tile.softcap is not None,
        )
