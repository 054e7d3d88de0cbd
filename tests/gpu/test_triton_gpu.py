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
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAN_RUN, reason=REASON)]
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
    """Loss and the gradients of hidden, weight and, where it is not None, bias."""
    loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, bias, backend="triton", **options)
    return loss.detach(), *torch.autograd.grad(loss, [t for t in (hidden, weight, bias) if t is not None])


def reserve(gigabytes):
    """Skip where the GPU has less memory free."""
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


# Everything on, with a bias; and the kernels' shortest form, without one.
TERMS = [
    {"balance": 0.3, "softcap": 30.0, "z_loss": 1e-3, "label_smoothing": 0.1, "logit_l2": 1e-5},
    {"balance": 0.6, "reality": "squared_error", "creativity": "collision"},
]
# Rows that are loaded in whole vectors, and others.
SIZES = [(1, 64, 1000), (1, 1, 1), (129, 136, 4099), (515, 1021, 32001), (300, 1024, 32000)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["index", "dense", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", TERMS, ids=["all", "short"])
@pytest.mark.parametrize(("n", "d", "v"), SIZES)
def test_against_the_reference(n, d, v, options, dtype, kind, strategy):
    hidden, weight, bias, target = tensors(n, d, v, dtype, kind)
    if "softcap" not in options:
        bias = None
    actual = run(hidden, weight, bias, target, strategy=strategy, **options)
    plain = tuple(t.cpu() for t in target) if kind == "topk" else target.cpu()

    def truth(precision):
        leaves = [
            None if t is None else t.detach().to("cpu", precision).requires_grad_()
            for t in (hidden, weight, bias)
        ]
        loss = reference.linear_reality_creativity_loss(leaves[0], leaves[1], plain, leaves[2], **options)
        return loss.detach(), *torch.autograd.grad(loss, [t for t in leaves if t is not None])

    exact, rough = truth(torch.float64), truth(torch.float32)
    assert len(actual) == len(exact)
    step = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for got, want, usual, rtol in zip(actual, exact, rough, (2e-5, step, step, step)):
        # Peaked rows cancel: there plain float32 PyTorch is the yardstick.
        allowed = rtol * want.norm() + 4 * (usual.double() - want).norm() + 1e-6
        assert (got.double().cpu() - want).norm() <= allowed


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", TERMS, ids=["all", "short"])
@pytest.mark.parametrize(("n", "d", "v"), SIZES)
def test_a_hessian_vector_product(n, d, v, options, strategy):
    """Another row's scalars, or a launch that is cut wrongly at real sizes."""
    hidden, weight, bias, target = tensors(n, d, v, torch.float32)
    make = torch.Generator("cuda").manual_seed(1)
    directions = [torch.randn(t.shape, device="cuda", generator=make) for t in (hidden, weight, bias)]

    def product(function, dtype, device, **given):
        values = [t.detach().to(device, dtype).requires_grad_() for t in (hidden, weight, bias)]
        loss = function(*values[:2], target.to(device), values[2], **options, **given)
        gradients = torch.autograd.grad(loss, values, create_graph=True)
        return torch.autograd.grad(gradients, values, [x.to(device, dtype) for x in directions])

    given = {"strategy": strategy, "backend": "triton"}
    actual = product(tightrope.linear_reality_creativity_loss, torch.float32, "cuda", **given)
    dense = reference.linear_reality_creativity_loss
    exact, rough = (product(dense, dtype, "cpu") for dtype in (torch.float64, torch.float32))
    for one, true, usual in zip(actual, exact, rough):
        error, known = ((x.cpu().double() - true).norm() for x in (one, usual))
        assert error <= 2e-5 * true.norm() + 4 * known + 1e-6


def test_float32_logits_are_as_exact_as_ieee_products():
    """tf32x3 on NVIDIA: entries of one sign, where truncated sums would drift."""
    hidden, weight, _, target = tensors(256, 4096, 4096, torch.float32)
    hidden, weight = hidden.detach() / 10 + 2, weight.detach() / 10 + 2
    exact = hidden.double() @ weight.double().t()
    usual = (torch.mm(hidden, weight.t()) - exact).abs().max()
    stats = tightrope.linear_vocab_stats(hidden, weight, target, backend="triton", logit_scale=1.0)
    error = (stats.target_logit - exact.gather(1, target[:, None]).squeeze(1)).abs().max()
    assert error <= 4 * usual + 2.0**-22 * exact.abs().max()


def test_the_first_nan_of_a_row_is_its_argmax():
    hidden, weight, bias, _ = tensors(130, 64, 9001, torch.bfloat16)
    for odd in ({7: 1e4, 40: float("nan"), 8000: float("nan")}, {40: float("inf"), 41: float("nan")}):
        with torch.no_grad():
            for column, value in odd.items():
                bias[column] = value
        logits = hidden.detach().float() @ weight.detach().float().t() + bias.detach().float()
        for stats in (
            tightrope.linear_vocab_stats(hidden, weight, bias=bias, backend="triton"),
            tightrope.linear_vocab_stats(
                hidden.double(), weight.double(), bias=bias.double(), backend="triton"
            ),
        ):
            assert torch.equal(stats.argmax, logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 250])
def test_autotuning_changes_no_bit(monkeypatch, width, dtype):
    given = tensors(300, width, 5003, dtype)
    plain = run(*given, strategy="streaming", balance=0.3)
    monkeypatch.setenv("TIGHTROPE_AUTOTUNE", "1")
    for _ in range(2):
        tuned = run(*given, strategy="streaming", balance=0.3)
        assert all(torch.equal(a, b) for a, b in zip(plain, tuned))


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("kind", ["min_p", "classes"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_a_set_of_classes_and_its_gradients(dtype, rtol, kind, softcap):
    """Fails if compiled kernels differ from plain PyTorch in which entries are in a set, or in a side."""
    hidden, weight, bias, target = tensors(129, 136, 9001, dtype)
    make = torch.Generator("cuda").manual_seed(1)
    indices = torch.randint(9001, (129, 40), device="cuda", generator=make)
    indices[5] = -100
    support = tightrope.MinP(0.05) if kind == "min_p" else tightrope.Classes(indices)

    def run(leaves, backend):
        stats = tightrope.linear_vocab_stats(
            leaves[0], leaves[1], target, leaves[2], softcap=softcap, support=support, backend=backend
        )
        parts = (stats.support_log_mass, stats.rest_log_mass, stats.support_entropy)
        total = sum((i + 1) * part[part.isfinite()].sum() for i, part in enumerate(parts))
        return *parts, *torch.autograd.grad(total + stats.entropy.sum(), leaves)

    actual = run((hidden, weight, bias), "triton")
    exact = run([t.detach().double().requires_grad_() for t in (hidden, weight, bias)], "eager")
    for i, (got, want) in enumerate(zip(actual, exact)):
        kept = want.isfinite()
        assert torch.equal(got[~kept].double(), want[~kept])
        step = 2e-5 if i < 3 else rtol
        assert (got.double() - want)[kept].norm() <= step * want[kept].norm() + 1e-5


@pytest.mark.parametrize("kind", ["index", "topk"])
def test_the_largest_logit_is_in_its_set(kind):
    """Fails if kernels round a softcap unlike each other, so that a row's maximum is not its threshold."""
    hidden, weight, bias, target = tensors(512, 136, 9001, torch.float32, kind)
    stats = tightrope.linear_vocab_stats(
        hidden, weight, target, bias, softcap=30.0, support=tightrope.MinP(1.0), backend="triton"
    )
    assert torch.isfinite(stats.support_log_mass).all()


def test_kernels_run_on_the_device_of_their_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    given = tensors(65, 64, 3001, torch.bfloat16)
    there = [t.detach().to("cuda:1").requires_grad_(t.is_floating_point()) for t in given]
    for strategy in STRATEGIES:
        here, far = (run(*t, strategy=strategy, balance=0.3) for t in (given, there))
        for a, b in zip(here, far):
            torch.testing.assert_close(a, b.to(a.device), rtol=2e-2, atol=1e-4)


def test_a_head_past_two_to_the_31_elements():
    reserve(12)
    vocab, width = 270_000, 8192
    weight = torch.zeros(vocab, width, device="cuda", dtype=torch.bfloat16)
    weight[-1, -1] = 3.0
    hidden = torch.ones(16, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.full((16,), vocab - 1, device="cuda")
    stats = tightrope.linear_vocab_stats(hidden, weight, target, backend="triton")
    assert (stats.argmax == vocab - 1).all()
    assert (stats.target_logit == 3.0).all()
    (grad,) = torch.autograd.grad(stats.target_logit.sum(), hidden)
    assert (grad[:, -1] == 3.0).all()
    assert not grad[:, :-1].any()


def test_logits_past_two_to_the_31_elements():
    reserve(14)
    rows, vocab = 17_000, 131_072
    logits = torch.zeros(rows, vocab, device="cuda", dtype=torch.bfloat16)
    logits[-1, 5] = 3.0
    logits.requires_grad_()
    target = torch.full((rows,), 5, device="cuda")
    loss = tightrope.reality_creativity_loss(logits, target, reduction="none", backend="triton")
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    expected = torch.logsumexp(logits[-1].detach().double(), 0) - 3.0
    assert (loss[-1] - expected).abs() < 1e-5
    assert grad[:, 5].max() < -0.9
    assert grad[-1, 6:].min() > 0


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
    side.wait_stream(torch.cuda.current_stream())
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
    reserve(8)
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
    """For the figure: run with -s, or read it in a JUnit report."""
    reserve(16)
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
