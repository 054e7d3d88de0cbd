"""The chunked strategy over the fused primitive: statistics and gradient of whole rows in one launch.

No backend of a CPU fuses, so the plain PyTorch backend is made to, with its own implementation of the
primitive: what is tested is the driver. The kernel has its own tests (tests/test_cuda_host.py, tests/gpu).
"""

from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tightrope
from helpers import Problem, assert_same_bits, linear_problem, oracle, ours, present, rand, randn, top_k
from strategies import hostile_linear, problems
from test_against_reference import BF16, F16, F32, F64, HOSTILE_TERMS, check, check_hostile
from tightrope import backends
from tightrope.backends import ops
from tightrope.strategies import chunked

few_threads = pytest.mark.usefixtures("one_thread")
RUN = {"backend": "eager", "strategy": "chunked"}


def operands(narrow):
    """Whether operands of GEMMs keep their dtype."""
    return patch("tightrope.strategies.problem.widens", lambda device, dtype: narrow)


@contextmanager
def fusing(narrow=False, sweeps=False):
    """The plain backend fuses; gives its launches, (logits, out) each, and what it was asked before.

    narrow: operands of GEMMs keep their dtype, as on a GPU. sweeps: separate sweeps are allowed too.
    """
    launches, asked = [], []

    def launch(logits, out, *rest):
        launches.append((logits, out))
        ops.row_loss_grad(logits, out, *rest)

    def fuses(*question):
        asked.append(question)
        return True

    def refuse(*_):
        raise AssertionError("a fused chunk has no separate sweeps")

    refused = {} if sweeps else {"row_stats": refuse, "row_grad": refuse}
    backend = replace(backends.BACKENDS["eager"], fuses=fuses, row_loss_grad=launch, **refused)
    with patch.dict(backends.BACKENDS, eager=backend), operands(narrow):
        yield launches, asked


def scalar(problem: Problem) -> Problem:
    """Without the reduction that the chunked strategy leaves to the streaming backward."""
    return problem.but(reduction="sum") if problem.options.get("reduction") == "none" else problem


def is_dense(problem: Problem) -> bool:
    return isinstance(problem.target, torch.Tensor) and problem.target.is_floating_point()


@few_threads
@given(problem=problems([F64]))
@settings(max_examples=80)
def test_float64(problem):
    with fusing(sweeps=is_dense(problem)):
        check(scalar(problem), **RUN)


@few_threads
@given(problem=problems([BF16, F16, F32, F64]))
@settings(max_examples=80)
def test_mixed_dtypes(problem):
    with fusing(sweeps=is_dense(problem)):
        check(scalar(problem), **RUN)


@few_threads
@given(case=hostile_linear(), terms=HOSTILE_TERMS, workspace_mb=st.sampled_from([None, 1e-3]))
@settings(max_examples=80)
def test_hostile(case, terms, workspace_mb):
    how, problem = case
    with fusing() as (launches, _):
        check_hostile(how, problem.but(reduction="sum", workspace_mb=workspace_mb, **terms), **RUN)
    assert launches


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1025, 3001])
def test_rows_are_padded_and_chunks_fit_the_workspace(vocab, small_tiles):
    """Several chunks and tiles; memory beyond the workspace is not asked for."""
    problem = linear_problem(90, vocab=vocab, width=7, dtype=F64, balance=0.3, ignored=0.2)
    workspace_mb = 40 * ((vocab + 31) // 32 * 32) * 8 / 2**20
    lent = []

    def borrow(elements, dtype, device):
        lent.append(elements * dtype.itemsize)
        return real(elements, dtype, device)

    real = chunked.borrow
    with fusing() as (launches, asked), patch.object(chunked, "borrow", borrow):
        check(problem, workspace_mb=workspace_mb, **RUN)
    assert len(launches) == 3
    assert max(lent) <= workspace_mb * 2**20
    for logits, out in launches:
        assert out.data_ptr() == logits.data_ptr()
        assert logits.stride(0) % 32 == 0
    assert asked[0] == (launches[0][0].shape[0], vocab, 1, F64, torch.device("cpu"))


def test_the_gradients_of_everything_that_has_one():
    """Balance and row_weight tensors, a normalizer, ignored rows gathered out or masked, shift, top-k."""
    target = top_k((3, 10), 50, k=4, seed=3)
    dropped = rand(3, 10, 4, seed=4) < 0.4
    target = target._replace(indices=target.indices.masked_fill(dropped, -100))
    for skip in (None, False):
        problem = linear_problem(3, 10, vocab=50, width=9, dtype=F64, reality="squared_error")
        problem.target = target
        problem.leaves |= {"balance": rand(3, 10, seed=5, dtype=F64), "row_weight": rand(3, 1, dtype=F64)}
        options = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_l2": 1e-3, "creativity": "collision"}
        with fusing() as (launches, asked):
            check(problem.but(skip_ignored=skip, normalizer=7.5, softcap=4.0, shift=1, **options), **RUN)
        assert len(launches) == 1
        assert asked[0][2] == 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "class"])
