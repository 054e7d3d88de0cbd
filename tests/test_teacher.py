"""A teacher's head as the target: what the dense target of the same teacher gives, in every loss and way.

The truth is the teacher's distribution in float64, made by PyTorch and passed as a dense target, or put into
the formula of the loss. Tiles are small, so that a teacher is normalised over several of them.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tightrope
from calls import own
from helpers import (
    BACKENDS,
    STRATEGIES,
    assert_no_worse,
    assert_within,
    deviation,
    linear_problem,
    rand,
    randn,
)

N, D, V = 13, 5, 300  # three tiles
F64 = torch.float64
LOSS = tightrope.linear_reality_creativity_loss
TERMS = {
    "cross_entropy": {"balance": 0.05},
    "smoothed": {"label_smoothing": 0.1, "balance": 0.1, "creativity": "collision"},
    "squared_error": {"reality": "squared_error", "label_smoothing": 0.1},
    "set": {"creativity": "support_entropy", "balance": 0.1},
    "weighed": {"class_weight": 0.5 + rand(V, seed=8, dtype=F64), "label_smoothing": 0.2},
    "tempered": {"temperature": 0.5 + rand(N, seed=9, dtype=F64), "softcap": 4.0, "z_loss": 0.01},
    "none": {"reduction": "none", "logit_l2": 0.01},
    "ignored": {"row_weight": (torch.arange(N) % 3).double(), "reduction": "sum"},
    "masked": {"row_weight": (torch.arange(N) % 3).double(), "skip_ignored": False},
    "shifted": {"shift": 1, "reality": "squared_error"},
}
HOSTILE = ("plain", "offset", "peaked", "sentinel", "impossible", "one class", "not contiguous")
pytestmark = [
    pytest.mark.one_in(2),
    pytest.mark.usefixtures("one_thread", "small_tiles"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own, of its compiler
]


def leaves(dtype=F64):
    made = randn(N, D, seed=1, dtype=F64), randn(V, D, seed=2, dtype=F64), randn(V, seed=3, dtype=F64)
    return tuple(t.to(dtype).requires_grad_() for t in made)


def teacher(hostile="plain", width=7, dtype=F64, **transform):
    hidden, weight = randn(N, width, seed=4, dtype=F64), randn(V, width, seed=5, dtype=F64)
    bias = randn(V, seed=6, dtype=F64)
    if hostile == "offset" and dtype == torch.float32:
        bias += 1e4
    elif hostile == "peaked":
        weight *= 40
    elif hostile == "sentinel":
        bias[::3] = torch.finfo(dtype).min
    elif hostile == "impossible":  # a whole tile of it
        bias[:128] = -torch.inf
    elif hostile == "one class":
        bias[1:] = -torch.inf
    elif hostile == "not contiguous":
        hidden, weight = hidden.t().contiguous().t(), torch.stack([weight, weight + 1], 1)[:, 0]
        bias = torch.stack([bias, bias], 1)[:, 0]
    return tightrope.TeacherTarget(hidden.to(dtype), weight.to(dtype), bias.to(dtype), **transform)


def log_probs(target):
    """Of a teacher, in float64, [N, V]."""
    u = F.linear(target.hidden.double(), target.weight.double(), target.bias.double()) * target.logit_scale
    z = u if target.softcap is None else target.softcap * torch.tanh(u / target.softcap)
    return torch.log_softmax(z, -1)


def results(loss, variables):
    upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()]
    return [loss.detach(), *torch.autograd.grad(loss, variables, upstream.view(loss.shape))]


def assert_same(actual, expected, rtol=1e-12):
    for name, a, b in zip(("loss", "input", "weight", "bias"), actual, expected):
        assert_within(a, b, rtol, what=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("terms", TERMS)
def test_equals_the_dense_target(terms, strategy, backend):
    """Would catch a tile normalised by another row, cut at the wrong class, or overwritten before its use."""
    target, h = teacher(logit_scale=0.7, softcap=5.0), leaves()
    options = {"strategy": strategy, "backend": backend, "workspace_mb": 0.02, **TERMS[terms]}
    dense = log_probs(target).exp()
    actual, expected = (LOSS(*h[:2], t, h[2], **options) for t in (target, dense))
    assert_same(results(actual, h), results(expected, h))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_teachers(hostile, strategy):
    """Would catch a teacher's exp that overflows, and 0 * -inf where it rules classes out."""
    target, h = teacher(hostile), leaves()
    for terms in ({"balance": 0.05}, {"reality": "squared_error"}):
        options = {"strategy": strategy, "workspace_mb": 0.02, **terms}
        actual, expected = (LOSS(*h[:2], t, h[2], **options) for t in (target, log_probs(target).exp()))
        assert_same(results(actual, h), results(expected, h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hostile", ["plain", "offset", "peaked"])
def test_low_precision(hostile, dtype):
    """Would catch teacher logits or probabilities that are rounded to the tensors' dtype."""
    target, h = teacher(hostile, dtype=dtype), leaves(dtype)
    exact = [t.detach().double().requires_grad_() for t in h]
    truth = results(LOSS(*exact[:2], log_probs(target).exp(), exact[2], balance=0.05), exact)
    plain = [t.detach().float().requires_grad_() for t in h]
    rough_b = torch.softmax(F.linear(*(t.float() for t in (target.hidden, target.weight, target.bias))), -1)
    rough = results(F.cross_entropy(F.linear(*plain), rough_b), plain)
    loss = LOSS(*h[:2], target, h[2], balance=0.05)
    assert loss.dtype == torch.float32
    actual = results(loss, h)
    for a, b, usual in zip(actual, truth, rough):
        allowed = 2.0**-8 * b.abs().max().item() if a.dtype == torch.bfloat16 else 1e-6
        assert_no_worse(a, b, usual.to(a.dtype) if a.dtype == torch.float32 else b, allowed)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_forward_kl_by_the_statistics(strategy):
    """Would catch an entropy of the student's, of the smoothed target, or one that ignored rows have."""
    target, h = teacher(), leaves()
    weight = torch.ones(N, dtype=F64)
    weight[[0, 7]] = 0.0
    options = {"reduction": "none", "return_stats": True, "row_weight": weight, "label_smoothing": 0.3}
    loss, stats = LOSS(*h[:2], target, h[2], strategy=strategy, workspace_mb=0.02, **options)
    log_b = log_probs(target)
    log_p = torch.log_softmax(F.linear(*h), -1).detach()
    kl = (log_b.exp() * (log_b - log_p)).sum(-1) * weight
    assert_within(-stats.target_log_prob - stats.target_entropy, kl, 1e-12)
    assert_within(stats.target_collision, log_b.exp().square().sum(-1) * weight, 1e-12)
    assert loss.shape == (N,) and not stats.target_entropy.requires_grad


def test_other_targets_have_no_entropy():
    """Would catch a field that is 0 where nobody computed it."""
    h = leaves()
    stats = tightrope.linear_vocab_stats(*h[:2], torch.zeros(N, dtype=torch.long), h[2])
    assert stats.target_entropy is None and stats.target_collision is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_of_ones_own(strategy):
    """Would catch a teacher's tiles that the two operators of a user's chunk lay out differently."""
    target, h = teacher(), leaves()

    def kl(stats):
        return (-stats.target_log_prob - stats.target_entropy) * stats.target_collision + own(stats)

    options = {"strategy": strategy, "workspace_mb": 0.02, "support": tightrope.MinP(0.1)}
    loss, stats = tightrope.linear_vocab_loss(*h[:2], target, kl, h[2], return_stats=True, **options)
    b = log_probs(target).exp()
    h_b, square = -(b * b.log()).sum(-1), b.square().sum(-1)

    def dense(stats, entropy, square):
        return (-stats.target_log_prob - entropy) * square + own(stats)

    expected = tightrope.linear_vocab_loss(*h[:2], b, dense, h[2], row_args=(h_b, square), **options)
    assert_same(results(loss, h), results(expected, h))
    assert_within(stats.target_entropy, h_b, 1e-12)


def test_logits_that_exist():
    """Would catch a teacher that the functions of logits do not hand on."""
    target, h = teacher(), leaves()
    b = log_probs(target).exp()
    logits = F.linear(*h)
    for function, args in (
        (tightrope.reality_creativity_loss, ()),
        (tightrope.vocab_loss, (own,)),
    ):
        actual, expected = (function(logits, t, *args) for t in (target, b))
        assert_same(results(actual, [logits]), results(expected, [logits]))
    stats = tightrope.vocab_stats(logits, target)
    assert_within(stats.target_entropy, -(b * b.log()).sum(-1), 1e-12)


def test_modules_and_heads():
    """Would catch a module that refuses a teacher, or takes it for a tensor."""
    target, h = teacher(), leaves()
    expected = LOSS(*h[:2], target, h[2], balance=0.1)
    assert torch.equal(tightrope.LinearRealityCreativityLoss(balance=0.1)(*h[:2], target, h[2]), expected)
    logits = tightrope.RealityCreativityLoss(balance=0.1)(F.linear(*h), target)
    assert_within(logits, expected, 1e-12)
    head = tightrope.LMHead.from_linear(torch.nn.Linear(D, V, dtype=F64), balance=0.1, reality="reverse_kl")
    torch.nn.init.constant_(head.bias, 0.0)
    loss = head(h[0], target)
    assert_within(loss, LOSS(h[0], head.weight, target, balance=0.1, reality="reverse_kl"), 1e-12)


def test_no_gradient_to_the_teacher():
    """Would catch a teacher that trains, or one that is refused because its head is a Parameter."""
    target, h = teacher(), leaves()
    own_tensors = [t.requires_grad_() for t in (target.hidden, target.weight, target.bias)]
    for strategy in STRATEGIES:
        LOSS(*h[:2], target, h[2], strategy=strategy).backward()
    assert all(t.grad is None for t in own_tensors) and all(t.grad is not None for t in h)


def test_a_token_dimension_or_none():
    """Would catch tokens that are taken for rows: several dimensions, one token, none at all."""
    head = randn(V, D, seed=2, dtype=F64)
    for lead in ((2, 3), (1,), (), (0,), (2, 0)):
        target = tightrope.TeacherTarget(randn(*lead, 7, seed=4, dtype=F64), randn(V, 7, seed=5, dtype=F64))
        hidden = randn(*lead, D, seed=1, dtype=F64).requires_grad_()
        b = torch.softmax(target.hidden @ target.weight.t(), -1)
        actual, expected = (LOSS(hidden, head, t, reduction="sum") for t in (target, b))
        assert_same(results(actual, [hidden]), results(expected, [hidden]))


# Reverse KL


def reverse_kl(h, log_b, smoothing=0.0, balance=0.0, dtype=F64):
    """By the formula, of each row."""
    if smoothing:
        log_b = torch.log((1 - smoothing) * log_b.exp() + smoothing / V)
    log_p = torch.log_softmax(F.linear(*h), -1)
    # Where p is 0 nothing is added, whatever b is.
    kl = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_b.to(dtype)))
    return (1 - balance) * kl.sum(-1) + balance * torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("smoothing", "balance"), [(0.0, 0.0), (0.0, 0.3), (0.1, 0.05), (1.0, 0.0)])
