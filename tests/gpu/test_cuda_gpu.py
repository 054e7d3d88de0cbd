"""The CUDA row kernels on a GPU: the cases of the host tests, and what only a device can show.

pytest -m gpu tests/gpu
"""

from dataclasses import replace

import pytest
import torch

import tightrope
from helpers import rand
from row_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    HOSTILE,
    KINDS,
    ROWS,
    TERMS,
    TRANSFORMS,
    Case,
    all_bits,
    check_grad,
    check_loss_grad,
    check_stats,
)
from side_cases import EXACT_SETS, SETS, check_sided_grad, check_sides, give_set, sided_bits
from tightrope import backends, reference

_CUDA = next(row for row in backends.describe() if row["backend"] == "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _CUDA["available"], reason=f"the CUDA extension is not in use: {_CUDA['detail']}"),
]
# Rows that take one block, a cluster, and more shared memory than any cluster of an A100 or RTX 50 has.
VOCABULARIES = (1, 7, 8, 9, 257, 4095, 9001, 50257, 151_936, 262_144)


class Gpu:
    """The operators on the GPU, for tensors on the CPU: alignment and aliasing are kept."""

    def __getattr__(self, name):
        def call(*args):
            storages = {}

            def there(t):
                if not isinstance(t, torch.Tensor):
                    return t
                storage = t.untyped_storage()
                key = storage.data_ptr()
                if key not in storages:
                    storages[key] = (storage, storage.cuda())
                moved = torch.empty(0, dtype=t.dtype, device="cuda")
                return moved.set_(storages[key][1], t.storage_offset(), t.size(), t.stride())

            getattr(torch.ops.tightrope, name)(*map(there, args))
            for host, device in storages.values():
                host.copy_(device)

        return call


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(dtype, kind):
    for i, vocab in enumerate(VOCABULARIES):
        transform = TRANSFORMS[i % len(TRANSFORMS)]
        case = Case(dtype, vocab, kind, seed=i, gap=i % 3, lead=i % 8, **transform)
        summary = check_stats(case, Gpu())
        check_grad(case, Gpu(), summary, in_place=i % 2 == 0, gap=1, lead=(i + i % 2) % 8)
        if kind is not None:
            case = Case(dtype, vocab, kind, seed=i, gap=i % 3, lead=i % 8, **transform)
            check_loss_grad(case, Gpu(), in_place=i % 2 == 1, **TERMS[i % len(TERMS)])


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("narrow", [BF16, F16], ids=str)
def test_gradients_narrower_than_the_logits(narrow, kind):
    """Also at the front of the logits' own rows, where those are kept: longer ones are refused."""
    for i, vocab in enumerate((1, 7, 257, 9001, 40_001)):
        case = Case(F32, vocab, kind, seed=i, gap=i % 3, lead=i % 8, **TRANSFORMS[i % len(TRANSFORMS)])
        check_grad(case, Gpu(), check_stats(case, Gpu()), False, 1, (i + i % 2) % 8, narrow)
        check_loss_grad(case, Gpu(), in_place=i % 2 == 0, narrow=narrow, **TERMS[i % len(TERMS)])
    case = Case(F32, 1_000_000, "index")
    with pytest.raises(ValueError, match="narrower than the logits"):
        check_loss_grad(case, Gpu(), in_place=True, narrow=narrow)
    check_loss_grad(case, Gpu(), in_place=False, narrow=narrow)
    summary = torch.zeros(11, ROWS)
    with pytest.raises(ValueError, match="narrower than the logits"):
        Gpu().row_grad(case.logits, case.front(narrow)[0], summary[:2], summary[:7], *case.sided_tail())


@pytest.mark.parametrize("how", HOSTILE[1:])
def test_hostile_rows(how):
    for dtype in DTYPES:
        for kind in KINDS:
            case = Case(dtype, 50_257, kind, how, seed=5, gap=1, lead=1)
            check_grad(case, Gpu(), check_stats(case, Gpu()), in_place=False)
            if kind is not None:
                check_loss_grad(case, Gpu(), in_place=True)