@pytest.mark.parametrize("skip", [None, False])
def test_a_bad_row_stays_alone(bad, skip):
    """In a row that counts it reaches that row's gradient only; in an ignored one, nothing."""
    options = dict(balance=0.3, skip_ignored=skip, reduction="sum", return_stats=True, **RUN)

    def run(broken, ignored):
        problem = linear_problem(12, vocab=1100, width=8, bias=False)
        hidden, weight = (leaf.clone() for leaf in problem.leaves.values())
        target = problem.target.clone()
        if broken and bad != "class":
            hidden[5] = bad
        if ignored:
            target[5] = -100
        elif broken and bad == "class":
            target[5] = 1100
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        with fusing(), patch("tightrope.targets.may_read", lambda _: False):  # as on a GPU
            loss, stats = tightrope.linear_reality_creativity_loss(*leaves, target, **options)
        return loss, *torch.autograd.grad(loss, leaves), stats

    loss, hidden, weight, stats = run(True, False)
    good = run(False, False)
    others = torch.arange(12) != 5
    assert loss.isnan()
    assert hidden[5].isnan().all()
    assert weight.isnan().any()
    assert torch.equal(hidden[others], good[1][others])
    for ours_, theirs in zip(present(stats).values(), present(good[3]).values()):
        assert torch.equal(ours_[others], theirs[others])
    for ours_, theirs in zip(run(True, True)[:3], run(False, True)):
        assert torch.equal(ours_, theirs)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("skip", [None, False])
def test_no_row_counts(rows, skip):
    problem = linear_problem(rows, vocab=40, width=4, ignored=1.0, balance=0.5)
    with fusing():
        result = ours(problem.but(skip_ignored=skip), **RUN)
    assert all((value == 0).all() for value in result.values())


@pytest.mark.parametrize("vocab", [7, 75, 2500])
@pytest.mark.parametrize("kind", ["index", "top_k"])
def test_narrower_gradients_take_the_front_of_their_rows(vocab, kind):
    """As on a GPU, where operands stay bfloat16. Each logit's gradient is rounded once more."""
    problem = linear_problem(40, vocab=vocab, width=24, dtype=BF16, ignored=0.2, balance=0.3, softcap=5.0)
    if kind == "top_k":
        problem.target = top_k((40,), vocab, k=4)
    workspace_mb = 16 * (vocab + 31) * 4 / 2**20
    with fusing(narrow=True) as (launches, _):
        actual = ours(problem, workspace_mb=workspace_mb, **RUN)
    exact = oracle(problem)
    assert actual["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-6)
    for name in ("input", "weight", "bias"):
        assert actual[name].dtype == BF16
        error = (actual[name].double() - exact[name]).norm()
        assert error <= 2 * torch.finfo(BF16).eps * exact[name].norm(), name
    assert len(launches) > 1
    for logits, out in launches:
        assert (out.dtype, out.shape) == (BF16, logits.shape)
        assert out.data_ptr() == logits.data_ptr()
        assert 2 * out.stride(0) == 4 * logits.stride(0)


def test_what_is_not_fused():
    """Dense targets, float16 gradients, a loss of one's own: two sweeps by the other primitives."""
    index = linear_problem(10, vocab=75, width=8, balance=0.3)
    dense = Problem(index.leaves, torch.softmax(randn(10, 75), -1), index.options)
    half = linear_problem(10, vocab=75, width=8, dtype=F16, balance=0.3)
    for problem, narrow in ((dense, False), (half, True)):
        with operands(narrow):
            apart = ours(problem, **RUN)
        with fusing(narrow, sweeps=True) as (launches, _):
            assert_same_bits(ours(problem, **RUN), apart)
        assert not launches
    hidden, weight = index.leaves["input"], index.leaves["weight"].clone().requires_grad_()
    with fusing(sweeps=True) as (launches, _):
        tightrope.linear_vocab_loss(hidden, weight, index.target, lambda s: -s.target_log_prob, **RUN)
    assert not launches


def test_no_backend_of_a_cpu_fuses():
    for name in ("cpu", "eager"):
        assert not backends.BACKENDS[name].fuses(4096, 128_256, 1, F32, torch.device("cpu"))
