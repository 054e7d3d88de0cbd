"""The public API with backend="triton" in the interpreter, as a person without a GPU tries it."""

import math
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; test_triton_interpreter.py runs it", allow_module_level=True)

import torch

import tightrope
from helpers import (
    STRATEGIES,
    Problem,
    assert_same_bits,
    assert_within,
    class_indices,
    linear_problem,
    ours,
    rand,
    randn,
    top_k,
)
from test_against_reference import check
from tightrope import backends, reference
from tightrope.strategies import plan
from tightrope.strategies.gemm import headroom
from triton_bounds import checked_bounds

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.one_in(12)]
both = pytest.mark.parametrize("strategy", STRATEGIES)
TERMS = [
    dict(balance=0.3),
    dict(balance=0.6, reality="squared_error", creativity="collision", z_loss=0.01),
    dict(balance=0.2, creativity="collision", label_smoothing=0.1, logit_l2=0.001, logit_scale=-1.5),
    dict(reality="squared_error", label_smoothing=0.1, softcap=4.0, shift=1),
    dict(reduction="none", softcap=4.0, z_loss=0.01, shift=1),
    dict(reduction="sum", skip_ignored=False, workspace_mb=1e-6),
]


def with_target(problem: Problem, kind: str, vocab: int) -> Problem:
    lead = problem.leaves["input"].shape[:-1]
    target = problem.target
    if kind == "dense":
        target = torch.softmax(randn(*lead, vocab, seed=9), -1)
    elif kind == "topk":
        pairs = top_k(lead, vocab, k=4, seed=9)
        dropped = rand(*pairs.indices.shape, seed=10) < 0.4
        target = pairs._replace(indices=pairs.indices.masked_fill(dropped, -100))
    return Problem(problem.leaves, target, problem.options)


@both
@pytest.mark.parametrize("kind", ["index", "dense", "topk"])
@pytest.mark.parametrize("terms", TERMS)
def test_every_term_and_target(strategy, kind, terms):
    vocab = 75
    problem = linear_problem(2, 5, vocab=vocab, width=21, ignored=0.3, **terms)
    with checked_bounds():
        check(with_target(problem, kind, vocab), strategy=strategy, backend="triton")


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(strategy, dtype):
    """float64 goes through the row kernels; half precision rounds the gradient of each logit as well."""
    problem = linear_problem(3, 4, vocab=75, width=24, dtype=dtype, ignored=0.3, balance=0.3, softcap=5.0)
    if dtype == torch.float64:
        return check(problem, strategy=strategy, backend="triton")
    actual = ours(problem, strategy=strategy, backend="triton")
    expected = ours(problem, strategy=strategy, backend="eager")
    assert actual["loss"] == pytest.approx(expected["loss"].item(), rel=1e-6)
    step = 2 * torch.finfo(dtype).eps
    for name in ("input", "weight", "bias"):
        assert actual[name].dtype == dtype
        error = (actual[name].double() - expected[name].double()).norm()
        assert error <= step * expected[name].double().norm(), name


@both
def test_float16_gradients_of_a_mean_over_many_tokens_do_not_vanish(strategy):
    problem = linear_problem(6, vocab=75, width=24, dtype=torch.float16, normalizer=2.0**22)
    actual = ours(problem, strategy=strategy, backend="triton")
    grown = ours(problem.but(normalizer=2.0**4), strategy=strategy, backend="triton")
    scale = 2.0**-18
    assert (actual["weight"].float() - grown["weight"].float() * scale).abs().max() <= 2.0**-24
    coef, undo = headroom(torch.full((7, 3), 2.0**-30), torch.float16)
    assert coef.max() in (0.5, 1.0)
    assert coef.max() * undo == 2.0**-30


def test_mixed_dtypes_and_a_loss_of_ones_own():
    problem = linear_problem(6, vocab=75, width=24)
    hidden = problem.leaves["input"].bfloat16().requires_grad_()
    weight = problem.leaves["weight"].clone().requires_grad_()

    def focal(stats):
        return (1 - stats.target_prob) ** 2 * -stats.target_log_prob

    results = []
    for backend in ("triton", "eager"):
        loss = tightrope.linear_vocab_loss(hidden, weight, problem.target, focal, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for ours_, theirs in zip(*results):
        torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["index", "dense", "topk"])
def test_streaming_equals_chunked(kind):
    problem = linear_problem(40, vocab=150, width=24, ignored=0.2, balance=0.3, z_loss=0.01)
    problem = with_target(problem, kind, 150)
    chunked = ours(problem, strategy="chunked", backend="triton")
    streaming = ours(problem, strategy="streaming", backend="triton")
    for name in chunked:
        torch.testing.assert_close(chunked[name], streaming[name], rtol=2e-6, atol=2e-7)


@both
def test_runs_repeat_bit_for_bit(strategy):
    problem = linear_problem(10, vocab=75, width=21, ignored=0.3, balance=0.3)
    assert_same_bits(*(ours(problem, strategy=strategy, backend="triton") for _ in range(2)))


def test_a_token_does_not_depend_on_its_batch():
    problem = linear_problem(40, vocab=150, width=24)
    hidden, weight, bias = problem.leaves.values()
    options = dict(balance=0.3, reduction="none", backend="triton")
    together = tightrope.linear_reality_creativity_loss(hidden, weight, problem.target, bias, **options)
    for token in (0, 33, 39):
        one = slice(token, token + 1)
        alone = tightrope.linear_reality_creativity_loss(
            hidden[one], weight, problem.target[one], bias, **options
        )
        assert torch.equal(alone[0], together[token])