def test_reverse_kl(smoothing, balance, strategy, backend):
    """Would catch a log that is of the unsmoothed b, or an entropy that reality and creativity both write."""
    target, h = teacher(logit_scale=0.7, softcap=5.0), leaves()
    options = {"strategy": strategy, "backend": backend, "workspace_mb": 0.02, "balance": balance}
    loss = LOSS(*h[:2], target, h[2], reality="reverse_kl", label_smoothing=smoothing, **options)
    expected = reverse_kl(h, log_probs(target), smoothing, balance).mean()
    assert_same(results(loss, h), results(expected, h))


@pytest.mark.parametrize("hostile", ["offset", "peaked", "not contiguous"])
def test_reverse_kl_of_hostile_teachers(hostile):
    """Would catch log b by way of b, which is 0 where a teacher is sure."""
    target, h = teacher(hostile), leaves()
    loss = LOSS(*h[:2], target, h[2], reality="reverse_kl")
    assert_same(results(loss, h), results(reverse_kl(h, log_probs(target)).mean(), h))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_impossible_classes(strategy, dtype):
    """Would catch NaN where both rule a class out, and a small loss where the teacher alone does."""
    target, (hidden, weight, bias) = teacher("impossible", dtype=dtype), leaves(dtype)
    both = bias.detach().masked_fill(torch.arange(V) < 128, -torch.inf).requires_grad_()
    options = {"reality": "reverse_kl", "strategy": strategy, "workspace_mb": 0.02}
    loss = LOSS(hidden, weight, target, both, **options)
    h, exact = (hidden, weight, both), [t.detach().double().requires_grad_() for t in (hidden, weight, both)]
    kept = [exact[0], exact[1][128:], exact[2][128:]]
    log_p = torch.log_softmax(F.linear(*kept), -1)
    expected = (log_p.exp() * (log_p - log_probs(target)[:, 128:])).sum(-1).mean()
    assert_same(results(loss, h), results(expected, exact), 1e-5 if dtype == torch.float32 else 1e-12)
    assert LOSS(hidden, weight, target, bias, **options) > 1e30
    smoothed = LOSS(hidden, weight, target, bias, label_smoothing=0.1, **options)
    assert smoothed.isfinite() and smoothed < 1e2


