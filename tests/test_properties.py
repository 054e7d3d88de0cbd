"""What must hold whatever the numbers are: repeatability, independence of rows, equal ways of asking.

These need no oracle. Where two calls do the same arithmetic they are compared bit by bit; where only
the order of sums differs, by rounding.
"""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F

import tightrope
from helpers import (
    BACKENDS,
    EPS32,
    STRATEGIES,
    Problem,
    assert_rounded_once,
    assert_same_bits,
    assert_within,
    class_indices,
    dense,
    linear_problem,
    oracle,
    ours,
    present,
    rand,
    randn,
    top_k,
)
from tightrope.strategies import plan

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
backends = pytest.mark.parametrize("backend", BACKENDS)
strategies = pytest.mark.parametrize("strategy", STRATEGIES)
dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=["float32", "bfloat16", "float64"])


def of(problem):
    """The positional arguments of the linear functions."""
    return (*(problem.leaves[n] for n in ("input", "weight")), problem.target, problem.leaves["bias"])


def assert_close(actual, expected, rtol=1e-5):
    for name in expected:
        assert_within(actual[name], expected[name], rtol, 1e-7, name)


@backends
@strategies
@dtypes
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeatable_to_the_bit(reduction, dtype, backend, strategy, small_tiles):
    problem = linear_problem(
        130, vocab=3001, width=24, dtype=dtype, ignored=0.2, balance=0.3, workspace_mb=0.3
    ).but(reduction=reduction, backend=backend, strategy=strategy)
    first = ours(problem)
    for _ in range(3):
        assert_same_bits(ours(problem), first)


def test_number_of_threads_changes_no_bit_of_the_logits_function():
    """A row is never split between threads. (The GEMMs of the linear functions may split sums.)"""
    logits, target = randn(64, 3001), class_indices((64,), 3001)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ours(Problem({"input": logits}, target, {"reduction": "none", "balance": 0.5})))
    assert_same_bits(*results)


