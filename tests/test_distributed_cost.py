"""`tightrope.distributed.estimate` against what real ranks send, collective by collective and byte by byte.

Every call stands here as words and numbers (`Call`): a rank makes tensors of them and counts, with torch's
own counter and one that knows bytes; this process, which has no process group, asks `estimate`.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import tightrope
from helpers import child_environment, rand, randn
from tightrope.cli.bench.traffic import Traffic
from tightrope.distributed import estimate
from tightrope.distributed.layout import Agreement
from tightrope.strategies import plan

pytestmark = pytest.mark.one_in(4)

K = 3  # entries of a top-k target, and classes of a set
WIDTH = 5
OPERATORS = {"_allgather_base_": "all_gather", "alltoall_base_": "all_to_all"}
LIMIT = 150  # seconds of a task of dozens of calls, on a busy machine
SEVERAL = 2.5e-4  # MiB of workspace: several chunks of these shapes


@dataclass(frozen=True)
class Call:
    sizes: tuple[int, ...]  # rows of each rank's head
    mode: str = "replicated"
    tokens: tuple[int, ...] = (13,)  # sharded: of each rank
    ignored: str = "none"  # "some", "all", or "masked": some, and they go along
    strategy: str | None = "chunked"
    support: str | None = None
    target: str = "index"
    reality: str = "cross_entropy"
    gradients: tuple[str, ...] = ("input", "weight")
    temperature: bool = False
    function: str = "loss"  # "own", "stats", "none" (reduction), "logits"
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    given: bool = True
    workspace_mb: float | None = None
    gradient_noise: float | tuple[float, float] = 0.0

    def here(self, rank: int) -> int:
        return self.tokens[rank] if self.mode == "sharded" else self.tokens[0]

    def lost(self, tokens: int) -> torch.Tensor:
        """Which tokens do not count."""
        every = {"none": math.inf, "all": 1}.get(self.ignored, 3)
        return torch.arange(tokens) % every == (0 if tokens and every < math.inf else -1)

    def asked(self) -> dict[str, object]:
        """What `estimate` is told."""
        keeps = self.ignored == "masked" or self.function == "logits"
        rows = [n if keeps else n - int(self.lost(n).sum()) for n in self.tokens]
        return {
            "ranks": len(self.sizes),
            "rows": rows if self.mode == "sharded" else rows[0],
            "hidden": None if self.function == "logits" else WIDTH,
            "vocab_size": sum(self.sizes),
            "mode": self.mode,
            "strategy": "streaming" if self.function in ("stats", "none") else self.strategy,
            "dtype": self.dtype,
            "weight_dtype": self.weight_dtype,
            "target": K if self.target == "topk" else self.target,
            "target_dtype": torch.float64 if self.target == "dense" else torch.float32,
            "reality": self.reality,
            "support": K if self.support == "classes" else self.support,
            "temperature": self.temperature,
            "gradients": self.gradients,
            "tokens": sum(self.tokens),
            "masked": self.ignored == "masked",
            "widest": max(self.sizes),
            "given": self.given,
            "workspace_mb": self.workspace_mb,
            "gradient_noise": self.gradient_noise,
        }


def make(call: Call, rank: int):
    """(function without arguments, leaves) of a rank."""
    vocab, tokens, here = sum(call.sizes), call.here(rank), call.sizes[rank]
    start, lost = sum(call.sizes[:rank]), call.lost(call.here(rank))
    leaves = {
        "input": randn(tokens, WIDTH).to(call.dtype),
        "weight": randn(vocab, WIDTH, seed=1)[start : start + here].to(call.weight_dtype),
        "bias": randn(vocab, seed=2)[start : start + here],
    }
    if call.temperature or "temperature" in call.gradients:
        leaves["temperature"] = rand(tokens, seed=3) + 0.5
    for name in call.gradients:
        leaves[name].requires_grad_()
    classes = torch.randint(vocab, (tokens, K), generator=torch.Generator().manual_seed(4))
    options = {"vocab_parallel": parallel(call, rank)}
    if call.target == "index":
        target = classes[:, 0].masked_fill(lost, -100)
    elif call.target == "topk":
        target = tightrope.TopKTarget(classes.masked_fill(lost[:, None], -100), torch.ones(tokens, K))
    else:
        width = vocab if call.mode == "sharded" else here
        target = torch.full((tokens, width), 1 / vocab, dtype=torch.float64)
        options["row_weight"] = (~lost).float()
    support = {"min_p": tightrope.MinP(0.1), "classes": tightrope.Classes(classes)}.get(call.support)
    options |= {"support": support, "temperature": leaves.get("temperature", 1.0)}
    if call.function != "logits":
        options |= {"workspace_mb": call.workspace_mb, "skip_ignored": call.ignored != "masked"}
        options |= {"gradient_noise": call.gradient_noise}
    head = leaves["input"], leaves["weight"], target

    def run() -> torch.Tensor:
        if call.function == "logits":
            logits = torch.nn.functional.linear(*head[:2])
            return tightrope.reality_creativity_loss(logits, target, **options)
        if call.function == "stats":
            return tightrope.linear_vocab_stats(*head, leaves["bias"], **options).lse.sum()
        loss = {"reduction": "sum" if call.function != "none" else "none", "strategy": call.strategy}
        if call.function == "own":
            return tightrope.linear_vocab_loss(*head, lambda s: s.lse, leaves["bias"], **options, **loss)
        options["reality"] = call.reality
        return tightrope.linear_reality_creativity_loss(*head, leaves["bias"], **options, **loss).sum()

    return run, [leaves[name] for name in call.gradients]


def parallel(call: Call, rank: int) -> tightrope.VocabParallel:
    size, start = (sum(call.sizes), sum(call.sizes[:rank])) if call.given else (None, None)
    return tightrope.VocabParallel(dist.group.WORLD, size, start, call.mode)


def counted(rank: int, calls: list[Call]) -> list[dict]:
    """What each call sent, forward and backward: {name: [calls, bytes]} each."""
    return [_counted(call, rank) for call in calls]


def _counted(call: Call, rank: int) -> dict[str, dict[str, list[int]]]:
    run, leaves = make(call, rank)
    with _Counter(len(call.sizes)) as forward:
        loss = run()
    with _Counter(len(call.sizes)) as backward:
        if leaves:
            torch.autograd.grad(loss, leaves)
    return {"forward": forward.found(), "backward": backward.found()}


class _Counter:
    def __init__(self, ranks: int):
        self.torch, self.ours = CommDebugMode(), Traffic(ranks)

    def __enter__(self) -> _Counter:
        self.torch.__enter__()
        self.ours.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self.ours.__exit__(*raised)
        self.torch.__exit__(*raised)

    def found(self) -> dict[str, list[int]]:
        counts = {OPERATORS[op.__name__]: n for op, n in self.torch.get_comm_counts().items()}
        assert counts == dict(self.ours.calls)
        return {name: [calls, self.ours.bytes[name]] for name, calls in counts.items()}


def expected(call: Call) -> dict[str, dict[str, list[int]]]:
    """The same of `estimate`."""
    cost, found = estimate(**call.asked()), {}
    for name in ("forward", "backward"):
        sums: dict[str, list[int]] = {}
        for part in getattr(cost, name):
            both = sums.setdefault(part.name, [0, 0])
            both[0] += part.calls
            both[1] += part.bytes
        found[name] = sums
    return found


def check(pool, calls: list[Call]) -> None:
    for rank, found in enumerate(pool.run(counted, calls, limit=LIMIT)):
        for call, have in zip(calls, found):
            assert have == expected(call), f"rank {rank}: {call}"


SIZES = {2: (15, 14), 3: (10, 10, 9)}
TOKENS = {2: (9, 4), 3: (0, 9, 4)}


def base(size: int, mode: str, **changes) -> Call:
    return Call(SIZES[size], mode, TOKENS[size] if mode == "sharded" else (13,), **changes)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_counted_collectives_and_bytes_are_the_estimate(ranks, size, mode):
    """Would catch a collective that one strategy makes and `estimate` does not know, or ignored rows sent."""
    check(
        ranks(size),
        [
            base(size, mode, strategy=strategy, support=support, ignored=ignored, workspace_mb=workspace)
            for strategy, support, (ignored, workspace) in itertools.product(
                ("chunked", "streaming"),
                (None, "min_p", "classes"),
                (("none", None), ("some", SEVERAL), ("all", SEVERAL), ("masked", SEVERAL)),
            )
        ],
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_targets_dtypes_and_gradients(ranks, size, mode):
    """Would catch a width in bytes that is taken from the wrong dtype, or a reduction that nobody wants."""
    low, double = torch.bfloat16, torch.float64
    changes = [
        {"target": "topk", "ignored": "some"},
        {"target": "dense", "ignored": "some"},
        {"target": "dense", "reality": "squared_error", "ignored": "some"},
        {"temperature": True},
        {"gradients": ("input", "temperature")},
        {"gradients": ("weight",)},
        {"gradients": ("bias",)},
        {"gradients": ("temperature",)},
        {"gradients": ()},
        {"given": False},
        {"dtype": low, "weight_dtype": low},
        {"dtype": low},
        {"dtype": double, "weight_dtype": double, "support": "min_p"},
        {"function": "own"},
        {"function": "stats", "strategy": None},
        {"function": "none"},
        {"function": "loss", "strategy": None},
        {"function": "loss", "strategy": None, "workspace_mb": SEVERAL},
        {"gradient_noise": 0.1, "workspace_mb": SEVERAL},
        {"gradient_noise": (0.0, 0.1), "gradients": ("input",), "workspace_mb": SEVERAL},
        {"gradient_noise": 0.1, "function": "stats", "workspace_mb": SEVERAL, "temperature": True},
    ]
    if mode == "replicated":
        changes += [
            {"function": "logits"},
            {"function": "logits", "gradients": ("input", "temperature"), "support": "classes"},
            {"function": "logits", "target": "dense", "reality": "cross_entropy"},
        ]
    calls = [
        base(size, mode, **{"strategy": strategy, **change})
        for change in changes
        for strategy in ("chunked", "streaming")
    ]
    uneven = {2: (0, 29), 3: (0, 28, 1)}[size]
    calls += [replace(call, sizes=uneven) for call in calls if call.given]
    check(ranks(size), calls)


def test_the_sizes_above_have_several_chunks():
    """Would catch a workspace that is too large for these tests to see more than one chunk."""
    for owners, rows in ((1, 13), (3, 9)):
        cpu, small = torch.device("cpu"), plan.workspace_bytes(SEVERAL, torch.device("cpu"))
        f32 = torch.float32
        assert len(plan.tiled_chunk_spans(rows, owners, 15, f32, f32, small, cpu)) > 1
        assert len(plan.streaming_spans(rows, owners, 15, 4, small, cpu)) > 1


# 512 ranks, of which there is one


MANY = [
    Call((2,) * 512, mode, (3,) * 512 if mode == "sharded" else (600,), **changes)
    for mode in ("replicated", "sharded")
    for changes in (
        {"strategy": "chunked", "workspace_mb": 0.02},
        {"strategy": "streaming", "workspace_mb": 0.02},
        {"strategy": "chunked", "support": "min_p", "ignored": "some"},
        {"strategy": "streaming", "given": False},
        {"function": "stats", "strategy": None},
    )
]


def on_fake_ranks(rank: int) -> None:
    """Prints what one of 512 ranks sends, and the shapes that it gets, where nothing is sent.

    Torch's fake group answers each rank with what it gave itself. So all would have this rank's part of the
    head: what the ranks tell of their parts is put right, in Python, after it has travelled.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=512)
    meet = Agreement._meet

    def met(self, facts: list[int], text: str = "") -> list[list[int]]:
        told = meet(self, facts, text)
        if facts[1] == 1:  # of a head's start and the vocabulary: that the heads are not one and the same
            return [[*facts[:5], rank, *facts[6:]] for rank, facts in enumerate(told)]
        return [[*facts[:3], facts[2] * rank, *facts[4:]] for rank, facts in enumerate(told)]

    Agreement._meet = met
    found = []
    for call in MANY:
        run, leaves = make(call, rank)
        with _Counter(512) as forward:
            loss = run()
        with _Counter(512) as backward:
            grads = torch.autograd.grad(loss, leaves)
        shapes = [list(loss.shape), *(list(grad.shape) for grad in grads)]
        found.append([{"forward": forward.found(), "backward": backward.found()}, shapes])
    print(json.dumps(found))


@pytest.mark.parametrize("rank", [0, 511])
def test_512_ranks_send_what_is_estimated(rank):
    """Would catch a count that is right for a few ranks only, or a shape that depends on their number."""
    done = subprocess.run(
        [sys.executable, "-c", f"import test_distributed_cost as t; t.on_fake_ranks({rank})"],
        capture_output=True,
        text=True,
        timeout=120,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for call, (counts, shapes) in zip(MANY, json.loads(done.stdout), strict=True):
        assert counts == expected(call), call
        assert shapes == [[], [call.here(rank), WIDTH], [2, WIDTH]], call