def test_a_student_that_is_the_teacher():
    """Would catch a divergence that is not 0, with its gradient, where there is nothing to learn."""
    h = leaves()
    target = tightrope.TeacherTarget(*h)
    loss, stats = LOSS(*h[:2], target, h[2], return_stats=True)
    (gradient,) = torch.autograd.grad(loss, h[0])
    assert deviation(-stats.target_log_prob - stats.target_entropy, torch.zeros(N)).max() < 1e-12
    assert gradient.abs().max() < 1e-13
    loss = LOSS(*h[:2], target, h[2], reality="reverse_kl")
    (gradient,) = torch.autograd.grad(loss, h[0])
    assert abs(loss.item()) < 1e-12 and gradient.abs().max() < 1e-13


def test_statistics_beside_reverse_kl():
    """Would catch inner products with log b that pass for those with b."""
    _, stats = LOSS(*leaves()[:2], teacher(), reality="reverse_kl", return_stats=True)
    assert stats.target_prob is None and stats.target_logit is None and stats.target_log_prob is None
    assert stats.entropy is not None and stats.target_entropy is not None


# Jensen-Shannon


def jensen_shannon(h, log_b, temperature=1.0, balance=0.0):
    """By the formula, of each row."""
    log_p = torch.log_softmax(F.linear(*h) / temperature, -1)
    p, b = log_p.exp(), log_b.exp()
    log_m = ((p + b) / 2).log()
    kl = sum(torch.where(q == 0, 0.0, q * (log_q - log_m)) for q, log_q in ((p, log_p), (b, log_b)))
    return (1 - balance) * 0.5 * kl.sum(-1) + balance * torch.special.xlogy(p, p).sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ["plain", "masked", "none"])
