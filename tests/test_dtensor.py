"""DTensors in and out give what one process gives, however vocabulary and tokens lie on a mesh.

A layout is a mesh with a letter for each of its dimensions: V, B and S cut the vocabulary, the batch and the
sequences there, R cuts nothing. Batches of 3 and a vocabulary of 5 leave ranks of four without a part.
"""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import tightrope
from helpers import randn
from shards import PER_TOKEN, Trial, call, whole
from tightrope.autograd import LinearVocabStats
from tightrope.distributed import full_weight, token_count

BATCH = (3, 6)
KINDS = {"R": Replicate(), "V": Shard(0), "B": Shard(0), "S": Shard(1)}
LAYOUTS = [  # mesh, head, tokens
    ((4,), "V", "R"),
    ((4,), "V", "B"),
    ((4,), "V", "S"),
    ((4,), "R", "S"),
    ((4,), "R", "R"),
    ((2, 2), "RV", "BR"),
    ((2, 2), "RV", "BS"),
    ((2, 2), "VR", "SB"),
    ((2, 2), "RV", "BB"),
    ((2, 2), "RV", "RR"),
    ((2, 2), "RR", "BS"),
]


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "model")[-len(shape) :])


def placed(value, mesh: DeviceMesh, letters: str):
    """A DTensor, or a TopKTarget of two, from what every rank has the whole of."""
    if isinstance(value, tightrope.TopKTarget):
        return tightrope.TopKTarget(*(placed(part, mesh, letters) for part in value))
    return distribute_tensor(value, mesh, [KINDS[letter] for letter in letters], src_data_rank=None)


def problem(trial: Trial) -> dict:
    """All tensors of a trial, its tokens as sequences."""
    made = whole(trial)
    for name in ("input", "target", "upstream", "classes", *PER_TOKEN):
        value = made[name]
        if isinstance(value, tightrope.TeacherTarget):
            made[name] = replace(value, hidden=value.hidden.unflatten(0, BATCH))
        elif isinstance(value, tightrope.TopKTarget):
            made[name] = tightrope.TopKTarget(*(part.unflatten(0, BATCH) for part in value))
        elif value is not None:
            made[name] = value.unflatten(0, BATCH)
    made["balance"] = made["balance"][0]  # broadcasts to the tokens
    return made


def spread(made: dict, layout, others: str) -> dict:
    """The same, as DTensors; others: what those are that are not the head, "whole" or "plain"."""
    shape, head, rows = layout
    mesh, everywhere = mesh_of(shape), "R" * len(shape)
    parts = dict(made)
    for name in ("weight", "bias"):
        parts[name] = placed(made[name], mesh, head)
    parts["input"] = placed(made["input"], mesh, rows)
    parts["upstream"] = placed(made["upstream"], mesh, everywhere)
    if others == "plain":
        return parts
    for name in ("classes", "class_weight", "target", *PER_TOKEN):
        cut = rows if others == "cut" and name not in ("class_weight", "balance") else everywhere
        if isinstance(parts[name], tightrope.TeacherTarget):
            target = parts[name]
            own = {part: placed(getattr(target, part), mesh, head) for part in ("weight", "bias")}
            parts[name] = replace(target, hidden=placed(target.hidden, mesh, cut), **own)
        elif parts[name] is not None:
            parts[name] = placed(parts[name], mesh, cut)
    return parts


def full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def differences(rank: int, trials: list[tuple[Trial, tuple, str]]) -> list[str]:
    """What differs from one process, in words; relative to the largest element of each tensor."""
    wrong = []
    for trial, layout, others in trials:
        made = problem(trial)
        expected, actual = call(trial, made, {}), call(trial, spread(made, layout, others), {})
        per_token = {name for name, value in expected.items() if name.startswith("stats.")}
        if expected["loss"].dim():
            per_token.add("loss")
        for name, want in expected.items():
            have = actual[name]
            where = f"{trial} {layout} {others}: rank {rank}, {name}"
            result = name in per_token or name == "loss"
            rows = layout[2] if name in per_token else "R" * len(layout[0])
            if result and list(have.placements) != [KINDS[letter] for letter in rows]:
                wrong.append(f"{where}: {have.placements}")
            have, want = full(have).double(), want.double()
            error = torch.where(have == want, 0.0, (have - want).abs()).max().item()
            if not error <= 1e-12 * max(want.abs().max().item(), 1e-3):
                wrong.append(f"{where}: off by {error:.2e}")
    return wrong


