"""Under what training scripts wrap around a loss: autocast, loss scaling, checkpointing, tied heads.

None of these may change a value beyond the rounding that the dtypes ask for, and in none of them may
a buffer that the library keeps between calls carry a mode over to the next call.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tightrope
from helpers import (
    BACKENDS,
    STRATEGIES,
    Problem,
    assert_rounded_once,
    assert_same_bits,
    assert_within,
    class_indices,
    evaluate,
    linear_problem,
    oracle,
    ours,
    rand,
    randn,
)
from tightrope.strategies import workspace

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
backends = pytest.mark.parametrize("backend", BACKENDS)
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


@strategies
@pytest.mark.parametrize("input_dtype", [F32, BF16])
def test_autocast_changes_nothing(input_dtype, strategy):
    """Under autocast hidden states come in bfloat16 and the head in float32; arithmetic stays float32."""
    problem = linear_problem(12, vocab=1500, width=32, balance=0.3, strategy=strategy)
    problem.leaves["input"] = problem.leaves["input"].to(input_dtype)
    expected = ours(problem)
    with torch.autocast("cpu", dtype=BF16):
        inside = ours(problem)
    assert_same_bits(inside, expected)
    assert inside["loss"].dtype == F32
    logits = Problem({"input": problem.raw_logits(F32)}, problem.target, {"balance": 0.3})
    expected = ours(logits)
    with torch.autocast("cpu", dtype=BF16):
        assert_same_bits(ours(logits), expected)


@strategies
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_changes_nothing(precision, strategy):
    """Scripts ask for fast GPU products with a global setting; the logits stay float32 on a CPU."""
    problem = linear_problem(32, vocab=2000, width=64, balance=0.3, strategy=strategy)
    expected = ours(problem)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        actual = ours(problem)
    finally:
        torch.set_float32_matmul_precision(before)
    for name in expected:
        assert_within(actual[name], expected[name], 1e-6, what=name)


def test_autocast_of_a_model():
    """The usual step: forward under autocast, backward outside."""
    body, head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 500)
    x, target = randn(10, 8), class_indices((10,), 500)
    with torch.autocast("cpu", dtype=BF16):
        hidden = body(x)
        assert hidden.dtype == BF16
        loss = tightrope.linear_reality_creativity_loss(hidden, head.weight, target, head.bias)
    loss.backward()
    exact = F.cross_entropy(hidden.detach().double() @ head.weight.double().t() + head.bias, target)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert all(p.grad.dtype == F32 for p in (body.weight, head.weight, head.bias))


@strategies
def test_training_after_inference(strategy):
    """Memory that is kept between calls was first made in inference mode."""
    problem = linear_problem(6, vocab=1500, balance=0.3, strategy=strategy)
    expected = ours(problem)
    workspace.release()
    with torch.inference_mode():
        tightrope.linear_reality_creativity_loss(
            problem.leaves["input"], problem.leaves["weight"], problem.target
        )
    assert_same_bits(ours(problem), expected)


@strategies
def test_checkpointing_and_offloading(strategy):
    """Recomputing the forward pass, or moving what it saved, gives the same bits."""
    problem = linear_problem(6, vocab=1500, balance=0.3, strategy=strategy)
    expected = ours(problem)

    def recomputed(*args, **options):
        return checkpoint(tightrope.linear_reality_creativity_loss, *args, use_reentrant=False, **options)

    assert_same_bits(evaluate(recomputed, problem), expected)
    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(ours(problem), expected)


@backends
@strategies
def test_loss_scaling_keeps_small_float16_gradients(backend, strategy):
    """The upstream gradient counts before the rounding to float16, or scaling would come too late."""
    problem = linear_problem(64, vocab=3000, width=16, dtype=F16, normalizer=2.0**14)
    del problem.leaves["bias"]
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in problem.leaves.items()}
    loss = tightrope.linear_reality_creativity_loss(
        **leaves, target=problem.target, backend=backend, strategy=strategy, **problem.options
    )
    (loss * 2.0**16).backward()
    exact = oracle(problem)
    for name, leaf in leaves.items():
        truth = exact[name] / (5 / 8) * 2.0**16
        assert_rounded_once(leaf.grad, truth, 1e-5 * truth.square().mean().sqrt().item(), name)


@strategies
def test_tied_head(strategy):
    """The head is the embedding, so both gradients go to one tensor."""
    tokens, target = class_indices((12,), 1100, seed=1), class_indices((12,), 1100, seed=2)
    table = randn(1100, 8, dtype=F64)
    gradients = []
    for loss_of in (
        lambda h, w: tightrope.linear_reality_creativity_loss(h, w, target, strategy=strategy),
        lambda h, w: F.cross_entropy(h @ w.t(), target),
    ):
        weight = table.clone().requires_grad_()
        loss_of(torch.tanh(F.embedding(tokens, weight)), weight).backward()
        gradients.append(weight.grad)
    assert_within(*gradients, 1e-12)


@pytest.mark.parametrize("default", [F64, BF16])
def test_default_dtype_changes_nothing(default):
    problem = linear_problem(6, vocab=200, label_smoothing=0.1, reality="squared_error", normalizer=3)
    problem.leaves["balance"] = rand(6)
    expected = ours(problem)
    torch.set_default_dtype(default)
    actual = ours(problem)
    assert actual["loss"].dtype == F32
    assert_same_bits(actual, expected)


@backends
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, BF16])
def test_row_weight_of_any_dtype(dtype, backend):
    """A loss mask is often boolean."""
    problem = linear_problem(6, vocab=200, ignored=0.3)
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    expected = ours(problem, row_weight=mask.float(), backend=backend)
    assert_same_bits(ours(problem, row_weight=mask.to(dtype), backend=backend), expected)


@strategies
def test_deterministic_mode_and_anomaly_detection(strategy):
    problem = linear_problem(6, vocab=1500, ignored=0.3, balance=0.3, strategy=strategy)
    expected = ours(problem)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            assert_same_bits(ours(problem), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_tensors_without_data():
    """On the meta device only shapes and dtypes are worked out, as tools that plan memory do."""
    hidden, weight = (randn(*shape, dtype=BF16).to("meta").requires_grad_() for shape in ((2, 3, 4), (50, 4)))
    target = class_indices((2, 3), 50).to("meta")
    for options, shape in (({}, ()), ({"reduction": "none"}, (2, 3))):
        loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, **options)
        assert loss.shape == shape
        assert loss.dtype == F32
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert [g.shape for g in grads] == [hidden.shape, weight.shape]
        assert all(g.dtype == BF16 for g in grads)
