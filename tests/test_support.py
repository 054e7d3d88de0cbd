"""The mass and the entropy of a set of classes: values and gradients, against the reference in float64.

First the row primitives, each backend in both layouts on hostile rows; then the public functions, in both
strategies, with everything that a call may have beside a set; then what is special about sets: masses near 0
and 1, sets of nothing and of everything, ties at the threshold.
"""

import math

import pytest
import torch

import tightrope
from helpers import (
    BACKENDS,
    EPS32,
    STRATEGIES,
    assert_no_worse,
    assert_within,
    class_indices,
    deviation,
    rand,
    randn,
    top_k,
)
from row_cases import HOSTILE, SENTINELS, hostile
from tightrope import Classes, MinP, backends, reference
from tightrope.arguments import SideArguments, TileArguments
from tightrope.coefficients import row_coefficients
from tightrope.statistics import (
    OF_SUPPORT,
    SUMMARY,
    StatGrads,
    empty_partial,
    empty_sides,
    summarise,
    summarise_sides,
)

pytestmark = pytest.mark.one_in(2)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
everywhere = pytest.mark.parametrize("backend", BACKENDS)
both = pytest.mark.parametrize("strategy", STRATEGIES)
SETS = ("min_p", "classes")


def lists(rows, vocab, k=6, seed=0):
    """Classes [rows, k] with a repeated one, and one that is ignored."""
    classes = torch.randint(vocab, (*rows, k), generator=torch.Generator().manual_seed(seed))
    classes[..., 1] = classes[..., 0]
    classes[..., 2] = -100
    return classes


def support_of(kind, rows, vocab, seed=0):
    return MinP(0.1) if kind == "min_p" else Classes(lists(rows, vocab, seed=seed))


def as_reference(support):
    return support.x if isinstance(support, MinP) else support.indices


# The row primitives.


def primitives(backend, logits, support, target=None, tile=64, transposed=False, active=None):
    """(summary of whole rows, function of upstream gradients that gives dloss/dlogits), tile by tile."""
    rows, vocab = logits.shape
    wide = torch.promote_types(logits.dtype, F32)
    backend = backends.BACKENDS[backend]
    partial, argmax = empty_partial(rows, wide, logits.device)
    sides = empty_sides(rows, wide, logits.device)
    tiles = [(a, min(a + tile, vocab)) for a in range(0, vocab, tile)]

    def part(start, stop):
        piece = logits[:, start:stop].contiguous()
        return piece.t().contiguous().t() if transposed else piece

    def arguments(start, stop):
        dense = None if target is None else target[:, start:stop].to(wide).contiguous()
        return TileArguments(dense=dense, active=active).flat()

    for a, b in tiles:
        backend.row_stats(part(a, b), partial, argmax, a, *arguments(a, b))
    if isinstance(support, MinP):
        which = SideArguments(threshold=partial[0] + math.log(support.x))
    else:
        which = SideArguments(classes=tightrope.support.ascending(support.indices, -100))
    for a, b in tiles:
        backend.row_sides(part(a, b), sides, a, *which.flat(), *arguments(a, b))
    summary = torch.cat([summarise(partial), summarise_sides(sides)])

    def gradient(grads):
        coef = row_coefficients(summary, grads, vocab)
        norm = summary[len(SUMMARY) :][:4].contiguous()
        out = []
        for a, b in tiles:
            piece = part(a, b)
            filled = torch.full_like(piece, torch.nan)
            backend.row_grad(piece, filled, norm, coef, a, *which.flat(), *arguments(a, b))
            out.append(filled)
        return torch.cat(out, 1)

    return summary, gradient


def truth(logits, support, dtype, upstream, target):
    """Statistics of the set in a dtype, and the gradient of all upstream gradients together."""
    z = logits.to(dtype).requires_grad_()
    inside = reference.members(z.detach(), as_reference(support))
    stats = dict(zip(OF_SUPPORT, reference.set_stats(z, inside)))
    rows = reference.row_stats(z, target.to(dtype))
    every = {**{name: getattr(rows, name) for name in upstream if hasattr(rows, name)}, **stats}
    total = sum((g.to(dtype) * every[name].nan_to_num()).sum() for name, g in upstream.items())
    return {name: value.detach() for name, value in stats.items()}, torch.autograd.grad(total, z)[0]