@pytest.mark.parametrize("kind", ["index", "top_k", "dense"])
def test_the_same_bits_every_time(kind):
    first = all_bits(Gpu(), kind, vocab=100_003)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, all_bits(Gpu(), kind, vocab=100_003)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_sides_at_every_size(dtype, kind):
    """Fails if nvcc's kernels look an entry up at another column, or on another side, than plain PyTorch."""
    for i, vocab in enumerate(VOCABULARIES):
        transform, sets = TRANSFORMS[i % len(TRANSFORMS)], SETS[i % len(SETS)]
        case = give_set(Case(dtype, vocab, kind, seed=i, gap=i % 3, lead=i % 8, **transform), sets, i)
        norm = check_sides(case, Gpu(), tiles=1 + i % 2 * 2)
        check_sided_grad(case, Gpu(), norm, in_place=i % 3 == 0, gap=1, lead=(i + i % 2) % 8)


@pytest.mark.parametrize("how", HOSTILE[1:])
def test_two_sides_of_hostile_rows(how):
    """Fails if the hardware's exponential or maximum treats -inf, NaN or large shifts unlike the host's."""
    for dtype in DTYPES:
        for i, sets in enumerate(EXACT_SETS):
            case = give_set(Case(dtype, 50_257, KINDS[i % 4], how, seed=5, gap=1, lead=1), sets)
            check_sided_grad(case, Gpu(), check_sides(case, Gpu()), how)


@pytest.mark.parametrize("sets", ["listed", "threshold"])
def test_the_same_bits_of_two_sides_every_time(sets):
    """Fails if a sum depends on who comes first."""
    first = sided_bits(Gpu(), sets, BF16, 100_003)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, sided_bits(Gpu(), sets, BF16, 100_003)))


def test_sets_that_are_not_what_the_kernels_take():
    """Fails if a wrong shape or dtype is read as if it were right."""
    case = Case(F32, 77, None)
    sides, coef = torch.zeros(6, ROWS), torch.zeros(14, ROWS)
    threshold, classes = torch.zeros(ROWS), torch.zeros(ROWS, 2, dtype=torch.int64)
    tail = case.tail(offset=())
    for which, error, match in (
        ((None, None), ValueError, "takes threshold or classes"),
        ((threshold, classes), ValueError, "exclude each other"),
        ((threshold[:2].clone(), None), ValueError, "threshold has shape"),
        ((threshold.double(), None), TypeError, "threshold is"),
        ((None, classes[:2].clone()), ValueError, "classes has shape"),
        ((None, classes.int()), TypeError, "classes is"),
    ):
        with pytest.raises(error, match=match):
            Gpu().row_sides(case.logits, sides, 0, *which, *tail)
    for norm, c, match in ((sides[:2], coef, "norm has shape"), (sides[:4], coef[:7], "coef has shape")):
        with pytest.raises(ValueError, match=match):
            Gpu().row_grad(case.logits, case.logits, norm, c, 0, threshold, None, *tail)


