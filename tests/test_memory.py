"""Nothing ever holds the N x V logits: the peak memory of a fresh process, read from the kernel.

A child process runs a small step first, so that libraries, threads and cached workspaces are there,
then resets its high-water mark, runs the step, and prints how far the mark rose. Gradients that the
caller gets are counted in. The sizes are chosen so that the logits would be many times the limit.
"""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import BACKENDS, child_environment
from tightrope.strategies import gemm

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
pytestmark = [
    pytest.mark.one_in(4),
    pytest.mark.skipif(not RESET.exists(), reason="needs Linux's /proc to read peak memory"),
]


def high_water() -> int:
    """Peak resident memory of this process in bytes."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def growth_in_child(code: str, **environment: str) -> float:
    """MiB by which ``step()``, defined by ``code`` as a function of the rows, raised the peak."""
    script = f"""
import gc, torch, tightrope, test_memory
from pathlib import Path
torch.set_num_threads(2)
{code}
step(8)
gc.collect()
test_memory.RESET.write_text("5")
before = test_memory.high_water()
step(ROWS)
print((test_memory.high_water() - before) / 2**20)
"""
    return number_from_child(script, **environment)


def number_from_child(script: str, **environment: str) -> float:
    """The last thing that a process of its own prints."""
    environment = child_environment(MALLOC_ARENA_MAX="1", OMP_NUM_THREADS="2", **environment)
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


LINEAR = """
ROWS, V, D = {rows}, 50257, 16
weight = torch.randn(V, D).requires_grad_()
bias = torch.zeros(V).requires_grad_()
def step(rows):
    hidden = torch.randn(rows, D).requires_grad_()
    target = torch.randint(V, (rows,))
    {body}
"""
LOSS = """loss = tightrope.linear_reality_creativity_loss(
        hidden, weight, target, bias, balance=0.3, reality="squared_error",
        workspace_mb=16, {options})
    loss.sum().backward()"""


def logits_mib(rows):
    return rows * 50257 * 4 / 2**20


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("strategy", "reduction"), [("chunked", "mean"), ("streaming", "mean"), ("streaming", "none")]
)
def test_training_step(strategy, reduction, backend):
    """823 MB of logits (a third of that for the slower backend) are never there."""
    rows = 4096 if backend == "cpu" else 1536
    options = f"strategy={strategy!r}, backend={backend!r}, reduction={reduction!r}"
    growth = growth_in_child(LINEAR.format(rows=rows, body=LOSS.format(options=options)))
    assert growth < 80 < logits_mib(rows) / 3, f"grew by {growth:.0f} MiB"


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_sets_of_classes(strategy):
    """A mask of the logits' shape, or a second copy of them: min-p's sets, then listed ones."""
    body = LOSS.format(options=f"creativity='support_entropy', strategy={strategy!r}, support=support")
    lists = (
        "for support in (tightrope.MinP(0.02), tightrope.Classes(torch.randint(V, (rows, 16)))):\n        {}"
    )
    growth = growth_in_child(LINEAR.format(rows=2048, body=lists.format(body.replace("\n", "\n    "))))
    assert growth < 80 < logits_mib(2048) / 4, f"grew by {growth:.0f} MiB"


TEACHER = """
ROWS, V, D, OWN = 1024, 50257, 16, 32
weight = torch.randn(V, D).requires_grad_()
head, teacher = torch.randn(V, OWN), torch.randn(ROWS, OWN)
def step(rows):
    hidden = torch.randn(rows, D).requires_grad_()
    target = {target}
    tightrope.linear_reality_creativity_loss(hidden, weight, target, workspace_mb=16, {options}).backward()