@everywhere
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("how", [*HOSTILE, *SENTINELS])
@pytest.mark.parametrize("kind", SETS)
def test_primitives(kind, how, transposed, backend):
    """A side that takes the other's norm, coefficients or entries; a tile that forgets the ones before."""
    vocab = 201
    logits = hostile(how, vocab, F32)
    support = support_of(kind, (len(logits),), vocab)
    target = torch.softmax(randn(len(logits), vocab, seed=5), -1).masked_fill(logits == -torch.inf, 0.0)
    names = ("lse", "entropy", "collision", "target_prob", *OF_SUPPORT)
    upstream = {name: randn(len(logits), seed=i) for i, name in enumerate(names)}
    exact, exact_grad = truth(logits, support, F64, upstream, target)
    rough, rough_grad = truth(logits, support, F32, upstream, target)
    summary, gradient = primitives(backend, logits, support, target, transposed=transposed)
    values = dict(zip(OF_SUPPORT, summary[-3:]))
    for name in OF_SUPPORT:
        assert_no_worse(values[name], exact[name], rough[name], 2e-6, f"{name} of {how}")
    assert_no_worse(gradient(StatGrads(**upstream)), exact_grad, rough_grad, 4e-6, f"gradient of {how}")


@everywhere
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("vocab", [1, 15, 64, 65, 257])
@pytest.mark.parametrize("kind", SETS)
def test_primitives_in_every_dtype_and_width(kind, vocab, dtype, transposed, backend):
    """Lanes past the end of a row, or rows past the last, that are counted; a narrow dtype that is summed."""
    rows = 37
    logits = (randn(rows, vocab) * 3).to(dtype)
    support = support_of(kind, (rows,), vocab)
    target = torch.zeros(rows, vocab)
    upstream = {name: randn(rows, seed=i) for i, name in enumerate(("entropy", *OF_SUPPORT))}
    exact, exact_grad = truth(logits, support, F64, upstream, target)
    if vocab == 1 and kind == "min_p":
        assert (exact["support_entropy"] == 0).all()
    active = rand(rows, seed=9) < 0.7
    summary, gradient = primitives(backend, logits, support, None, 64, transposed, active)
    wide = torch.promote_types(dtype, F32)
    for name, value in zip(OF_SUPPORT, summary[-3:]):
        bar = 1e-12 if wide == F64 else 3e-6
        assert (deviation(value, exact[name])[active] <= bar).all(), name
    grad = gradient(StatGrads(**{name: g.to(wide) for name, g in upstream.items()}))
    assert not grad[~active].any(), "a row that does not count"
    rounding = {F64: 1e-12, F32: 3e-6, BF16: 2.0**-7, F16: 2.0**-10}[dtype]
    assert_within(grad[active], exact_grad[active], rounding, rounding, "gradient")


@everywhere
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_a_nan_stays_in_its_row(transposed, backend):
    """Fails if rows that share a vector share a NaN, or if the row's own set goes without it."""
    logits = randn(20, 150, seed=3) * 4
    poisoned = logits.clone()
    poisoned[7, ::3] = torch.nan
    (clean, _), (summary, _) = (
        primitives(backend, z, MinP(0.1), transposed=transposed) for z in (logits, poisoned)
    )
    others = torch.arange(20) != 7
    assert torch.equal(summary[:, others], clean[:, others])
    assert summary[-3:, 7].isnan().all()


