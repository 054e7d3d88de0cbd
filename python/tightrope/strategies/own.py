"""The chunk loop of a user's loss: plain Python between two operators.

One makes a chunk's statistics, the other its gradients. The loss is differentiated where it stands, with
autograd: three GEMMs, as for the built-in losses.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from weakref import WeakSet

import torch
from torch import Tensor

from ..ambient import has_values, may_read
from ..arguments import LinearArguments
from ..coefficients import row_coefficients
from ..statistics import FLOATING, RowStats, StatGrads
from ..tokens import without_target
from . import chunked, ops
from .chunked import Plan, Record
from .products import Gradients, Needs
from .sampled import in_full
from .scored import Rows
from .workspace import borrow


def loss_and_gradients(
    loss_fn: Callable[..., Tensor],
    row_scale: Tensor,
    row_args: tuple[Tensor, ...],
    args_need: tuple[bool, ...],
    needs: Needs,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arguments: LinearArguments,
) -> tuple[Record, Gradients, Tensor]:
    """The loss of every row and the gradients of ``sum(row_scale * loss)``, row_args' in the record.

    And what came of sampling, as `chunked.loss_and_gradients` gives it.
    """
    if arguments.group is not None or (arguments.noisy and has_values(input)):
        problem = ops.linear_problem(input, weight, bias, arguments)
        upstream = _differentiate(loss_fn, row_scale, row_args, args_need, problem.target.is_given)
        with ops.exact_products(input.device):
            return chunked.loss_and_gradients(problem, upstream, needs, arguments.budget)
    # Where there are no values to count, rows are masked.
    rows = Rows.of(input.shape[0], arguments.valid, arguments.skip and has_values(input))
    problem = ops.linear_problem(input, weight, bias, arguments, rows)
    problem.check_topk()
    how = Plan.of(problem, arguments.budget, fusible=False)
    record, gradients = Record(problem), Gradients.unwritten(problem, needs, len(how.chunks))
    differentiate = _differentiate(loss_fn, row_scale, row_args, args_need, problem.target.is_given)
    place = problem.dtype, problem.device
    # What is kept between calls holds values, which a fake tensor has no use for.
    kept = borrow if has_values(input) else _fresh
    with kept(how.elements, *place) as memory:
        for start, stop in how.chunks:
            chunk = problem.chunk(start, stop)
            span = ops.Span(rows.kept, start, stop)
            summary, argmax = ops.chunk_stats(memory, span, input, weight, bias, arguments)
            grads = record.add(chunk, summary, argmax, differentiate)
            coef = row_coefficients(summary, grads, problem.vocab_size)
            ops.chunk_gradients(
                memory, summary, coef, span, *gradients.flat(), input, weight, bias, arguments
            )
    return record, gradients, in_full(problem)


@contextlib.contextmanager
def _fresh(elements: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    yield torch.empty(elements, dtype=dtype, device=device)


def evaluate(
    loss_fn: Callable[..., Tensor], stats: RowStats, row_args: tuple[Tensor, ...], has_target: bool
) -> Tensor:
    """A user's loss of some rows, checked, in the dtype of the statistics."""
    if not has_target:
        stats = without_target(stats)
    try:
        loss = loss_fn(stats, *row_args)
    except (AttributeError, TypeError) as error:
        missing = [name for name, value in stats._asdict().items() if value is None]
        if "NoneType" not in str(error) or not missing:
            raise
        raise ValueError(
            f"loss_fn: failed ({error}), and {', '.join(missing)} are None; expected a loss of the others, "
            "or support= for the mass and entropy of a set of classes, and a target for target_*"
        ) from error
    rows = stats.lse.shape[0]
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: returned {type(loss).__name__}, expected a tensor of shape [{rows}]")
    if loss.shape != (rows,):
        raise ValueError(
            f"loss_fn: returned a tensor of shape {list(loss.shape)}, expected [{rows}]: one loss a row"
        )
    if loss.is_complex():
        raise TypeError(f"loss_fn: returned dtype {loss.dtype}, expected a real one")
    if _to_be_checked(loss_fn, loss):
        _refuse_mixed_rows(loss_fn, loss, stats, row_args)
    return loss.to(stats.lse.dtype)


