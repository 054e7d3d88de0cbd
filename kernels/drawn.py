"""Sampled gradients: sums over the columns of a gradient, and products with the columns that were drawn.

How many were drawn only the device knows. So programs are started for as many as there may be; those past
the last one end at once, and what is summed over columns is a loop that ends with them. A product therefore
takes the time of the columns that there are, nothing waits, and nothing is left out.

`row_grad_sums` is `rows.row_grad` for a block of rows, with the sums over each column while its entries are
in registers; the blocks' parts are added up in one order. Of a chunk of n rows the entry of row i and column
j stands in tile ``t = j // tile`` of the vocabulary, each [n, its width] by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import gradient_of_row

VARYING = ("rows", "offset", "first", "most")


@triton.jit(do_not_specialize=VARYING)
def row_grad_sums(
    logits,  # as for rows.row_grad, to members_stride; all of one dtype
    out,
    norm,
    coef,
    members,
    target,
    target_prob,
    bias,
    active,
    along,  # [RANK, rows]
    scale,  # of one element: multiplies the gradient where it is summed
    parts,  # out [row blocks, RANK + 1, columns]
    rows,
    columns,
    logits_stride,
    out_stride,
    members_stride,
    target_stride,
    offset,
    logit_scale: "fp64",
    softcap: "fp64",
    SET: tl.constexpr,
    TARGET: tl.constexpr,
    CAPPED: tl.constexpr,
    RANK: tl.constexpr,  # 1 or 2
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dloss/draw of one block of ROWS rows and BLOCK columns, and the sums over its rows."""
    start = tl.program_id(0) * ROWS
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    inside = column < columns
    DTYPE: tl.constexpr = norm.dtype.element_ty
    factor = tl.load(scale).to(DTYPE)
    products = tl.zeros((BLOCK,), DTYPE)
    others = tl.zeros((BLOCK,), DTYPE)
    squares = tl.zeros((BLOCK,), DTYPE)
    wide = rows.to(tl.int64)
    for i in range(0, tl.minimum(rows - start, ROWS)):
        row = start.to(tl.int64) + i
        grad = gradient_of_row(
            logits,
            norm,
            coef,
            members,
            target,
            target_prob,
            bias,
            active,
            row,
            wide,
            first,
            column,
            inside,
            logits_stride,
            members_stride,
            target_stride,
            offset,
            logit_scale,
            softcap,
            SET,
            TARGET,
            CAPPED,
            BLOCK,
        )
        tl.store(out + row * out_stride + column, grad.to(out.dtype.element_ty), mask=inside)
        grad *= factor
        products += tl.load(along + row) * grad
        if RANK == 2:
            others += tl.load(along + wide + row) * grad
        squares += grad * grad
    at = parts + tl.program_id(0).to(tl.int64) * (RANK + 1) * columns + column
    tl.store(at, products, mask=inside)
    if RANK == 2:
        tl.store(at + columns, others, mask=inside)
    tl.store(at + RANK * columns, squares, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def drawn_columns(
    grad,  # a chunk's gradient, flat
    part,  # out [most, part_stride]: columns as rows, zeros behind; of those that were not drawn nothing
    index,  # [columns] int64: the drawn ones first
    count,  # of one element, int64: how many were drawn
    factor,  # as index: what each column is multiplied by
    along,  # [RANK, columns]
    basis,  # [RANK, rows]
    rows,
    columns,
    tile,
    part_stride,
    first,  # in index, of the first row of part
    most,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Drawn columns of a gradient less ``basis^T along``, times their factors."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    drawn = tl.minimum(tl.load(count) - first, most)
    if tl.program_id(0) * BLOCK >= drawn:
        return
    live = k < drawn
    column = tl.load(index + first + k, mask=live, other=0)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    tile = tile.to(tl.int64)
    start = column // tile * tile
    width = tl.minimum(columns - start, tile)
    at = start * rows + (column - start)
    mask = live[:, None] & inside[None, :]
    value = tl.load(grad + at[:, None] + row[None, :] * width[:, None], mask=mask, other=0.0)
    for r in tl.static_range(RANK):
        share = tl.load(along + r * columns + column, mask=live, other=0.0)
        value -= share[:, None] * tl.load(basis + r * rows + row, mask=inside, other=0.0)[None, :]
    value *= tl.load(factor + first + k, mask=live, other=0.0)[:, None]
    value = tl.where(mask, value, 0.0)
    place = part + k[:, None].to(tl.int64) * part_stride + row[None, :]
    tl.store(place, value.to(part.dtype.element_ty), mask=live[:, None] & (row < part_stride)[None, :])


@triton.jit(do_not_specialize=VARYING)
def drawn_by_head(
    part,  # what drawn_columns wrote; part_stride is a multiple of BLOCK_M and of BLOCK_K
    weight,  # [columns, width], row stride weight_stride
    index,
    count,
    out,  # [rows, width], row stride out_stride; is added to
    rows,
    width,
    part_stride,
    weight_stride,
    out_stride,
    first,
    most,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out += part^T weight[index]``, over the columns that were drawn."""
    drawn = tl.minimum(tl.load(count) - first, most).to(tl.int32)
    if drawn <= 0:
        return
    blocks = tl.cdiv(width, BLOCK_N)
    row = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (d < width)[None, :]
    ACCUMULATOR: tl.constexpr = out.dtype.element_ty
    product = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    step = tl.arange(0, BLOCK_K)
    a_at = part + step.to(tl.int64)[None, :] * part_stride + row[:, None]
    index += first
    for start in range(0, drawn, BLOCK_K):
        live = step < drawn - start
        column = tl.load(index + start + step, mask=live, other=0)
        a = tl.load(a_at, mask=live[None, :], other=0.0)
        b = tl.load(
            weight + column[:, None] * weight_stride + d[None, :], mask=live[:, None] & inside, other=0.0
        )
        product = tl.dot(a, b.to(a.dtype), product, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        a_at += BLOCK_K * part_stride.to(tl.int64)
    mask = (row < rows)[:, None] & inside
    place = out + row.to(tl.int64)[:, None] * out_stride + d[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + product, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def drawn_by_hidden(
    part,  # as in drawn_by_head
    hidden,  # [rows, width], row stride hidden_stride
    index,
    count,
    out,  # [columns, width], row stride out_stride; rows of it are added to
    rows,
    width,
    part_stride,
    hidden_stride,
    out_stride,
    first,
    most,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[index] += part hidden``, of the columns that were drawn."""
    drawn = tl.minimum(tl.load(count) - first, most).to(tl.int32)
    blocks = tl.cdiv(width, BLOCK_N)
    start = tl.program_id(0) // blocks * BLOCK_M
    if start >= drawn:
        return
    m = start + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (d < width)[None, :]
    ACCUMULATOR: tl.constexpr = out.dtype.element_ty
    product = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    step = tl.arange(0, BLOCK_K)
    # Clamped, not masked: what lies past the end is masked in the result.
    a_at = part + tl.minimum(m, drawn - 1).to(tl.int64)[:, None] * part_stride + step[None, :]
    b_at = hidden + step.to(tl.int64)[:, None] * hidden_stride + d[None, :]
    for i in range(0, rows, BLOCK_K):
        a = tl.load(a_at)
        b = tl.load(b_at, mask=(step < rows - i)[:, None] & inside, other=0.0)
        product = tl.dot(a, b.to(a.dtype), product, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        a_at += BLOCK_K
        b_at += BLOCK_K * hidden_stride.to(tl.int64)
    mask = (m < drawn)[:, None] & inside
    column = tl.load(index + first + m, mask=m < drawn, other=0)
    place = out + column[:, None] * out_stride + d[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + product, mask=mask)