def check(pool, trials: list[tuple[Trial, tuple, str]]) -> None:
    wrong = [line for lines in pool.run(differences, trials) for line in lines]
    assert not wrong, "\n".join(wrong[:10])


def trial(**options) -> Trial:
    fields = {k: options.pop(k) for k in list(options) if k in Trial.__dataclass_fields__}
    return Trial(sizes=(29,), tokens=(math.prod(BATCH),), **fields, options=options)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_every_layout(ranks, shape):
    """Would catch a wrong start of a shard, a gradient placed as whole where it is a part, a local mean."""
    kinds = [
        trial(strategy="chunked", workspace_mb=1e-3),
        trial(strategy="streaming", target="topk", balance=0.2, label_smoothing=0.1),
        trial(strategy="chunked", target="dense", reality="squared_error", reduction="sum"),
        trial(reduction="none", vocab=5, creativity="collision", balance=0.3),
        trial(function="own", vocab=5, target="dense"),
        trial(function="stats", target="topk"),
    ]
    others = itertools.cycle(("cut", "whole", "plain"))
    each = itertools.product(enumerate(LAYOUTS), enumerate(kinds))
    cases = [(kind, layout, next(others)) for (i, layout), (j, kind) in each if (i + j) % 2]
    check(ranks(4), [case for case in cases if case[1][0] == shape])


def test_a_teacher(ranks):
    """Would catch a teacher whose head is not cut as the student's, or whose tokens are another rank's."""
    kinds = [
        trial(strategy="chunked", target="teacher", workspace_mb=2e-3),
        trial(strategy="streaming", target="teacher", reality="reverse_kl"),
    ]
    layouts = [layout for layout in LAYOUTS if layout[0] == (4,)]
    others = itertools.cycle(("cut", "plain", "whole"))
    check(ranks(4), list(zip(itertools.cycle(kinds), layouts, others)))


@pytest.mark.parametrize("others", ["cut", "plain"])
def test_tensors_beside_the_head(ranks, others):
    """Would catch a tensor cut along another dimension than the tokens, or a gradient summed too often."""
    leaves = ("input", "weight", "bias", "balance", "row_weight", "temperature", "scale")
    kinds = [
        trial(tensors=("balance", "row_weight", "class_weight"), leaves=leaves, label_smoothing=0.1),
        trial(tensors=("temperature", "classes"), leaves=leaves, strategy="chunked", balance=0.1),
        trial(tensors=("scale", "row_weight"), leaves=leaves, function="own", strategy="chunked"),
    ]
    layouts = [((4,), "V", "R"), ((4,), "V", "S"), ((2, 2), "RV", "BS"), ((2, 2), "RR", "BS")]
    check(ranks(4), [(kind, layout, others) for layout in layouts for kind in kinds])


def test_shift_where_whole_sequences_are_here(ranks):
    """Would catch a refusal of shift, or labels of another sequence, where batches alone are cut."""
    kinds = [trial(shift=1, target=target) for target in ("index", "topk", "dense")]
    layouts = [((4,), "V", "B"), ((2, 2), "RV", "BR"), ((4,), "V", "R")]
    check(ranks(4), [(kind, layout, "cut") for layout in layouts for kind in kinds])


def logits_of(rank: int, head: str, rows: str, shape: tuple[int, ...]) -> list[float]:
    """Errors of the three functions on logits, and of their gradients."""
    mesh = mesh_of(shape)
    made = problem(trial(target="topk"))
    logits = randn(*BATCH, 29, seed=3, dtype=torch.float64)
    places = [Shard(2) if letter == "V" else KINDS[row] for letter, row in zip(head, rows)]
    target = placed(made["target"], mesh, rows)

    def results(logits, target):
        logits = logits.detach().requires_grad_()
        loss = tightrope.reality_creativity_loss(logits, target, balance=0.2, label_smoothing=0.1)
        own = tightrope.vocab_loss(logits, target, lambda stats: stats.lse - 0.3 * stats.entropy)
        stats = tightrope.vocab_stats(logits, target)
        total = loss + own + (stats.target_log_prob * stats.collision).sum()
        return [loss, own, stats.lse, *torch.autograd.grad(total, logits)]

    whole_ones = results(logits, made["target"])
    parts = results(distribute_tensor(logits, mesh, places, src_data_rank=None), target)
    return [(full(a) - b).abs().max().item() / b.abs().max().item() for a, b in zip(parts, whole_ones)]


