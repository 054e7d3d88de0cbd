"""The Triton backend's primitives of second order, whose contract is at the top of ``second.py``.

As ``triton.py``, with whose helpers they launch kernels/tangent_rows.py.
"""

from __future__ import annotations

from contextlib import ExitStack

import triton

from ..arguments import SideArguments, TileArguments
from ..kernels import configs, tangent_rows
from .triton import _by_rows, _members, _merge, _new_parts, _target, _writable


def row_tangent(logits, tangent, sums, norm, offset, threshold, classes, *arguments) -> None:
    """Add what a tile contributes to sums."""
    count, columns = logits.shape
    if count == 0 or columns == 0:
        return
    tile = TileArguments(*arguments)
    which, members, members_stride = _members(logits, offset, SideArguments(threshold, classes))
    kind, target, target_prob, target_stride = _target(tile)
    logits, tangent = _by_rows(logits), _by_rows(tangent)
    (parts,) = _new_parts(triton.cdiv(columns, configs.TANGENT_BLOCK * configs.TANGENT_BLOCKS), sums)
    tangent_rows.row_tangent[(count, len(parts))](
        logits,
        tangent,
        parts,
        norm,
        members,
        target,
        target_prob,
        tile.bias,
        tile.active,
        count,
        columns,
        logits.stride(0),
        tangent.stride(0),
        members_stride,
        target_stride,
        offset,
        float(tile.logit_scale),
        tile.softcap or 0.0,
        SET=which,
        TARGET=kind,
        CAPPED=tile.softcap is not None,
        BLOCK=configs.TANGENT_BLOCK,
        BLOCKS=configs.TANGENT_BLOCKS,
        TOPK_BLOCK=configs.TOPK_BLOCK,
        num_warps=configs.ROW_WARPS,
    )
    _merge(tangent_rows.merge_sums, (parts,), (sums,), tile.active, len(sums))


def row_grad_tangent(
    logits,
    tangent,
    out,
    out_tangent,
    norm,
    norm_tangent,
    coef,
    coef_tangent,
    offset,
    threshold,
    classes,
    *arguments,
) -> None:
    """Write dloss/dlogits of a tile and its derivative; they may be narrower than the logits."""
    count, columns = logits.shape
    if count == 0 or columns == 0:
        return
    tile = TileArguments(*arguments)
    which, members, members_stride = _members(logits, offset, SideArguments(threshold, classes))
    kind, target, target_prob, target_stride = _target(tile)
    logits, tangent = _by_rows(logits), _by_rows(tangent)
    block = configs.GRAD_BLOCK if members is None else configs.SET_GRAD_BLOCK
    with ExitStack() as written:
        out_tangent = written.enter_context(_writable(out_tangent))
        if out is not None:
            out = written.enter_context(_writable(out))
        tangent_rows.row_grad_tangent[(count, triton.cdiv(columns, block))](
            logits,
            tangent,
            out,
            out_tangent,
            norm,
            norm_tangent,
            coef,
            coef_tangent,
            members,
            target,
            target_prob,
            tile.bias,
            tile.active,
            count,
            columns,
            logits.stride(0),
            tangent.stride(0),
            0 if out is None else out.stride(0),
            out_tangent.stride(0),
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
