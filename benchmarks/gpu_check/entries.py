"""What is timed at each shape, and what each step is made of: a table, in the order of what it tells.

A line says who computes the loss (Tightrope with some options, or a competitor of ``tightrope bench``), in
which of its scenarios, and the phases from which `predictions` reckons its time. To add one is to add a
line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from roofline import ITEM, Phase, chunk_count, phases
from tightrope.cli.bench import competitors
from tightrope.cli.bench.cases import GPU_SHAPES, IGNORED_SHARE, Case
from tightrope.cli.bench.competitors import Competitor
from tightrope.strategies import plan

LLAMA, QWEN, LARGEST = (
    next(case for case in GPU_SHAPES if case.name == name) for name in ("llama3-8b", "qwen3-8b", "qwen3.5-2b")
)
SHAPES = tuple(
    replace(case, dtype="bfloat16", device="cuda")
    for case in (LLAMA, QWEN, replace(LLAMA, name="llama3-8b, half", rows=LLAMA.rows // 2), LARGEST)
)


@dataclass(frozen=True)
class Entry:
    """phases: of a case. options: of Tightrope, where peer, a competitor's name, is not given."""

    name: str
    phases: Callable[[Case], list[Phase]]
    options: dict[str, object] = field(default_factory=dict)
    scenario: str = "pretraining"
    peer: str | None = None

    def competitor(self) -> Competitor:
        if self.peer is not None:
            return next(c for c in competitors.all_competitors() if c.name == self.peer)
        loss = partial(competitors.ours, **self.options)
        return Competitor(self.name, "tightrope", loss, lambda case, loss: None)


def _step(strategy: str, frozen: bool = False, share: float = 1.0) -> Callable[[Case], list[Phase]]:
    """share: of the rows that count."""
    return lambda case: phases(strategy, round(share * case.rows), case.dim, case.vocab, frozen)


def _dense(bytes_a_logit: float) -> Callable[[Case], list[Phase]]:
    """The three GEMMs and passes over all the logits, which stay in bfloat16."""

    def found(case: Case) -> list[Phase]:
        passes = Phase("passes", 0, bytes_a_logit * case.rows * case.vocab, 0)
        return [*three_gemms(case), passes]

    return found


def three_gemms(case: Case) -> list[Phase]:
    """The floor: each into a fresh bfloat16 output."""
    n, d, v = case.rows, case.dim, case.vocab
    gemm, hidden, head, logits = 2.0 * n * d * v, ITEM * n * d, ITEM * v * d, ITEM * n * v
    return [
        Phase("logits", gemm, hidden + head, logits),
        Phase("dh", gemm, logits + head, hidden),
        Phase("dW", gemm, logits + hidden, head),
    ]


def _taught(case: Case) -> list[Phase]:
    """A teacher of twice the D: one product more, a sweep for its statistics, three passes of PyTorch's that
    make probabilities of its logits, and what the row kernels read of these."""
    n, d, v = case.rows, case.dim, case.vocab
    read = ITEM * (chunk_count(n, v) * v * 2 * d + n * 2 * d)
    teacher = Phase("teacher", 2.0 * n * 2 * d * v, read, 4 * n * v)
    return [teacher, Phase("target", 0, (4 + 3 * 8 + 2 * 4) * n * v, 0), *phases("chunked", n, d, v)]


def _curvature(case: Case) -> list[Phase]:
    """Seven products, by chunks: the logits, two for their direction, and two for each of the results, of G
    and its derivative. Logits and direction are float32, and rounded for the products that they go into."""
    n, d, v = case.rows, case.dim, case.vocab
    gemm, head, hidden, logits = 2.0 * n * d * v, ITEM * v * d, ITEM * n * d, n * v
    chunks, tiles = chunk_count(n, v), math.ceil(v / plan.GPU.tile)
    return [
        Phase("z", gemm, chunks * head + hidden, 4 * logits),
        Phase("zdot", 2 * gemm, 2 * (chunks * head + hidden), (4 + 8) * logits),
        Phase("row_tangent", 0, 8 * logits, 0),
        Phase("row_grad_tangent", 0, 8 * logits, 8 * logits),
        Phase("narrower", 0, 8 * logits, 2 * ITEM * logits),
        Phase("dh", 2 * gemm, 2 * (ITEM * logits + chunks * head), (4 * tiles - 1) * 4 * n * d),
        Phase("dW", 2 * gemm, 2 * (ITEM * logits + hidden), (4 * chunks - 1) * 4 * v * d),
        Phase("round", 0, 4 * (n + v) * d, ITEM * (n + v) * d),
    ]


