"""Sampled gradients on a GPU: noise, bits, no wait, and a captured graph.

Written without a GPU at hand. Skipped where there is none.
"""

import pytest
import torch

import tightrope
from helpers import Problem
from sampled_cases import NOISE, problem, relative, run, statistics_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROWS, VOCAB = 512, 20011
DTYPES = [torch.float32, torch.bfloat16]


def given(dtype, **options):
    """Of several tiles, the last narrower, and several chunks."""
    options = {"workspace_mb": 200 * VOCAB * 4 / 2**20, "skip_ignored": False, **options}
    made = problem(rows=ROWS, vocab=VOCAB, dtype=dtype, spread=5.0, **options)
    leaves = {name: leaf.cuda() for name, leaf in made.leaves.items()}
    return Problem(leaves, made.target.cuda(), made.options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise(dtype):
    """Fails if a kernel reads another column than was drawn, or a promise does not hold."""
    made = given(dtype)
    exact = run(made)
    stats = statistics_of(made, gradient_noise=NOISE)
    assert 0 < stats.sampled_share < 0.5
    draws = 20
    for i, name in enumerate(("input", "weight")):
        mean, square = torch.zeros_like(exact[name], dtype=torch.float64), 0.0
        for _ in range(draws):
            noisy = run(made, gradient_noise=NOISE)[name].double()
            mean += noisy / draws
            square += relative(noisy, exact[name].double()) ** 2 / draws
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
        assert square**0.5 <= NOISE + rounding
        assert square**0.5 >= 0.8 * stats.sampled_noise[i].item() - rounding
        assert relative(mean, exact[name].double()) <= 2 * NOISE / draws**0.5 + rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_and_full(dtype):
    """Fails if an order of sums changes from run to run, or a column is left out where all are taken."""
    made = given(dtype)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(run(made, gradient_noise=NOISE))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    exact, full = run(made), run(made, gradient_noise=1e-6)
    assert statistics_of(made, gradient_noise=1e-6).sampled_share == 1
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    for name in ("input", "weight"):
        assert relative(full[name].double(), exact[name].double()) <= rounding


def test_nothing_waits():
    """Fails if the host waits for the device in a step."""
    made = given(torch.bfloat16)
    run(made, gradient_noise=NOISE)  # compiles
    leaves = [leaf.clone().requires_grad_() for leaf in made.leaves.values()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        options = {**made.options, "gradient_noise": NOISE}
        tightrope.linear_reality_creativity_loss(*leaves, made.target, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_draws_anew():
    """Fails if a step cannot be captured, or every replay has the draw of the capture."""
    made = given(torch.bfloat16)
    exact = run(made)["weight"]
    leaves = [leaf.clone().requires_grad_() for leaf in made.leaves.values()]
    options = {**made.options, "gradient_noise": NOISE}

    def step():
        loss = tightrope.linear_reality_creativity_loss(*leaves, made.target, **options)
        return torch.autograd.grad(loss, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step()
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(grads[1].clone())
    assert not torch.equal(*seen)
    for grad in seen:
        assert relative((5 / 8 * grad).float(), exact.float()) <= 2 * NOISE


def test_float16_is_exact():
    """Fails if float16, in which a column over its chance may overflow, is sampled."""
    made = given(torch.float16)
    exact, other = run(made), run(made, gradient_noise=NOISE)
    assert all(torch.equal(exact[name], other[name]) for name in exact)