@everywhere
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_rows_that_are_switched_off_keep_their_sides(transposed, backend):
    """Fails if an ignored row's statistics are merged into, which a later tile may find half done."""
    logits, active = randn(20, 150), torch.arange(20) % 3 != 0
    piece = logits.t().contiguous().t() if transposed else logits
    for which in (
        SideArguments(threshold=torch.zeros(20)),
        SideArguments(classes=lists((20,), 150).sort(-1).values),
    ):
        before = rand(6, 20)
        sides = before.clone()
        backends.BACKENDS[backend].row_sides(
            piece, sides, 0, *which.flat(), *TileArguments(active=active).flat()
        )
        assert torch.equal(sides[:, ~active], before[:, ~active])
        assert not torch.equal(sides[:, active], before[:, active])


# The public functions.

TOKENS, VOCAB, WIDTH = (3, 13), 157, 8


def leaves_of(dtype=F64):
    tensors = {
        "input": randn(*TOKENS, WIDTH, seed=1, dtype=dtype),
        "weight": randn(VOCAB, WIDTH, seed=2, dtype=dtype),
        "bias": randn(VOCAB, seed=3, dtype=dtype),
        "temperature": 0.5 + rand(*TOKENS, seed=4, dtype=dtype),
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def dense_logits(leaves, **options):
    return reference.logits(leaves["input"], leaves["weight"], leaves["bias"], **options)


def reference_stats(z, support):
    """What a user's loss is given, from dense logits."""
    rows = reference.row_stats(z)._asdict()
    of_set = dict(zip(OF_SUPPORT, reference.set_stats(z, reference.members(z, support))))
    return tightrope.RowStats(**{name: rows.get(name) for name in tightrope.RowStats._fields} | of_set)


def own(stats):
    """Every statistic of a set with a gradient of its own, beside two of whole rows."""
    of_set = 0.3 * stats.support_log_mass - 0.2 * stats.rest_log_mass.square() - 0.7 * stats.support_entropy
    return of_set + stats.entropy * stats.collision


TRANSFORMS = {"plain": {}, "softcap and scale": {"softcap": 4.0, "logit_scale": -1.5}}
transformed = pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)


def judge(loss, exact, leaves, bar=1e-11):
    assert_within(loss, exact, bar, what="loss")
    wanted = [t for t in leaves.values() if t.requires_grad]
    names = [name for name, t in leaves.items() if t.requires_grad]
    got = torch.autograd.grad(loss, wanted, allow_unused=True)
    want = torch.autograd.grad(exact, wanted, allow_unused=True)
    for name, a, b in zip(names, got, want):
        if b is not None:
            assert_within(a, b, bar, what=f"gradient of {name}")


@everywhere
@transformed
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("temperature", [False, True], ids=["", "temperature"])
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("function", ["stats", "chunked", "streaming", "logits", "logits' stats"])
def test_functions(function, kind, temperature, shift, options, backend):
    """Every function and strategy, with bias, softcap, scale, ignored rows, shift, a learned temperature."""
    leaves = leaves_of()
    support = support_of(kind, TOKENS, VOCAB)
    target = class_indices(TOKENS, VOCAB, ignored=0.3, seed=6)
    options = {**options, "temperature": leaves["temperature"] if temperature else 0.8}
    settings = {**options, "support": support, "shift": shift, "backend": backend}
    linear = (leaves["input"], leaves["weight"], target)
    logits = dense_logits(leaves)
    if function == "stats":
        ours = own(tightrope.linear_vocab_stats(*linear, leaves["bias"], **settings))
    elif function == "logits' stats":
        ours = own(tightrope.vocab_stats(logits, target, **settings))
    elif function == "logits":
        ours = tightrope.vocab_loss(logits, target, own, reduction="sum", **settings)
    else:
        settings |= {"strategy": function, "reduction": "sum", "workspace_mb": 0.005}
        ours = tightrope.linear_vocab_loss(*linear, own, leaves["bias"], **settings)
    z = dense_logits(leaves, **options)
    indices = as_reference(support)
    indices = indices.roll(-shift, -2) if kind == "classes" else indices
    fields = dict(zip(OF_SUPPORT, reference.set_stats(z, reference.members(z, indices))))
    rows = reference.row_stats(z)
    stats = tightrope.RowStats(
        **{**{n: getattr(rows, n, None) for n in tightrope.RowStats._fields}, **fields}
    )
    valid = reference.dense_target(target, VOCAB, dtype=F64, shift=shift)[1]
    exact = torch.where(valid, own(stats), 0.0)
    judge(ours.sum() if ours.dim() else ours, exact.sum(), leaves)


