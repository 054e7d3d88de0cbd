"""A vocabulary over ranks gives what one process gives: every loss, target, option, strategy and layout.

Real processes over gloo. A task runs many trials in one go, as a message to the ranks costs more than a
trial; every trial is named in what it reports.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import tightrope
from shards import Trial, alone, differences, on_rank, parallel, part_of
from tightrope import backends
from tightrope.strategies import sampled as sampler

STRATEGIES = ("chunked", "streaming")
# Rows of each rank's head, of 29 classes (a prime): even with padding, uneven, a rank without any.
LAYOUTS = {
    2: [(15, 15), (4, 25), (0, 29)],
    3: [(10, 10, 10), (20, 8, 1), (14, 0, 15)],
    4: [(8, 8, 8, 8), (1, 2, 3, 23), (0, 29, 0, 0)],
}
# Tokens of each rank where each has its own: a rank without any, and ones that fill chunks unevenly.
TOKENS = {2: (9, 4), 3: (0, 9, 4), 4: (3, 0, 9, 1)}
SMALL = {"workspace_mb": 1e-3}  # several chunks
LOSSES = [
    {},
    {"balance": 0.2, "creativity": "collision", "label_smoothing": 0.1},
    {"balance": 0.05, "creativity": "entropy", "z_loss": 0.01, "logit_l2": 0.02, "softcap": 4.0},
    {"balance": 0.1, "creativity": "support_entropy", "logit_scale": 0.7, "temperature": 1.3},
    {"balance": 0.3, "reality": "squared_error", "creativity": "collision", "label_smoothing": 0.1},
]


def report(rank: int, trials: list[Trial], rtol: float = 1e-12) -> list[str]:
    return [line for trial in trials for line in differences(trial, rank, rtol)]


def check(pool, trials: list[Trial], *rtol: float) -> None:
    wrong = [line for lines in pool.run(report, trials, *rtol) for line in lines]
    assert not wrong, "\n".join(wrong[:10])


def layouts(size: int, rows: str) -> list[dict]:
    tokens = TOKENS[size] if rows == "sharded" else (13,)
    return [
        {"sizes": sizes, "rows": rows, "tokens": tokens, "given": given}
        for sizes, given in zip(LAYOUTS[size], (True, sum(LAYOUTS[size][1]) > 29, False))
    ]


def share(trials: list[Trial], size: int) -> list[Trial]:
    """A third of the trials, another one for each number of ranks: together they are all of them."""
    return trials[size - 2 :: 3]


everywhere = pytest.mark.parametrize("size", [2, 3, 4])
both = pytest.mark.parametrize("rows", ["replicated", "sharded"])


@everywhere
@both
def test_losses_targets_and_strategies(ranks, size, rows):
    """Would catch a statistic that is merged wrongly, or a target looked for in the wrong shard."""
    trials = [
        Trial(**layout, target=target, options={**loss, "strategy": strategy, **SMALL})
        for layout, target, loss, strategy in itertools.product(
            layouts(size, rows), ("index", "topk", "dense"), LOSSES, STRATEGIES
        )
    ]
    check(ranks(size), share(trials, size))


@pytest.mark.parametrize("size", [2, 3])
@both
def test_a_teacher(ranks, size, rows):
    """Would catch a teacher normalised over a rank's classes alone, or by other rows' maxima."""
    common = {"target": "teacher"}
    small = {"workspace_mb": 2e-3}  # shared with the teacher
    losses = [LOSSES[3], {"reality": "reverse_kl", "label_smoothing": 0.1}, {"reality": "jensen_shannon"}]
    trials = [
        Trial(**layout, **common, options={**loss, "strategy": strategy, **small})
        for layout, loss, strategy in itertools.product(layouts(size, rows), losses, STRATEGIES)
    ]
    for layout, strategy in itertools.product(layouts(size, rows), STRATEGIES):
        options = {"reduction": "none", "skip_ignored": strategy == "chunked", **small}
        trials.append(Trial(**layout, **common, tensors=("row_weight",), options=options))
        options = {"strategy": strategy, **small}
        trials.append(Trial(**layout, **common, function="own", options=options))
        if rows == "replicated":
            trials.append(Trial(**layout, **common, function="logits", leaves=("weight", "bias")))
    check(ranks(size), share(trials, size))


def cut_otherwise(rank: int) -> str:
    trial = Trial((20, 9), target="teacher")
    part = part_of(trial, rank)
    target = part["target"]
    if rank == 1:
        target = replace(target, weight=target.weight[1:], bias=target.bias[1:])
    head, parallels = (part["input"], part["weight"], target, part["bias"]), parallel(trial, rank)
    with pytest.raises(ValueError, match=r"target.weight: got shape") as raised:
        tightrope.linear_reality_creativity_loss(*head, vocab_parallel=parallels)
    return str(raised.value)


def test_a_teacher_that_is_cut_otherwise(ranks):
    """Would catch a rank that waits for one whose teacher was refused."""
    message = "target.weight: got shape [8, 3], expected [9, 3]"
    other, own = ranks(2).run(cut_otherwise)
    assert own.startswith(message) and message in other and "rank 1 of 2" in other


TENSORS = [
    {"tensors": ("balance",), "leaves": ("input", "weight", "balance")},
    {"tensors": ("row_weight",), "leaves": ("input", "weight", "row_weight")},
    {"tensors": ("row_weight",)},  # weights that are not learned
    {"tensors": ("temperature",), "leaves": ("input", "weight", "bias", "temperature")},
    {"tensors": ("temperature",), "leaves": ("temperature",)},
    {"tensors": ("class_weight",), "options": {"label_smoothing": 0.1}},
    {"tensors": ("class_weight",)},
    {"tensors": ("classes",), "options": {"creativity": "support_entropy", "balance": 0.1}},
    {
        "tensors": ("classes", "temperature"),
        "options": {"creativity": "support_entropy", "balance": 0.1},
        "leaves": ("input", "weight", "temperature"),
    },
    {"without": ("bias",), "leaves": ("input", "weight")},
    {"leaves": ("weight",)},
    {"leaves": ("input",)},
    {"options": {"reduction": "none"}},
    {"options": {"reduction": "sum", "skip_ignored": False}},
    {"options": {"reduction": "sum"}, "ignored": 1.0},
]


@everywhere
@both
def test_tensors_and_reductions(ranks, size, rows):
    """Would catch a per-token tensor that stays with the wrong rows, or a gradient that is not summed."""
    trials = []
    for case, strategy, layout in itertools.product(TENSORS, STRATEGIES, layouts(size, rows)[:2]):
        options = {**case.get("options", {}), "strategy": strategy, **SMALL}
        trials.append(Trial(**layout, **{**case, "options": options}))
    check(ranks(size), share(trials, size))


@everywhere
@both
def test_own_losses_and_statistics(ranks, size, rows):
    """Would catch a statistic without its gradient over ranks, and row_args of another rank's rows."""
    trials = []
    for layout, target, support in itertools.product(
        layouts(size, rows), ("index", "topk", "none"), (None, tightrope.MinP(0.1))
    ):
        common = {**layout, "target": target}
        trials.append(Trial(**common, function="stats", options={"support": support, **SMALL}))
        for strategy in STRATEGIES:
            options = {"support": support, "strategy": strategy, **SMALL}
            scaled = {"tensors": ("scale",), "leaves": ("input", "weight", "bias", "scale")}
            trials.append(Trial(**common, function="own", options=options, **scaled))
    check(ranks(size), share(trials, size))


