"""Modes that surround calls: a default device, tensors without values, batched gradients, traces."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import tightrope
from calls import CALLS, every_call, every_loss
from helpers import class_indices, randn
from tightrope.strategies import workspace

ROWS, VOCAB, WIDTH = 33, 1301, 16
# PyTorch's own, in export and in the compiler.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")
]


def tensors(device=None, ignored=False):
    hidden, weight = randn(ROWS, WIDTH), randn(VOCAB, WIDTH, seed=1)
    target = class_indices((ROWS,), VOCAB, ignored=0.3 if ignored else 0.0)
    if device is not None:
        hidden, weight, target = (t.to(device) for t in (hidden, weight, target))
    return hidden.requires_grad_(), weight.requires_grad_(), target


def value(call, arguments, **options):
    function, own = CALLS[call]
    return function(*arguments, **own, **options)


@every_call
@pytest.mark.parametrize("ignored", [False, True], ids=["all count", "some ignored"])
def test_a_default_device_of_another_kind(call, ignored):
    """The workspace was made on the default device, kept, and crashed every later loss of the process."""
    arguments = tensors(ignored=ignored)
    expected = value(call, arguments)
    wanted = torch.autograd.grad(expected, arguments[:2])
    workspace.release()
    with torch.device("meta"):
        inside = value(call, arguments)
        got = torch.autograd.grad(inside, arguments[:2])
    for loss, grads in ((inside, got), (value(call, arguments), None)):
        assert torch.equal(loss, expected)
        assert grads is None or all(torch.equal(a, b) for a, b in zip(grads, wanted))


@every_call
@pytest.mark.parametrize("ignored", [False, True], ids=["all count", "some ignored"])
def test_fake_tensors(call, ignored):
    """Memory planners run a step without data: nothing may ask for a value, or leave a fake behind."""
    with FakeTensorMode():
        hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH)
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        target = torch.randint(VOCAB, (ROWS,))
        value(call, (hidden, weight, target.masked_fill(target < 9, -100) if ignored else target)).backward()
        assert hidden.grad.shape == hidden.shape
        assert weight.grad.shape == weight.shape
    assert value(call, tensors()).isfinite()


@every_call
def test_meta_tensors(call):
    hidden, weight, target = tensors("meta")
    hidden.retain_grad()
    value(call, (hidden, weight, target)).backward()
    assert hidden.grad.shape == hidden.shape
    assert hidden.grad.is_meta and weight.grad.is_meta


@every_loss
@pytest.mark.parametrize("what", ["row_weight", "balance", "normalizer"])
def test_options_without_values(call, what):
    """Checks of values must not look at what has none."""
    if what == "balance" and "own" in call:
        pytest.skip("a loss of one's own has no balance")
    with FakeTensorMode():
        hidden = torch.randn(ROWS, WIDTH).requires_grad_()
        weight, target = torch.randn(VOCAB, WIDTH), torch.randint(VOCAB, (ROWS,))
        given = torch.rand(()) if what == "normalizer" else torch.rand(ROWS)
        if what == "balance":
            function = tightrope.linear_reality_creativity_loss
            function(hidden, weight, target, balance=given, strategy="chunked").backward()
        else:
            value(call, (hidden, weight, target), **{what: given}).backward()
        assert hidden.grad.shape == hidden.shape


def _by_autograd(loss, leaves, upstream):
    return torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True)


def _by_vmap(loss, leaves, upstream):
    return torch.func.vmap(lambda one: torch.autograd.grad(loss, leaves, one))(upstream)


slower_than_possible = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@every_call
@pytest.mark.parametrize("batched", [_by_autograd, pytest.param(_by_vmap, marks=slower_than_possible)])
def test_batched_gradients(batched, call):
    """``upstream.item()`` stopped a backward of several upstream gradients at once.

    Those of torch.func are other tensors than those of is_grads_batched, and hold no number either.
    """
    arguments = tensors(ignored=True)
    scales = torch.tensor([1.0, 0.0, -3.0])
    got = batched(value(call, arguments), arguments[:2], scales)
    one = torch.autograd.grad(value(call, arguments), arguments[:2])
    for batch, single in zip(got, one):
        torch.testing.assert_close(batch, scales.view(-1, 1, 1) * single)


class Model(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.head, self.call = torch.nn.Linear(WIDTH, VOCAB, bias=False), call

    def forward(self, hidden, target):
        return value(self.call, (hidden, self.head.weight, target))


@every_call
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_number_of_tokens(call, strict):
    """The number of tokens of the example was baked in, or guarded by the choice of a strategy."""
    model = Model(call)
    hidden, _, target = tensors()
    rows = torch.export.Dim("rows", min=2, max=4096)
    shapes = ({0: rows}, {0: rows})
    program = torch.export.export(model, (hidden.detach(), target), strict=strict, dynamic_shapes=shapes)
    for count in (3, ROWS, 200):
        given = randn(count, WIDTH, seed=count), class_indices((count,), VOCAB)
        torch.testing.assert_close(program.module()(*given), model(*given))


@every_call
def test_make_fx_with_any_number_of_tokens(call):
    weight = randn(VOCAB, WIDTH, seed=1)
    hidden, _, target = tensors()

    def step(hidden, target):
        return value(call, (hidden, weight, target))

    trace = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)(hidden.detach(), target)
    for count in (3, ROWS, 200):
        given = randn(count, WIDTH, seed=count), class_indices((count,), VOCAB)
        torch.testing.assert_close(trace(*given), step(*given))


@every_call
def test_make_fx_of_real_tensors(call):
    """They have values, but a number that is read would be a constant of the trace: the rows that count."""
    weight = randn(VOCAB, WIDTH, seed=1)
    hidden, _, target = tensors(ignored=True)
    weight.requires_grad_()

    def step(hidden, target):
        return value(call, (hidden, weight, target))

    trace = make_fx(step)(hidden.detach(), target)
    given = randn(ROWS, WIDTH, seed=7), class_indices((ROWS,), VOCAB, seed=8, ignored=0.5)
    torch.testing.assert_close(trace(*given), step(*given))


@pytest.mark.parametrize(
    ("call", "products"), [("chunked", 3), ("own chunked", 3), ("streaming", 4), ("own streaming", 4)]
)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen head"])
def test_products_are_counted(call, products, frozen):
    """An operator is opaque to FlopCounterMode: most of a small model's products were missing."""
    hidden, weight, target = tensors(ignored=True)
    weight.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        value(call, (hidden, weight, target)).backward()
    counted = int((target != -100).sum())
    assert counter.get_total_flops() == 2 * counted * WIDTH * VOCAB * (products - frozen)