def test_jensen_shannon(case, strategy, backend):
    """Would catch a mixture with another row's student, half a gradient, or a divergence that is not b's."""
    target, h = teacher(logit_scale=0.7, softcap=5.0), leaves()
    options = {"strategy": strategy, "backend": backend, "workspace_mb": 0.02, "reality": "jensen_shannon"}
    weight, temperature = (torch.arange(N) % 3).double(), 0.5 + rand(N, seed=9, dtype=F64)
    if case == "plain":
        loss = LOSS(*h[:2], target, h[2], **options)
        expected = jensen_shannon(h, log_probs(target)).mean()
    elif case == "masked":
        options |= {"row_weight": weight, "skip_ignored": False, "reduction": "sum"}
        loss = LOSS(*h[:2], target, h[2], temperature=temperature, **options)
        expected = (jensen_shannon(h, log_probs(target), temperature[:, None]) * weight).sum()
    else:
        loss = LOSS(*h[:2], target, h[2], reduction="none", temperature=2.0, balance=0.05, **options)
        expected = jensen_shannon(h, log_probs(target), 2.0, 0.05)
    assert_same(results(loss, h), results(expected, h))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("hostile", [*HOSTILE, "both impossible"])
def test_jensen_shannon_of_hostile_teachers(hostile, dtype):
    """Would catch NaN where one or both rule a class out, and a divergence beyond log 2."""
    target, h = teacher(hostile.removeprefix("both "), dtype=dtype), list(leaves(dtype))
    if hostile == "both impossible":
        h[2] = h[2].detach().masked_fill(torch.arange(V) < 200, -torch.inf).requires_grad_()
    loss = LOSS(*h[:2], target, h[2], reality="jensen_shannon", strategy="chunked", reduction="none")
    assert ((loss >= 0) & (loss <= 0.6932)).all()
    kept = torch.ones(V, dtype=torch.bool)
    if hostile == "both impossible":  # PyTorch's own gradient of a logarithm of 0 is NaN
        kept = torch.arange(V) >= 128
    exact = [t.detach().double().requires_grad_() for t in h]
    cut = [exact[0], exact[1][kept], exact[2][kept]]
    log_p, log_b = torch.log_softmax(F.linear(*cut), -1), log_probs(target)[:, kept]
    r = (log_p - log_b).nan_to_num(0.0, 1e4, -1e4)
    near = [q.exp() * (math.log(2) - F.softplus(x)) for q, x in ((log_p, -r), (log_b, r))]
    expected = 0.5 * (near[0] + near[1]).sum(-1)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    if hostile == "offset" and dtype == torch.float32:
        rtol = 5e-4  # the rounding error of a logit near 1e4
    for a, b in zip(results(loss, h), results(expected, exact)):
        assert_within(a, b.nan_to_num(0.0), rtol)