def test_logits_that_exist_already():
    problem = linear_problem(2, 5, vocab=75, width=8, balance=0.3, softcap=4.0)
    logits = problem.raw_logits(torch.float32)
    with checked_bounds():
        check(Problem({"input": logits}, problem.target, problem.options), backend="triton")


def test_streaming_cuts_rows_and_vocabulary_to_the_workspace(monkeypatch):
    """Every combination of several tiles and several blocks of rows, against one of each."""
    monkeypatch.setattr(plan, "STREAM_STEP", 32)
    monkeypatch.setattr(plan, "DENSE_TILE", 48)
    problem = linear_problem(34, vocab=100, width=24, balance=0.3)
    for kind in ("index", "dense"):
        case = with_target(problem, kind, 100)
        for workspace in (32 * 17 * 8, 34 * 64 * 4):
            check(case, strategy="streaming", backend="triton", workspace_mb=workspace / 2**20)


def _support_problem(vocab=75):
    """(leaves, target, classes): classes named twice, ignored ones, and a token without any."""
    problem = linear_problem(2, 5, vocab=vocab, width=21, ignored=0.3)
    classes = class_indices((2, 5, 6), vocab, seed=7, ignored=0.3)
    classes[..., 1] = classes[..., 0]
    classes[0, 1] = -100
    return problem.leaves, problem.target, classes


def _dense_support_statistics(leaves, support, valid, softcap):
    """The three statistics of a set from a softmax that is whole; 0 for ignored tokens."""
    z = reference.logits(leaves["input"], leaves["weight"], leaves["bias"], softcap=softcap)
    log_p = torch.log_softmax(z, -1)
    if isinstance(support, tightrope.MinP):
        members = log_p.detach() >= log_p.detach().amax(-1, keepdim=True) + math.log(support.x)
    else:
        kept = support.indices >= 0
        hits = torch.zeros(z.shape, dtype=torch.int64).scatter_add_(-1, support.indices * kept, kept.long())
        members = hits > 0
    own = log_p.masked_fill(~members, -torch.inf)
    log_mass, rest = own.logsumexp(-1), log_p.masked_fill(members, -torch.inf).logsumexp(-1)
    log_r = torch.where(members, log_p - log_mass.unsqueeze(-1), 0.0)
    entropy = -torch.where(members, log_r.exp() * log_r, 0.0).sum(-1)
    return [x.masked_fill(~valid, 0.0) for x in (log_mass, rest, entropy)]


@pytest.mark.parametrize("workspace", [None, 1e-6])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("kind", ["min_p", "classes"])
def test_statistics_of_a_set_and_their_gradients(kind, softcap, workspace):
    """Fails if the drivers hand the kernels another set, norm or order of the sides than they mean."""
    leaves, target, classes = _support_problem()
    support = tightrope.MinP(0.3) if kind == "min_p" else tightrope.Classes(classes)
    names = ("support_log_mass", "rest_log_mass", "support_entropy")

    def weighted(values):
        # -inf, of an empty set, has no gradient.
        return sum((randn(2, 5, seed=20 + i).to(v) * v)[v.isfinite()].sum() for i, v in enumerate(values))

    ours_ = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    with checked_bounds():
        stats = tightrope.linear_vocab_stats(
            ours_["input"],
            ours_["weight"],
            target,
            bias=ours_["bias"],
            support=support,
            softcap=softcap,
            backend="triton",
            workspace_mb=workspace,
        )
        actual = [getattr(stats, name) for name in names]
        total = weighted(actual) + (stats.entropy + 0.5 * stats.target_log_prob).sum()
        grads = torch.autograd.grad(total, list(ours_.values()))
    exact = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    valid = target != -100
    expected = _dense_support_statistics(exact, support, valid, softcap)
    z = reference.logits(exact["input"], exact["weight"], exact["bias"], softcap=softcap)
    whole = reference.row_stats(z, reference.dense_target(target, 75, dtype=z.dtype)[0])
    total = weighted(expected)
    total = total + (whole.entropy + 0.5 * whole.target_log_prob).masked_fill(~valid, 0.0).sum()
    for name, got, want in zip(names, actual, expected):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)
    for name, got, want in zip(exact, grads, torch.autograd.grad(total, list(exact.values()))):
        assert_within(got, want, 1e-5, 1e-6, name)


@both
@pytest.mark.parametrize("support", [None, "classes"])
def test_a_loss_of_a_set_in_both_strategies(strategy, support):
    """Fails if a strategy leaves the set out of a gradient, or streams where only row kernels know sets."""
    leaves, target, classes = _support_problem()
    options = {"creativity": "support_entropy", "balance": 0.3, "strategy": strategy}
    if support:
        options["support"] = tightrope.Classes(classes.masked_fill(classes == -100, 3))
    problem = Problem(leaves, target, options)
    actual, expected = (ours(problem, backend=backend) for backend in ("triton", "eager"))
    for name in expected:
        assert_within(actual[name], expected[name], 1e-5, 1e-6, name)


def test_the_interpreter_serves_only_who_asks_for_it():
    cpu = torch.device("cpu")
    assert backends.resolve(None, cpu).name != "triton"
    assert backends.resolve("triton", cpu).name == "triton"
