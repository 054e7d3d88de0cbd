"""What a call with `vocab_parallel` sends: collectives, bytes and seconds, before anything is run.

Number and size of all collectives follow from numbers that the ranks agree on, so they follow here from the
same numbers, without tensors and without a process group. How the rows are cut into chunks is asked of the
very functions that the drivers ask (`strategies.plan`), so the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import backends, validation
from ..coefficients import RowCoefficients
from ..losses import REALITY
from ..statistics import PARTIAL, SIDES, norm_rows, summary_rows
from ..strategies import plan
from ..strategies.gemm import operand_dtype, result_dtype, widens
from ..strategies.products import Needs
from ..strategies.sampled import samples
from .layout import FACTS, ROWS

GRADIENTS = ("input", "weight", "bias", "temperature")
_INDEX = 8  # bytes of an int64
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a pass."""

    name: str  #: "all_gather" or "all_to_all"
    carries: str  #: what travels
    calls: int
    bytes: int  #: that a rank gets from the others in all these calls; it sends as many


@dataclass(frozen=True)
class Estimate:
    """The collectives of one call, which are the same on every rank.

    Bytes are those that a rank gets from the other ranks, filling included: of an all-gather ``ranks - 1``
    times its own value, of an all-to-all all but its own part of the result. It sends as many.
    """

    ranks: int
    strategy: str  #: "chunked", whose gradients are made in the forward pass, or "streaming"
    forward: tuple[Collective, ...]
    backward: tuple[Collective, ...]

    @property
    def calls(self) -> int:
        """Collectives, forward and backward."""
        return sum(part.calls for part in self.forward + self.backward)

    @property
    def bytes(self) -> int:
        """Bytes that a rank gets, forward and backward."""
        return sum(part.bytes for part in self.forward + self.backward)

    @property
    def steps(self) -> int:
        """Messages that a rank gets one after another: ``ranks - 1`` a collective, as in a ring."""
        return self.calls * (self.ranks - 1)

    def seconds(self, alpha: float, beta: float) -> float:
        """``alpha * steps + beta * bytes``: alpha seconds a message, beta seconds a byte.

        Nothing overlaps in it, where the chunked strategy sends gradients while it works on the next chunk.
        """
        return alpha * self.steps + beta * self.bytes


@dataclass(frozen=True)
class _Row:
    """Bytes of a row in each of the messages that it takes part in."""

    packed: int  # hidden states, and what they are scored against
    classes: int  # of a distribution: those of the rank that has most
    statistics: int
    maxima: int
    sides: int
    coefficients: int
    gradients: int