def test_jensen_shannon_of_a_student_that_is_the_teacher():
    """Would catch a divergence found by subtracting entropies, whose rounding is larger than it is."""
    hidden, weight, bias = leaves(torch.float32)
    target = tightrope.TeacherTarget(hidden, weight, bias)
    near = (hidden.detach() + 1e-3 * randn(N, D, seed=7)).requires_grad_()
    loss = LOSS(near, weight, target, bias, reality="jensen_shannon", reduction="none")
    h = [t.detach().double() for t in (near, weight, bias)]
    assert_within(loss, jensen_shannon(h, log_probs(target)), 1e-3)
    assert LOSS(hidden, weight, target, bias, reality="jensen_shannon").abs() < 1e-12


def test_what_jensen_shannon_does_not_offer():
    """Would catch a second derivative, or a smoothing, that is silently another's."""
    target, h = teacher(), leaves()
    for strategy in STRATEGIES:
        loss = LOSS(*h[:2], target, reality="jensen_shannon", strategy=strategy)
        with pytest.raises(RuntimeError, match=r'with reality="jensen_shannon", expected gradients'):
            torch.autograd.grad(loss, h[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'transform of torch.func, with reality="jensen_shannon"'):
        torch.func.grad(lambda x: LOSS(x, h[1].detach(), target, reality="jensen_shannon"))(h[0].detach())
    with pytest.raises(ValueError, match=r"label_smoothing: got 0.1 with reality='jensen_shannon'"):
        LOSS(*h[:2], target, reality="jensen_shannon", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"reality: got 'jensen_shannon' with logits, expected"):
        tightrope.reality_creativity_loss(F.linear(*h), target, reality="jensen_shannon")


# Second order, transforms, compilers


def twice(h, target, **options):
    loss = LOSS(*h[:2], target, h[2], **options)
    gradients = torch.autograd.grad(loss, h, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), h)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_order(strategy):
    """Would catch a tile that is not normalised where a gradient's derivative makes it again."""
    target, h = teacher(), leaves()
    options = {"strategy": strategy, "workspace_mb": 0.02}
    log_b = log_probs(target)
    for a, b in zip(twice(h, target, balance=0.05, **options), twice(h, log_b.exp(), balance=0.05)):
        assert_within(a, b, 1e-11)
    gradients = torch.autograd.grad(reverse_kl(h, log_b).mean(), h, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in gradients), h)
    for a, b in zip(twice(h, target, reality="reverse_kl", **options), expected):
        assert_within(a, b, 1e-11)


