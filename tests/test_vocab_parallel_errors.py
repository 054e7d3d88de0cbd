"""Ranks that differ: one clear error on every rank, and never a hang.

A rank whose arguments are refused does not reach the collectives that the others wait in. So each case is run
on real processes under a time limit, and what each rank raised is compared.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import tightrope
from helpers import randn

VOCAB, WIDTH, TOKENS = 24, 4, 6


def _tensors(rank: int, size: int):
    share = VOCAB // size
    hidden = randn(TOKENS, WIDTH, seed=1)
    head = randn(VOCAB, WIDTH, seed=2)[rank * share : (rank + 1) * share]
    target = torch.arange(TOKENS)
    return hidden, head, target


def attempt(rank: int, size: int, who: int, case: str, rows: str, given: bool) -> str:
    """What a rank raised: its type and words; "" where it raised nothing."""
    hidden, head, target = _tensors(rank, size)
    start = rank * (VOCAB // size)
    options, here = {}, rank == who
    if case == "class out of range" and here:
        target = target.clone()
        target[2] = VOCAB
    elif case == "negative class" and here:
        target = target.clone()
        target[2] = -7
    elif case == "top-k class" and here:
        target = tightrope.TopKTarget(torch.full((TOKENS, 2), VOCAB), torch.ones(TOKENS, 2))
    elif case == "another D" and here:
        hidden, head = randn(TOKENS, WIDTH + 1), randn(len(head), WIDTH + 1)
    elif case == "D of the head" and here:
        head = randn(len(head), WIDTH + 1)
    elif case == "another option":
        options["softcap"] = 30.0 if here else None
    elif case == "another term":
        options.update(balance=0.01, creativity="collision" if here else "entropy")
    elif case == "another reduction":
        options["reduction"] = "sum" if here else "mean"
    elif case == "another kind of target" and here:
        target = tightrope.TopKTarget(target.unsqueeze(-1), torch.ones(TOKENS, 1))
    elif case == "bad option" and here:
        options["label_smoothing"] = 2.0
    elif case == "no tensor" and here:
        hidden = "hidden"
    elif case == "unknown option" and here:
        options["balanced"] = 0.1
    elif case == "other token counts" and here:
        hidden, target = hidden[:-1], target[:-1]
    elif case == "other ignored tokens" and here:
        target = target.masked_fill(target == 1, -100)
    elif case == "a whole head":
        head = randn(VOCAB, WIDTH, seed=2)
    elif case == "a hole" and here:
        head = head[:-1]
    elif case == "an overlap" and here:
        start = max(start - 1, 0) if rank else start + 1
    elif case == "another vocab_size":
        options["vocab_size"] = VOCAB + here
    elif case == "no gradient of input":
        hidden = hidden.requires_grad_(not here)
    elif case == "no gradient of temperature":
        options["temperature"] = torch.ones(TOKENS, requires_grad=not here)
    elif case == "another dtype of the head" and here:
        head = head.bfloat16()
    elif case == "not given" and here:
        given = False
    elif case == "not started" and here:
        start = None
    vocab_size = options.pop("vocab_size", VOCAB) if given else None
    parallel = tightrope.VocabParallel(dist.group.WORLD, vocab_size, start if given else None, rows)
    head = head.requires_grad_()
    try:
        tightrope.linear_reality_creativity_loss(hidden, head, target, vocab_parallel=parallel, **options)
    except Exception as error:
        # The others do not wait: a collective here would hang if they did.
        dist.barrier()
        return f"{type(error).__name__}: {error}"
    dist.barrier()
    return ""


# case: (words that every rank's error has, words of the rank that is at fault)
CASES = {
    "class out of range": ("target: got class 24", "IndexError"),
    "negative class": ("target: got class -7", "IndexError"),
    "top-k class": ("target.indices: got class 24", "IndexError"),
    "another D": ("expected hidden states of one D", "ValueError"),
    "D of the head": ("input: got last dimension 4, expected D = 5", "ValueError"),
    "another option": ("softcap=30.0", "ValueError"),
    "another term": ("creativity", "ValueError"),
    "another reduction": ("reduction=", "ValueError"),
    "another kind of target": ("index=", "ValueError"),
    "bad option": ("label_smoothing: got 2.0", "ValueError"),
    "no tensor": ("input: got str, expected a tensor", "TypeError"),
    "unknown option": ("balanced", "TypeError"),
    "no gradient of input": ("gradient of input=", "ValueError"),
    "no gradient of temperature": ("that requires grad on rank", "ValueError"),
    "another dtype of the head": ("dtype of weight=torch.bfloat16", "ValueError"),
}
REPLICATED = {
    "other token counts": ("expected the same tokens on all ranks", "ValueError"),
    "other ignored tokens": ("expected the same tokens on all ranks", "ValueError"),
}
GIVEN = {
    "a whole head": ("expected a part of the 24 classes on each rank, not all of them", "ValueError"),
    "a hole": ("expected heads that", "ValueError"),
    "an overlap": ("expected heads that follow each other from 0 to 24", "ValueError"),
    "another vocab_size": ("expected one vocab_size", "ValueError"),
    "not given": ("expected vocab_size and start given on all ranks, or on none", "ValueError"),
    "not started": ("expected vocab_size and start given on all ranks, or on none", "ValueError"),
}


def raised_everywhere(pool, case: str, rows: str, given: bool, words: str, kind: str) -> None:
    for who in range(pool.size):
        for rank, said in enumerate(pool.run(attempt, pool.size, who, case, rows, given)):
            assert words in said, f"rank {rank}, where rank {who} differs, raised {said!r}"
            assert said.startswith(kind), said


@pytest.mark.parametrize("rows", ["replicated", "sharded"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_rank_that_differs(ranks, case, rows, given):
    """Would catch a check that is made on one rank alone, while the others wait for it."""
    raised_everywhere(ranks(2), case, rows, given, *CASES[case])


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("rows", ["replicated", "sharded"])
def test_heads_that_are_no_vocabulary(ranks, case, rows):
    """Would catch heads that overlap, leave a hole, or are whole on every rank (peers sum those silently)."""
    raised_everywhere(ranks(3), case, rows, True, *GIVEN[case])


@pytest.mark.parametrize("case", REPLICATED)
def test_replicated_tokens_that_differ(ranks, case):
    """Would catch ranks whose chunks are not of the same number: they part ways in the middle of a call."""
    raised_everywhere(ranks(2), case, "replicated", True, *REPLICATED[case])


def whole_head(rank: int) -> str:
    head, hidden = randn(VOCAB, WIDTH, seed=2), randn(TOKENS, WIDTH)
    try:
        tightrope.linear_vocab_stats(hidden, head, vocab_parallel=tightrope.VocabParallel(dist.group.WORLD))
    except ValueError as error:
        return str(error)
    return ""


def test_a_whole_head_on_every_rank_without_sizes(ranks):
    """Would catch the vocabulary counted once a rank, where nothing but the weights tells that."""
    for said in ranks(3).run(whole_head):
        assert "the same 24 rows" in said and "a part of the vocabulary on each rank" in said


def no_tokens(rank: int, rows: str, strategy: str, which: str) -> list:
    """A loss and gradients where a rank, or all of them, have no token or none that counts."""
    hidden, head, target = _tensors(rank, dist.get_world_size())
    if which == "all ignored" or (which == "one ignored" and rank == 1):
        target = torch.full_like(target, -100)
    elif which == "none" or (which == "none on one" and rank == 1):
        hidden, target = hidden[:0], target[:0]
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    parallel = tightrope.VocabParallel(dist.group.WORLD, rows=rows)
    loss = tightrope.linear_reality_creativity_loss(
        hidden, head, target, vocab_parallel=parallel, strategy=strategy
    )
    loss.backward()
    return [loss.item(), hidden.grad.abs().sum().item(), head.grad.abs().sum().item()]


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_ranks_without_tokens(ranks, strategy):
    """Would catch an empty chunk on one rank that the others wait for, and NaN from a mean of nothing."""
    for which in ("all ignored", "none"):
        for rows in ("replicated", "sharded"):
            assert ranks(3).run(no_tokens, rows, strategy, which) == [[0.0, 0.0, 0.0]] * 3
    for which in ("one ignored", "none on one"):
        results = ranks(3).run(no_tokens, "sharded", strategy, which)
        assert results[1][:2] == [0.0, 0.0]
        # Its part of the head is scored with the others' tokens.
        assert all(head > 0 for _, _, head in results)


def scaled(rank: int, by: list[float], strategy: str) -> str:
    hidden, head, target = _tensors(rank, dist.get_world_size())
    head = head.requires_grad_()
    parallel = tightrope.VocabParallel(dist.group.WORLD, rows="sharded")
    loss = tightrope.linear_reality_creativity_loss(
        hidden, head, target, vocab_parallel=parallel, strategy=strategy
    )
    try:
        (loss * by[rank]).backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_losses_that_ranks_weigh_differently(ranks):
    """Would catch a head's gradient that takes this rank's weight for that of all ranks' losses."""
    assert ranks(2).run(scaled, [0.5, 0.5], "chunked") == ["", ""]
    assert ranks(2).run(scaled, [0.5, 2.0], "streaming") == ["", ""]
    for said in ranks(2).run(scaled, [0.5, 2.0], "chunked"):
        assert "[0.5, 2.0]" in said and "row_weight" in said and 'strategy="streaming"' in said