@backends
@pytest.mark.parametrize(
    "terms",
    [
        {},
        {"creativity": "collision", "label_smoothing": 0.1, "logit_l2": 1e-3},
        {"reality": "squared_error", "z_loss": 0.1, "softcap": 5.0},
    ],
)
def test_strategies_and_workspaces_agree(terms, backend, request):
    """How the work is cut, into chunks and then into tiles, changes no more than the order of sums."""
    problem = linear_problem(70, vocab=2500, width=16, ignored=0.3, **terms)
    problem.leaves |= {"balance": rand(70, seed=5), "row_weight": rand(70, seed=6)}
    expected = ours(problem, backend=backend, strategy="chunked")
    for fixture in (None, "small_tiles"):
        if fixture:
            request.getfixturevalue(fixture)
        for strategy in STRATEGIES:
            for workspace_mb in (1e-6, 0.02, 0.3, 1000):
                actual = ours(problem, backend=backend, strategy=strategy, workspace_mb=workspace_mb)
                assert_close(actual, expected)
        assert_close(ours(problem), expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_defaults_are_cross_entropy(label_smoothing, reduction):
    hidden, weight = randn(9, 5, dtype=F64).requires_grad_(), randn(40, 5, dtype=F64)
    target = class_indices((9,), 40, ignored=0.3)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    expected = F.cross_entropy(hidden @ weight.t(), target, **options)
    for actual in (
        tightrope.linear_reality_creativity_loss(hidden, weight, target, **options),
        tightrope.reality_creativity_loss(hidden @ weight.t(), target, **options),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(actual.sum(), hidden, retain_graph=True)
        (truth,) = torch.autograd.grad(expected.sum(), hidden, retain_graph=True)
        torch.testing.assert_close(gradient, truth, rtol=1e-12, atol=1e-12)


@backends
def test_balance_of_each_token_is_that_many_losses(backend):
    problem = linear_problem(6, vocab=90, dtype=F64, reduction="none")
    balance = torch.tensor([0.0, 0.25, 1.0, 0.5, 0.0, 1.0], dtype=F64)
    mixed = ours(problem.but(balance=balance), backend=backend)
    for value in balance.unique():
        single = ours(problem.but(balance=value.item()), backend=backend)
        rows = balance == value
        for name in ("loss", "input"):
            assert_within(mixed[name][rows], single[name][rows], 1e-13, what=name)


@backends
def test_a_weight_gradient_over_blocks_of_rows_is_rounded_once(backend):
    """Streaming sums dW over blocks of rows in float32; a sum in the weight's dtype would round for each."""
    rows = 2100
    assert rows > 2 * plan.sizes(torch.device("cpu")).streaming_rows
    problem = linear_problem(rows, vocab=300, width=16, dtype=BF16, balance=0.3, reduction="sum")
    exact = oracle(problem)["weight"]
    actual = ours(problem, backend=backend, strategy="streaming")["weight"]
    assert actual.dtype == BF16
    assert_rounded_once(actual, exact, 16 * EPS32 * exact.abs().max(), "weight")


@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["hidden", "logits"])
def test_bad_rows_stay_alone(where, bad, backend):
    """A NaN or inf reaches its own row's loss and gradient, and no other row's."""
    options = {"reduction": "none", "balance": 0.3}
    problem = linear_problem(40, vocab=1030, **options)
    if where == "logits":
        problem = Problem({"input": problem.raw_logits(F32)}, problem.target, options)
    clean = ours(problem, backend=backend)
    problem.leaves["input"] = problem.leaves["input"].clone()
    problem.leaves["input"][21] = bad
    actual = ours(problem, backend=backend)
    assert not actual["loss"][21].isfinite()
    assert not actual["input"][21].isfinite().all()
    others = torch.arange(40) != 21
    for name in ("loss", "input"):
        assert torch.equal(actual[name][others], clean[name][others]), name


@backends
def test_masked_vocabulary_is_no_bad_row(backend):
    """-inf in some logits of a row is a mask: it has no probability and gets no gradient."""
    logits, target = randn(5, 1030), torch.arange(5)
    logits[:, 100:] = -float("inf")
    actual = ours(Problem({"input": logits}, target, {"balance": 0.5}), backend=backend)
    small = ours(Problem({"input": logits[:, :100]}, target, {"balance": 0.5}), backend=backend)
    assert_within(actual["loss"], small["loss"], 1e-6)
    assert_within(actual["input"][:, :100], small["input"], 1e-6)
    assert not actual["input"][:, 100:].any()


OPTIONS = {"balance": 0.3, "creativity": "collision", "softcap": 9.0, "reduction": "sum"}


@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_modules_are_the_functions(kind):
    problem = linear_problem(5, vocab=70)
    if kind == "linear":
        module = tightrope.LinearRealityCreativityLoss(**OPTIONS)
        arguments = (
            problem.leaves["input"],
            problem.leaves["weight"],
            problem.target,
            problem.leaves["bias"],
        )
        function = tightrope.linear_reality_creativity_loss
    else:
        module = tightrope.RealityCreativityLoss(**OPTIONS)
        arguments = (problem.raw_logits(F32), problem.target)
        function = tightrope.reality_creativity_loss
    assert torch.equal(module(*arguments), function(*arguments, **OPTIONS))
    for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(duplicate(*arguments), module(*arguments))
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    shown = repr(module)
    for part in (type(module).__name__, "balance=0.3", "creativity='collision'", "softcap=9.0"):
        assert part in shown
    assert "z_loss" not in shown, "options that were not given only hide those that were"
    weights = rand(5)
    again = module(*arguments, balance=0.7, row_weight=weights)
    assert torch.equal(again, function(*arguments, **{**OPTIONS, "balance": 0.7, "row_weight": weights}))


@backends
@strategies
@pytest.mark.parametrize("reality", ["cross_entropy", "squared_error"])
def test_one_target_in_three_forms(reality, backend, strategy, request):
    """Top-k pairs are the dense target that they scatter to; one pair of mass 1 is a class index.

    The first is cut into tiles and the second is not, for a mass that is lost with a tile.
    """
    problem = linear_problem(8, vocab=1100, dtype=F64, reality=reality, label_smoothing=0.1)
    options = {"backend": backend, "strategy": strategy}
    pairs = top_k((8,), 1100, k=5, dtype=F64)
    pairs.indices[:, 1] = pairs.indices[:, 0]
    full = ours(Problem(problem.leaves, dense(pairs, 1100), problem.options), **options)
    request.getfixturevalue("small_tiles")
    sparse = ours(Problem(problem.leaves, pairs, problem.options), **options)
    assert_close(sparse, full, 1e-12)
    one = tightrope.TopKTarget(problem.target[:, None], torch.ones(8, 1, dtype=F64))
    assert_close(
        ours(Problem(problem.leaves, one, problem.options), **options), ours(problem, **options), 1e-12
    )


@pytest.mark.parametrize("terms", [{}, {"balance": 0.4, "reality": "squared_error"}])
def test_evaluation_is_the_training_loss(terms):
    problem = linear_problem(40, vocab=1500, ignored=0.2, **terms)
    training = ours(problem)["loss"]
    arguments = of(problem)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            loss = tightrope.linear_reality_creativity_loss(*arguments, **terms)
        assert not loss.requires_grad
        assert_within(loss, training, 1e-6)


@backends
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_single_token_without_dimensions(reduction, backend):
    problem = linear_problem(vocab=33, dtype=F64, balance=0.5, reduction=reduction, backend=backend)
    assert problem.target.shape == ()
    assert_close(ours(problem), oracle(problem), 1e-12)
    stats = tightrope.linear_vocab_stats(problem.leaves["input"], problem.leaves["weight"], problem.target)
    assert all(x.shape == () for x in present(stats).values())


@backends
def test_argmax_of_ties_is_the_lowest_index(backend, small_tiles):
    """Ties inside a tile, across tiles and across vector lanes."""
    vocab = 2500
    rows = [(5, 6), (3, 2400), (1023, 1024), (0, 1024), (17, 33), (2498, 2499)]
    hidden, head = torch.eye(len(rows)), torch.zeros(vocab, len(rows))
    for row, tied in enumerate(rows):
        head[list(tied), row] = 2.0
    stats = tightrope.linear_vocab_stats(hidden, head, backend=backend)
    assert stats.argmax.tolist() == [min(tied) for tied in rows]
    constant = tightrope.linear_vocab_stats(torch.zeros(2, 3), torch.ones(vocab, 3), backend=backend)
    assert constant.argmax.tolist() == [0, 0]


@backends
def test_upstream_gradients_of_any_stride(backend):
    problem = linear_problem(4, 6, vocab=50, dtype=F64, reduction="none", balance=0.2)
    results = []
    for upstream in (rand(6, 4, dtype=F64).t(), rand(1, 1, dtype=F64).expand(4, 6)):
        hidden = problem.leaves["input"].clone().requires_grad_()
        loss = tightrope.linear_reality_creativity_loss(
            hidden, problem.leaves["weight"], problem.target, reduction="none", backend=backend
        )
        for given in (upstream, upstream.contiguous()):
            results.append(torch.autograd.grad(loss, hidden, given, retain_graph=True)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[2], results[3])


def test_returned_statistics():
    """Of every token, detached, in the tokens' shape; zeros and -1 for ignored tokens."""
    problem = linear_problem(3, 4, vocab=60, ignored=0.4)
    arguments = [problem.leaves[n].clone().requires_grad_() for n in ("input", "weight")]
    for strategy in STRATEGIES:
        loss, stats = tightrope.linear_reality_creativity_loss(
            *arguments, problem.target, return_stats=True, strategy=strategy
        )
        assert loss.requires_grad
        assert all(not x.requires_grad and x.shape == (3, 4) for x in present(stats).values())
        kept = problem.target != -100
        assert_within(loss, -stats.target_log_prob.sum() / kept.sum(), 1e-6)
        for name, value in present(stats).items():
            assert (value[~kept] == (-1 if name == "argmax" else 0)).all(), name
    without = tightrope.linear_vocab_stats(*arguments)
    assert [name for name, x in without._asdict().items() if x is None] == [
        "target_logit",
        "target_prob",
        "target_log_prob",
        "support_log_mass",
        "rest_log_mass",
        "support_entropy",
        "target_entropy",
        "target_collision",
        "sampled_share",
        "sampled_noise",
    ]


def test_a_loss_function_may_call_the_library():
    """The workspace in use is nobody else's, even when a user's loss computes another loss meanwhile."""
    problem = linear_problem(20, vocab=700, dtype=F64, workspace_mb=0.02)

    def plain(stats):
        return -stats.target_log_prob

    def nested(stats):
        ours(problem)
        return plain(stats)

    arguments = (problem.leaves["input"].clone().requires_grad_(), problem.leaves["weight"], problem.target)
    grads = []
    for loss_fn in (plain, nested):
        loss = tightrope.linear_vocab_loss(*arguments, loss_fn, workspace_mb=0.02, strategy="chunked")
        grads.append(torch.autograd.grad(loss, arguments[0])[0])
    assert torch.equal(*grads)


@strategies
def test_threads_do_not_disturb_each_other(strategy):
    problems = [linear_problem(40, vocab=2000, seed=seed, strategy=strategy) for seed in range(4)]
    alone = [ours(problem) for problem in problems]
    together = [[] for _ in problems]

    def work(i):
        together[i].extend(ours(problems[i]) for _ in range(5))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for expected, results in zip(alone, together):
        assert len(results) == 5
        for actual in results:
            assert_close(actual, expected)


@strategies
@pytest.mark.parametrize("learns_head", [False, True])
def test_frozen_hidden_states_and_learned_balance(learns_head, strategy):
    """Any subset of the tensors may require grad, also none but the balance, which then streams."""
    problem = linear_problem(5, vocab=60, dtype=F64, strategy=strategy)
    balance = rand(5, dtype=F64).requires_grad_()
    head = problem.leaves["weight"].clone().requires_grad_(learns_head)
    loss = tightrope.linear_reality_creativity_loss(
        problem.leaves["input"], head, problem.target, balance=balance, strategy=strategy
    )
    (gradient,) = torch.autograd.grad(loss, balance)
    problem.leaves = {**problem.leaves, "balance": balance.detach()}
    del problem.leaves["bias"]
    assert_within(gradient, oracle(problem)["balance"] / (5 / 8), 1e-12)


@pytest.mark.parametrize("rows", [1, 31, 64, 512, 4096])
def test_tiles_cover_the_vocabulary_and_stay_small(rows):
    """Wide for few rows, never beyond a cache's worth of logits for many."""
    cpu = torch.device("cpu")
    sizes, width = plan.sizes(cpu), plan.tile_width(rows, cpu)
    assert sizes.tile <= width <= sizes.widest_tile
    assert width == sizes.tile or width * rows <= sizes.tile_logits
    assert (width == sizes.widest_tile) == (rows < 64)
    for vocab in (1, 17, width - 1, width + 1, 5 * width + 3):
        spans = plan.spans(vocab, width, multiple=16)
        assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])] and spans[-1][1] == vocab
        assert all(b - a <= width for a, b in spans)


def test_a_tile_of_a_head_that_is_converted_is_bounded():
    """Its copy and its float32 gradient take memory; with one row and D 4096 they took 268 MB each."""
    cpu = torch.device("cpu")
    for width in (16, 300, 4096, 100_000):
        tile = plan.tile_width(1, cpu, width)
        assert tile == plan.sizes(cpu).tile or tile * width <= plan.sizes(cpu).tile_head
        assert tile <= plan.tile_width(1, cpu)


@pytest.mark.parametrize(
    ("rows", "vocab", "megabytes", "expected"),
    [
        (1024, 50257, None, "chunked"),
        (1024, 294912, None, "chunked"),  # 64 rows fit
        (1024, 294913, None, "streaming"),
        (63, 294913, None, "chunked"),  # all rows fit
        (1024, 402056, 256, "chunked"),
        (1024, 50257, 8, "streaming"),
    ],
)
def test_the_strategy_follows_from_the_rows_that_the_workspace_holds(rows, vocab, megabytes, expected):
    cpu = torch.device("cpu")
    workspace = plan.workspace_bytes(megabytes, cpu)
    assert plan.choose_strategy(rows, vocab, 4, workspace, cpu) == expected
