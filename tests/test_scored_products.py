"""Logits that are scored as they are made: the statistics beside those of logits that exist already."""

from dataclasses import replace

import pytest
import torch

import tightrope
from helpers import class_indices, paired, randn, top_k
from tightrope import backends
from tightrope.backends import ops
from tightrope.statistics import SUMMARY, empty_partial, summarise
from tightrope.strategies import gemm

CPU = torch.device("cpu")
HAS_KERNEL = pytest.mark.skipif(backends.PANEL is None, reason="the CPU extension is not in use here")
HAS_PAIRS = pytest.mark.skipif(
    backends.BACKENDS["cpu"].pair_product is None, reason="this CPU has no products of pairs"
)
KERNELS = [
    pytest.param(ops.product_stats, torch.float32, id="eager-float32"),
    pytest.param(ops.product_stats, torch.bfloat16, id="eager-bfloat16"),
    pytest.param(torch.ops.tightrope.product_stats, torch.float32, id="cpu-float32", marks=HAS_KERNEL),
    pytest.param(torch.ops.tightrope.product_stats, torch.bfloat16, id="cpu-bfloat16", marks=HAS_PAIRS),
]


def factor_of(hidden):
    """Hidden states [n, D] as the kernel meets them: panels of float32, pairs of bfloat16."""
    if hidden.dtype == torch.bfloat16:
        return paired(hidden)
    width = backends.PANEL or 48
    panels = torch.full((-(-len(hidden) // width), hidden.shape[1], width), torch.nan)
    ops.panels(hidden.t(), panels)
    return panels


def target_of(kind, rows, vocab):
    return {
        "none": (None, None, None, None),
        "index": (class_indices((rows,), vocab), None, None, None),
        "top_k": (None, None, *top_k((rows,), vocab, k=min(3, vocab))),
    }[kind]


def score(kernel, hidden, head, keeps, offset, tail):
    out = torch.full((len(head), len(hidden)), torch.nan) if keeps else None
    partial, argmax = empty_partial(len(hidden), torch.float32, CPU)
    kernel(head, factor_of(hidden), out, partial, argmax, offset, *tail)
    return partial, argmax, out


def assert_same(made, logits, offset, tail):
    """The statistics of logits [n, T] in float64, by the plain implementation."""
    partial, argmax = empty_partial(len(logits), torch.float64, CPU)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tail]
    ops.row_stats(logits.double(), partial, argmax, offset, *wide)
    assert torch.equal(made[1], argmax)
    got, want = summarise(made[0].double()), summarise(partial)
    for name, one, other in zip(SUMMARY, got, want):
        atol = 1e-7 * float(logits.abs().sum(-1).max()) if name.startswith("logit_s") else 2e-5
        torch.testing.assert_close(one, other, rtol=2e-5, atol=atol, equal_nan=True, msg=name)


# Around a block, a lot and what the threads take together; rows around a vector and a panel.
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("rows", [1, 15, 49, 130])
@pytest.mark.parametrize("vocab", [1, 255, 257, 512, 1025, 9000])
@pytest.mark.parametrize("kind", ["none", "index", "top_k"])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.one_in(6)
def test_statistics(kernel, dtype, rows, vocab, kind, keeps):
    """A block left out or scored twice, a lot merged out of order, targets or a bias off by a block."""
    hidden, head = randn(rows, 20, dtype=dtype), randn(vocab, 23, seed=1, dtype=dtype)[:, :20]
    bias, active = 5 * randn(vocab, seed=2), torch.arange(rows) % 5 != 1
    tail = (*target_of(kind, rows, vocab), bias, active, 0.7, 8.0)
    made = score(kernel, hidden, head, keeps, 0, tail)
    logits = hidden.float() @ head.float().t()
    if keeps:
        torch.testing.assert_close(made[2], logits.t(), rtol=1e-5, atol=1e-5)
    assert_same(made, logits, 0, tail)


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("hostile", ["peaked", "offset", "sentinel", "ties", "nan", "inf"])
def test_hostile_logits(kernel, dtype, hostile):
    """Sums about the wrong origin, a maximum that is not the first, a NaN that is lost between two lots."""
    rows, vocab = 33, 2000
    hidden, head = torch.ones(rows, 2, dtype=dtype), torch.zeros(vocab, 2, dtype=dtype)
    bias = randn(vocab)
    if hostile == "peaked":
        bias[1300] = 300.0
    elif hostile == "offset":
        bias += 1e5
    elif hostile == "sentinel":
        bias[::3] = torch.finfo(torch.float32).min
    elif hostile == "ties":
        bias[[700, 600, 1999]] = 9.0
    else:
        bias[[900, 1500]] = float(hostile)
    tail = (*target_of("index", rows, vocab), bias, None, 1.0, None)
    made = score(kernel, hidden, head, False, 50, tail)
    partial, argmax = empty_partial(rows, torch.float32, CPU)
    ops.row_stats(torch.zeros(rows, vocab), partial, argmax, 50, *tail)
    assert torch.equal(made[1], argmax)
    got, want = summarise(made[0]), summarise(partial)
    # A logit is kept as its distance from the largest, which is 300 where one is.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=6e-5, equal_nan=True)


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS[2:])
def test_bits_do_not_depend_on_threads_or_on_where_the_logits_go(kernel, dtype):
    """Lots that are cut where a thread's part ends."""
    hidden, head = randn(70, 64, dtype=dtype), randn(30_000, 64, seed=1, dtype=dtype)
    tail = (*target_of("index", 70, 30_000), None, None, 1.0, None)
    made = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for keeps in (False, True):
            made.append(score(kernel, hidden, head, keeps, 0, tail)[:2])
    for partial, argmax in made[1:]:
        assert torch.equal(partial, made[0][0]) and torch.equal(argmax, made[0][1])


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_statistics_are_merged_into_what_is_there(kernel, dtype):
    """A second part of the vocabulary that starts afresh, or rows that do not count that are touched."""
    hidden, head = randn(20, 6, dtype=dtype), randn(1400, 6, seed=1, dtype=dtype)
    active = torch.arange(20) != 3
    tail = (*target_of("index", 20, 1400), None, active, 1.0, None)
    partial, argmax = empty_partial(20, torch.float32, CPU)
    for start, stop in ((0, 600), (600, 1400)):
        kernel(head[start:stop], factor_of(hidden), None, partial, argmax, start, *tail)
    assert_same((partial, argmax), hidden.float() @ head.float().t(), 0, tail)
    assert partial[1, 3] == 0 and argmax[3] == -1


@HAS_KERNEL
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": torch.zeros(4, 30)}, "dense is given, expected none"),
        ({"out": torch.zeros(4, 30)}, r"out has shape \[4, 30\], expected \[30, 4\]"),
        ({"head": torch.zeros(30, 8).double()}, "head is Double, expected float"),
        ({"head": torch.zeros(8, 30).t()}, "head has shape"),
        ({"factor": torch.zeros(1, 7, backends.PANEL or 48)}, "factor has shape"),
        ({"partial": torch.zeros(11, 5)}, r"partial has shape \[11, 5\]"),
    ],
)
def test_bad_arguments(change, message):
    """A kernel that reads past the end of what it was given."""
    partial, argmax = empty_partial(4, torch.float32, CPU)
    hidden = randn(4, 8)
    arguments = {"head": randn(30, 8), "factor": factor_of(hidden), "out": None, "partial": partial}
    arguments |= {"argmax": argmax, "offset": 0, "index": None, "dense": None}
    arguments |= {"topk_index": None, "topk_prob": None, "bias": None, "active": None}
    arguments |= {"logit_scale": 1.0, "softcap": None} | change
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.tightrope.product_stats(*arguments.values())


@HAS_KERNEL
@pytest.mark.parametrize("call", ["chunked", "streaming", "stats"])
def test_where_it_serves(monkeypatch, call):
    """A path that goes tile by tile without anybody noticing: results are the same, and only slower."""
    monkeypatch.setattr(gemm, "_prefers_own", lambda: True)
    monkeypatch.setattr(gemm, "_prefers_onednn", lambda: False)
    calls, kernel = [], backends.BACKENDS["cpu"].product_stats

    def spied(head, factor, out, *rest):
        calls.append(out is not None)
        kernel(head, factor, out, *rest)

    spying = replace(backends.BACKENDS["cpu"], product_stats=spied)
    monkeypatch.setitem(backends.BACKENDS, "cpu", spying)
    hidden, head, target = randn(40, 8), randn(3000, 8, seed=1), class_indices((40,), 3000)
    if call == "stats":
        tightrope.linear_vocab_stats(hidden, head, target)
    else:
        hidden.requires_grad_()
        tightrope.linear_reality_creativity_loss(hidden, head, target, strategy=call).backward()
    assert calls == [call == "chunked"]