def shifted(rank: int, rows: str) -> str:
    hidden, head, target = _tensors(rank, dist.get_world_size())
    parallel = tightrope.VocabParallel(dist.group.WORLD, rows=rows)
    try:
        tightrope.linear_reality_creativity_loss(hidden, head, target, vocab_parallel=parallel, shift=1)
    except ValueError as error:
        return str(error)
    return ""


def test_shift_where_sequences_are_cut(ranks):
    """Would catch the label that is lost at every boundary of a sequence that is cut over ranks."""
    assert ranks(2).run(shifted, "replicated") == ["", ""]
    for said in ranks(2).run(shifted, "sharded"):
        assert "shift the targets before they are cut" in said


def differentiated_twice(rank: int, strategy: str, rows: str) -> list[str]:
    """What a derivative of a gradient says, and what forward mode does."""
    hidden, head, target = _tensors(rank, dist.get_world_size())
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    options = {"vocab_parallel": tightrope.VocabParallel(dist.group.WORLD, rows=rows), "strategy": strategy}

    def loss(hidden):
        return tightrope.linear_reality_creativity_loss(hidden, head, target, **options)

    def twice():
        gradients = torch.autograd.grad(loss(hidden), (hidden, head), create_graph=True)
        sum(g.square().sum() for g in gradients).backward()

    said = []
    for attempted in (twice, lambda: torch.func.jvp(loss, (hidden,), (hidden,))):
        try:
            attempted()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