@everywhere
@both
@transformed
@pytest.mark.parametrize("kind", [*SETS, "default"])
@pytest.mark.parametrize("target_kind", ["index", "dense", "top_k"])
@pytest.mark.parametrize("reality", ["cross_entropy", "squared_error"])
def test_support_entropy_as_creativity(reality, target_kind, kind, options, strategy, backend):
    """The term of the built-in loss, with each kind of target, a learned balance, and the default set."""
    leaves = leaves_of()
    balance = rand(*TOKENS, seed=8, dtype=F64).requires_grad_()
    target = {
        "index": class_indices(TOKENS, VOCAB, ignored=0.3, seed=6),
        "dense": torch.softmax(randn(*TOKENS, VOCAB, seed=7, dtype=F64), -1),
        "top_k": top_k(TOKENS, VOCAB, seed=7, dtype=F64),
    }[target_kind]
    support = {"default": None}.get(kind, None if kind == "default" else support_of(kind, TOKENS, VOCAB))
    terms = {"reality": reality, "creativity": "support_entropy", "z_loss": 0.01, "label_smoothing": 0.1}
    given = {**options, **terms, "balance": balance, "temperature": leaves["temperature"]}
    ours = tightrope.linear_reality_creativity_loss(
        leaves["input"],
        leaves["weight"],
        target,
        leaves["bias"],
        support=support,
        strategy=strategy,
        backend=backend,
        workspace_mb=0.005,
        **given,
    )
    plain = tuple(target) if target_kind == "top_k" else target
    exact = reference.linear_reality_creativity_loss(
        leaves["input"],
        leaves["weight"],
        plain,
        leaves["bias"],
        support=0.02 if support is None else as_reference(support),
        **given,
    )
    judge(ours, exact, {**leaves, "balance": balance})


@both
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_narrow_dtypes(dtype, kind, strategy):
    """Statistics in float32 whatever the inputs, and gradients rounded once."""
    leaves = leaves_of(F32)
    given = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    support = support_of(kind, TOKENS, VOCAB)
    target = class_indices(TOKENS, VOCAB, seed=6)
    ours = tightrope.linear_vocab_loss(
        given["input"], given["weight"], target, own, given["bias"], support=support, strategy=strategy
    )
    z = dense_logits(exact)
    fields = dict(zip(OF_SUPPORT, reference.set_stats(z, reference.members(z, as_reference(support)))))
    rows = reference.row_stats(z)
    stats = tightrope.RowStats(
        **{**{n: getattr(rows, n, None) for n in tightrope.RowStats._fields}, **fields}
    )
    want = own(stats).mean()
    assert ours.dtype == F32
    assert_within(ours, want, 3e-6, what="loss")
    names = ("input", "weight", "bias")
    got = torch.autograd.grad(ours, [given[n] for n in names])
    for name, a, b in zip(names, got, torch.autograd.grad(want, [exact[n] for n in names])):
        assert a.dtype == dtype
        assert_within(a, b, {F32: 1e-5, BF16: 2.0**-8, F16: 2.0**-10}[dtype], what=name)


# What is special about sets.