def test_transforms():
    """Would catch a teacher whose rows a batch leaves behind, or a tangent of a constant statistic."""
    hidden, weight = (t.detach() for t in leaves()[:2])
    target = teacher()
    b = log_probs(target).exp()

    def of(t):
        return lambda x: LOSS(x, weight, t, balance=0.05)

    moved = randn(N, D, seed=7, dtype=F64)
    for a, c in zip(*(torch.func.jvp(of(t), (hidden,), (moved,)) for t in (target, b))):
        assert_within(a, c, 1e-12)
    both = torch.stack([hidden, moved])
    actual, expected = (torch.vmap(torch.func.grad(of(t)))(both) for t in (target, b))
    assert_within(actual, expected, 1e-12)
    teachers = torch.stack([target.hidden, 2 * target.hidden])

    def one(x, q):
        return LOSS(x, weight, tightrope.TeacherTarget(q, target.weight), balance=0.05)

    actual = torch.vmap(torch.func.grad(one))(both, teachers)
    for i, q in enumerate(teachers):
        assert_within(actual[i], torch.func.grad(one)(both[i], q), 1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"reality": "reverse_kl", "strategy": "streaming"}, {"reality": "jensen_shannon"}]
)
def test_compiled(options):
    """Would catch a fake whose statistics lack the teacher's rows, or a graph that breaks at a target."""
    h, target = leaves(torch.float32), teacher(dtype=torch.float32)

    def step(hidden, weight, target):
        loss, stats = LOSS(hidden, weight, target, return_stats=True, **options)
        return loss + stats.target_entropy.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(results(f(*h[:2], target), h[:2]) for f in (compiled, step))):
        assert_within(a, b, 1e-6)


def test_flops():
    """Would catch products of the teacher that a count leaves out."""
    from torch.utils.flop_counter import FlopCounterMode

    target, h = teacher(), leaves()
    for reality, strategy, count in (
        ("reverse_kl", "chunked", 3 * D + 7),
        ("reverse_kl", "streaming", 4 * D + 3 * 7),
        ("jensen_shannon", "chunked", 5 * D + 2 * 7),
        ("jensen_shannon", "streaming", 8 * D + 4 * 7),
    ):
        with FlopCounterMode(display=False) as counter:
            LOSS(*h[:2], target, strategy=strategy, reality=reality).backward()
        assert counter.get_total_flops() == 2 * N * V * count


# Errors

BAD = {
    "tokens": (
        lambda t: {"hidden": t.hidden[1:]},
        ValueError,
        r"target.hidden: got shape \[12, 7\], expected",
    ),
    "vocabulary": (lambda t: {"weight": t.weight[1:]}, ValueError, r"target.weight: got shape \[299, 7\]"),
    "width": (lambda t: {"weight": t.weight[:, 1:]}, ValueError, r"target.weight: .* expected \[300, 7\]"),
    "bias": (lambda t: {"bias": t.bias[1:]}, ValueError, r"target.bias: got shape \[299\], expected \[300\]"),
    "dtype": (lambda t: {"hidden": t.hidden.long()}, TypeError, "target.hidden: got dtype int64"),
    "kind": (lambda t: {"weight": None}, TypeError, "target.weight: got NoneType, expected a tensor"),
    "scale": (lambda t: {"logit_scale": float("nan")}, ValueError, "target.logit_scale: got nan"),
    "softcap": (lambda t: {"softcap": 0.0}, ValueError, "target.softcap: got 0.0, expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    """Would catch a teacher that fails inside a product, with no word of which argument it is."""
    change, kind, message = BAD[case]
    target, h = teacher(), leaves()
    with pytest.raises(kind, match=message):
        LOSS(*h[:2], replace(target, **change(target)))


def test_no_class_is_ignored():
    """Would catch an ignore_index that a teacher lets pass, and nothing obeys."""
    h = leaves()
    with pytest.raises(ValueError, match="ignore_index: got 3 with a distribution as target"):
        LOSS(*h[:2], teacher(), ignore_index=3)
    count = tightrope.distributed.token_count(teacher())
    assert count.item() == N


def test_reverse_kl_wants_a_teacher():
    """Would catch reverse KL to something else: the logarithm of a distribution that nobody took."""
    problem = linear_problem(N, vocab=V)
    for target in (problem.target, torch.softmax(randn(N, V), -1)):
        with pytest.raises(ValueError, match=r"target: got Tensor .* expected a tightrope.TeacherTarget"):
            LOSS(problem.leaves["input"], problem.leaves["weight"], target, reality="reverse_kl")
    with pytest.raises(ValueError, match=r'class_weight: got reality=.reverse_kl., expected "cross_entropy"'):
        LOSS(*leaves()[:2], teacher(), reality="reverse_kl", class_weight=torch.ones(V))
