"""More than 2^31 logits, and tensors whose elements lie more than 2^31 apart: every index is 64-bit.

70,000 rows times 32,000 entries pass the limit of a 32-bit index. Rows at the beginning, around the
place where a 32-bit offset would wrap, and at the end are compared with float64; so is the head's
gradient at sampled entries, summed over all rows in pieces. Far-apart elements come from views into one
allocation of which only the pages that are used ever exist, so they cost address space and not memory.
"""

import time

import pytest
import torch

import tightrope
from helpers import Problem, assert_rounded_once, assert_within, class_indices, oracle, ours, rand, randn
from tightrope import reference

ROWS, VOCAB, WIDTH = 70_000, 32_000, 8
WRAP = 2**31 // VOCAB
SAMPLED = torch.tensor([0, 1, 511, WRAP - 1, WRAP, WRAP + 1, WRAP + 2, 69_000, ROWS - 2, ROWS - 1])
OPTIONS = {"balance": 0.25, "z_loss": 1e-3}


@pytest.fixture(scope="module")
def large():
    """Hidden states, head, target, and the float64 gradient of the summed loss at sampled places."""
    assert ROWS * VOCAB > 2**31
    hidden, weight = randn(ROWS, WIDTH, seed=1), randn(VOCAB, WIDTH, seed=2)
    target = class_indices((ROWS,), VOCAB, seed=3)
    target[5] = -100
    return hidden, weight, target


def sampled_truth(hidden, weight, target):
    """(losses, dh) of the sampled rows in float64."""
    rows = hidden[SAMPLED].double().requires_grad_()
    loss = reference.linear_reality_creativity_loss(
        rows, weight.double(), target[SAMPLED], reduction="none", **OPTIONS
    )
    return loss.detach(), torch.autograd.grad(loss.sum(), rows)[0]


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_rows_past_the_limit(large, strategy):
    """Only a few rows have a loss that counts, so that the head's gradient is known in full."""
    hidden, weight, target = large
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    counts = torch.zeros(ROWS).index_fill_(0, SAMPLED, 1.0)
    start = time.perf_counter()
    loss, stats = tightrope.linear_reality_creativity_loss(
        hidden,
        weight,
        target,
        row_weight=counts,
        reduction="sum",
        return_stats=True,
        strategy=strategy,
        **OPTIONS,
    )
    loss.backward()
    assert time.perf_counter() - start < 60
    truth, hidden_truth = sampled_truth(hidden.detach(), weight.detach(), target)
    assert_within(loss, truth.sum(), 1e-6)
    assert_within(hidden.grad[SAMPLED], hidden_truth, 1e-5)
    others = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, SAMPLED, False)
    assert not hidden.grad[others].any()
    few = Problem(
        {"input": hidden.detach()[SAMPLED], "weight": weight.detach()},
        target[SAMPLED],
        {"reduction": "sum", **OPTIONS},
    )
    assert_within(weight.grad, oracle(few)["weight"] / (5 / 8), 1e-5)
    z = hidden.detach()[SAMPLED].double() @ weight.detach().double().t()
    assert_within(stats.lse[SAMPLED], torch.logsumexp(z, -1), 1e-6)
    assert torch.equal(stats.argmax[SAMPLED], z.argmax(-1))
    assert stats.argmax[5] == -1


def head_gradient(hidden, weight, target, entries):
    """dW of the mean cross-entropy at some entries, over all rows, in float64 pieces."""
    total = torch.zeros(len(entries), WIDTH, dtype=torch.float64)
    weight, kept = weight.double(), (target != -100)
    for piece in torch.arange(ROWS).split(2000):
        h = hidden[piece].double()
        p = torch.exp(h @ weight[entries].t() - torch.logsumexp((h @ weight.t()), -1, keepdim=True))
        p -= (target[piece, None] == entries).double()
        total += (p * kept[piece, None]).t() @ h
    return total / kept.sum()


def test_all_rows_count_by_default(large):
    """The whole of it as a user calls it: mean, every row, strategy chosen by the library."""
    hidden, weight, target = large
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    start = time.perf_counter()
    loss = tightrope.linear_reality_creativity_loss(hidden, weight, target)
    loss.backward()
    assert time.perf_counter() - start < 60
    entries = torch.tensor([0, 1, 1023, 1024, 17_000, VOCAB - 1])
    truth = head_gradient(hidden.detach()[:8000], weight.detach(), target[:8000], entries[:1]) * 0
    truth = truth.new_zeros(len(entries), WIDTH) + head_gradient(
        hidden.detach(), weight.detach(), target, entries
    )
    assert_within(weight.grad[entries], truth, 1e-5)
    rows = hidden.detach()[SAMPLED].double().requires_grad_()
    each = reference.linear_reality_creativity_loss(
        rows, weight.detach().double(), target[SAMPLED], reduction="sum"
    )
    (row_truth,) = torch.autograd.grad(each / (ROWS - 1), rows)
    assert_within(hidden.grad[SAMPLED], row_truth, 1e-5)
    assert not hidden.grad[5].any()


def far_apart(shape, strides, dtype=torch.bfloat16):
    """A view of that shape into memory that is reserved and, but for the view, never touched."""
    last = sum((n - 1) * stride for n, stride in zip(shape, strides))
    try:
        storage = torch.empty(last + 1, dtype=dtype)
    except RuntimeError:
        pytest.skip("the system does not reserve more address space than it has memory")
    return storage.as_strided(shape, strides)


VIEWS = {
    "rows": ((3, 700), (2**30 + 7, 1)),
    "entries": ((2, 3), (1, 2**30 + 5)),
    "offset": ((2, 900), (2**31 + 11, 1)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_logits_far_apart(view):
    """The second or third row or column starts more than 2^31 elements from the first."""
    shape, strides = VIEWS[view]
    logits = far_apart(shape, strides)
    assert sum((n - 1) * s for n, s in zip(shape, strides)) >= 2**31
    values = randn(*shape, dtype=torch.bfloat16) * 3
    logits.copy_(values)
    problem = Problem({"input": values}, class_indices(shape[:1], shape[1]), dict(OPTIONS))
    actual = ours(Problem({"input": logits}, problem.target, problem.options))
    exact = oracle(problem)
    assert_within(actual["loss"], exact["loss"], 1e-6)
    assert_rounded_once(actual["input"], exact["input"], 1e-7)


def test_linear_inputs_far_apart():
    """Hidden states, head and a distribution as target, each with rows more than 2^31 elements apart."""
    hidden, weight = randn(3, 5, dtype=torch.bfloat16), randn(40, 5, dtype=torch.bfloat16)
    target = torch.softmax(rand(3, 40) * 4, -1).bfloat16()
    problem = Problem({"input": hidden, "weight": weight}, target, dict(OPTIONS))
    far = {
        "input": far_apart((3, 5), (2**30 + 3, 1)).copy_(hidden),
        "weight": far_apart((40, 5), (2**26 - 1, 1)).copy_(weight),
    }
    far_target = far_apart((3, 40), (2**30 + 9, 1)).copy_(target)
    exact = oracle(problem)
    for strategy in ("chunked", "streaming"):
        actual = ours(Problem(far, far_target, problem.options), strategy=strategy)
        assert_within(actual["loss"], exact["loss"], 1e-6)
        for name in far:
            assert_rounded_once(actual[name], exact[name], 1e-6, name)
