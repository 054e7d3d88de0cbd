"""More than 2^31 logits, and tensors whose elements lie more than 2^31 apart: every index is 64-bit.

70,000 rows times 32,000 entries pass the limit of a 32-bit index. They are 500 rows, 140 times over, so
that the float64 reference of the 500 tells the loss, the gradient of every row and that of the head; a
position that wraps lands in the middle of other rows, since 2^31 is no multiple of theirs. Far-apart
elements come from views into one allocation of which only the pages that are used ever exist, so they
cost address space and not memory.
"""

import time

import pytest
import torch

from helpers import (
    Problem,
    assert_rounded_once,
    assert_within,
    class_indices,
    deviation,
    linear_problem,
    oracle,
    ours,
    rand,
    randn,
)

pytestmark = pytest.mark.one_in(2)

ROWS, VOCAB, WIDTH, COPIES = 70_000, 32_000, 8, 140
OPTIONS = {"balance": 0.25, "z_loss": 1e-3}


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_more_logits_than_32_bits_count(strategy):
    few = linear_problem(ROWS // COPIES, vocab=VOCAB, width=WIDTH, bias=False, spread=1.0, **OPTIONS)
    few.target[[5, 77]] = -100
    assert (ROWS - 2 * COPIES) * VOCAB > 2**31
    many = Problem(
        {**few.leaves, "input": few.leaves["input"].repeat(COPIES, 1)}, few.target.repeat(COPIES), few.options
    )
    exact = oracle(few)
    exact["input"] = exact["input"].repeat(COPIES, 1) / COPIES
    start = time.process_time()  # of all threads; unlike the clock on the wall, no other process counts
    actual = ours(many, strategy=strategy)
    assert time.process_time() - start < 120
    assert_within(actual["loss"], exact["loss"], 1e-6)
    assert_within(actual["input"], exact["input"], 1e-5, what="input")
    # The sums of equal copies round alike, so their errors add up instead of cancelling.
    assert_within(actual["weight"], exact["weight"], 1e-4, what="weight")
    # Norm-wise alone, a few wrong rows in 70,000 would hardly show.
    scales = {"input": exact["input"].norm(dim=-1), "weight": exact["weight"].norm() / VOCAB**0.5}
    for name, scale in scales.items():
        errors = deviation(actual[name], exact[name]).norm(dim=-1)
        assert (errors <= 1e-3 * scale).all(), name


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
