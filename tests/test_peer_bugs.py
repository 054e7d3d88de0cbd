"""The bugs that users of other libraries met, one named test each.

The docstring of a test names the library and its thread. Each test is built so that the bug, had it
been ours, would show: rows differ in scale, maxima are negative, the vocabulary ends inside a tile,
labels are mixed with ignored ones, and the second of two backward passes is the one that is looked at.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import tightrope
from helpers import (
    BACKENDS,
    STRATEGIES,
    Problem,
    assert_no_worse,
    assert_rounded_once,
    assert_same_bits,
    assert_within,
    class_indices,
    evaluate,
    linear_problem,
    oracle,
    ours,
    randn,
)

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
several_tiles = pytest.mark.usefixtures("small_tiles")
backends = pytest.mark.parametrize("backend", BACKENDS)
strategies = pytest.mark.parametrize("strategy", STRATEGIES)
skipping = pytest.mark.parametrize("skip_ignored", [None, False, True])


def loss_of(problem, **options):
    """The loss with its graph, and the leaves."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in problem.leaves.items()}
    options = {**problem.options, **options}
    rest = {name: leaf for name, leaf in leaves.items() if name not in ("input", "weight")}
    loss = tightrope.linear_reality_creativity_loss(
        leaves["input"], leaves["weight"], problem.target, **rest, **options
    )
    return loss, leaves


@several_tiles
@backends
def test_rows_have_their_own_upstream_gradient(backend):
    """Liger #488, #872, #968: under reduction "none" all rows took the first row's upstream gradient."""
    problem = linear_problem(6, vocab=1030, dtype=F64, reduction="none", balance=0.3)
    for row in range(6):
        loss, leaves = loss_of(problem, backend=backend)
        upstream = torch.zeros(6, dtype=F64)
        upstream[row] = -2.5
        (gradient,) = torch.autograd.grad(loss, leaves["input"], upstream)
        alone = Problem(
            {**problem.leaves, "input": problem.leaves["input"][row : row + 1]},
            problem.target[row : row + 1],
            {**problem.options, "reduction": "sum"},
        )
        (expected,) = (x["input"] for x in [oracle(alone)])
        scale = -2.5 / (5 / 8)  # `oracle` uses an upstream gradient of 5 / 8 for a scalar
        assert_within(gradient[row], scale * expected[0], 1e-12)
        assert not gradient[torch.arange(6) != row].any()


@several_tiles
@backends
@strategies
@pytest.mark.parametrize("vocab", [1000, 1023, 1025, 2047, 2049])
def test_tail_of_the_vocabulary_is_masked(vocab, backend, strategy):
    """verl #2656, #5349: a tail was not masked, and uniform inputs hid it; these rows are peaked."""
    problem = linear_problem(5, vocab=vocab, width=16, dtype=F64)
    problem.leaves["input"] = 3 * problem.leaves["weight"][problem.target].clone()
    problem.leaves["bias"] -= 500.0
    for options in ({}, {"balance": 1.0}, {"reality": "squared_error", "z_loss": 1e-4}):
        asked = problem.but(**options)
        actual, exact = ours(asked, backend=backend, strategy=strategy), oracle(asked)
        for name in exact:
            assert_within(actual[name], exact[name], 1e-12, 1e-15, name)


@several_tiles
@backends
@strategies
def test_softcap_gives_padded_lanes_no_mass(backend, strategy):
    """unsloth #10616: softcap turned the padding's -inf into -softcap, which has probability."""
    vocab = 1029
    problem = linear_problem(4, vocab=vocab, dtype=F64, softcap=0.5, balance=0.1)
    problem.leaves["bias"] -= 100  # all real logits sit at -softcap too, so padding would count fully
    actual, exact = ours(problem, backend=backend, strategy=strategy), oracle(problem)
    for name in exact:
        assert_within(actual[name], exact[name], 1e-12, 1e-15, name)
    target = torch.zeros(4, dtype=torch.int64)
    flat = ours(Problem(problem.leaves, target, {"softcap": 0.5}), backend=backend)
    assert flat["loss"].item() == pytest.approx(torch.tensor(vocab, dtype=F64).log().item(), rel=1e-6)