def _differentiate(
    loss_fn: Callable,
    row_scale: Tensor,
    row_args: tuple[Tensor, ...],
    args_need: tuple[bool, ...],
    has_target: bool,
):
    """A user's loss as the chunk loop wants it: autograd gives the gradients of the statistics."""

    def upstream(stats: RowStats, chunk):
        with torch.enable_grad():
            given = {name: getattr(stats, name) for name in FLOATING}
            leaves = {k: v.detach().requires_grad_() for k, v in given.items() if v is not None}
            args = [arg.detach()[chunk.where].requires_grad_(need) for arg, need in zip(row_args, args_need)]
            loss = evaluate(loss_fn, stats._replace(**leaves), tuple(args), has_target)
            inputs = [*leaves.values(), *(a for a in args if a.requires_grad)]
            if loss.requires_grad:
                _refuse_captured(loss, inputs)
                total = (loss * row_scale[chunk.where]).sum()
                grads = torch.autograd.grad(total, inputs, allow_unused=True)
            else:
                grads = [None] * len(inputs)
        to_stats = StatGrads(**dict(zip(leaves, grads)))
        rest = iter(grads[len(leaves) :])
        to_args = []
        for arg in args:
            grad = next(rest) if arg.requires_grad else None
            to_args.append(torch.zeros_like(arg) if grad is None and arg.requires_grad else grad)
        return loss.detach(), to_stats, tuple(to_args)

    return upstream


def _refuse_captured(loss: Tensor, inputs: list[Tensor]) -> None:
    """Raise where the loss depends on a tensor that requires grad and is not among the inputs.

    The gradients are made here, in the forward pass, so such a tensor would silently get none.
    """
    known = {id(t) for t in inputs}
    seen, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"loss_fn: depends on a tensor of shape {list(leaf.shape)} that requires grad and is not in "
                'row_args; expected it in row_args, or strategy="streaming"'
            )
        queue.extend(parent for parent, _ in node.next_functions)


# Losses found to take rows one by one; by their code, which the next lambda of the same line shares.
_checked: WeakSet = WeakSet()


def _to_be_checked(loss_fn: Callable, loss: Tensor) -> bool:
    """Whether to look if a loss mixes rows: once for each function, and always under TIGHTROPE_DEBUG=1."""
    if not may_read(loss) or loss.shape[0] < 2:
        return False
    if os.environ.get("TIGHTROPE_DEBUG") == "1":
        return True
    try:
        return getattr(loss_fn, "__code__", loss_fn) not in _checked
    except TypeError:  # an object without a hash is looked at each time
        return True


def _refuse_mixed_rows(
    loss_fn: Callable, loss: Tensor, stats: RowStats, row_args: tuple[Tensor, ...]
) -> None:
    """Raise where a loss of some rows depends on the others: the strategies would give it different rows."""
    rows, middle = loss.shape[0], loss.shape[0] // 2

    def part(start: int, stop: int) -> Tensor:
        cut = RowStats(*(None if s is None else s[start:stop] for s in stats))
        return loss_fn(cut, *(arg[start:stop] for arg in row_args))

    advice = (
        "expected a loss of each row by itself, with what belongs to rows in row_args; for a loss over a "
        "sequence or a batch (GSPO, say) take linear_vocab_stats, or vocab_stats of logits"
    )
    try:
        halves = torch.cat([part(0, middle), part(middle, rows)])
    except Exception as error:
        raise ValueError(f"loss_fn: cannot be called on half of its rows ({error}), {advice}") from error
    # One that draws random numbers agrees with itself no more than with its halves.
    if not _agree(halves, loss) and _agree(part(0, rows), loss):
        raise ValueError(f"loss_fn: gave rows another loss when it was called on half of them, {advice}")
    with contextlib.suppress(TypeError):  # so is one without weak references
        _checked.add(getattr(loss_fn, "__code__", loss_fn))


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same arithmetic are equal but for how its loops were vectorised."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    rounding = 4 * torch.finfo(b.dtype).eps if b.is_floating_point() else 0.0
    a, b = a.detach().double(), b.detach().double()
    size = b.abs().masked_fill(~b.isfinite(), 0.0).amax().item()
    tolerance = max(rounding, 1e-4 if rounding else 0.0)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)