class _Ledger:
    """The collectives of a pass."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.sums: dict[tuple[str, str], tuple[int, int]] = {}

    def gather(self, carries: str, part: int) -> None:
        """part: bytes that a rank has for each other one."""
        self._add("all_gather", carries, part)

    def exchange(self, carries: str, part: int) -> None:
        self._add("all_to_all", carries, part)

    def _add(self, name: str, carries: str, part: int) -> None:
        if self.ranks > 1 and part:
            calls, total = self.sums.get((name, carries), (0, 0))
            self.sums[name, carries] = calls + 1, total + part * (self.ranks - 1)

    def collectives(self) -> tuple[Collective, ...]:
        return tuple(Collective(*names, *sums) for names, sums in self.sums.items())


@dataclass(frozen=True)
class _Moments:
    """What the moments of a chunk (`exchange.Step`) send for so many rows: of the rank that has most."""

    ranks: int
    sharded: bool
    row: _Row

    def spread(self, ledger: _Ledger, rows: int) -> None:
        if self.sharded:
            ledger.gather("rows", rows * self.row.packed)
            ledger.exchange("targets", rows * self.row.classes)

    def collect(self, ledger: _Ledger, rows: int) -> None:
        send = ledger.exchange if self.sharded else ledger.gather
        send("statistics", rows * self.row.statistics)
        if self.sharded:
            ledger.gather("maxima", rows * self.row.maxima)
        send("statistics of sets", rows * self.row.sides)

    def publish(self, ledger: _Ledger, rows: int) -> None:
        if self.sharded:
            ledger.gather("coefficients", rows * self.row.coefficients)

    def reduce(self, ledger: _Ledger, rows: int) -> None:
        part = (rows if self.sharded else -(-rows // self.ranks)) * self.row.gradients
        ledger.exchange("gradients", part)
        if not self.sharded:
            ledger.gather("gradients", part)

    def forward(self, ledger: _Ledger, spans: Spans) -> None:
        for start, stop in spans:
            self.spread(ledger, stop - start)
            self.collect(ledger, stop - start)

    def backward(self, ledger: _Ledger, spans: Spans) -> None:
        """Of a strategy whose gradients come with the backward pass."""
        if not self.sharded:
            self.reduce(ledger, spans[-1][1] if spans else 0)  # of all rows at once
            return
        for start, stop in spans:
            self.spread(ledger, stop - start)
            self.both(ledger, stop - start)

    def both(self, ledger: _Ledger, rows: int) -> None:
        self.publish(ledger, rows)
        self.reduce(ledger, rows)

    def chunked(self, ledger: _Ledger, spans: Spans) -> None:
        for start, stop in spans:
            self.forward(ledger, [(start, stop)])
            self.both(ledger, stop - start)


def estimate(
    *,
    ranks: int,
    rows: int | Sequence[int],
    hidden: int | None,
    vocab_size: int,
    mode: str = "replicated",
    strategy: str | None = None,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    target: str | int = "index",
    target_dtype: torch.dtype = torch.float32,
    reality: str = "cross_entropy",
    support: str | int | None = None,
    temperature: bool = False,
    gradients: Sequence[str] = ("input", "weight"),
    tokens: int | None = None,
    masked: bool = False,
    widest: int | None = None,
    given: bool = True,
    workspace_mb: float | None = None,
    gradient_noise: float | tuple[float, float] = 0.0,
    device: str | torch.device = "cpu",
) -> Estimate:
    """The collectives and bytes of one call with ``vocab_parallel``, and of its backward.

    They are those of an eager call, which begins with an agreement; docs/distributed.md says what a compiled
    one has in its place. With one rank nothing is sent.

    Args:
        ranks: of the group.
        rows: tokens that count; with ``mode="sharded"`` those of each rank, or one number for all of them.
        hidden: D; None for the functions that take logits.
        vocab_size: V, without padding.
        mode: the ``rows`` of :class:`tightrope.VocabParallel`, ``"replicated"`` or ``"sharded"``.
        strategy: ``"chunked"``, ``"streaming"``, or None: what a call chooses. Without gradients and for
            logits it is streaming whatever is said here, as it is for statistics and ``reduction="none"``.
        dtype: of the hidden states, or of the logits.
        weight_dtype: of the head; default ``dtype``.
        target: ``"index"``, ``"dense"``, or the K of a :class:`tightrope.TopKTarget`; with a
            ``class_weight`` class indices are a target of K = 1.
        target_dtype: of a dense target.
        reality: as in the call: the squared error of a dense target needs its square.
        support: None, ``"min_p"``, or the K of :class:`tightrope.Classes`.
        temperature: whether each token has its own.
        gradients: those that are wanted: some of ``"input"``, ``"weight"``, ``"bias"``, ``"temperature"``.
        tokens: those that do not count included, of all ranks together; default: all count.
        masked: tokens that do not count go along, masked (``skip_ignored=False``), and are among ``rows``.
        widest: classes of the rank that has most; default those of even shards, ``ceil(V / ranks)``.
        given: whether VocabParallel has both ``vocab_size`` and ``start``; else ranks agree on these first.
        workspace_mb, gradient_noise: as in the call.
        device: its type decides on the size of chunks; there need not be one.

    Returns:
        An :class:`Estimate`: ``forward`` and ``backward`` collectives, ``calls``, ``bytes``, ``steps`` and
        ``seconds(alpha, beta)``.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    ranks = validation.integer("ranks", ranks, low=1)
    vocab_size = validation.integer("vocab_size", vocab_size, low=1)
    validation.choice("mode", mode, ROWS)
    validation.choice("reality", reality, REALITY)
    workspace_mb = validation.run_options(None, workspace_mb, strategy)
    for gradient in gradients:
        validation.choice("gradients", gradient, GRADIENTS)
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    for name, value in (("dtype", dtype), ("weight_dtype", weight_dtype), ("target_dtype", target_dtype)):
        if value not in validation.FLOATING:
            raise TypeError(f"{name}: got {value!r}, expected a floating-point torch.dtype")
    sharded, device = mode == "sharded", torch.device(device)
    if hidden is None and sharded:
        raise ValueError('mode: got "sharded" for logits, expected "replicated", or hidden=D')
    counts = _counts(rows, ranks, sharded)
    tokens = sum(counts) if tokens is None else validation.integer("tokens", tokens, low=sum(counts))
    widest = -(-vocab_size // ranks) if widest is None else validation.integer("widest", widest, low=1)
    result = result_dtype(dtype, weight_dtype)
    row = _row(
        None if hidden is None else validation.integer("hidden", hidden, low=1),
        dtype.itemsize,
        result.itemsize,
        _kind("target", target, ("index", "dense")),
        widest * target_dtype.itemsize,
        None if support is None else _kind("support", support, ("min_p",)),
        bool(temperature),
        bool(masked),
        gradients,
    )
    moments, forward, backward = _Moments(ranks, sharded, row), _Ledger(ranks), _Ledger(ranks)
    for _ in range(1 if given else 2):
        forward.gather("agreement", FACTS * _INDEX)
    if reality == "squared_error" and target == "dense" and not sharded:
        forward.gather("targets", 2 * tokens * result.itemsize)  # sum and sum of squares of each
    if hidden is None:
        strategy, spans = "streaming", plan.logits_spans(tokens, widest, device)
        moments.forward(forward, spans)
        moments.backward(backward, spans)
        return Estimate(ranks, strategy, forward.collectives(), backward.collectives())
    workspace = plan.workspace_bytes(workspace_mb, device)
    strategy = strategy or plan.choose_strategy(tokens, widest, result.itemsize, workspace, device)
    strategy = strategy if gradients else "streaming"
    most, owners = max(counts), ranks if sharded else 1
    operand = operand_dtype(dtype, weight_dtype, result, widens(device, dtype))
    chunks = plan.tiled_chunk_spans(most, owners, widest, result, operand, workspace, device)
    if strategy == "chunked":
        moments.chunked(forward, chunks)
        if sharded:
            backward.gather("upstream gradient", result.itemsize)
    else:
        spans = plan.streaming_spans(most, owners, widest, result.itemsize, workspace, device)
        moments.forward(forward, spans)
        noise = validation.gradient_noise(gradient_noise)
        wanted = Needs("input" in gradients, "weight" in gradients, "bias" in gradients)
        if samples(noise, wanted, device, operand, result, backends.resolve(None, device), widest):
            for start, stop in chunks:
                moments.spread(backward, stop - start)
                moments.both(backward, stop - start)
        elif gradients:
            moments.backward(backward, chunks)
    return Estimate(ranks, strategy, forward.collectives(), backward.collectives())


def _row(
    hidden: int | None,
    itemsize: int,
    result: int,
    target: str | int,
    classes: int,
    support: str | int | None,
    temperature: bool,
    masked: bool,
    gradients: Sequence[str],
) -> _Row:
    """itemsize: of the hidden states. result: of the arithmetic. classes: bytes of a rank's part of a
    distribution. hidden is None for logits."""
    own_temperature = temperature or "temperature" in gradients
    packed = (hidden or 0) * itemsize + own_temperature * result + masked
    if isinstance(target, int):
        packed += target * (_INDEX + result)
    elif target == "index":
        packed += _INDEX
    if isinstance(support, int):
        packed += support * _INDEX
    norm = len(norm_rows(torch.empty(summary_rows(support is not None), 0)))
    scalars = len(RowCoefficients._fields) * (1 if support is None else 2)
    summed = ("input" in gradients) * (hidden or 0) + ("temperature" in gradients)
    return _Row(
        packed,
        classes if target == "dense" else 0,
        (len(PARTIAL) + 1) * result,  # the argmax is one more
        result if support == "min_p" else 0,
        0 if support is None else len(SIDES) * result,
        (norm + scalars) * result,
        summed * result,
    )


def _counts(rows: int | Sequence[int], ranks: int, sharded: bool) -> list[int]:
    """Rows of each rank that has its own."""
    if isinstance(rows, Sequence):
        if not sharded or len(rows) != ranks:
            expected = f"one of each of {ranks} ranks" if sharded else 'an integer with mode="replicated"'
            raise ValueError(f"rows: got {len(rows)} numbers, expected {expected}")
        return [validation.integer("rows", count, low=0) for count in rows]
    return [validation.integer("rows", rows, low=0)] * (ranks if sharded else 1)


def _kind(name: str, value: object, kinds: tuple[str, ...]) -> str | int:
    """One of the kinds, or the K of a sparse one."""
    if isinstance(value, str):
        validation.choice(name, value, kinds)
        return value
    return validation.integer(name, value, low=1)