@several_tiles
@backends
@strategies
@pytest.mark.parametrize("offset", [-1e2, -1e3, -1e5])
def test_all_negative_rows(offset, backend, strategy):
    """verl #7439: a maximum that starts at 0 underflows every exponential of a negative row."""
    problem = linear_problem(4, vocab=1500, dtype=F64, balance=0.2)
    problem.leaves["bias"] += offset
    actual, exact = ours(problem, backend=backend, strategy=strategy), oracle(problem)
    for name in exact:
        assert_within(actual[name], exact[name], 1e-9 if offset == -1e5 else 1e-11, 1e-15, name)


@several_tiles
@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0])
def test_cross_entropy_is_never_negative(sharpness, dtype, backend):
    """CCE #55: target logit and lse came from different passes, so sure rows had a negative loss."""
    weight = randn(2053, 32, seed=1, dtype=dtype)
    target = class_indices((64,), 2053, seed=2)
    hidden = sharpness * weight[target]
    options = {"reduction": "none", "backend": backend}
    loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, **options)
    assert loss.dtype == F32
    assert (loss >= 0).all()
    stats = tightrope.linear_vocab_stats(hidden, weight, target, backend=backend)
    assert (stats.target_log_prob <= 0).all()
    assert (stats.entropy >= 0).all()
    assert ((stats.collision <= 1) & (stats.target_prob <= 1)).all()


@several_tiles
@backends
@strategies
def test_bias(backend, strategy):
    """CCE #52: the path with a bias was wrong and untested; this bias decides every row."""
    problem = linear_problem(6, vocab=1100, dtype=F64, balance=0.1, logit_scale=1.3, softcap=20.0)
    problem.leaves["bias"] *= 10
    actual, exact = ours(problem, backend=backend, strategy=strategy), oracle(problem)
    for name in exact:
        assert_within(actual[name], exact[name], 1e-12, 1e-15, name)


@several_tiles
@backends
@strategies
def test_bfloat16_head_gradient_is_rounded_once(backend, strategy):
    """Liger #512, #827, CCE #14: dW summed over chunks in bfloat16 made training diverge."""
    problem = linear_problem(512, vocab=300, width=16, dtype=BF16, workspace_mb=0.005)
    problem.leaves["input"][:] = problem.leaves["input"][0]  # all rows push the same way
    problem.target[:] = 7
    actual, exact = ours(problem, backend=backend, strategy=strategy), oracle(problem)
    for name in ("input", "weight", "bias"):
        floor = 1e-5 * exact[name].square().mean().sqrt().item()
        assert_rounded_once(actual[name], exact[name], floor, name)


@several_tiles
@backends
@strategies
def test_entropy_of_bfloat16_inputs_is_float32(backend, strategy):
    """Entropy was rounded to bfloat16, and the rounded value used again in the backward pass."""
    problem = linear_problem(40, vocab=1500, width=32, dtype=BF16, balance=1.0)
    actual, exact = ours(problem, backend=backend, strategy=strategy), oracle(problem)
    assert_within(actual["loss"], exact["loss"], 1e-6)
    for name in ("input", "weight"):
        floor = 1e-5 * exact[name].square().mean().sqrt().item()
        assert_rounded_once(actual[name], exact[name], floor, name)
    stats = tightrope.linear_vocab_stats(*(problem.leaves[n] for n in ("input", "weight")), backend=backend)
    assert stats.entropy.dtype == F32


@several_tiles
@backends
@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("creativity", ["entropy", "collision"])
def test_entropy_under_a_common_offset(creativity, offset, backend):
    """An unshifted sum of e * z loses all digits of the entropy when all logits are large."""
    logits = (2 * randn(5, 1500, seed=1) + offset).requires_grad_()
    problem = Problem(
        {"input": logits.detach()}, class_indices((5,), 1500), {"balance": 1.0, "creativity": creativity}
    ).but(reduction="none")
    actual, exact = ours(problem, backend=backend), oracle(problem)
    rough = oracle(problem, F32)
    assert_no_worse(actual["loss"], exact["loss"], rough["loss"], 1e-5, "loss")
    assert_no_worse(actual["input"], exact["input"], rough["input"], 1e-7, "gradient")


@several_tiles
@backends
@strategies
@skipping
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction, skip_ignored, backend, strategy):
    """CCE: the mean over no rows was NaN. Ours is 0, with a graph and zero gradients."""
    problem = linear_problem(3, vocab=50, balance=0.5, row_weight=torch.rand(3), reduction=reduction)
    problem.target[:] = -100
    for rows in (3, 0):
        leaves = {**problem.leaves, "input": problem.leaves["input"][:rows]}
        options = {**problem.options, "row_weight": torch.rand(rows)}
        actual = ours(
            Problem(leaves, problem.target[:rows], options),
            backend=backend,
            strategy=strategy,
            skip_ignored=skip_ignored,
        )
        assert all(not value.any() for value in actual.values())  # NaN is true