@pytest.mark.parametrize("rows", ["replicated", "sharded"])
def test_second_order(ranks, strategy, rows):
    """Would catch a derivative of this rank's part of the vocabulary alone, or a hang of the others."""
    for second, forward in ranks(2).run(differentiated_twice, strategy, rows):
        assert second.startswith("tightrope: got a derivative of a gradient, or forward mode, with vocab_p")
        assert forward.startswith("tightrope: got vocab_parallel inside a transform of torch.func")


def constructed(rank: int) -> list[str]:
    said = []
    group = dist.group.WORLD
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, dist.get_world_size()))
    for arguments in (
        {"group": "tp"},
        {"group": mesh},
        {"group": group, "rows": "cut"},
        {"group": group, "vocab_size": 0},
        {"group": group, "vocab_size": 2.5},
        {"group": group, "start": -1},
    ):
        try:
            tightrope.VocabParallel(**arguments)
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    try:
        tightrope.linear_vocab_stats(torch.ones(1, 1), torch.ones(1, 1), vocab_parallel=group)
    except TypeError as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def test_arguments_of_vocab_parallel(ranks):
    """Would catch a group of the wrong kind that fails deep in a collective."""
    expected = [
        "TypeError: group: got str",
        "ValueError: group: got a DeviceMesh of 2 dimensions",
        "ValueError: rows: got 'cut', expected one of 'replicated', 'sharded'",
        "ValueError: vocab_size: got 0, expected an integer of at least 1",
        "TypeError: vocab_size: got float",
        "ValueError: start: got -1, expected an integer of at least 0",
        "TypeError: vocab_parallel: got ProcessGroup, expected tightrope.VocabParallel",
    ]
    for said in ranks(2).run(constructed):
        assert len(said) == len(expected)
        for have, want in zip(said, expected):
            assert have.startswith(want), have