"""


@pytest.mark.parametrize("options", ["strategy='chunked'", "strategy='streaming'", "reality='reverse_kl'"])
def test_a_teacher(options):
    """Would catch a teacher's distribution that is whole in memory, or its head converted whole.

    A third of the dense target alone, without what its softmax took.
    """
    target = "tightrope.TeacherTarget(teacher[:rows].bfloat16(), head.bfloat16())"
    growth = growth_in_child(TEACHER.format(target=target, options=options))
    assert growth < logits_mib(1024) / 3, f"grew by {growth:.0f} MiB"


@pytest.mark.parametrize(
    "body",
    [
        "with torch.no_grad(): tightrope.linear_vocab_stats(hidden, weight, target, workspace_mb=16)",
        "tightrope.linear_vocab_loss(hidden, weight, target, lambda s: s.entropy * s.lse, workspace_mb=16)"
        ".backward()",
        "tightrope.linear_vocab_stats(hidden, weight, workspace_mb=16).entropy.sum().backward()",
    ],
    ids=["evaluation", "own_loss", "statistics"],
)
def test_other_functions(body):
    growth = growth_in_child(LINEAR.format(rows=2048, body=body))
    assert growth < 80 < logits_mib(2048) / 4, f"grew by {growth:.0f} MiB"


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_a_hessian_vector_product(strategy):
    """A graph that keeps logits or their direction, and a product that makes them whole."""
    body = f"""loss = tightrope.linear_reality_creativity_loss(
        hidden, weight, target, bias, balance=0.3, creativity="collision", workspace_mb=16,
        strategy="{strategy}")
    leaves = hidden, weight, bias
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    torch.autograd.grad(gradients, leaves, [torch.ones_like(g) for g in gradients])"""
    growth = growth_in_child(LINEAR.format(rows=2048, body=body))
    assert growth < 80 < logits_mib(2048) / 4, f"grew by {growth:.0f} MiB"


def test_sampled_gradients():
    """Columns that are gathered whole, or parts of low rank that all chunks wait with."""
    body = """loss, stats = tightrope.linear_reality_creativity_loss(
        hidden, weight, target, bias, workspace_mb=16, gradient_noise=0.05, return_stats=True)
    loss.backward()
    assert rows < 1000 or stats.sampled_share < 0.5"""
    growth = growth_in_child(LINEAR.format(rows=4096, body=body))
    assert growth < 80 < logits_mib(4096) / 3, f"grew by {growth:.0f} MiB"


@pytest.mark.parametrize("training", [False, True])
def test_logits_function(training):
    """The gradient of the logits is all that is made, and evaluation makes nothing of that size."""
    code = f"""
ROWS, V = 1024, 50257
logits = torch.randn(ROWS, V)
def step(rows):
    leaf, target = logits[:rows].requires_grad_({training}), torch.randint(V, (rows,))
    loss = tightrope.reality_creativity_loss(leaf, target, balance=0.3)
    return torch.autograd.grad(loss, leaf) if {training} else None
"""
    growth = growth_in_child(code)
    limit = logits_mib(1024) * (1.1 if training else 0) + 20
    assert growth < limit, f"grew by {growth:.0f} MiB, limit {limit:.0f}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_memory_does_not_grow_with_rows(dtype):
    """Four times the rows: four times the gradient of the hidden states, and nothing else."""
    body = LOSS.format(options="")
    growths = []
    for rows in (1024, 4096):
        code = LINEAR.format(rows=rows, body=body).replace("D).requires", f"D, dtype={dtype}).requires")
        growths.append(growth_in_child(code))
    assert growths[1] < growths[0] + 12, f"grew by {growths} MiB"


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_few_rows_under_a_wide_head(dtype, strategy):
    """Tiles are wide with few rows; what is made for a tile besides its logits must not be."""
    code = f"""
ROWS, V, D = 16, 16384, 2048
weight = torch.randn(V, D).to({dtype}).requires_grad_()
def step(rows):
    hidden, target = torch.randn(rows, D).to({dtype}).requires_grad_(), torch.randint(V, (rows,))
    weight.grad = None
    tightrope.linear_reality_creativity_loss(hidden, weight, target, strategy="{strategy}").backward()
