"""Derivatives that are not offered raise, whatever else the graph holds: nothing is lost in silence."""

import pytest
import torch

import tightrope
from calls import CALLS, every_call, every_loss
from helpers import class_indices, randn
from tightrope import reference

# PyTorch's own: forward mode and the compiler use what it deprecates; backward(create_graph=True) may leak.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using backward:UserWarning"),
]
ROWS, VOCAB, WIDTH = 6, 11, 8


def leaves():
    hidden, weight = randn(ROWS, WIDTH), randn(VOCAB, WIDTH, seed=1)
    return hidden.requires_grad_(), weight.requires_grad_(), class_indices((ROWS,), VOCAB)


def value(call, arguments, **options):
    function, own = CALLS[call]
    loss = function(*arguments, **own, **options)
    return loss.sum()


@every_call
@pytest.mark.parametrize("of", [0, 1], ids=["input", "weight"])
def test_a_penalty_that_is_added_to_another_loss(call, of):
    """Its derivative was dropped without an error, since the other loss alone reached the leaves."""
    arguments = leaves()
    loss = value(call, arguments)
    (gradient,) = torch.autograd.grad(loss, arguments[of], create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match=r"tightrope.*first order"):
        (loss + gradient.square().sum()).backward()


@every_loss
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_reduction(call, reduction):
    """By the other leaf, which the rest of the sum reaches by itself."""
    hidden, weight, target = leaves()
    loss = value(call, (hidden, weight, target), reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="tightrope"):
        torch.autograd.grad(gradient.square().sum() + weight.square().sum(), weight)


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


def test_an_upstream_gradient_that_requires_grad():
    """The way on which PyTorch's own guard did raise still does."""
    hidden, weight, target = leaves()
    loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, reduction="none")
    upstream = torch.ones(ROWS, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss, hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="tightrope"):
        torch.autograd.grad(gradient.sum(), upstream)


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
@pytest.mark.parametrize("learned", ["balance", "row_weight", "row_args"])
def test_of_what_is_learned_beside_the_model(learned, strategy):
    """The gradient of the balance, of weights, of a loss's arguments depends on the model as well.

    Streaming it is a function of the statistics, whose derivative is of first order: right, and not refused.
    """
    hidden, weight, target = leaves()
    given = torch.full((ROWS,), 0.25, requires_grad=True)

    def penalised(loss):
        (gradient,) = torch.autograd.grad(loss, given, create_graph=True)
        return torch.autograd.grad(loss + 10 * gradient.square().sum(), (hidden, weight))

    p = (hidden @ weight.t()).log_softmax(-1)
    ce, creativity = -p.gather(-1, target[:, None])[:, 0], (p.exp() * p).sum(-1)
    if learned == "row_args":
        loss = tightrope.linear_vocab_loss(
            hidden, weight, target, lambda s, g: -g * s.target_log_prob, row_args=(given,), strategy=strategy
        )
        exact = (given * ce).mean()
    else:
        loss = tightrope.linear_reality_creativity_loss(
            hidden, weight, target, strategy=strategy, **{learned: given}
        )
        exact = ((1 - given) * ce + given * creativity).mean()
        if learned == "row_weight":
            exact = (given * ce).sum() / given.sum()
    if strategy == "chunked":
        with pytest.raises(RuntimeError, match="tightrope"):
            penalised(loss)
        return
    for actual, expected in zip(penalised(loss), penalised(exact)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@every_call
def test_compiled(call):
    """The compiler has a graph of its own, which must not lose the penalty either."""
    hidden, weight, target = leaves()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden, weight):
        return value(call, (hidden, weight, target))

    loss = compiled(hidden, weight)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|first order"):
        (loss + gradient.square().sum()).backward()


TRANSFORMS = {
    "grad": lambda f, h: torch.func.grad(f)(h),
    "vjp": lambda f, h: torch.func.vjp(f, h)[1](torch.ones(())),
    "jvp": lambda f, h: torch.func.jvp(f, (h,), (torch.ones_like(h),)),
    "vmap": lambda f, h: torch.func.vmap(f)(torch.stack([h, h])),
    "jacrev": lambda f, h: torch.func.jacrev(f)(h),
    "hessian": lambda f, h: torch.func.hessian(f)(h),
}


@every_call
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms(call, transform):
    """PyTorch's own message spoke of setup_context and named nobody."""
    hidden, weight, target = leaves()
    hidden, weight = hidden.detach(), weight.detach()
    with pytest.raises(RuntimeError, match=r"tightrope.*torch.func.*torch.autograd.grad"):
        TRANSFORMS[transform](lambda h: value(call, (h, weight, target)), hidden)


@every_call
def test_forward_mode(call):
    """A tangent was refused with a message that named an internal class."""
    hidden, weight, target = leaves()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden.detach(), torch.ones_like(hidden))
        with pytest.raises(RuntimeError, match=r"tightrope.*forward-mode"):
            value(call, (dual, weight.detach(), target))
        value(call, (hidden, weight, target)).backward()  # what carries no tangent is served


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
