"""The CUDA row kernels on a GPU: the cases of the host tests, and what only a device can show.

pytest -m gpu tests/gpu
"""

import pytest
import torch

import tightrope
from helpers import rand
from row_cases import (
    BF16,
    DTYPES,
    HOSTILE,
    KINDS,
    TERMS,
    TRANSFORMS,
    Case,
    all_bits,
    check_grad,
    check_loss_grad,
    check_stats,
)
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


def loss_grad(logits, target, upstream):
    partial = torch.empty(11, logits.shape[0], device="cuda")
    argmax = torch.empty(logits.shape[0], dtype=torch.int64, device="cuda")
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