@several_tiles
@backends
@strategies
@skipping
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ignored_rows_do_not_leak(bad, skip_ignored, backend, strategy):
    """verl: label -100 read garbage. Here ignored rows are NaN, and nothing may see them."""
    problem = linear_problem(9, vocab=1100, ignored=0.5, balance=0.3, z_loss=0.1, logit_l2=0.1)
    ignored = problem.target == -100
    assert 0 < ignored.sum() < 9
    clean = ours(problem, backend=backend, strategy=strategy, skip_ignored=skip_ignored)
    problem.leaves["input"][ignored] = bad
    problem.options["row_weight"] = torch.ones(9).masked_fill(ignored, bad)
    problem.leaves["balance"] = torch.full((9,), problem.options.pop("balance"))
    for reduction in ("mean", "none"):
        actual = ours(
            problem,
            reduction=reduction,
            backend=backend,
            strategy=strategy,
            skip_ignored=skip_ignored,
        )
        assert all(value.isfinite().all() for value in actual.values())
        assert not actual["input"][ignored].any()
        assert not actual["balance"][ignored].any()
        if reduction == "mean":
            for name in clean:
                assert_within(actual[name], clean[name], 1e-6, 1e-7, name)


@several_tiles
@backends
@strategies
@skipping
def test_user_loss_of_ignored_rows_does_not_leak(skip_ignored, backend, strategy):
    """Statistics of ignored rows are 0; a loss with log(collision) is infinite there."""
    problem = linear_problem(7, vocab=60, dtype=F64, ignored=0.5)
    gamma = torch.full((7,), 2.0, dtype=F64).masked_fill(problem.target == -100, float("nan"))

    def function(*args, gamma, **options):
        def loss_fn(stats, gamma):
            return gamma * stats.collision.log() / stats.entropy

        return tightrope.linear_vocab_loss(*args, loss_fn=loss_fn, row_args=(gamma,), **options)

    problem.leaves["gamma"] = gamma
    options = {"backend": backend, "strategy": strategy, "skip_ignored": skip_ignored}
    actual = evaluate(function, problem, **options)
    assert all(value.isfinite().all() for value in actual.values())


# Matrix products: where the first factor [m, k] stands among the arguments, where what has n, and n in it.
PRODUCTS = {
    "aten::mm": (0, 1, -1),
    "aten::addmm": (1, 2, -1),
    "aten::addmm_": (1, 2, -1),
    "mkldnn::_linear_pointwise": (0, 1, 0),
    "tightrope::product": (0, 2, -1),
    "tightrope::product_stats": (0, 4, -1),
}


def profiled_step(problem, frozen, **options):
    """(operations of all matrix products, bytes of the largest allocation, leaves) of a training step."""
    leaves = {
        name: leaf.detach().clone().requires_grad_(name not in frozen)
        for name, leaf in problem.leaves.items()
    }
    # With acc_events torch 2.11 does not warn that a next cycle would drop the events of this one.
    settings = {"record_shapes": True, "profile_memory": True, "acc_events": True}
    with profile(activities=[ProfilerActivity.CPU], **settings) as run:
        tightrope.linear_reality_creativity_loss(
            leaves["input"], leaves["weight"], problem.target, leaves.get("bias"), **options
        ).backward()
    events = run.events()
    products = [e for e in events if e.name in PRODUCTS]
    products = [e for e in products if e.cpu_parent is None or e.cpu_parent.name not in PRODUCTS]
    operations = 0
    for event in products:
        first, second, last = PRODUCTS[event.name]
        operations += 2 * math.prod(event.input_shapes[first]) * event.input_shapes[second][last]
    return operations, max(e.self_cpu_memory_usage for e in events), leaves