@pytest.mark.parametrize("support", [tightrope.MinP(0.02), "listed"], ids=["min_p", "listed"])
def test_support_by_the_public_functions(support):
    """Fails if the drivers and these kernels disagree on what a set is; the truth is plain PyTorch."""
    hidden, weight = torch.randn(33, 64).double(), torch.randn(3001, 64).double() / 4
    target, named = torch.randint(3001, (33,)), torch.randint(3001, (33, 7))
    results = []
    for device, backend in (("cuda", "cuda"), ("cpu", "eager")):
        leaves = [t.detach().to(device).requires_grad_() for t in (hidden, weight)]
        sets = tightrope.Classes(named.to(device)) if support == "listed" else support
        options = {"creativity": "support_entropy", "support": sets, "balance": 0.3}
        loss = tightrope.linear_reality_creativity_loss(
            *leaves, target.to(device), strategy="chunked", backend=backend, **options
        )
        results.append([loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, leaves))])
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_the_public_functions(strategy):
    """The preferred backend of a CUDA device is this one, or Triton where it is asked for."""
    hidden, weight = torch.randn(33, 64).double(), torch.randn(3001, 64).double() / 8
    target, balance = torch.randint(3001, (33,)), rand(33).double()
    results = []
    for device, module in (("cuda", tightrope), ("cpu", reference)):
        leaves = [t.detach().to(device).requires_grad_() for t in (hidden, weight)]
        options = {"strategy": strategy, "backend": "cuda"} if module is tightrope else {}
        loss = module.linear_reality_creativity_loss(
            *leaves, target.to(device), balance=balance.to(device), **options
        )
        results.append([loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, leaves))])
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    assert backends.resolve(None, torch.device("cuda")).name == "cuda"


@pytest.fixture
def launches(monkeypatch):
    """The fused launches of the chunked strategy: (logits, out) each."""
    made, cuda = [], backends.BACKENDS["cuda"]

    def launch(logits, out, *rest):
        made.append((logits, out))
        cuda.row_loss_grad(logits, out, *rest)

    monkeypatch.setitem(backends.BACKENDS, "cuda", replace(cuda, row_loss_grad=launch))
    return made


def step(dtype, rows, vocab, **options):
    """Loss and gradients by the chunked strategy, and the leaves and target on the CPU."""
    make = torch.Generator().manual_seed(vocab)
    hidden, weight = (torch.randn(n, 136, generator=make) for n in (rows, vocab))
    leaves = [(hidden * 2).to(dtype), (weight / 12).to(dtype), torch.randn(vocab, generator=make).to(dtype)]
    target = torch.randint(vocab, (rows,), generator=make)
    target[::7] = -100
    there = [t.cuda().requires_grad_() for t in leaves]
    options = {"strategy": "chunked", "backend": "cuda", **options}
    loss = tightrope.linear_reality_creativity_loss(*there[:2], target.cuda(), there[2], **options)
    return [loss.detach(), *torch.autograd.grad(loss, there)], leaves, target


TERM = {"balance": 0.3, "z_loss": 1e-3, "softcap": 30.0}


@pytest.mark.parametrize(("dtype", "step_size"), [(F64, 1e-10), (F32, 2e-5), (BF16, 2e-2), (F16, 3e-3)])
@pytest.mark.parametrize("vocab", [4099, 32_001])
def test_the_fused_chunked_strategy(dtype, step_size, vocab, launches):
    """Against the reference; several chunks, rows that are masked, gradients in the logits' memory."""
    options = {"skip_ignored": False, "workspace_mb": 256 * (vocab + 31) * 4 / 2**20, **TERM}
    actual, leaves, target = step(dtype, 700, vocab, **options)
    exact = [t.double().requires_grad_() for t in leaves]
    loss = reference.linear_reality_creativity_loss(*exact[:2], target, exact[2], **TERM)
    for ours, theirs in zip(actual, (loss, *torch.autograd.grad(loss, exact))):
        assert (ours.double().cpu() - theirs).norm() <= step_size * theirs.norm()
    if dtype == F16:
        assert not launches  # its scale is found from the coefficients
    elif dtype != F64 and backends.BACKENDS["cuda"].fuses(256, vocab, 1, F32, torch.device("cuda", 0)):
        assert len(launches) >= 3
        assert all(out.data_ptr() == logits.data_ptr() for logits, out in launches)