@everywhere
def test_logits(ranks, size):
    """Would catch logits whose columns are counted from the shard and not from the vocabulary."""
    trials = [
        Trial(**layout, function="logits", target=target, options=loss, tensors=tensors, leaves=leaves)
        for layout, target, loss, (tensors, leaves) in itertools.product(
            layouts(size, "replicated"),
            ("index", "topk", "dense"),
            LOSSES[:4:3],
            [((), ("weight", "bias")), (("temperature",), ("weight", "temperature"))],
        )
    ]
    # The gradient of hidden states is a product with a part of the head: its sum is the caller's.
    check(ranks(size), trials)


HOSTILE = (
    "offset",
    "negative offset",
    "apart",
    "peaked",
    "impossible shard",
    "sentinel",
    "equal maxima",
)


@both
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_logits(ranks, rows, hostile):
    """Would catch a merge that loses small masses, makes NaN of -inf, or takes the later of equal maxima."""
    trials = [
        Trial(**layout, hostile=hostile, function=function, options={"strategy": strategy, **SMALL})
        for layout, function, strategy in itertools.product(layouts(3, rows), ("loss", "own"), STRATEGIES)
        # The sum of z^2 of such a row is no number.
        if function == "loss" or hostile not in ("impossible shard", "sentinel")
    ]
    check(ranks(3), trials)


@both
def test_fewer_classes_than_ranks(ranks, rows):
    """Would catch a rank without a class, or with padding alone, that breaks or is waited for."""
    tokens = TOKENS[4] if rows == "sharded" else (13,)
    trials = [
        Trial(sizes, vocab=3, rows=rows, tokens=tokens, options={**loss, "strategy": strategy, **SMALL})
        for sizes, loss, strategy in itertools.product([(1, 1, 1, 1), (0, 3, 0, 0)], LOSSES, STRATEGIES)
    ]
    check(ranks(4), trials)


