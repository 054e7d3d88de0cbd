"""Whole training steps on a GPU: in a CUDA graph, compiled, on another stream; and what they launch.

Written without a GPU at hand. Skipped where there is none.
"""

import pytest
import torch
from torch import nn

import tightrope
from tightrope import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROWS, WIDTH, VOCAB = 512, 128, 5003
BF16 = torch.bfloat16
STRATEGIES = ("chunked", "streaming")


class Model(nn.Module):
    def __init__(self, strategy):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, WIDTH, device="cuda", dtype=BF16)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False, device="cuda", dtype=BF16)
        self.options = {"strategy": strategy, "skip_ignored": False}

    def forward(self, x, target, balance):
        hidden = torch.tanh(self.body(x))
        return tightrope.linear_reality_creativity_loss(
            hidden, self.head.weight, target, balance=balance, **self.options
        )


def batch(seed):
    make = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(ROWS, WIDTH, device="cuda", dtype=BF16, generator=make)
    target = torch.randint(VOCAB, (ROWS,), device="cuda", generator=make)
    target[::5] = -100
    return x, target, torch.full((), 0.1 * seed, device="cuda")


def trained(strategy, seeds):
    """Losses and parameters of eager steps."""
    model = Model(strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for seed in seeds:
        optimizer.zero_grad(set_to_none=True)
        loss = model(*batch(seed))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_whole_training_step_in_a_graph(strategy):
    """Fails if forward, backward or what they keep cannot be captured, or a replay reads stale memory."""
    model = Model(strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    given = batch(1)
    start = [p.detach().clone() for p in model.parameters()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and makes the libraries' workspaces
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            model(*given).backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = model(*given)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for p, value in zip(model.parameters(), start):
            p.copy_(value)
    losses = []
    for seed in (1, 2, 3):
        for memory, value in zip(given, batch(seed)):
            memory.copy_(value)
        graph.replay()
        losses.append(loss.detach().clone())
    expected, parameters = trained(strategy, (1, 2, 3))
    for ours, eager in zip((*losses, *model.parameters()), (*expected, *parameters)):
        torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of the compiler
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_with_reduced_overhead(strategy):
    """Fails if the operators break the compiler's CUDA graphs, or a schedule of the balance compiles anew."""
    torch._dynamo.reset()
    model = Model(strategy)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seeds, losses = (1, 2, 3, 4, 5), []
    for seed in seeds:
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=True)
        with torch._dynamo.config.patch(error_on_recompile=seed > 1):
            loss = compiled(*batch(seed))
            loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    expected, parameters = trained(strategy, seeds)
    for ours, eager in zip((*losses, *model.parameters()), (*expected, *parameters)):
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_a_stream_that_is_not_the_current_one(strategy):
    """Fails if a kernel, or memory that a call lends, goes to the default stream and does not wait."""
    given = batch(2)

    def run(wait):
        model = Model(strategy)
        x = given[0].clone()
        if wait:
            torch.cuda._sleep(50_000_000)  # a launch elsewhere would see the zeros
            x.zero_()
            torch.cuda._sleep(50_000_000)
            x.copy_(given[0])
        loss = model(x, *given[1:])
        loss.backward()
        return loss.detach(), *(p.grad for p in model.parameters())

    expected = run(False)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        actual = run(True)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_waits_for_nothing(strategy):
    """Fails if forward, backward or an upstream gradient that is not 1 reads a value from the device."""
    model, given = Model(strategy), batch(2)
    model(*given).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (model(*given) * 0.37).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ignored_rows_wait_once_in_the_forward_pass():
    """Fails if rows that are gathered out cost the chunked strategy more than the one wait of the docs."""
    model, given = Model("chunked"), batch(2)
    model.options["skip_ignored"] = None
    loss = model(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(step):
    """How many kernels a step launches."""
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def test_a_fused_chunk_launches_few_kernels():
    """Fails if what is a number a row is worked on once a chunk; the products may be two kernels each."""
    if not backends.BACKENDS["cuda"].available:
        pytest.skip("the CUDA extension is not in use")
    hidden = torch.randn(4096, WIDTH, device="cuda", dtype=BF16, requires_grad=True)
    weight = torch.randn(32_000, WIDTH, device="cuda", dtype=BF16, requires_grad=True)
    target = torch.randint(32_000, (4096,), device="cuda")

    def step(chunks):
        def run():
            loss = tightrope.linear_reality_creativity_loss(
                hidden, weight, target, strategy="chunked", workspace_mb=4096 / chunks * 32_000 * 4 / 2**20
            )
            torch.autograd.grad(loss, (hidden, weight))

        return run

    assert (kernels_of(step(8)) - kernels_of(step(2))) / 6 <= 20


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_scaled_gradient_is_rounded_once(retain_graph):
    """Fails if the product that is rounded as it is written has other bits than one that is rounded after."""
    hidden = torch.randn(ROWS, WIDTH, device="cuda", dtype=BF16, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, device="cuda", dtype=BF16, requires_grad=True)
    target, factor = batch(1)[1], torch.tensor(0.37, device="cuda")

    def grads(scale, **options):
        loss = tightrope.linear_reality_creativity_loss(
            hidden, weight, target, strategy="chunked", reduction="sum"
        )
        return torch.autograd.grad(loss * scale if scale is not None else loss, (hidden, weight), **options)

    for double, single in zip(grads(2 * torch.ones_like(factor), retain_graph=retain_graph), grads(None)):
        # A power of two changes no bit of the mantissa.
        assert torch.equal(double, 2 * single)
    for ours, whole in zip(grads(factor, retain_graph=retain_graph), grads(None)):
        torch.testing.assert_close(ours.float(), 0.37 * whole.float(), rtol=2**-7, atol=0)