@pytest.mark.parametrize(("workspace_mb", "again"), [(None, 0), (1e-5, 3)], ids=["chunks", "tiles"])
def test_products_of_a_second_derivative(workspace_mb, again):
    """Seven, of a direction of hidden states and head, and three more where the logits are made again."""
    hidden, weight, target = tensors(ignored=True)
    weight.requires_grad_()
    options = {"strategy": "streaming", "workspace_mb": workspace_mb}
    with FlopCounterMode(display=False) as counter:
        loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, balance=0.1, **options)
        gradients = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
        before = counter.get_total_flops()
        torch.autograd.grad(gradients, (hidden, weight), [torch.ones_like(g) for g in gradients])
    product = 2 * int((target != -100).sum()) * WIDTH * VOCAB
    assert (before, counter.get_total_flops() - before) == (4 * product, (7 + again) * product)


def test_the_flop_counter_may_come_first():
    """Its formulas are registered when it is imported, before this library or after."""
    import subprocess
    import sys

    code = """
import torch
{first}
import tightrope
from torch.utils.flop_counter import FlopCounterMode
hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8)
with FlopCounterMode(display=False) as counter:
    tightrope.linear_reality_creativity_loss(hidden, weight, torch.tensor([0, 1, 2, 3])).backward()
print(counter.get_total_flops())
"""
    for first in ("import torch.utils.flop_counter", ""):
        command = [sys.executable, "-W", "ignore", "-c", code.format(first=first)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert int(done.stdout.split()[-1]) == 2 * 2 * 4 * 8 * 11