def test_the_fused_chunked_strategy_waits_for_nothing_and_repeats(launches):
    options = {"skip_ignored": False, **TERM}
    first, *_ = step(BF16, 512, 4099, **options)
    torch.cuda.synchronize()
    assert launches
    hidden, weight = (torch.randn(n, 136, device="cuda", dtype=BF16, requires_grad=True) for n in (512, 4099))
    target = torch.randint(4099, (512,), device="cuda")
    options |= {"strategy": "chunked", "backend": "cuda"}

    def run():
        loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, **options)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager))
    again, *_ = step(BF16, 512, 4099, skip_ignored=False, **TERM)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_memory_of_the_fused_chunked_strategy(launches):
    """The formula of docs/gpu.md; a row's logits are kept on every GPU that is served."""
    rows, width, vocab, workspace = 8192, 1024, 32_000, 128
    hidden = torch.randn(rows, width, device="cuda", dtype=BF16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=BF16, requires_grad=True)
    target = torch.randint(vocab, (rows,), device="cuda")
    options = {"strategy": "chunked", "backend": "cuda", "workspace_mb": workspace}

    def run():
        loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, **options)
        return torch.autograd.grad(loss, (hidden, weight))

    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results)
    assert launches
    allowed = workspace * 2**20 + 4 * vocab * width + 4 * rows * width + 200 * rows
    assert peak <= allowed * 1.02


def test_without_rows_nothing_is_launched():
    target = torch.zeros(0, dtype=torch.int64, device="cuda")
    partial, argmax = loss_grad(torch.empty(0, 77, device="cuda"), target, torch.empty(11, 0, device="cuda"))
    assert (partial.shape, argmax.shape) == ((11, 0), (0,))


def test_a_device_that_is_not_the_current_one():
    """It has its own stream, and a guard while a kernel is launched."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    logits = torch.randn(64, 50_257, device="cuda:0")
    target, upstream = torch.randint(50_257, (64,), device="cuda:0"), torch.rand(11, 64, device="cuda:0")
    there = [t.to("cuda:1") for t in (logits, target, upstream)]
    expected = loss_grad(logits, target, upstream)
    assert torch.cuda.current_device() == 0
    for a, b in zip((*loss_grad(*there), there[0]), (*expected, logits)):
        assert torch.equal(a.cpu(), b.cpu())


def loss_grad(logits, target, upstream):
    partial = torch.empty(11, logits.shape[0], device=logits.device)
    argmax = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    torch.ops.tightrope.row_loss_grad(
        logits, logits, partial, argmax, upstream, target, *(None,) * 5, 1.0, None
    )
    return partial, argmax


def test_in_a_cuda_graph_and_on_another_stream():
    logits = torch.randn(64, 50_257, device="cuda", dtype=BF16)
    target = torch.randint(50_257, (64,), device="cuda")
    upstream = torch.rand(11, 64, device="cuda")
    eager = logits.clone()
    expected = loss_grad(eager, target, upstream)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # work on the stream before: a launch elsewhere would not wait
        elsewhere = logits.clone()
        loss_grad(elsewhere, target, upstream)
    side.synchronize()
    assert torch.equal(elsewhere, eager)
    graph, buffer = torch.cuda.CUDAGraph(), logits.clone()
    with torch.cuda.graph(graph):
        captured = loss_grad(buffer, target, upstream)
    buffer.copy_(logits)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(buffer, eager)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


def test_past_two_to_the_31_elements():
    rows, vocab = 17_000, 131_072
    if torch.cuda.mem_get_info()[0] < 2 * rows * vocab + 2**30:
        pytest.skip("needs 6 GB of free GPU memory")
    logits = torch.zeros(rows, vocab, device="cuda", dtype=BF16)
    logits[-1, 5] = 3.0
    target = torch.full((rows,), 5, device="cuda")
    upstream = torch.zeros(11, rows, device="cuda")
    upstream[7] = -1.0
    _, argmax = loss_grad(logits, target, upstream)
    assert argmax[-1] == 5
    assert argmax[0] == 0
    torch.testing.assert_close(
        logits[:, 5].float().mean(), torch.tensor(-1.0, device="cuda"), rtol=0, atol=1e-2
    )
    assert (logits[-1, 6:] > 0).all()
