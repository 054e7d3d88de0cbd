"""What the interpreter tests of the Triton kernels share: problems, the float64 truth, and judging.

The truth for a primitive is the reference: statistics in float64, and gradients by autograd through them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import EPS32, assert_no_worse, assert_representable, class_indices, rand, randn, top_k
from tightrope import reference
from tightrope.coefficients import row_coefficients
from tightrope.statistics import OF_SUPPORT, StatGrads, empty_partial, row_stats, summarise

KINDS = ("none", "index", "dense", "topk")
HOSTILE = ("plain", "peaked", "offset", "negative", "masked", "constant")
# Masks of the lowest finite number but for two classes: alone, beside -inf, beside the largest number.
SENTINELS = ("lowest", "lowest and -inf", "lowest and largest")
OFFSET = 11  # of the tile in the vocabulary
NO_SET = (None, None)

# Columns of a row of 100 that make its argmax odd: the first NaN wins, then the first maximum.
NAN, INF = float("nan"), float("inf")
ODD_COLUMNS = (
    {34: 1e4, 40: NAN},
    {33: INF, 40: NAN, 41: NAN, 70: NAN},
    {3: INF, 99: NAN},
    {40: NAN, 90: INF},
    {50: INF, 60: INF},
    {34: 1e4, 35: 1e4, 90: 1e4},
    dict.fromkeys(range(100), -INF),
    {**dict.fromkeys(range(100), -INF), 77: NAN},
    dict.fromkeys(range(100), NAN),
)


@dataclass
class Case:
    """hidden [R, D] and head [T, D] in their dtype, and the tail that the primitives share."""

    hidden: Tensor
    weight: Tensor
    tail: tuple
    target: Tensor | None  # dense, float64
    has_index: bool

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def active(self) -> Tensor | None:
        return self.tail[6]

    def raw(self, dtype=torch.float64) -> Tensor:
        return self.hidden.to(dtype) @ self.weight.to(dtype).t()

    def transformed(self, raw: Tensor) -> Tensor:
        bias, scale, cap = self.tail[5], self.tail[7], self.tail[8]
        return reference.transform(raw if bias is None else raw + bias, logit_scale=scale, softcap=cap)


def with_set(tail, sides: tuple = NO_SET) -> tuple:
    """The tail of a primitive that takes a set, (threshold, classes), after the offset."""
    return tail[0], *sides, *tail[1:]


def case(
    rows,
    columns,
    width,
    kind,
    *,
    how="plain",
    dtype=torch.float32,
    softcap=None,
    bias=True,
    masked_rows=False,
    logit_scale=0.75,
    seed=0,
) -> Case:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = randn(rows, width, seed=seed)
    weight = randn(columns, width, seed=seed + 1) * 2 / width**0.5
    shift = randn(columns, seed=seed + 2, dtype=wide)
    index = class_indices((rows,), columns, seed=seed + 3)
    if how == "peaked":
        hidden[::2] *= 20
    elif how == "offset":
        shift += 1e4
    elif how == "negative":
        shift = -shift.abs() - 60
    elif how == "masked":
        shift[rand(columns, seed=seed + 4) < 0.5] = -torch.inf
        shift[0], index = 0.0, torch.zeros(rows, dtype=torch.int64)
    elif how == "constant":
        hidden, shift = torch.zeros_like(hidden), torch.zeros_like(shift)
    elif how in SENTINELS:
        allowed = torch.tensor([columns // 2, columns - 1])
        mask = torch.full_like(shift, torch.finfo(torch.float32).min)
        if how == "lowest and -inf":
            mask[1::2], mask[: columns // 2] = -torch.inf, -torch.inf  # whole tiles, too
        mask[allowed] = shift[allowed]
        if how == "lowest and largest":
            mask[allowed[1]] = torch.finfo(torch.float32).max
        shift, index = mask, allowed[torch.arange(rows) % 2]
        if how == "lowest":
            index[0] = 3  # masked itself
    target = topk_index = topk_prob = dense = None
    if kind == "index":
        target = reference.dense_target(index, columns, dtype=torch.float64)[0]
    elif kind == "dense":
        target = torch.softmax(randn(rows, columns, seed=seed + 5, dtype=torch.float64), -1)
        target[:, shift == -torch.inf] = 0.0
        dense = target.to(wide)
        target = dense.double()
    elif kind == "topk":
        pairs = top_k((rows,), columns, k=5, seed=seed + 6, dtype=wide)
        finite = shift[pairs.indices].isfinite()
        indices = torch.where(finite, pairs.indices, index.unsqueeze(-1))
        topk_index, order = indices.sort(dim=-1, stable=True)
        topk_prob = pairs.probs.gather(-1, order)
        target = reference.dense_target((topk_index, topk_prob), columns, dtype=torch.float64)[0]
        topk_index = topk_index + OFFSET
    active = torch.arange(rows) % 3 != 1 if masked_rows else None
    tail = (
        OFFSET,
        index + OFFSET if kind == "index" else None,
        dense,
        topk_index,
        topk_prob,
        shift if bias or how != "plain" else None,
        active,
        logit_scale,
        softcap,
    )
    return Case(hidden.to(dtype), weight.to(dtype), tail, target, kind == "index")


def upstream(rows: int, has_target: bool) -> StatGrads:
    """An upstream gradient for every field but those of a set: every coefficient is used."""
    names = [name for name in StatGrads._fields if name not in OF_SUPPORT]
    names = [name for name in names if has_target or not name.startswith("target_")]
    values = {name: randn(rows, seed=50 + i, dtype=torch.float64) for i, name in enumerate(names)}
    for name in ("logit_sum", "logit_square_sum"):
        values[name] = values[name] * 0.01
    return StatGrads(**values)


def truth(problem: Case, dtype=torch.float64) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics by name, and the gradient of the raw logits under `upstream`, in a dtype."""
    raw = problem.raw(dtype).requires_grad_()
    target = None if problem.target is None else problem.target.to(dtype)
    stats = reference.row_stats(problem.transformed(raw), target)
    grads = upstream(raw.shape[0], target is not None)
    total = sum(
        (g.to(dtype) * getattr(stats, n)).sum() for n, g in zip(grads._fields, grads) if g is not None
    )
    return {n: v.detach() for n, v in stats._asdict().items() if v is not None}, torch.autograd.grad(
        total, raw
    )[0]


