"""Derivatives of gradients through every public function, against PyTorch's own of the dense loss.

Finite differences of each term are in test_gradgradcheck.py. Here stand the ways of asking for a second
derivative, the precision in float32 beside that of plain PyTorch, hostile data, and what is refused.
"""

import pytest
import torch

import tightrope
from calls import CALLS, every_call, every_loss
from helpers import STRATEGIES, TORCH, assert_no_worse, assert_within, class_indices, randn
from tightrope import reference
from tightrope.strategies import chunked, gemm, problem, streaming, tangents
from tightrope.strategies import products as tiles_of_products

# PyTorch's own: forward mode and the compiler use what it deprecates; backward(create_graph=True) may leak.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using backward:UserWarning"),
]
ROWS, VOCAB, WIDTH = 6, 11, 8
F64 = torch.float64


def leaves(dtype=torch.float32):
    hidden, weight = randn(ROWS, WIDTH, dtype=dtype), randn(VOCAB, WIDTH, seed=1, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), class_indices((ROWS,), VOCAB)


def value(call, arguments, **options):
    function, given = CALLS[call]
    return function(*arguments, **given, **options).sum()


def exact(arguments, reduction="mean"):
    """What every call says, dense."""
    hidden, weight, target = arguments
    return reference.linear_reality_creativity_loss(
        hidden, weight, target, balance=0.1, reduction=reduction
    ).sum()


def penalised(loss, sources, of):
    """The gradients of a loss and of a penalty on its gradient by some of the sources."""
    gradients = torch.autograd.grad(loss, [sources[i] for i in of], create_graph=True)
    return torch.autograd.grad(loss + sum(g.square().sum() for g in gradients), sources)


@every_call
@pytest.mark.parametrize("of", [[0], [1], [0, 1]], ids=["input", "weight", "both"])
def test_a_penalty_on_a_gradient(call, of):
    """A derivative that the graph of another loss hides, or one of the other leaf."""
    arguments = leaves(F64)
    actual = penalised(value(call, arguments), arguments[:2], of)
    for one, expected in zip(actual, penalised(exact(arguments), arguments[:2], of)):
        assert_within(one, expected, 1e-12)


@every_loss
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_reduction(call, reduction):
    """By the other leaf, which the rest of the sum reaches by itself."""

    def mixed(loss, hidden, weight):
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        return torch.autograd.grad(gradient.square().sum() + weight.square().sum(), weight)[0]

    arguments = leaves(F64)
    actual = mixed(value(call, arguments, reduction=reduction), *arguments[:2])
    assert_within(actual, mixed(exact(arguments, reduction), *arguments[:2]), 1e-12)