@backends
@strategies
def test_frozen_head_costs_no_gradient(backend, strategy):
    """fla #1253: a frozen head still had its dW computed, the third of the matrix products."""
    problem = linear_problem(64, vocab=8000, width=64, workspace_mb=0.5)
    product, head_bytes = 2 * 64 * 8000 * 64, 4 * 8000 * 64
    options = {"backend": backend, "strategy": strategy, "workspace_mb": 0.5}
    ours(problem, **options)  # whatever is made once and kept is there before the measurement
    expected = {"chunked": (3, 2, 2), "streaming": (4, 3, 3)}[strategy]
    for frozen, count in zip([(), ("weight", "bias"), ("input",)], expected):
        operations, largest, leaves = profiled_step(problem, frozen, **options)
        assert all((leaves[name].grad is None) == (name in frozen) for name in leaves)
        assert operations == count * product, f"frozen {frozen}"
        assert (largest >= head_bytes) == ("weight" not in frozen), f"frozen {frozen}: {largest} bytes"


@several_tiles
@backends
@strategies
@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_second_backward(upstream, backend, strategy):
    """Liger, QuACK #209: saved gradients were scaled in place, so a second backward was wrong."""
    loss, leaves = loss_of(linear_problem(5, vocab=1100, balance=0.3), backend=backend, strategy=strategy)
    wanted = list(leaves.values())
    factor = torch.tensor(upstream)
    first = torch.autograd.grad(loss, wanted, factor, retain_graph=True)
    copies = [x.clone() for x in first]
    for x in first:
        x.mul_(7)  # what the caller does to its gradients is not our business
    second = torch.autograd.grad(loss, wanted, factor, retain_graph=True)
    third = torch.autograd.grad(loss, wanted, factor)
    for a, b, c in zip(copies, second, third):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@several_tiles
@backends
@strategies
def test_backward_accumulates(backend, strategy):
    """The same, through ``.grad``: two backward passes of one graph add up to twice the gradient."""
    loss, leaves = loss_of(linear_problem(5, vocab=300, balance=0.3), backend=backend, strategy=strategy)
    (3 * loss).backward(retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    (3 * loss).backward()
    assert_same_bits({name: leaf.grad for name, leaf in leaves.items()}, {n: 2 * x for n, x in once.items()})


@several_tiles
@backends
@strategies
def test_loss_in_two_terms_of_one_graph(backend, strategy):
    """A loss used twice in one graph gets the sum of both upstream gradients."""
    problem = linear_problem(5, vocab=300, dtype=F64)
    loss, leaves = loss_of(problem, backend=backend, strategy=strategy)
    (loss.square() + 2 * loss).backward()
    single = ours(problem, backend=backend, strategy=strategy)
    for name, leaf in leaves.items():
        assert_within(leaf.grad, single[name] / (5 / 8) * (2 * loss.item() + 2), 1e-12, what=name)


@several_tiles
@backends
@strategies
@pytest.mark.parametrize("weighted", [False, True])
def test_normalizer_makes_micro_batches_equal_one(weighted, backend, strategy):
    """unsloth #8261, fla #539: the mean of means is not the mean when the counts differ."""
    problem = linear_problem(10, vocab=200, dtype=F64, ignored=0.3, balance=0.2)
    row_weight = torch.linspace(0.5, 2, 10, dtype=F64) if weighted else torch.ones(10, dtype=F64)
    whole = ours(problem.but(row_weight=row_weight), backend=backend, strategy=strategy)
    kept = problem.target != -100
    assert kept[:3].sum() / 3 != kept[3:].sum() / 7
    normalizer = row_weight[kept].sum()
    parts = [
        ours(
            Problem(
                {**problem.leaves, "input": problem.leaves["input"][s]}, problem.target[s], problem.options
            ),
            normalizer=normalizer,
            row_weight=row_weight[s],
            backend=backend,
            strategy=strategy,
        )
        for s in (slice(0, 3), slice(3, 10))
    ]
    for name in ("loss", "weight", "bias"):
        assert_within(parts[0][name] + parts[1][name], whole[name], 1e-12, what=name)
    assert_within(torch.cat([p["input"] for p in parts]), whole["input"], 1e-12)


@several_tiles
def test_mean_of_no_rows_differs_from_torch_on_purpose():
    """`F.cross_entropy` gives NaN; the documentation says that ours gives 0."""
    hidden, weight, target = randn(2, 3), randn(4, 3), torch.full((2,), -100)
    assert F.cross_entropy(hidden @ weight.t(), target).isnan()
    assert tightrope.linear_reality_creativity_loss(hidden, weight, target) == 0
    assert tightrope.reality_creativity_loss(hidden @ weight.t(), target) == 0