@pytest.mark.parametrize(
    ("shape", "head", "rows"),
    [((4,), "V", "R"), ((4,), "R", "S"), ((2, 2), "RV", "BR"), ((2, 2), "VR", "RS")],
)
def test_logits(ranks, shape, head, rows):
    """Would catch logits of a part of the vocabulary taken for all of it."""
    errors = ranks(4).run(logits_of, head, rows, shape)
    assert max(max(line) for line in errors) < 1e-12


def attempts(rank: int) -> dict[str, str]:
    """Calls that must be refused, on a mesh of 2 x 2."""
    mesh, other = mesh_of((2, 2)), mesh_of((4,))
    made = problem(trial())
    loss = tightrope.linear_reality_creativity_loss
    h, w, t = made["input"], made["weight"], made["target"]
    group = tightrope.VocabParallel(dist.group.WORLD)

    def on(value, *places, mesh=mesh):
        return DTensor.from_local(value, mesh, places)

    tp, batch = on(w, Replicate(), Shard(0)), on(h, Shard(0), Replicate())
    split = on(h, Replicate(), Shard(1))
    calls = {
        "plain input": lambda: loss(h, tp, t),
        "plain weight": lambda: loss(batch, w, t),
        "plain input, whole head": lambda: loss(h, on(w, Replicate(), Replicate()), t),
        "two cuts": lambda: loss(batch, on(w, Shard(0), Shard(0)), t),
        "columns": lambda: loss(batch, on(w, Replicate(), Shard(1)), t),
        "partial weight": lambda: loss(batch, on(w, Replicate(), Partial()), t),
        "partial input": lambda: loss(on(h, Partial(), Replicate()), tp, t),
        "hidden cut": lambda: loss(on(h, Replicate(), Shard(2)), tp, t),
        "other mesh": lambda: loss(on(h, Replicate(), mesh=other), tp, t),
        "target's mesh": lambda: loss(split, tp, on(torch.cat([t, t], 1), Replicate(), mesh=other)),
        "both": lambda: loss(batch, tp, t, vocab_parallel=group),
        "plain bias": lambda: loss(batch, tp, torch.cat([t, t]), made["bias"]),
        "part of a target": lambda: loss(batch, tp, t),
        "shift": lambda: loss(split, tp, on(t, Replicate(), Shard(1)), shift=1),
        "logits cut twice": lambda: tightrope.vocab_stats(on(h, Shard(2), Shard(2))),
        "keyword": lambda: loss(batch, tp, t, balanse=0.1),
    }
    said = {}
    for name, attempt in calls.items():
        try:
            said[name] = f"nothing, but gave {attempt()}"
        except (ValueError, TypeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


EXPECTED = {
    "plain input": ["weight", "vocab_parallel=", "LMHead", "DTensor as input"],
    "plain weight": ["weight: got a plain tensor", "input.to_local()"],
    "plain input, whole head": ["input: got a plain tensor", "weight.to_local()"],
    "two cuts": ["weight", "vocab_parallel=", "LMHead"],
    "columns": ["weight", "Shard(dim=1)", "expected Shard(dim=0)"],
    "partial weight": ["weight", "Partial", "expected Shard(dim=0)"],
    "partial input": ["input", "Partial", "redistribute"],
    "hidden cut": ["input", "Shard(dim=2)", "token dimension"],
    "other mesh": ["input", "the mesh of the head"],
    "target's mesh": ["target", "the mesh of the head"],
    "both": ["vocab_parallel: got one beside DTensors"],
    "plain bias": ["bias: got a plain tensor"],
    "part of a target": ["target: got shape [3, 6], expected [6, 6]", "DTensor.from_local"],
    "shift": ["shift the targets before they are cut"],
    "logits cut twice": ["logits", "one mesh dimension at most"],
    "keyword": ["TypeError", "balanse"],
}


def test_what_is_ambiguous_or_wrong_is_refused(ranks):
    """Would catch a guess where placements do not say what ranks share, and an error that names no remedy."""
    for said in ranks(4).run(attempts):
        assert said.keys() == EXPECTED.keys()
        for name, parts in EXPECTED.items():
            assert all(part in said[name] for part in parts), (name, said[name])


def one_is_wrong(rank: int, shape: tuple[int, ...], head: str, rows: str) -> str:
    made = spread(problem(trial()), (shape, head, rows), "plain")
    balance = torch.tensor(2.0 if rank == 1 else 0.1, dtype=torch.float64)
    try:
        tightrope.linear_reality_creativity_loss(
            made["input"], made["weight"], made["target"], balance=balance
        )
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    "layout", [((4,), "V", "B"), ((4,), "R", "B"), ((2, 2), "RV", "BR"), ((2, 2), "RV", "BS")]
)
def test_an_error_of_one_rank_is_raised_on_all(ranks, layout):
    """Would catch ranks that wait for the sum of one that has left, over any dimension of the mesh."""
    said = ranks(4).run(one_is_wrong, *layout)
    assert all("balance: got values from 2.0" in text for text in said), said


