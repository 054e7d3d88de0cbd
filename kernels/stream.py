"""The GEMM ``h W^T`` fused with row statistics, or with the gradient form: `stream_stats` and `stream_grad`.

A program makes tiles of logits on tensor cores with float32 accumulators, and works on them while they are
in registers: logits are never written. `stream_stats` gives a program one block of rows and one segment of
the vocabulary; the number of segments depends on the vocabulary alone, and rows.merge_parts merges them in
one order, so a row's bits do not depend on the other rows, and few rows still fill a GPU. `stream_grad`
writes the gradient of one tile [rows, T] of logits, for two GEMMs that stay with the vendor's library: a
program that owned a tile of dh or dW would need logits that take all of D. Programs go by in groups of row
blocks that share their piece of W in the second-level cache.

The epilogue's live values, and not the GEMM, decide the size of a tile; sizes are in configs.py. Top-k
targets come sorted by class, so that a tile finds each row's few entries without trying all K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    DENSE,
    FIELDS,
    INDEX,
    LOG_ZERO,
    NO_COLUMN,
    SUM_SCALE,
    TOPK,
    Partial,
    first_maximum,
    gradient,
    load_coefficients,
    merge,
    origin,
    scaled_shift,
    store_partial,
    takes_argmax,
    transform,
)

_VARYING = ("rows", "offset")


@triton.jit
def _grouped(program, row_blocks, pieces, GROUP: tl.constexpr):
    """(row block, piece of the vocabulary) of a program: GROUP row blocks take a piece one after another."""
    group = program // (GROUP * pieces)
    within = program % (GROUP * pieces)
    size = tl.minimum(row_blocks - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def _tile_logits(
    hidden,
    weight,
    first_row,
    first_column,
    rows,
    columns,
    width,
    hidden_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of ``h W^T`` in float32; rows and columns past the end hold anything."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        for k in range(0, width, BLOCK_K):
            h = hidden.load([first_row, k])
            w = weight.load([first_column, k])
            product = tl.dot(h, w.T, product, input_precision=PRECISION)
    else:
        # Clamped, not masked: what lies past the end is masked in the result.
        row = tl.minimum(first_row + tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
        column = tl.minimum(first_column + tl.arange(0, BLOCK_N), columns - 1).to(tl.int64)
        step = tl.arange(0, BLOCK_K)
        h_at = hidden + row[:, None] * hidden_stride + step[None, :]
        w_at = weight + column[None, :] * weight_stride + step[:, None]
        for k in range(0, width, BLOCK_K):
            left = step < width - k
            h = tl.load(h_at, mask=left[None, :], other=0.0)
            w = tl.load(w_at, mask=left[:, None], other=0.0)
            product = tl.dot(h, w, product, input_precision=PRECISION)
            h_at += BLOCK_K
            w_at += BLOCK_K
    return product


@triton.jit
def _halves(tile):
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _pieces(tile, PIECES: tl.constexpr):
    """A tile cut into PIECES (1, 2 or 4) along the vocabulary, so that only one piece's temporaries live."""
    if PIECES == 1:
        pieces = (tile,)
    elif PIECES == 2:
        pieces = _halves(tile)
    else:
        a, b = _halves(tile)
        c, d = _halves(a)
        e, f = _halves(b)
        pieces = (c, d, e, f)
    return pieces


@triton.jit
def _finish(product, bias, column, columns, logit_scale, softcap, CAPPED: tl.constexpr):
    """From the product to logits, -inf past the end of the vocabulary."""
    inside = column < columns
    if bias is not None:
        bias = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    z = transform(product, bias, logit_scale, softcap, CAPPED)
    return tl.where(inside[None, :], z, float("-inf"))


@triton.jit
def _run_of_entries(target, row, inside, entries, first, last, TOPK_BLOCK: tl.constexpr):
    """Where each row's sorted top-k entries in [first, last) start, and how many there are."""
    start = tl.zeros(row.shape, tl.int32)
    stop = tl.zeros(row.shape, tl.int32)
    for base in range(0, entries, TOPK_BLOCK):
        k = base + tl.arange(0, TOPK_BLOCK)
        wanted = inside[:, None] & (k < entries)[None, :]
        index = tl.load(target + row[:, None] * entries + k[None, :], mask=wanted, other=2**31 - 1)
        start += tl.sum((index < first).to(tl.int32), 1)
        stop += tl.sum((index < last).to(tl.int32), 1)
    return start, stop - start


