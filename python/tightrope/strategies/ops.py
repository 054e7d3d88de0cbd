"""The drivers as dispatcher operators.

One operator per driver, opaque to torch.compile and one named row in a profile. What they return has a
shape that depends on the arguments' shapes alone, so their fakes are exact. An operator cannot return
None: a gradient that was not asked for is a tensor of no elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.ops import define
from ..losses import RealityCreativity
from ..statistics import SUMMARY
from ..targets import Target
from . import chunked, dense, streaming
from .chunked import Needs, Upstream
from .problem import LinearProblem, LogitsProblem, Rows, Transform, arithmetic_dtype

# The tail that the operators share. input [N, D], weight [V, D], bias [V]; the target is index [N], dense
# [N, V], or topk_index and topk_prob [N, K]; valid [N] says which rows count, and skip whether the others
# are gathered out or masked; workspace is in bytes.
_TARGET = "Tensor? index, Tensor? dense, Tensor? topk_index, Tensor? topk_prob, Tensor? valid, int shift"
_TRANSFORM = "float logit_scale, float? softcap"
_LINEAR = (
    f"Tensor input, Tensor weight, Tensor? bias, {_TARGET}, {_TRANSFORM}, "
    "bool skip, int workspace, str? backend"
)
_LOGITS = f"Tensor logits, {_TARGET}, {_TRANSFORM}, str? backend"
_NEEDS = "bool need_input, bool need_weight, bool need_bias"
_FAMILY = "str reality, str creativity, float label_smoothing, float z_loss, float logit_l2"


def no_autocast(device: torch.device):
    """Under autocast the GEMMs would round the logits to half precision."""
    return torch.autocast(device.type, enabled=False)


def linear_problem(
    input,
    weight,
    bias,
    index,
    dense_target,
    topk_index,
    topk_prob,
    valid,
    shift,
    logit_scale,
    softcap,
    skip,
    backend,
) -> LinearProblem:
    """The arguments of the linear operators as one object. Raises IndexError for a class out of range."""
    target = Target(index, dense_target, topk_index, topk_prob, shift)
    target.check_range(valid, weight.shape[0])
    return LinearProblem(
        input,
        weight,
        bias,
        target,
        Rows.of(input.shape[0], valid, skip),
        Transform(logit_scale, softcap),
        backends.resolve(backend, input.device),
    )


def _split(*linear) -> tuple[LinearProblem, int]:
    *head, workspace, backend = linear
    return linear_problem(*head, backend), workspace


def _given(gradients, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def _fake_statistics(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        rows.new_empty((len(SUMMARY), rows.shape[0]), dtype=dtype),
        rows.new_empty((rows.shape[0],), dtype=torch.int64),
    )


def _fake_gradients(needs, tensors, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape, dtype=dtype or t.dtype) if need else tensors[0].new_empty(0)
        for need, t in zip(needs, tensors)
    )


def _linear_stats(*linear) -> tuple[Tensor, Tensor]:
    """Summary [SUMMARY, N] and argmax [N]."""
    problem, workspace = _split(*linear)
    with no_autocast(problem.input.device):
        return streaming.statistics(problem, workspace)


def _linear_stats_fake(input, weight, bias, *_):
    return _fake_statistics(input, arithmetic_dtype(input, weight, bias))


def _linear_stats_backward(summary, coef, need_input, need_weight, need_bias, *linear):
    """Gradients of input, weight and bias, in their dtypes, from the coefficients [7, N] of every row."""
    problem, workspace = _split(*linear)
    needs = Needs(need_input, need_weight, need_bias)
    with no_autocast(problem.input.device):
        return _given(streaming.gradients(problem, summary, coef, needs, workspace), problem.input)


def _linear_stats_backward_fake(summary, coef, need_input, need_weight, need_bias, *linear):
    return _fake_gradients((need_input, need_weight, need_bias), linear[:3])


def _linear_loss(
    row_scale,
    balance,
    square,
    reality,
    creativity,
    label_smoothing,
    z_loss,
    logit_l2,
    need_input,
    need_weight,
    need_bias,
    *linear,
):
    """The whole chunk loop of the built-in losses.

    Gives the loss of each row [N], summary [SUMMARY, N], argmax [N], and the gradients of
    ``sum(row_scale * loss)`` with respect to input, weight, bias (in the dtype of the arithmetic: the one
    rounding comes after the upstream gradient is known) and balance [N].
    """
    problem, workspace = _split(*linear)
    family = RealityCreativity(problem.vocab_size, reality, creativity, label_smoothing, z_loss, logit_l2)
    needs = Needs(need_input, need_weight, need_bias)

    def ahead(chunk):
        return family.upstream(balance[chunk.where], row_scale[chunk.where])

    with no_autocast(problem.input.device):
        result = chunked.loss_and_gradients(
            problem, _upstream(family, row_scale, balance, square), needs, workspace, ahead
        )
    grads = _given((result.input, result.weight, result.bias), problem.input)
    to_balance = result.args[0] if result.args else torch.zeros_like(row_scale)
    return result.row_loss, result.summary, result.argmax, *grads, to_balance


def _upstream(
    family: RealityCreativity, row_scale: Tensor, balance: Tensor, square: Tensor | None
) -> Upstream:
    """The built-in losses, as the chunk loop wants them."""

    def upstream(stats, chunk):
        row = (balance[chunk.where], None if square is None else square[chunk.where])
        grads, to_balance = family.gradients(stats, *row, row_scale[chunk.where])
        return family(stats, *row), grads, (to_balance,)

    return upstream


def _linear_loss_fake(
    row_scale,
    balance,
    square,
    reality,
    creativity,
    label_smoothing,
    z_loss,
    logit_l2,
    need_input,
    need_weight,
    need_bias,
    *linear,
):
    input, weight, bias = linear[:3]
    dtype = arithmetic_dtype(input, weight, bias)
    return (
        torch.empty_like(row_scale),
        *_fake_statistics(input, dtype),
        *_fake_gradients((need_input, need_weight, need_bias), (input, weight, bias), dtype),
        torch.empty_like(row_scale),
    )


def _logits_problem(
    logits, index, dense_target, topk_index, topk_prob, valid, shift, logit_scale, softcap, backend
) -> LogitsProblem:
    target = Target(index, dense_target, topk_index, topk_prob, shift)
    target.check_range(valid, logits.shape[1])
    rows = Rows.of(logits.shape[0], valid, skip=False)
    transform = Transform(logit_scale, softcap)
    return LogitsProblem(logits, target, rows, transform, backends.resolve(backend, logits.device))


def _logits_stats(*logits) -> tuple[Tensor, Tensor]:
    """Summary [SUMMARY, N] and argmax [N]."""
    problem = _logits_problem(*logits)
    with no_autocast(problem.logits.device):
        return dense.statistics(problem)


def _logits_stats_fake(logits, *_):
    return _fake_statistics(logits, arithmetic_dtype(logits))


def _logits_stats_backward(summary, coef, *logits) -> Tensor:
    """Gradient of the logits [N, V] from the coefficients [7, N] of every row."""
    problem = _logits_problem(*logits)
    with no_autocast(problem.logits.device):
        return dense.gradient(problem, summary, coef)


def _logits_stats_backward_fake(summary, coef, logits, *_):
    return logits.new_empty(logits.shape)


_STATISTICS = "-> (Tensor summary, Tensor argmax)"
_GRADIENTS = "Tensor to_input, Tensor to_weight, Tensor to_bias"
define(f"linear_stats({_LINEAR}) {_STATISTICS}", _linear_stats, _linear_stats_fake)
define(
    f"linear_stats_backward(Tensor summary, Tensor coef, {_NEEDS}, {_LINEAR}) -> ({_GRADIENTS})",
    _linear_stats_backward,
    _linear_stats_backward_fake,
)
define(
    f"linear_loss(Tensor row_scale, Tensor balance, Tensor? target_square, {_FAMILY}, {_NEEDS}, {_LINEAR}) "
    f"-> (Tensor row_loss, Tensor summary, Tensor argmax, {_GRADIENTS}, Tensor to_balance)",
    _linear_loss,
    _linear_loss_fake,
)
define(f"logits_stats({_LOGITS}) {_STATISTICS}", _logits_stats, _logits_stats_fake)
define(
    f"logits_stats_backward(Tensor summary, Tensor coef, {_LOGITS}) -> Tensor",
    _logits_stats_backward,
    _logits_stats_backward_fake,
)