@every_call
def test_the_gradients_themselves_are_right(call):
    """create_graph=True for another part of a model: values and sums in place are as before."""
    arguments = leaves()
    expected = torch.autograd.grad(value(call, arguments), arguments[:2])
    value(call, arguments).backward(create_graph=True)
    for leaf, gradient in zip(arguments, expected):
        torch.testing.assert_close(leaf.grad.detach(), gradient)
        leaf.grad += 1.0
        leaf.grad = None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_upstream_gradient_that_requires_grad(strategy, reduction):
    """Its gradient is a tangent of the loss, along what the gradient is multiplied by."""
    hidden, weight, target = leaves(F64)

    def asked(loss):
        upstream = torch.linspace(1, 2, loss.numel(), dtype=F64).view(loss.shape).requires_grad_()
        (gradient,) = torch.autograd.grad(loss, hidden, upstream, create_graph=True)
        return torch.autograd.grad((gradient * gradient.detach().cos()).sum(), (upstream, hidden))

    options = {"balance": 0.1, "reduction": reduction}
    ours = tightrope.linear_reality_creativity_loss(hidden, weight, target, strategy=strategy, **options)
    dense = reference.linear_reality_creativity_loss(hidden, weight, target, **options)
    for actual, expected in zip(asked(ours), asked(dense)):
        assert_within(actual, expected, 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("learned", ["balance", "row_weight", "row_args", "temperature"])
def test_of_what_is_learned_beside_the_model(learned, strategy):
    """The gradient of the balance, of weights, of a loss's arguments depends on the model as well."""
    hidden, weight, target = leaves(F64)
    given = torch.full((ROWS,), 0.25, dtype=F64, requires_grad=True)

    def penalised(loss):
        (gradient,) = torch.autograd.grad(loss, given, create_graph=True)
        return torch.autograd.grad(loss + 10 * gradient.square().sum(), (hidden, weight, given))

    z = hidden @ weight.t()
    if learned == "temperature":
        z = z / given[:, None]
    log_p = z.log_softmax(-1)
    ce, creativity = -log_p.gather(-1, target[:, None])[:, 0], (log_p.exp() * log_p).sum(-1)
    if learned == "row_args":
        loss = tightrope.linear_vocab_loss(
            hidden, weight, target, lambda s, g: -g * s.target_log_prob, row_args=(given,), strategy=strategy
        )
        dense = (given * ce).mean()
    else:
        loss = tightrope.linear_reality_creativity_loss(
            hidden, weight, target, strategy=strategy, **{learned: given}
        )
        dense = {
            "balance": ((1 - given) * ce + given * creativity).mean(),
            "row_weight": (given * ce).sum() / given.sum(),
            "temperature": ce.mean(),
        }[learned]
    for actual, expected in zip(penalised(loss), penalised(dense)):
        assert_within(actual, expected, 1e-12)


def test_a_temperature_that_follows_from_the_hidden_states():
    """A chunked backward that takes the loss again must not count a path through another argument twice."""
    hidden, weight, target = leaves(F64)

    def temperature():
        return 1 + hidden.square().mean(-1)

    loss = tightrope.linear_reality_creativity_loss(
        hidden, weight, target, balance=0.1, temperature=temperature(), strategy="chunked"
    )
    dense = reference.linear_reality_creativity_loss(
        hidden, weight, target, balance=0.1, temperature=temperature()
    )
    for actual, expected in zip(
        penalised(loss, (hidden, weight), [0, 1]), penalised(dense, (hidden, weight), [0, 1])
    ):
        assert_within(actual, expected, 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_of_a_model_whose_head_is_its_input(strategy):
    """One tensor as hidden states and head: both gradients, each with its derivative by both."""
    shared = randn(VOCAB, WIDTH, dtype=F64).requires_grad_()
    target = class_indices((VOCAB,), VOCAB)
    loss = tightrope.linear_reality_creativity_loss(shared, shared, target, balance=0.1, strategy=strategy)
    (actual,) = penalised(loss, (shared,), [0])
    (expected,) = penalised(exact((shared, shared, target)), (shared,), [0])
    assert_within(actual, expected, 1e-12)


def test_a_target_that_was_overwritten():
    """A chunked loss is taken again: with another target it would silently be another one's curvature."""
    hidden, weight, target = leaves()
    loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, strategy="chunked")
    target.zero_()
    torch.autograd.grad(loss, hidden, retain_graph=True)  # of first order nothing changed
    with pytest.raises(RuntimeError, match=r"tightrope.*modified in place"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("call", [name for name in CALLS if "logits" not in name])
def test_bfloat16(call):
    """Derivatives in the dtype of their tensors, near those of the upcast ones."""
    hidden, weight, target = (x.detach().bfloat16() if x.is_floating_point() else x for x in leaves())
    wide = hidden.double().requires_grad_(), weight.double().requires_grad_()
    narrow = hidden.requires_grad_(), weight.requires_grad_()
    gradient, expected = (
        torch.autograd.grad(f(x), x, create_graph=True)
        for f, x in (
            (lambda x: value(call, (*x, target)), narrow),
            (lambda x: exact((*x, target)), wide),
        )
    )
    directions = [g.detach().sign() for g in gradient]
    actual = torch.autograd.grad(gradient, narrow, directions)
    expected = torch.autograd.grad(expected, wide, [d.double() for d in directions])
    for one, true in zip(actual, expected):
        assert one.dtype == torch.bfloat16
        assert_within(one, true, 5e-3)


@pytest.mark.parametrize(("workspace_mb", "products"), [(None, 7), (1e-5, 10)], ids=["chunks", "tiles"])
@pytest.mark.parametrize("call", ["chunked", "own chunked"])
@pytest.mark.parametrize("creativity", ["entropy", "collision"])
def test_products_of_a_chunked_loss(monkeypatch, call, creativity, workspace_mb, products):
    """A graph that takes the loss again, or a curvature in the statistics that takes a sweep of its own."""
    hidden, weight, target = leaves(F64)
    if call == "chunked":
        options = {"balance": 0.1, "creativity": creativity}
        function = tightrope.linear_reality_creativity_loss
    else:
        options = {"loss_fn": lambda s: -s.target_log_prob + getattr(s, creativity).square()}
        function = tightrope.linear_vocab_loss
    count = [0]

    def counted(a, b, out, **others):
        count[0] += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return multiply(a, b, out, **others)

    multiply = gemm.multiply
    for module in (chunked, problem, tiles_of_products, streaming, tangents):
        monkeypatch.setattr(module, "multiply", counted)
    loss = function(hidden, weight, target, strategy="chunked", workspace_mb=workspace_mb, **options)
    gradients = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    first = count[0]
    torch.autograd.grad(gradients, (hidden, weight), [torch.ones_like(g) for g in gradients])
    one = 2 * ROWS * WIDTH * VOCAB
    assert (first, count[0] - first) == (3 * one, products * one)


@pytest.mark.parametrize("call", [name for name in CALLS if "statistics" not in name])
def test_a_batch_of_directions(call):
    """Several products in one call of the engine, which holds directions that have no values."""
    hidden, weight, target = leaves(F64)
    directions = randn(3, ROWS, WIDTH, seed=9, dtype=F64)
    (gradient,) = torch.autograd.grad(value(call, (hidden, weight, target)), hidden, create_graph=True)
    ask = {"outputs": gradient, "inputs": (hidden, weight), "retain_graph": True}
    batched = torch.autograd.grad(**ask, grad_outputs=directions, is_grads_batched=True)
    for i, direction in enumerate(directions):
        for one, expected in zip(batched, torch.autograd.grad(**ask, grad_outputs=direction)):
            assert_within(one[i], expected, 1e-12)


HOSTILE = ("plain", "offset", "peaked", "wide", "masked rows", "impossible classes")


def hostile(how):
    """(hidden states, head, bias, target, rows' weights or None), float32."""
    rows, vocab, width = 13, 301, 16
    hidden, weight = randn(rows, width), randn(vocab, width, seed=1) / 2
    bias, target = randn(vocab, seed=2), class_indices((rows,), vocab, seed=3)
    if how == "offset":
        bias += 1e4
    elif how == "peaked":
        hidden *= 30
    elif how == "wide":
        hidden[::2] *= 100
        bias[::3] = -1e4
    elif how == "masked rows":
        target[::2] = -100
        hidden[::2] = torch.nan
    elif how == "impossible classes":
        bias[::2] = -torch.inf
        target |= 1
    return hidden, weight, bias, target


@pytest.mark.parametrize("workspace_mb", [None, 1e-3], ids=["chunks", "tiles"])
@pytest.mark.parametrize("terms", [{}, {"creativity": "collision"}, {"reality": "squared_error"}], ids=str)
@pytest.mark.parametrize("how", HOSTILE)
def test_float32_beside_plain_pytorch(how, terms, workspace_mb):
    """A Hessian-vector product is at most a few times as wrong as that of the dense float32 loss."""
    hidden, weight, bias, target = hostile(how)
    directions = [randn(*x.shape, seed=7 + i) for i, x in enumerate((hidden, weight, bias))]
    terms = {"balance": 0.3, **terms}

    def product(function, dtype, **options):
        values = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        loss = function(values[0], values[1], target, values[2], **terms, **options)
        gradients = torch.autograd.grad(loss, values, create_graph=True)
        return torch.autograd.grad(gradients, values, [d.to(dtype) for d in directions])

    def dense(hidden, weight, target, bias, **options):
        kept = target != -100
        return reference.linear_reality_creativity_loss(hidden[kept], weight, target[kept], bias, **options)

    actual = product(tightrope.linear_reality_creativity_loss, torch.float32, workspace_mb=workspace_mb)
    truth, rough = product(dense, F64), product(dense, torch.float32)
    for name, one, true, usual in zip(("input", "weight", "bias"), actual, truth, rough):
        assert_no_worse(one, true, usual, 2e-6 * true.abs().max().item(), name)


def test_hidden_states_of_ignored_rows_and_their_directions_are_not_read():
    """A NaN of a padded row, or of its direction, must not reach the head's derivative."""
    hidden, weight, target = leaves(F64)
    target[1] = -100
    hidden = hidden.detach()
    hidden[1] = torch.nan
    hidden.requires_grad_()
    direction = randn(ROWS, WIDTH, seed=3, dtype=F64)
    direction[1] = torch.nan
    for skip_ignored in (None, False):
        loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, skip_ignored=skip_ignored)
        gradient = torch.autograd.grad(loss, hidden, create_graph=True)
        for derivative in torch.autograd.grad(gradient, (hidden, weight), direction):
            assert derivative.isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_no_row_that_counts(rows):
    """Nothing to sum up, and no NaN."""
    hidden, weight = randn(rows, WIDTH).requires_grad_(), randn(VOCAB, WIDTH).requires_grad_()
    target = torch.full((rows,), -100)
    loss = tightrope.linear_reality_creativity_loss(hidden, weight, target)
    gradients = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    for derivative in torch.autograd.grad(
        gradients, (hidden, weight), [torch.ones_like(g) for g in gradients]
    ):
        assert not derivative.any()


@every_call
def test_third_order(call):
    """What is not offered is an error, and not a zero."""
    arguments = leaves()
    (gradient,) = torch.autograd.grad(value(call, arguments), arguments[0], create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"tightrope.*third order"):
        second.sum().backward()


@every_call
def test_a_product_is_linear_in_its_direction(call):
    """The derivative by the direction is the product again: torch.autograd.functional.hvp takes it."""
    arguments = leaves(F64)
    direction = randn(ROWS, WIDTH, seed=5, dtype=F64)
    products = [
        torch.autograd.functional.hvp(f, arguments[0], direction)[1]
        for f in (lambda h: value(call, (h, *arguments[1:])), lambda h: exact((h, *arguments[1:])))
    ]
    assert_within(*products, 1e-12)


@every_call
def test_compiled(call):
    """The compiler has a graph of its own, which must not lose the penalty either."""
    if call == "chunked" and TORCH < (2, 13):
        pytest.skip("torch 2.11: gradients of a compiled function have no graph if it saved no leaf's tensor")
    hidden, weight, target = leaves()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden, weight):
        return value(call, (hidden, weight, target))

    loss = compiled(hidden, weight)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        (loss + gradient.square().sum()).backward()


@every_call
def test_a_batch_of_upstream_gradients(call):
    """The way out that the error names: several upstream gradients in one call."""
    hidden, weight, target = leaves()
    scales = torch.tensor([1.0, -2.0, 0.5])
    loss = value(call, (hidden, weight, target))
    (batched,) = torch.autograd.grad(loss, hidden, scales, is_grads_batched=True)
    z = reference.logits(hidden.double(), weight.double())
    p = z.log_softmax(-1)
    exact = (-0.9 * p.gather(-1, target[:, None])[:, 0] + 0.1 * (p.exp() * p).sum(-1)).mean()
    (one,) = torch.autograd.grad(exact, hidden)
    torch.testing.assert_close(batched, scales[:, None, None] * one, rtol=1e-4, atol=1e-6)