def _sampled(share: float, workspace_mb: float | None, passes: int) -> Callable[[Case], list[Phase]]:
    """By chunks: the logits' product and two row kernels, whose float32 gradient stays; per chunk the drawn
    columns are gathered by sectors and multiplied in Triton; the part of low rank at the end.

    share: of the columns, drawn. passes: that they take.
    """

    def found(case: Case) -> list[Phase]:
        n, d, v = case.rows, case.dim, case.vocab
        chunks = chunk_count(n, v, fused=True, workspace_mb=workspace_mb)
        head, hidden, logits, drawn = ITEM * v * d, ITEM * n * d, n * v, share * n * v
        thin, met = share * 2.0 * n * d * v, 1 - (1 - share) ** (SECTOR / 4)
        return [
            Phase("norms", 0, head, 4 * v * d),  # and zeros to the float32 sum of dW
            Phase("logits", 2.0 * n * d * v, chunks * head + hidden, 4 * logits),
            Phase("row_stats", 0, 4 * logits, 0),
            Phase("row_grad_sums", 0, 4 * logits, 4 * logits),
            Phase("vectors", 0, chunks * VECTORS * LAUNCH, 0),
            Phase("drawn_columns", 0, 4 * met * logits, ITEM * drawn),
            Phase("stream_dh", thin, ITEM * drawn + chunks * share * head, 2 * 4 * passes * n * d),
            Phase("stream_dW", thin, ITEM * drawn + hidden, 2 * 4 * chunks * share * v * d),
            Phase("low rank", 0, head, 2 * 4 * v * d),
            Phase("round", 0, 4 * (n + v) * d, ITEM * (n + v) * d),
        ]

    return found


def _liger(case: Case) -> list[Phase]:
    """Chunks of ``N / (V / D)`` rows, to a power of two: each makes a bfloat16 dW, and adds it to the sum."""
    rows = 1 << (-(-case.rows // -(-case.vocab // case.dim)) - 1).bit_length()
    chunks = -(-case.rows // rows)
    sums = Phase("sums", 0, chunks * 4 * ITEM * case.vocab * case.dim, 0)
    return [*three_gemms(case), Phase("rows", 0, 10 * case.rows * case.vocab, 0), sums]


def _cce(case: Case) -> list[Phase]:
    """The logits twice in Triton; of the gradients' products those blocks that have a target, one in five
    here: its filter leaves out what is below bfloat16's precision, and random logits are flat."""
    gemm = 2.0 * case.rows * case.dim * case.vocab
    blocks = [Phase(f"stream_{name}", share * gemm, 0, 0) for name, share in (("dh", 0.2), ("dW", 0.2))]
    return [Phase("stream_forward", gemm, 0, 0), Phase("stream_backward", gemm, 0, 0), *blocks]


# Kernels on vectors of V or fewer numbers that a chunk of a sampled step starts, counted on a CPU; and bytes
# that memory moves while one of them starts and ends, 2.5 microseconds.
VECTORS, LAUNCH = 320, 7.5e6
# Bytes that memory gives at least: entries of columns that are not wanted come with those that are.
SECTOR = 32
# Of random logits, which are flat, SAMPLED_NOISE takes all of the columns, and NOISE a SHARE of them, counted
# on a CPU: in chunks of half the rows, so that the pilot has every target.
NOISE, SHARE, SAMPLED_MB = 0.02, 0.09, 512
CHUNKED = {"strategy": "chunked"}
ENTRIES = (
    Entry("chunked, fused", _step("fused"), CHUNKED | {"backend": "cuda"}),
    Entry("chunked, two kernels", _step("chunked"), CHUNKED | {"backend": "triton"}),
    Entry("streaming", _step("streaming"), {"strategy": "streaming"}),
    Entry(
        "sampled",
        _sampled(SHARE, SAMPLED_MB, 1),
        CHUNKED | {"backend": "cuda", "gradient_noise": NOISE, "workspace_mb": SAMPLED_MB},
    ),
    # Where less noise is allowed than sampling has, all columns are drawn.
    Entry(
        "sampled, made in full",
        _sampled(1.0, None, 4),
        CHUNKED | {"backend": "cuda", "gradient_noise": competitors.SAMPLED_NOISE},
    ),
    Entry("frozen head", _step("fused", frozen=True), scenario="lora"),
    Entry("70 % ignored", _step("fused", share=1 - IGNORED_SHARE), scenario="sft"),
    Entry("statistics, with gradients", _step("streaming"), scenario="rl"),
    Entry("teacher's head", _taught, CHUNKED, scenario="teacher"),
    Entry("Hessian-vector product", _curvature, CHUNKED, scenario="curvature"),
    # Read and written once and again: log_softmax and its gradient, and the entropy's own passes.
    Entry("eager", _dense(52), peer="eager PyTorch"),
    Entry("Liger", _liger, peer="Liger"),
    Entry("cut-cross-entropy", _cce, peer="cut-cross-entropy"),
    # Fused into three passes that read the logits, and one that writes their gradient.
    Entry("torch.compile", _dense(10), peer="torch.compile"),
    Entry("torch.compile, auto-chunked", _dense(10), peer=competitors.AUTO_CHUNKED),
)
