"""The drivers as dispatcher operators.

One operator per driver, opaque to torch.compile and one named row in a profile. What they return has a
shape that depends on the arguments' shapes alone, so their fakes are exact. An operator cannot return
None: a gradient that was not asked for is a tensor of no elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import backends
from ..arguments import (
    Arguments,
    LinearArguments,
    LogitsArguments,
    NoiseArguments,
    Signature,
    Transform,
    group,
)
from ..backends.ops import define
from ..distributed.exchange import Exchange
from ..losses import RealityCreativity
from ..statistics import norm_rows, summary_rows
from ..support import RowSets
from ..targets import Target
from . import chunked, dense, streaming
from .chunked import Reductions, Upstream
from .problem import LinearProblem, LogitsProblem, arithmetic_dtype
from .products import Gradients, Needs
from .scored import Rows

# input [N, D], weight [V, D], bias [V]; logits [N, V].
HEAD = ("Tensor input", "Tensor weight", "Tensor? bias", LinearArguments)
LOGITS = ("Tensor logits", LogitsArguments)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """GEMMs as they are asked for: autocast would round the logits to half precision.

    So would, on CPUs with bfloat16 instructions, ``torch.set_float32_matmul_precision("medium")``, by which
    training scripts ask for fast products on a GPU. Here it is for gradients of logits alone, beside a head
    and hidden states that are bfloat16 themselves: a problem that was made before knows of it.
    """
    matmul = torch.backends.mkldnn.matmul
    precision = matmul.fp32_precision if device.type == "cpu" else "ieee"
    lowered = precision not in ("ieee", "none")
    # What an operator is given may require grad where no autograd Function calls it: in an exported program.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if lowered:
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            if lowered:
                matmul.fp32_precision = precision


def linear_problem(
    input: Tensor, weight: Tensor, bias: Tensor | None, arguments: LinearArguments, rows: Rows | None = None
) -> LinearProblem:
    """The arguments of the linear operators as one object. Raises IndexError for a class out of range.

    rows: those that are worked on, where that is known already.
    """
    if rows is None:
        rows = Rows.of(input.shape[0], arguments.valid, arguments.skip)
    scoring = _scoring(arguments, rows, weight.shape[0], input.device)
    teacher = _teacher(arguments, scoring, arithmetic_dtype(input, weight, bias))
    noise = arguments.part(NoiseArguments)
    narrow = torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    return LinearProblem(input, weight, bias, noise=noise, narrow=narrow, **scoring, teacher=teacher)


def logits_problem(logits: Tensor, arguments: LogitsArguments) -> LogitsProblem:
    rows = Rows.of(logits.shape[0], arguments.valid, skip=False)
    scoring = _scoring(arguments, rows, logits.shape[1], logits.device)
    return LogitsProblem(logits, **scoring, teacher=_teacher(arguments, scoring, arithmetic_dtype(logits)))


def _teacher(
    arguments: LogitsArguments, scoring: dict[str, object], dtype: torch.dtype
) -> LinearProblem | None:
    """A teacher as a problem over the rows that a student is scored on. dtype: of the arithmetic."""
    if arguments.teacher_weight is None:
        return None
    own = {
        "target": Target(),
        "sets": None,
        "transform": Transform(arguments.teacher_scale, arguments.teacher_softcap),
        "temperature": None,
    }
    tensors = arguments.teacher_input, arguments.teacher_weight, arguments.teacher_bias
    return LinearProblem(*tensors, arithmetic=dtype, **{**scoring, **own})


def _scoring(arguments: LogitsArguments, rows: Rows, here: int, device: torch.device) -> dict[str, object]:
    """The fields that both kinds of problem have. here: entries of the vocabulary, padding included."""
    target, sets, vocab_size = arguments.part(Target), RowSets.of(arguments), arguments.vocab_size(here)
    columns = max(min(here, vocab_size - arguments.first_class), 0)
    target.check_range(arguments.valid, vocab_size)
    if sets is not None:
        sets.check_range(arguments.valid, vocab_size)
    return {
        "target": target,
        "rows": rows,
        "vocab_size": vocab_size,
        "offset": arguments.first_class,
        "columns": columns,
        "widest": columns if arguments.group is None else max(arguments.widest, 1),
        "exchange": Exchange.of(arguments, rows.count, device),
        "sets": sets,
        "transform": arguments.part(Transform),
        "temperature": arguments.temperature,
        "backend": backends.resolve(arguments.backend, device),
    }


def given(gradients, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def _fake_statistics(
    rows: int, like: Tensor, arguments: LogitsArguments, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    count = summary_rows(RowSets.of(arguments) is not None, arguments.teacher_weight is not None)
    return like.new_empty((count, rows), dtype=dtype), like.new_empty((rows,), dtype=torch.int64)


def fake_gradients(
    needs: Needs, input, weight, bias, arguments: LinearArguments, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    tensors = (input, weight, bias, arguments.temperature)
    return tuple(
        t.new_empty(t.shape, dtype=dtype or t.dtype) if need else input.new_empty(0)
        for need, t in zip(needs.flat(), tensors)
    )


def _linear_stats(input, weight, bias, arguments: LinearArguments) -> tuple[Tensor, Tensor]:
    """Summary [SUMMARY, N] and argmax [N]."""
    problem = linear_problem(input, weight, bias, arguments)
    with exact_products(input.device):
        return streaming.statistics(problem, arguments.budget)


def _linear_stats_fake(input, weight, bias, arguments):
    dtype = arithmetic_dtype(input, weight, bias)
    return _fake_statistics(input.shape[0], input, arguments, dtype)


def _linear_stats_backward(summary, coef, needs: Needs, input, weight, bias, arguments: LinearArguments):
    """Gradients of input, weight, bias and temperature, in their dtypes, from coefficients [7 or 14, N]."""
    problem = linear_problem(input, weight, bias, arguments)
    with exact_products(input.device):
        return given(streaming.gradients(problem, summary, coef, needs, arguments.budget).flat(), input)


def _linear_stats_backward_fake(summary, coef, needs, input, weight, bias, arguments):
    return fake_gradients(needs, input, weight, bias, arguments)


def _linear_loss(
    row_scale,
    balance,
    target_square,
    family: RealityCreativity,
    needs: Needs,
    input,
    weight,
    bias,
    arguments: LinearArguments,
):
    """The whole chunk loop of the built-in losses.

    Gives the loss of each row [N], summary [SUMMARY, N], argmax [N], and the gradients of
    ``sum(row_scale * loss)`` with respect to input, weight, bias, temperature (in the dtype of the
    arithmetic: the one rounding comes after the upstream gradient is known) and balance [N]; and what came of
    sampling [3] (`Sampler.report`).
    """
    problem = linear_problem(input, weight, bias, arguments)
    upstream = _upstream(family, row_scale, balance, target_square)

    def ahead(where):
        return family.upstream(balance[where], row_scale[where])

    with exact_products(input.device):
        record, gradients, sampling = chunked.loss_and_gradients(
            problem, upstream, needs, arguments.budget, ahead
        )
    to_balance = record.args[0] if record.args else torch.zeros_like(row_scale)
    made = given(gradients.flat(), input)
    return record.row_loss, record.summary, record.argmax, *made, to_balance, sampling


def _upstream(
    family: RealityCreativity, row_scale: Tensor, balance: Tensor, square: Tensor | None
) -> Upstream:
    """The built-in losses, as the chunk loop wants them."""

    def upstream(stats, chunk):
        row = (balance[chunk.where], None if square is None else square[chunk.where])
        grads, to_balance = family.gradients(stats, *row, row_scale[chunk.where])
        return family(stats, *row), grads, (to_balance,)

    return upstream


def _linear_loss_fake(row_scale, balance, target_square, family, needs, input, weight, bias, arguments):
    dtype = arithmetic_dtype(input, weight, bias)
    return (
        torch.empty_like(row_scale),
        *_fake_statistics(input.shape[0], input, arguments, dtype),
        *fake_gradients(needs, input, weight, bias, arguments, dtype),
        torch.empty_like(row_scale),
        row_scale.new_empty((3,), dtype=dtype),
    )


@group
class Span(Arguments):
    """A chunk of rows: start:stop of those in `kept`, or of all, where those that do not count are masked."""

    kept: Tensor | None  # [n] int64, ascending
    start: int
    stop: int


def _chunk_problem(input, weight, bias, arguments: LinearArguments, span: Span) -> LinearProblem:
    active = arguments.valid if span.kept is None else None
    return linear_problem(input, weight, bias, arguments, Rows(input.shape[0], span.kept, active))


def _chunk(problem: LinearProblem, span: Span):
    """(problem, chunk, the same chunk, its hidden states), of a process that has all of the vocabulary."""
    chunk = problem.chunk(span.start, span.stop)
    return problem, chunk, chunk, problem.hidden(chunk)


def _chunk_stats(memory, span: Span, input, weight, bias, arguments: LinearArguments):
    """Fill memory with the logits of a chunk of rows; gives their summary [SUMMARY, n] and argmax [n]."""
    problem = _chunk_problem(input, weight, bias, arguments, span)
    with exact_products(input.device):
        return chunked.chunk_statistics(*_chunk(problem, span), memory)


def _chunk_stats_fake(memory, span, input, weight, bias, arguments):
    dtype = arithmetic_dtype(input, weight, bias)
    return _fake_statistics(span.stop - span.start, input, arguments, dtype)


def _chunk_gradients(
    memory,
    summary,
    coef,
    span: Span,
    to_input,
    to_weight,
    to_bias,
    to_temperature,
    input,
    weight,
    bias,
    arguments,
) -> None:
    """Add to the gradients what the chunk contributes whose logits memory holds; coef [7 or 14, n]."""
    gradients = Gradients(to_input, to_weight, to_bias, to_temperature)
    problem = _chunk_problem(input, weight, bias, arguments, span)
    with exact_products(input.device):
        problem, chunk, *rest = _chunk(problem, span)
        if problem.teacher is not None:
            chunk.target.dense.keep(chunked.of_teacher(memory))
        whole = problem, chunk, *rest
        chunked.chunk_gradients(*whole, memory, norm_rows(summary), coef, Reductions(gradients))


def _logits_stats(logits, arguments: LogitsArguments) -> tuple[Tensor, Tensor]:
    """Summary [SUMMARY, N] and argmax [N]."""
    problem = logits_problem(logits, arguments)
    with exact_products(logits.device):
        return dense.statistics(problem)


def _logits_stats_fake(logits, arguments):
    return _fake_statistics(logits.shape[0], logits, arguments, arithmetic_dtype(logits))


def _logits_stats_backward(
    summary, coef, temperature_grad: bool, logits, arguments: LogitsArguments
) -> tuple[Tensor, Tensor]:
    """Gradients of logits [N, V] and of temperature [N] from the coefficients of every row."""
    problem = logits_problem(logits, arguments)
    to_temperature = summary.new_zeros(logits.shape[0]) if temperature_grad else None
    with exact_products(logits.device):
        gradient = dense.gradient(problem, summary, coef, to_temperature)
    if to_temperature is not None:
        to_temperature = to_temperature.to(arguments.temperature.dtype)
    return given((gradient, to_temperature), logits)


def _logits_stats_backward_fake(summary, coef, temperature_grad, logits, arguments):
    to_temperature = torch.empty_like(arguments.temperature) if temperature_grad else logits.new_empty(0)
    return logits.new_empty(logits.shape), to_temperature


SIGNATURES: dict[str, Signature] = {}
# Of operators that may sample: no compiler may take two calls for one.
_DRAWS = torch.Tag.nondeterministic_seeded


def register(
    name: str, signature: Signature, returns: str, driver: Callable, fake: Callable, *tags: torch.Tag
) -> Callable:
    """Register a driver that takes one object for each part of its signature; gives what calls it so."""
    SIGNATURES[name] = signature

    def flat(function: Callable) -> Callable:
        return lambda *arguments: function(*signature.unflatten(*arguments))

    define(name, signature, returns, flat(driver), flat(fake), *tags)
    operator = getattr(torch.ops.tightrope, name)

    def call(*arguments):
        # Where ranks work together what they exchange is to be seen by who counts it: no operator around it.
        if arguments[-1].group is not None and not torch.compiler.is_compiling():
            return driver(*arguments)
        return operator(*signature.flatten(*arguments))

    return call


def _nothing(*_) -> None:
    """The fake of an operator that writes to what it is given."""


_STATISTICS = "(Tensor summary, Tensor argmax)"
_GRADIENTS = "Tensor to_input, Tensor to_weight, Tensor to_bias, Tensor to_temperature"
linear_stats = register("linear_stats", Signature(*HEAD), _STATISTICS, _linear_stats, _linear_stats_fake)
linear_stats_backward = register(
    "linear_stats_backward",
    Signature("Tensor summary", "Tensor coef", Needs, *HEAD),
    f"({_GRADIENTS})",
    _linear_stats_backward,
    _linear_stats_backward_fake,
    _DRAWS,
)
linear_loss = register(
    "linear_loss",
    Signature("Tensor row_scale", "Tensor balance", "Tensor? target_square", RealityCreativity, Needs, *HEAD),
    f"(Tensor row_loss, Tensor summary, Tensor argmax, {_GRADIENTS}, Tensor to_balance, Tensor sampling)",
    _linear_loss,
    _linear_loss_fake,
    _DRAWS,
)
logits_stats = register("logits_stats", Signature(*LOGITS), _STATISTICS, _logits_stats, _logits_stats_fake)
logits_stats_backward = register(
    "logits_stats_backward",
    Signature("Tensor summary", "Tensor coef", "bool temperature_grad", *LOGITS),
    "(Tensor to_logits, Tensor to_temperature)",
    _logits_stats_backward,
    _logits_stats_backward_fake,
)
chunk_stats = register(
    "chunk_stats",
    Signature("Tensor(a!) memory", Span, *HEAD),
    _STATISTICS,
    _chunk_stats,
    _chunk_stats_fake,
)
chunk_gradients = register(
    "chunk_gradients",
    Signature(
        "Tensor(a!) memory",
        "Tensor summary",
        "Tensor coef",
        Span,
        "Tensor(b!)? to_input",
        "Tensor(c!)? to_weight",
        "Tensor(d!)? to_bias",
        "Tensor(e!)? to_temperature",
        *HEAD,
    ),
    "()",
    _chunk_gradients,
    _nothing,
)