def unfinished(rank: int) -> str:
    """What a backend is handed of hidden states that are still being gathered."""
    mesh, made = mesh_of((4,)), problem(trial())
    h = placed(made["input"].flatten(0, 1)[:16], mesh, "B").redistribute(
        placements=[Replicate()], async_op=True
    )
    assert type(h._local_tensor) is AsyncCollectiveTensor
    seen = []
    look = mock.patch.object(LinearVocabStats, "apply", lambda hidden, *_: seen.append(type(hidden).__name__))
    with look, pytest.raises(TypeError):  # of what does not come back
        tightrope.linear_vocab_stats(h, placed(made["weight"], mesh, "V"))
    return seen[0]


def test_hidden_states_are_waited_for(ranks):
    """Would catch a class that stands for a tensor, whose memory is not there, handed to a kernel."""
    assert ranks(4).run(unfinished) == ["Tensor"] * 4


def bits(rank: int) -> list[int]:
    made = spread(problem(trial(dtype=torch.float32)), ((2, 2), "RV", "BS"), "cut")
    loss = tightrope.linear_reality_creativity_loss(made["input"], made["weight"], made["target"])
    return loss.to_local().view(torch.int32).tolist()


def test_all_ranks_hold_the_same_bits(ranks):
    """Would catch a loss that is summed in another order on another rank."""
    assert len(set(ranks(4).run(bits))) == 1


def steps(rank: int) -> float:
    """The largest difference of weights after two steps of AdamW, tokens cut over "data"."""
    made = problem(trial())
    parts = spread(made, ((2, 2), "RV", "BR"), "cut")
    ends = []
    for of in (parts, made):
        weight = torch.nn.Parameter(of["weight"].clone())
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            tightrope.linear_reality_creativity_loss(of["input"], weight, of["target"]).backward()
            optimizer.step()
        ends.append(full(weight.detach()))
    return (ends[0] - ends[1]).abs().max().item()


def test_an_optimizer_steps_as_in_one_process(ranks):
    """Would catch a gradient that is a part of a sum, and that an optimizer takes for all of it."""
    assert max(ranks(4).run(steps)) < 1e-12


def two_ways(rank: int) -> tuple[float, list[str]]:
    """A step of a head under FSDP and tensor parallel; what is said of its weight outside its forward."""
    mesh, made = mesh_of((2, 2)), problem(trial())
    del made["bias"]
    expected = call(trial(), made, {})["weight"]
    head = tightrope.LMHead(*made["weight"].shape[::-1], dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(made["weight"])
    parallelize_module(head, mesh["model"], ColwiseParallel(output_layouts=Replicate()))
    fully_shard(head, mesh=mesh["data"])
    mine = slice(0, 1) if rank < 2 else slice(1, 3)
    hidden, target = made["input"][mine], made["target"][mine]
    normalizer = token_count(target, mesh["data"]) / 2
    (0.75 * head(hidden, target, normalizer=normalizer)).backward()
    error = (full(head.weight.grad) - expected).abs().max() / expected.abs().max()
    said = []
    for outside in (functools.partial(tightrope.linear_vocab_stats, hidden), full_weight):
        with pytest.raises(ValueError, match="weight") as raised:
            outside(head.weight)
        said.append(str(raised.value))
    return error.item(), said


def test_fully_sharded_and_tensor_parallel(ranks):
    """Would catch a shard of a shard taken for one part of the vocabulary, in the head's forward or out."""
    for error, (loss, gathered) in ranks(4).run(two_ways):
        assert error < 1e-12
        assert "_StridedShard" in loss and "LMHead" in loss and "vocab_parallel=" in loss
        assert "grad_placements" in gathered


def test_plain_tensors_do_not_load_the_package_of_dtensors():
    """Would catch an import of torch.distributed.tensor, half a second, for who has no DTensor."""
    program = (
        "import sys, torch, tightrope\n"
        "h, w = torch.randn(2, 3), torch.randn(5, 3)\n"
        "tightrope.linear_reality_creativity_loss(h, w, torch.tensor([1, 2]))\n"
        "tightrope.LMHead(3, 5)(h, torch.tensor([1, 2]))\n"
        "sys.exit('torch.distributed.tensor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
