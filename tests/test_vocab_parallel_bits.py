"""Vocabulary over ranks: the same bits everywhere and every time, dtypes, one rank, and compiled graphs."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

import tightrope
from helpers import assert_no_worse
from shards import Trial, alone, call, normalized, of_rank, on_rank, parallel, part_of, whole

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = {"workspace_mb": 1e-3}
both = pytest.mark.parametrize("rows", ["replicated", "sharded"])
strategies = pytest.mark.parametrize("strategy", ["chunked", "streaming"])


def bits(rank: int, trial: Trial) -> dict[str, str]:
    """A digest of every result."""
    results = on_rank(trial, rank)
    digest = {}
    for name, value in results.items():
        flat = value.contiguous().flatten()
        digest[name] = hashlib.sha256(bytes(flat.view(torch.uint8).tolist())).hexdigest()
    return digest


@strategies
def test_all_ranks_hold_the_same_bits(ranks, strategy):
    """Would catch sums in another order on each rank: their losses, and then their models, drift apart."""
    options = {"strategy": strategy, "balance": 0.1, "creativity": "support_entropy", **SMALL}
    trial = Trial((20, 8, 1), dtype=F32, tokens=(40,), options=options)
    first, *others = ranks(3).run(bits, trial)
    shared = [name for name in first if name not in ("weight", "bias")]
    assert "loss" in shared and "input" in shared and "stats.support_entropy" in shared
    for other in others:
        assert {name: other[name] for name in shared} == {name: first[name] for name in shared}


@both
@strategies
def test_runs_repeat_bit_for_bit(ranks, rows, strategy):
    """Would catch a sum whose order is that in which messages arrive."""
    tokens = (3, 40, 11) if rows == "sharded" else (40,)
    trial = Trial((10, 10, 10), rows=rows, dtype=F32, tokens=tokens, options={"strategy": strategy, **SMALL})
    first = ranks(3).run(bits, trial)
    for _ in range(3):
        assert ranks(3).run(bits, trial) == first


def in_parts(rank: int, trial: Trial) -> dict[str, list]:
    return {name: value.tolist() for name, value in on_rank(trial, rank).items()}


@both
@strategies
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_narrow_dtypes_are_no_worse_than_one_process(ranks, rows, strategy, dtype):
    """Would catch a partial gradient that is rounded before it is summed, or float16 that flushes to zero."""
    tokens = (5, 20) if rows == "sharded" else (25,)
    options = {"strategy": strategy, "balance": 0.1, "creativity": "collision", "softcap": 9.0, **SMALL}
    trial = Trial((4, 25), rows=rows, dtype=dtype, tokens=tokens, width=16, options=options)
    rough, exact = alone(trial), alone(trial, exactly=True)
    for rank, results in enumerate(ranks(2).run(in_parts, trial)):
        want, usual = of_rank(trial, rank, exact), of_rank(trial, rank, rough)
        for name, values in results.items():
            if rows == "sharded" and not want[name].dim():
                continue  # the loss, of which this is a part
            have = torch.tensor(values, dtype=torch.float64).reshape(want[name].shape)
            assert_no_worse(have, want[name], usual[name], 1e-6, f"{name} of rank {rank}")


def one_rank(rank: int, rows: str, strategy: str) -> list[str]:
    """Names of the results in which a group of one differs from no group by any bit."""
    wrong = []
    for size in range(dist.get_world_size()):
        group = dist.new_group([size])
        if rank == size:
            mine = group
    trial = Trial((29,), rows=rows, dtype=F32, options={"strategy": strategy, **SMALL})
    plain = alone(trial)
    part = whole(trial)
    options = {**normalized(trial), "vocab_parallel": tightrope.VocabParallel(mine, rows=rows)}
    for name, value in call(trial, part, options).items():
        if not torch.equal(value, plain[name]):
            wrong.append(name)
    return wrong


@both
@strategies
def test_one_rank_is_no_rank(ranks, rows, strategy):
    """Would catch a group of one that goes another way, or sends anything."""
    assert ranks(2).run(one_rank, rows, strategy) == [[], []]


def compiled(rank: int, trial: Trial) -> list[str]:
    """Where a compiled call differs from an eager one; and where it was compiled again for other values."""
    torch._dynamo.reset()
    made = part_of(trial, rank)
    options = {**trial.options, **normalized(trial), "vocab_parallel": parallel(trial, rank)}

    def step(hidden, head, target):
        return tightrope.linear_reality_creativity_loss(hidden, head, target, **options)

    wrong, results = [], []
    counter = CompileCounterWithBackend("aot_eager")
    for function in (step, torch.compile(step, fullgraph=True, backend=counter)):
        for scale in (1.0, 0.5):
            hidden = (made["input"] * scale).requires_grad_()
            head = made["weight"].clone().requires_grad_()
            loss = function(hidden, head, made["target"])
            loss.backward()
            results.append((loss.detach(), hidden.grad, head.grad))
    for eager, graph in zip(results[:2], results[2:]):
        for name, a, b in zip(("loss", "input", "weight"), eager, graph):
            if a.numel() and not torch.allclose(a, b, rtol=1e-12, atol=1e-14, equal_nan=False):
                wrong.append(f"{name}: {(a - b).abs().max().item():.2e}")
    if counter.frame_count != 1:
        wrong.append(f"compiled {counter.frame_count} times")
    return wrong


@both
def test_compiled_in_one_graph(ranks, rows):
    """Would catch a graph break, or ranks of a compiled call that do not agree on the chunks."""
    tokens = (0, 9) if rows == "sharded" else (9,)
    for target, strategy, options in (
        ("index", "chunked", {}),
        ("topk", "streaming", {"balance": 0.1, "creativity": "support_entropy"}),
    ):
        options = {**options, "strategy": strategy, **SMALL}
        trial = Trial((25, 4), rows=rows, tokens=tokens, target=target, options=options)
        assert ranks(2).run(compiled, trial) == [[], []]


def not_given(rank: int) -> str:
    torch._dynamo.reset()
    step = torch.compile(tightrope.linear_vocab_stats, fullgraph=True, backend="eager")
    parallel = tightrope.VocabParallel(dist.group.WORLD)
    try:
        step(torch.ones(2, 3), torch.ones(4, 3), vocab_parallel=parallel)
    except Exception as error:
        return str(error)
    return ""


def test_compiled_without_sizes(ranks):
    """Would catch a collective that is made while a graph is traced, by some ranks and not by others."""
    for said in ranks(2).run(not_given):
        assert "got vocab_size or start None under torch.compile, expected both" in said