def rounding(problem: Case, exact: Tensor) -> float:
    """The size of the terms that a statistic is summed from: what float32 rounds."""
    largest = problem.transformed(problem.raw()).abs().nan_to_num(posinf=0).max().item()
    return 1 + largest + exact.abs().nan_to_num(posinf=0).max().item()


def summary_of(problem: Case, partial: Tensor) -> Tensor:
    return summarise(partial, target_must_occur=problem.has_index)


def named_statistics(problem: Case, partial: Tensor, argmax: Tensor) -> dict[str, Tensor]:
    stats = row_stats(summary_of(problem, partial), argmax - OFFSET)._asdict()
    given = {n: v for n, v in stats.items() if v is not None}
    return {n: v for n, v in given.items() if problem.target is not None or not n.startswith("target_")}


def coefficients(problem: Case, partial: Tensor) -> tuple[Tensor, Tensor]:
    """(norm [2, R], coef [7, R]) of finished statistics, under `upstream`."""
    summary = summary_of(problem, partial)
    grads = upstream(summary.shape[1], problem.target is not None)
    grads = StatGrads(*(None if g is None else g.to(summary.dtype) for g in grads))
    return summary[:2].contiguous(), row_coefficients(summary, grads, problem.weight.shape[0])


def judge(actual, exact, rough, scale, what):
    assert_no_worse(actual, exact, rough, 16 * EPS32 * scale, what)


def judge_sentinels(problem: Case, partial: Tensor, argmax: Tensor, out: Tensor) -> None:
    """Statistics, and the gradient of them all, beside masks: what float32 can hold, else its infinity."""
    stats, grad = truth(problem)
    z = problem.transformed(problem.raw()).nan_to_num(neginf=0.0)
    # What is relative to the largest logit, and the sum of logits of both signs, have its rounding.
    rounding = {"target_logit": z.amax(-1).clamp_min(0) * EPS32, "logit_sum": z.abs().sum(-1) * EPS32}
    for name, value in named_statistics(problem, partial, argmax).items():
        if name == "argmax":
            assert torch.equal(value, stats[name])
        else:
            assert_representable(value, stats[name], 1e-5, 1e-4 + 4 * rounding.get(name, 0.0), name)
    assert_representable(out, grad, 1e-5, 1e-4, "gradient")


def unwritten_parts(monkeypatch, backend) -> None:
    """What kernels hand to each other is NaN, and no place, where it is not written."""
    new_parts = backend._new_parts

    def unwritten(*args):
        return [part.fill_(NAN if part.is_floating_point() else -(2**40)) for part in new_parts(*args)]

    monkeypatch.setattr(backend, "_new_parts", unwritten)


def check_argmax(stats, odd: dict[int, float]) -> None:
    """The argmax of rows with odd values is torch's, whole and in pieces, with a NaN first as maximum.

    stats: takes (problem, first column, end, partial, argmax, tail) and merges these columns' statistics.
    """
    problem = case(3, 100, 16, "none")
    for column, value in odd.items():
        problem.tail[5][column] = value
    expected = problem.transformed(problem.raw()).argmax(-1) + OFFSET
    for spans in (((0, 100),), ((0, 37), (37, 70), (70, 100))):
        partial, argmax = new_partial(problem)
        for start, stop in spans:
            tail = (OFFSET + start, *problem.tail[1:5], problem.tail[5][start:stop], *problem.tail[6:])
            stats(problem, start, stop, partial, argmax, tail)
        assert torch.equal(argmax, expected)
        has_nan = any(value != value for value in odd.values())
        assert partial[0].isnan().all() == has_nan


def new_partial(problem: Case):
    return empty_partial(problem.hidden.shape[0], problem.wide, torch.device("cpu"))
