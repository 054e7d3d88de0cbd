"""The Triton backend on a real GPU: correctness at real sizes, graphs, determinism, memory and speed.

Written without one at hand. Skipped where there is none.
"""

import os
import time

import pytest
import torch

import tightrope
from tightrope import reference

REASON = "needs a CUDA device and Triton, without TRITON_INTERPRET"
CAN_RUN = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason=REASON
    ),
]
STRATEGIES = ("chunked", "streaming")
MIB = 2**20


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton", reason=REASON)


def tensors(n, d, v, dtype, kind="index", seed=0):
    """Peaked and flat rows: logits of a standard deviation of 2, and of 20 in every eighth row."""
    make = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(n, d, device="cuda", generator=make)
    hidden[::8] *= 10
    weight = torch.randn(v, d, device="cuda", generator=make) * 2 / d**0.5
    bias = torch.randn(v, device="cuda", generator=make)
    target = torch.randint(v, (n,), device="cuda", generator=make)
    if kind == "dense":
        target = torch.softmax(torch.randn(n, v, device="cuda", generator=make), -1)
    elif kind == "topk":
        probs = torch.rand(n, 16, device="cuda", generator=make)
        indices = torch.randint(v, (n, 16), device="cuda", generator=make)
        target = tightrope.TopKTarget(indices, probs / probs.sum(-1, keepdim=True))
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    return *leaves, target


def run(hidden, weight, bias, target, **options):
    loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, bias, backend="triton", **options)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["index", "dense", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d", "v"), [(1, 64, 1000), (129, 136, 4099), (515, 1021, 32001)])
def test_against_the_reference(n, d, v, dtype, kind, strategy):
    given = tensors(n, d, v, dtype, kind)
    options = {"balance": 0.3, "softcap": 30.0, "z_loss": 1e-3, "label_smoothing": 0.1}
    actual = run(*given, strategy=strategy, **options)
    hidden, weight, bias, target = given
    exact = [t.detach().double().cpu().requires_grad_() for t in (hidden, weight, bias)]
    plain = tuple(t.cpu() for t in target) if kind == "topk" else target.cpu()
    loss = reference.linear_reality_creativity_loss(exact[0], exact[1], plain, exact[2], **options)
    expected = (loss.detach(), *torch.autograd.grad(loss, exact))
    step = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for got, want, rtol in zip(actual, expected, (2e-5, step, step, step)):
        assert (got.double().cpu() - want).norm() <= rtol * want.norm()


@pytest.mark.parametrize("dtype", [torch.float64])
def test_float64(dtype):
    streaming, chunked = (run(*tensors(65, 48, 3001, dtype), strategy=s, balance=0.3) for s in STRATEGIES)
    for a, b in zip(streaming, chunked):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_runs_repeat_bit_for_bit(strategy):
    given = tensors(2048, 1024, 50257, torch.bfloat16)
    first, second = (run(*given, strategy=strategy, balance=0.2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_token_does_not_depend_on_its_batch():
    hidden, weight, bias, target = tensors(1000, 512, 50257, torch.bfloat16)
    options = {"balance": 0.2, "reduction": "none", "backend": "triton"}
    with torch.no_grad():
        whole = tightrope.linear_reality_creativity_loss(hidden, weight, target, bias, **options)
        for part in (slice(7, 8), slice(100, 357), slice(999, 1000)):
            alone = tightrope.linear_reality_creativity_loss(
                hidden[part], weight, target[part], bias, **options
            )
            assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_graph_replays_with_new_values(strategy):
    hidden, weight, bias, target = tensors(256, 128, 5003, torch.bfloat16)
    balance = torch.full((), 0.1, device="cuda")
    target[::5] = -100
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles
        run(hidden, weight, bias, target, balance=balance, strategy=strategy, skip_ignored=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(hidden, weight, bias, target, balance=balance, strategy=strategy)
    for value in (0.1, 0.8):
        balance.fill_(value)
        graph.replay()
        eager = run(hidden, weight, bias, target, balance=balance, strategy=strategy, skip_ignored=False)
        assert all(torch.equal(a, b) for a, b in zip(captured, eager))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_waits_for_the_device(strategy):
    given = tensors(256, 128, 5003, torch.bfloat16)
    run(*given, strategy=strategy, skip_ignored=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*given, strategy=strategy, balance=0.5, skip_ignored=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_is_below_the_formula(strategy):
    """The formulas of docs/gpu.md."""
    n, d, v, workspace = 4096, 2048, 128256, 256
    given = tensors(n, d, v, torch.bfloat16)
    run(*given, strategy=strategy, workspace_mb=workspace)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run(*given, strategy=strategy, workspace_mb=workspace)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results)
    tile = min(workspace * MIB // (2 * n), 16384)
    allowed = workspace * MIB + 4 * n * d + 200 * n + 4 * v
    allowed += 4 * tile * d + 64 * MIB if strategy == "streaming" else 4 * v * d
    assert peak <= allowed * 1.02, f"{peak / MIB:.0f} MiB, allowed {allowed / MIB:.0f}"


def milliseconds(function, repeats=5):
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_speed_beside_three_bare_gemms(strategy, record_property):
    """A wide bound: it is to catch a path that fell off the tensor cores, and to print the figure."""
    n, d, v = 4096, 4096, 128256
    hidden, weight, bias, target = tensors(n, d, v, torch.bfloat16)
    h, w = hidden.detach(), weight.detach()

    def gemms():
        logits = torch.mm(h, w.t())
        torch.mm(logits, w)
        torch.mm(logits.t(), h)

    bare = milliseconds(gemms)
    ours = milliseconds(lambda: run(hidden, weight, bias, target, strategy=strategy, balance=0.1))
    record_property("times_three_gemms", ours / bare)
    print(f"{strategy}: {ours:.1f} ms, three GEMMs {bare:.1f} ms, {ours / bare:.2f} times")
    assert ours < 4 * bare