def chunks_of_ranks(rank: int) -> list[str]:
    """One token on a rank, two hundred on the other: chunks that one has many of and the other none."""
    options = {"strategy": "chunked", "workspace_mb": 1e-3}
    return report(rank, [Trial((20, 9), rows="sharded", tokens=(1, 200), options=options)])


def test_ranks_with_other_numbers_of_chunks(ranks):
    """Would catch the hang of peers whose ranks go by their own numbers of chunks (TRL 6696)."""
    assert ranks(2).run(chunks_of_ranks) == [[], []]


def smoothed(rank: int) -> list[float]:
    trial = Trial((20, 9), options={"label_smoothing": 0.3, "reduction": "sum"})
    return [on_rank(trial, rank)["loss"].item(), alone(trial)["loss"].item()]


def test_smoothing_over_the_whole_vocabulary(ranks):
    """Would catch label smoothing that divides by the classes of a rank, as a peer's does."""
    for ours, one in ranks(2).run(smoothed):
        assert abs(ours - one) <= 1e-12 * one


def hidden_gradients(rank: int) -> list[float]:
    trial = Trial((20, 9), options={"reduction": "sum"})
    gradient, one = on_rank(trial, rank)["input"], alone(trial)["input"]
    return [(gradient - one).abs().max().item(), one.abs().max().item()]


def test_gradient_of_replicated_hidden_states_is_whole(ranks):
    """Would catch a dh that is of a rank's classes alone where nothing after it sums (verl, SkyRL 1886)."""
    for error, size in ranks(2).run(hidden_gradients):
        assert error <= 1e-12 * size


def sampled(
    rank: int, rows: str, strategy: str, sizes: tuple[int, ...] = (1200, 803)
) -> dict[str, list[float]]:
    """Errors of the gradients, over their norms, of four draws."""
    trial = Trial(
        sizes,
        vocab=2003,
        rows=rows,
        tokens=(50, 30) if rows == "sharded" else (80,),
        hostile="peaked",
        options={"strategy": strategy, "workspace_mb": 0.5},
    )
    noisy = replace(trial, options={**trial.options, "gradient_noise": 0.05})
    torch.manual_seed(rank)
    exact, draws = on_rank(trial, rank), [on_rank(noisy, rank) for _ in range(4)]

    def errors(name: str) -> list[float]:
        return [((draw[name] - exact[name]).norm() / exact[name].norm()).item() for draw in draws]

    return {name: errors(name) for name in ("loss", "input", "weight", "bias")}


@both
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sampled_gradients(ranks, rows, strategy):
    """Would catch a part of low rank that one rank alone adds, or a draw that another rank waits for."""
    for errors in ranks(2).run(sampled, rows, strategy):
        for name in ("input", "weight"):
            assert all(0 < error <= 0.1 for error in errors[name]), name
        assert max(errors["loss"] + errors["bias"]) <= 1e-12


def sampled_by_devices(rank: int, rows: str, strategy: str) -> dict[str, list[float]]:
    """`sampled`, as devices draw, one of which has fewer classes than a pilot takes."""
    drawing = {name: replace(backend, draws=True) for name, backend in backends.BACKENDS.items()}
    drawing["cpu"] = replace(drawing["eager"], name="cpu")
    with patch.object(sampler, "reads", lambda device: False), patch.dict(backends.BACKENDS, drawing):
        return sampled(rank, rows, strategy, (1903, 100))


@both
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sampled_gradients_on_devices(ranks, rows, strategy):
    """Would catch ranks that part ways over what a device alone decides."""
    for errors in ranks(2).run(sampled_by_devices, rows, strategy):
        for name in ("input", "weight"):
            assert all(error <= 0.1 for error in errors[name]), name
        assert max(errors["loss"] + errors["bias"]) <= 1e-12


def by_module(rank: int, rows: str) -> list[bool]:
    """Whether modules give what the functions give, bit for bit."""
    trial = Trial((20, 9), rows=rows, tokens=(9, 4) if rows == "sharded" else (13,))
    part, options = part_of(trial, rank), {"balance": 0.1, "creativity": "collision"}
    options["vocab_parallel"] = parallel(trial, rank)
    head = part["input"], part["weight"], part["target"], part["bias"]
    module = tightrope.LinearRealityCreativityLoss(**options)
    same = [torch.equal(module(*head), tightrope.linear_reality_creativity_loss(*head, **options))]
    if rows == "replicated":
        logits = torch.nn.functional.linear(part["input"], part["weight"], part["bias"])
        module = tightrope.RealityCreativityLoss(**options)
        function = tightrope.reality_creativity_loss
        same.append(torch.equal(module(logits, part["target"]), function(logits, part["target"], **options)))
    return same


@both
def test_modules(ranks, rows):
    """Would catch a module that drops its vocab_parallel, whose loss is then of the rank's classes alone."""
    for same in ranks(2).run(by_module, rows):
        assert same and all(same)