@triton.jit
def _entry(target, target_prob, row, entries, place, wanted):
    """Class and mass of one top-k entry of each row; class -1 and mass 0 where not wanted."""
    at = row * entries + place
    index = tl.load(target + at, mask=wanted, other=-1)
    return index, tl.load(target_prob + at, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def _statistics(
    z,
    row,
    live,
    first,
    columns,
    target,
    target_prob,
    target_stride,
    offset,
    TARGET: tl.constexpr,
    TOPK_BLOCK: tl.constexpr,
):
    """Statistics of a tile of logits [rows, columns from first on], and the place of each row's maximum.

    In the order in which, for each kind of target, fewest values live at a time.
    """
    column = first + tl.arange(0, z.shape[1])
    inside = (column < columns)[None, :]
    last = tl.minimum(first + column.shape[0], columns)
    maximum = tl.max(z, 1)
    place = first_maximum(z, maximum[:, None], column[None, :], 1)
    start = origin(maximum)
    valued = tl.where(inside, z, 0.0)
    logit_sum, square_sum = tl.sum(valued * SUM_SCALE, 1), tl.sum(valued * valued, 1)
    zero = tl.zeros(row.shape, tl.float32)
    target_shift, target_exp, mass = zero, zero, zero
    if TARGET == INDEX:
        index = tl.load(target + row, mask=live, other=-1) - offset
        hit = (index >= first) & (index < last)
        hit_z = tl.sum(tl.where(column[None, :] == index.to(tl.int32)[:, None], z, 0.0), 1)
        target_shift = tl.where(hit, scaled_shift(hit_z, start), 0.0)
        target_exp = tl.where(hit, tl.exp(hit_z - start), 0.0)
        mass = hit.to(tl.float32)
    shift_sum = tl.sum(tl.where(inside, scaled_shift(z, start[:, None]), 0.0), 1)
    if TARGET == TOPK:
        run, count = _run_of_entries(
            target, row, live, target_stride, first + offset, last + offset, TOPK_BLOCK
        )
        for k in range(0, tl.max(count, 0)):
            entry, b = _entry(target, target_prob, row, target_stride, run + k, k < count)
            entry = (entry - offset).to(tl.int32)
            entry_z = tl.sum(tl.where(column[None, :] == entry[:, None], z, 0.0), 1)
            target_shift += tl.where(b == 0, 0.0, b * scaled_shift(entry_z, start))
            target_exp += tl.where(b == 0, 0.0, b * tl.exp(entry_z - start))
            mass += b
    d = z - start[:, None]
    e = tl.exp(d)
    if TARGET == DENSE:
        at = target + row[:, None] * target_stride + column[None, :]
        b = tl.load(at, mask=live[:, None] & inside, other=0.0).to(tl.float32)
        target_shift = tl.sum(tl.where(b == 0, 0.0, b * scaled_shift(z, start[:, None])), 1)
        target_exp = tl.sum(b * e, 1)
        mass = tl.sum(b, 1)
    sum_exp, sum_exp_shift = tl.sum(e, 1), tl.sum(e * tl.maximum(d, LOG_ZERO), 1)
    tile = Partial(
        tl.where(place < 0, float("nan"), maximum),
        sum_exp,
        sum_exp_shift,
        tl.sum(e * e, 1),
        target_shift,
        target_exp,
        mass,
        shift_sum,
        square_sum,
        zero + tl.maximum(last - first, 0),
        logit_sum,
    )
    return tile, tl.where(place < 0, place + NO_COLUMN, place)


@triton.jit(do_not_specialize=_VARYING)
def stream_stats(
    hidden,  # [rows, width], or its descriptor
    weight,  # [columns, width], or its descriptor
    parts,  # out [splits, 11, rows]
    best,  # out [splits, rows] int64: the argmax of each part, counted from the start of the vocabulary
    target,  # [rows] index, [rows, columns] dense, or [rows, K] sorted indices; None
    target_prob,  # [rows, K] of a top-k target; else None
    bias,  # [columns] or None
    rows,
    columns,
    width,
    hidden_stride,
    weight_stride,
    target_stride,  # row stride of target: K for a top-k target
    offset,  # of column 0 in the vocabulary
    logit_scale: "fp64",
    softcap: "fp64",
    TARGET: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOPK_BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,  # that the vocabulary is cut into at most
):
    """Statistics of a block of rows over one segment of the vocabulary."""
    tiles = tl.cdiv(tl.cdiv(columns, BLOCK_N), SEGMENTS)  # in a segment
    splits = tl.cdiv(columns, tiles * BLOCK_N)
    row_block, split = _grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_M), splits, GROUP)
    row = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    zero = tl.zeros((BLOCK_M,), tl.float32)
    running = Partial(zero - float("inf"), zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    argmax = tl.full((BLOCK_M,), -1, tl.int32)
    segment = split * tiles * BLOCK_N
    for first in range(segment, tl.minimum(segment + tiles * BLOCK_N, columns), BLOCK_N):
        product = _tile_logits(
            hidden,
            weight,
            row_block * BLOCK_M,
            first,
            rows,
            columns,
            width,
            hidden_stride,
            weight_stride,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DESCRIPTORS,
            PRECISION,
        )
        pieces = _pieces(product, PIECES)
        for piece in tl.static_range(PIECES):
            at = first + piece * (BLOCK_N // PIECES)
            column = at + tl.arange(0, BLOCK_N // PIECES)
            z = _finish(pieces[piece], bias, column, columns, logit_scale, softcap, CAPPED)
            tile, place = _statistics(
                z, row, live, at, columns, target, target_prob, target_stride, offset, TARGET, TOPK_BLOCK
            )
            argmax = tl.where(takes_argmax(running.max, argmax, tile.max), place, argmax)
            running = merge(running, tile)
    rows = rows.to(tl.int64)
    store_partial(parts + split.to(tl.int64) * FIELDS * rows, row, rows, running, live)
    tl.store(best + split.to(tl.int64) * rows + row, argmax.to(tl.int64) + offset, mask=live)


@triton.jit
def _mass(
    row,
    live,
    first,
    column,
    columns,
    target,
    target_prob,
    target_stride,
    offset,
    TARGET: tl.constexpr,
    TOPK_BLOCK: tl.constexpr,
):
    """The target mass at each entry of a tile, or None."""
    mass = None
    if TARGET == INDEX:
        index = tl.load(target + row, mask=live, other=-1) - offset
        # A class elsewhere in the vocabulary may be far; as 32 bits it must not come to lie in the tile.
        index = tl.where((index >= 0) & (index < columns), index, -1).to(tl.int32)
        mass = (column[None, :] == index[:, None]).to(tl.float32)
    if TARGET == DENSE:
        at = target + row[:, None] * target_stride + column[None, :]
        mass = tl.load(at, mask=live[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)
    if TARGET == TOPK:
        last = tl.minimum(first + column.shape[0], columns)
        start, count = _run_of_entries(
            target, row, live, target_stride, first + offset, last + offset, TOPK_BLOCK
        )
        mass = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
        for k in range(0, tl.max(count, 0)):
            entry, b = _entry(target, target_prob, row, target_stride, start + k, k < count)
            entry = (entry - offset).to(tl.int32)
            mass += tl.where(column[None, :] == entry[:, None], b[:, None], 0.0)
    return mass


@triton.jit(do_not_specialize=_VARYING)
def stream_grad(
    hidden,  # [rows, width], or its descriptor
    weight,  # [columns, width], or its descriptor
    out,  # [rows, columns], contiguous
    norm,  # [2, rows]: maximum and log of the sum of exponentials of the whole row
    coef,  # [7, rows]
    target,  # as in stream_stats
    target_prob,
    bias,
    active,  # [rows] or None: rows that are not get zeros
    rows,
    columns,
    width,
    hidden_stride,
    weight_stride,
    target_stride,
    offset,
    logit_scale: "fp64",
    softcap: "fp64",
    TARGET: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOPK_BLOCK: tl.constexpr,
):
    """dloss/draw of one tile of logits."""
    row_block, piece = _grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    first = piece * BLOCK_N
    product = _tile_logits(
        hidden,
        weight,
        row_block * BLOCK_M,
        first,
        rows,
        columns,
        width,
        hidden_stride,
        weight_stride,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        DESCRIPTORS,
        PRECISION,
    )
    row = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    c = load_coefficients(coef, row[:, None], rows.to(tl.int64), live[:, None])
    maximum = tl.load(norm + row, mask=live, other=0.0)[:, None]
    log_sum = tl.load(norm + rows.to(tl.int64) + row, mask=live, other=0.0)[:, None]
    counts = live
    if active is not None:
        counts = tl.load(active + row, mask=live, other=0) != 0
    pieces = _pieces(product, PIECES)
    for piece in tl.static_range(PIECES):
        at = first + piece * (BLOCK_N // PIECES)
        column = at + tl.arange(0, BLOCK_N // PIECES)
        writes = live[:, None] & (column < columns)[None, :]
        z = _finish(pieces[piece], bias, column, columns, logit_scale, softcap, CAPPED)
        mass = _mass(
            row, live, at, column, columns, target, target_prob, target_stride, offset, TARGET, TOPK_BLOCK
        )
        grad = gradient(z, maximum, log_sum, c, logit_scale, softcap, mass, CAPPED)
        if active is not None:
            grad = tl.where(counts[:, None], grad, 0.0)
        where = out + row[:, None] * columns + column[None, :]
        tl.store(where, grad.to(out.dtype.element_ty), mask=writes)