"""
    # A float32 sum of dW is what the chunked strategy holds beside the gradient of a narrower head.
    gradient = 16384 * 2048 * dtype.itemsize / 2**20
    total = gradient + (128 if strategy == "chunked" and dtype != torch.float32 else 0)
    growth = growth_in_child(code)
    assert growth < total + 80, f"grew by {growth:.0f} MiB, gradients and sums {total:.0f}"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_only_the_gradients_are_fresh_memory():
    """In a process that never freed a large block, where temporaries came to eight times the gradients."""
    script = """
import resource, torch, tightrope
from tightrope.strategies import gemm
gemm._prefers_own = lambda: False
if gemm.has_onednn():
    gemm._prefers_onednn = lambda: True  # which makes the most temporaries
hidden, weight = torch.randn(256, 64, requires_grad=True), torch.randn(150000, 64, requires_grad=True)
target = torch.randint(150000, (256,))
for _ in range(3):
    hidden.grad = weight.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tightrope.linear_reality_creativity_loss(hidden, weight, target, strategy="streaming").backward()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() / weight.grad.nbytes)
"""
    assert number_from_child(script) < 1.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reality", ["cross_entropy", "squared_error"])
def test_a_slice_of_a_dense_target_is_not_copied(dtype, reality):
    """teacher[:, 1:] is no run of memory; it was copied whole, which is a second N x V.

    Blocks of some size are given back as they are freed: else, on a busy machine, glibc keeps up to 145 MiB.
    """
    code = f"""
ROWS = 513
teacher = torch.rand(2, ROWS, 60000, dtype=torch.{dtype})
weight = torch.randn(60000, 16)
def step(rows):
    hidden = torch.randn(2, rows - 1, 16)
    target = teacher[:, -(rows - 1):]
    with torch.no_grad():
        tightrope.linear_reality_creativity_loss(
            hidden, weight, target, reality="{reality}", workspace_mb=8)
"""
    growth = growth_in_child(code, MALLOC_MMAP_THRESHOLD_=str(2**18))
    assert growth < 80  # the target: 235 MiB, or 117


GROWTH = """
import random, torch, tightrope
from pathlib import Path
from tightrope.strategies import gemm
torch.set_num_threads(2)
random.seed(0)
if {onednn}:
    gemm._prefers_own, gemm._prefers_onednn = lambda: False, lambda: True
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
hidden, target = torch.randn({most}, {width}), torch.randint({vocab}, ({most},))
weight = torch.randn({vocab}, {width}, requires_grad=True)
def step(rows, how):
    weight.grad = None
    h, t = hidden.clone().requires_grad_(), target.clone()
    if how == "ignored":
        t[torch.randperm({most})[rows:]] = -100
    else:
        h, t = h[:rows], t[:rows]
    if how == "own":
        loss = tightrope.linear_vocab_loss(h, weight, t, lambda s: s.entropy - s.lse)
    elif how == "statistics":
        loss = tightrope.linear_vocab_stats(h, weight, t).entropy.sum()
    else:
        loss = tightrope.linear_reality_creativity_loss(
            h, weight, t, balance=0.1, strategy="chunked" if how == "ignored" else how)
    loss.backward()
ways = ("chunked", "streaming", "ignored", "own", "statistics")
for i in range(40):
    step({most}, ways[i % 5])
plateau = resident()
for i in range({calls}):
    step(random.randint(1, {most}), ways[i % 5])
print(resident() - plateau)
"""


@pytest.mark.parametrize("onednn", [False, True], ids=["", "onednn"])
def test_memory_does_not_grow_with_the_number_of_shapes(onednn):
    """oneDNN keeps code and state for each shape: 500 MiB after 1200 calls of as many sizes."""
    if onednn and not gemm.has_onednn():
        pytest.skip("PyTorch has no oneDNN here")
    script = GROWTH.format(onednn=onednn, most=300, width=64, vocab=5000, calls=500)
    assert number_from_child(script) < 100
