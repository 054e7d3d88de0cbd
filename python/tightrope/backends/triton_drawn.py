"""The Triton backend's primitives of sampled gradients, whose contract is at the top of ``ops.py``.

As ``triton.py``, with whose helpers they launch kernels/drawn.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..arguments import SideArguments, TileArguments
from ..kernels import configs, drawn
from .triton import (
    INTERPRETED,
    _aligned,
    _by_rows,
    _members,
    _new_parts,
    _target,
    _writable,
    architecture,
)


def row_grad_sums(
    logits, out, norm, coef, along, scale, sums, offset, threshold, classes, *arguments
) -> None:
    """Write dloss/dlogits of a tile to out, which may be the logits, and the sums of its columns to sums."""
    count, columns = logits.shape
    if count == 0 or columns == 0:
        sums.zero_()
        return
    tile = TileArguments(*arguments)
    which, members, members_stride = _members(logits, offset, SideArguments(threshold, classes))
    kind, target, target_prob, target_stride = _target(tile)
    logits = _by_rows(logits)
    (parts,) = _new_parts(triton.cdiv(count, configs.SUMS_ROWS), sums)
    with _writable(out) as out:
        drawn.row_grad_sums[(len(parts), triton.cdiv(columns, configs.SUMS_BLOCK))](
            logits,
            out,
            norm,
            coef,
            members,
            target,
            target_prob,
            tile.bias,
            tile.active,
            along,
            scale if isinstance(scale, Tensor) else sums.new_full((), scale),
            parts,
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
            RANK=len(along),
            BLOCK=configs.SUMS_BLOCK,
            ROWS=configs.SUMS_ROWS,
            num_warps=configs.ROW_WARPS,
        )
    sums.copy_(parts.sum(0))


def drawn_columns(grad, tile, index, count, factor, along, basis, first, out) -> None:
    """Write drawn columns of a gradient less what lies along the basis, times factors, to out."""
    most, width = out.shape
    grid = triton.cdiv(most, configs.DRAWN_BLOCK), triton.cdiv(width, configs.DRAWN_ROWS)
    with _writable(out) as out:
        drawn.drawn_columns[grid](
            grad,
            out,
            index,
            count,
            factor,
            along,
            basis,
            basis.shape[1],
            along.shape[1],
            tile,
            width,
            first,
            most,
            RANK=len(along),
            BLOCK=configs.DRAWN_BLOCK,
            ROWS=configs.DRAWN_ROWS,
            num_warps=4,
        )


def drawn_by_head(part, weight, index, count, first, out) -> None:
    """Add the product of the drawn columns with their rows of the head to out."""
    _product(drawn.drawn_by_head, part, weight, index, count, first, out, len(out), len(out))


def drawn_by_hidden(part, hidden, index, count, first, out) -> None:
    """Add the product of the drawn columns with the hidden states to their rows of out."""
    _product(drawn.drawn_by_hidden, part, hidden, index, count, first, out, len(hidden), len(part))


def _product(kernel, part, factor, index, count, first, out, rows: int, results: int) -> None:
    """rows: of the chunk. results: rows of the result."""
    if INTERPRETED and part.dtype == torch.bfloat16:
        part, factor = part.float(), factor.float()  # as `triton._operands`
    factor = factor if factor.stride(1) == 1 else factor.contiguous()
    itemsize, width = part.element_size(), out.shape[1]
    config = architecture().drawn(itemsize, _aligned(factor, 16))
    kernel[(triton.cdiv(results, config.block_m) * triton.cdiv(width, config.block_n),)](
        part,
        factor,
        index,
        count,
        out,
        rows,
        width,
        part.stride(0),
        factor.stride(0),
        out.stride(0),
        first,
        len(part),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PRECISION=config.precision,
        **config.options,
    )