@everywhere
@pytest.mark.parametrize("side", ["set", "rest"])
def test_masses_near_0_and_1(side, backend):
    """A mass of 1e-30 and its complement, as precise as float32 logs are: log(1 - q) says nothing."""
    nats = torch.tensor([2.0, 10.0, 30.0, 69.0, 87.0, 200.0])
    logits = torch.zeros(len(nats), 50)
    few = torch.tensor([[3, 7, 11]]).expand(len(nats), 3)
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, few, True)
    logits = torch.where(inside if side == "set" else ~inside, -nats.unsqueeze(-1), 0.25)
    tiny = torch.finfo(F32).tiny
    z = logits.double().requires_grad_()
    leaf = logits.clone().requires_grad_()
    stats = tightrope.vocab_stats(leaf, support=Classes(few), backend=backend)
    for name, exact in zip(OF_SUPPORT, reference.set_stats(z, inside)):
        value = getattr(stats, name)
        # A log mass near 0 is the mass of the other side, whose log is so many nats, each rounded.
        assert (deviation(value, exact) <= EPS32 * (4 + nats) * exact.abs() + tiny).all(), name
        (got,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        (want,) = torch.autograd.grad(exact.sum(), z, retain_graph=True)
        bar = 2 * EPS32 * (4 + nats).unsqueeze(-1) * want.abs()
        assert (deviation(got, want) <= bar + tiny).all(), f"gradient of {name}"


@everywhere
@both
def test_sets_of_nothing_and_of_everything(strategy, backend):
    """log 0, an entropy of 0, and no NaN in any gradient; a set of all classes is the whole distribution."""
    vocab = 9
    hidden = randn(4, 5, dtype=F64).requires_grad_()
    weight = randn(vocab, 5, seed=1, dtype=F64).requires_grad_()
    indices = torch.full((4, vocab), -100)
    indices[1] = torch.arange(vocab)
    indices[2, 0] = 3
    stats = tightrope.linear_vocab_stats(hidden, weight, support=Classes(indices), backend=backend)
    assert stats.support_log_mass[[0, 3]].tolist() == [-math.inf] * 2
    assert stats.rest_log_mass[[0, 3]].tolist() == [0.0, 0.0] == stats.support_entropy[[0, 3]].tolist()
    assert stats.support_log_mass[1] == 0 and stats.rest_log_mass[1] == -math.inf
    assert_within(stats.support_entropy[1], stats.entropy[1], 1e-12)
    assert stats.support_entropy[2] == 0
    # A log mass of -inf has whatever upstream gradient a loss makes of it.
    total = sum(x.sum() for x in (stats.support_log_mass.exp(), stats.rest_log_mass, stats.support_entropy))
    for gradient in torch.autograd.grad(total + stats.entropy.sum(), (hidden, weight)):
        assert gradient.isfinite().all()

    def loss(s):
        return torch.where(s.support_log_mass > -torch.inf, s.support_log_mass, 0.0) - s.support_entropy

    result = tightrope.linear_vocab_loss(
        hidden, weight, None, loss, support=Classes(indices), strategy=strategy, backend=backend
    )
    (grad,) = torch.autograd.grad(result, hidden)
    assert result.isfinite() and grad.isfinite().all() and not grad[0].any() and grad[1:3].any(-1).all()


@everywhere
def test_ties_at_the_threshold(backend):
    """p = x max p belongs to the set: > in the place of >= loses all that are as likely as the first."""
    x = 0.25
    tie = math.log(x)
    logits = torch.tensor([[0.0, 0.0, 0.0, -1.0], [5.0, 5.0 + tie, 3.0, 5.0 + tie]], dtype=F32)
    for start in (logits, logits.t().contiguous().t()):
        everything = tightrope.vocab_stats(start, support=MinP(1.0), backend=backend)
        assert_within(everything.support_entropy, torch.tensor([math.log(3), 0.0]), 1e-6)
        stats = tightrope.vocab_stats(start, support=MinP(x), backend=backend)
        assert_within(stats.support_log_mass.exp()[0], torch.softmax(logits, -1)[0].sum(), 1e-6)
        p = torch.softmax(logits[1].double(), -1)
        assert_within(stats.support_log_mass.exp()[1], p[[0, 1, 3]].sum(), 1e-6)


@everywhere
def test_a_call_without_a_set_does_not_look_for_one(backend, monkeypatch):
    """What a set costs is paid by who asks for one."""
    from dataclasses import replace

    def refuse(*_):
        raise AssertionError("row_sides was called")

    known = replace(backends.BACKENDS[backend], row_sides=refuse)
    monkeypatch.setitem(backends.BACKENDS, backend, known)
    leaves = leaves_of()
    target = class_indices(TOKENS, VOCAB)
    args = (leaves["input"], leaves["weight"], target)
    tightrope.linear_reality_creativity_loss(*args, balance=0.1, backend=backend).backward()
    assert tightrope.linear_vocab_stats(*args, backend=backend).support_entropy is None
    with pytest.raises(AssertionError, match="row_sides"):
        tightrope.linear_vocab_stats(*args, support=MinP(0.1), backend=backend)


@pytest.mark.parametrize("kind", SETS)
def test_gradcheck(kind):
    """Against finite differences, which share no formula with anything here."""
    hidden, weight = randn(3, 4, seed=1, dtype=F64), randn(7, 4, seed=2, dtype=F64)
    temperature = 0.5 + rand(3, seed=3, dtype=F64)
    support = MinP(0.3) if kind == "min_p" else Classes(torch.tensor([[1, 2, -100], [5, 5, 0], [6, 3, 2]]))
    for strategy in STRATEGIES:

        def function(h, w, t, strategy=strategy):
            settings = {"support": support, "temperature": t, "softcap": 3.0, "strategy": strategy}
            return tightrope.linear_vocab_loss(h, w, None, own, **settings)

        leaves = [t.clone().requires_grad_() for t in (hidden, weight, temperature)]
        assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_same_bits_for_any_number_of_threads():
    """Sums of a side in an order that depends on who made them."""
    leaves, target = leaves_of(F32), class_indices(TOKENS, VOCAB)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss = tightrope.linear_vocab_loss(
                leaves["input"], leaves["weight"], target, own, support=MinP(0.1), strategy="chunked"
            )
            results.append((loss.detach(), *torch.autograd.grad(loss, (leaves["input"], leaves["weight"]))))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
@both
def test_compiled(strategy):
    """Under torch.compile without a graph break, sets and temperatures included."""
    leaves = leaves_of(F32)
    target = class_indices(TOKENS, VOCAB, ignored=0.2)
    indices = lists(TOKENS, VOCAB)

    def function(h, w, t, indices):
        settings = {"temperature": t, "strategy": strategy}
        first = tightrope.linear_reality_creativity_loss(
            h, w, target, balance=0.2, creativity="support_entropy", **settings
        )
        second = tightrope.linear_vocab_loss(h, w, target, own, support=Classes(indices), **settings)
        return first + second

    args = (leaves["input"], leaves["weight"], leaves["temperature"])
    plain = function(*args, indices)
    compiled = torch.compile(function, fullgraph=True)(*args, indices)
    assert_within(compiled, plain, 1e-6)
    for a, b in zip(torch.autograd.grad(compiled, args), torch.autograd.grad(plain, args)):
        assert_within(a, b, 1e-5)


def test_modules():
    """A set that is fixed at construction, one that comes with each call, and a learned temperature."""
    leaves, target = leaves_of(F32), class_indices(TOKENS, VOCAB)
    args = (leaves["input"], leaves["weight"], target)
    options = {"balance": 0.2, "creativity": "support_entropy"}
    wanted = tightrope.linear_reality_creativity_loss(*args, support=MinP(0.1), temperature=0.7, **options)
    learned = torch.nn.Parameter(torch.tensor(0.7))
    module = tightrope.LinearRealityCreativityLoss(support=MinP(0.1), temperature=learned, **options)
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    loss = module(*args)
    loss.backward()
    assert_within(loss, wanted, 1e-6)
    assert learned.grad.abs() > 0
    module = tightrope.RealityCreativityLoss(**options)
    logits = leaves["input"] @ leaves["weight"].t()
    sets = Classes(lists(TOKENS, VOCAB))
    assert_within(
        module(logits, target, support=sets, temperature=0.5),
        tightrope.reality_creativity_loss(logits, target, support=sets, temperature=0.5, **options),
        0.0,
    )
