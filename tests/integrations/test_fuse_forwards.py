"""Models whose own code does to its logits what a record of them can hold, or cannot: never another loss.

The loss function of a tiny model, in float64, changes its logits and takes the cross-entropy of them. Fused
it must be the same step, and with a balance that of Tightrope's loss of the changed logits. What cannot be
said of hidden states and a head makes the logits, and one warning names the operation.
"""

import functools
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import VOCAB
from torch import nn

import tightrope
from tightrope.integrations import fuse

pytestmark = [pytest.mark.one_in(2), pytest.mark.usefixtures("one_thread")]

EXACT = 1e-12
ROWS, LENGTH = 5, 9  # of tiny.batch
BALANCES = pytest.mark.parametrize("balance", [0.0, 0.05])
BIAS = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
KEPT = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 3 > 0


def step(model, inputs, loss_function, balance=None):
    """Loss, gradients and warnings of a model whose loss function is another: fused, or with that balance."""
    cross_entropy = F.cross_entropy
    if balance is not None:
        cross_entropy = functools.partial(tightrope.reality_creativity_loss, balance=balance)
    model.temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def loss(logits, labels, vocab_size, **kwargs):
        return loss_function(logits, labels, model, cross_entropy)

    model.loss_function = loss
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = tiny.loss_and_gradients(model, inputs)
    return result, [str(warning.message) for warning in caught]


def check(loss_function, balance, reason=None):
    """The step is the unfused model's; one warning, in the first call, names what made logits."""
    plain, handle = tiny.twins(balance=balance)
    inputs = tiny.batch()
    expected, _ = step(plain, inputs, loss_function, balance)
    with tiny.Watch(inputs) as watch:
        actual, caught = step(handle.model, inputs, loss_function)
    assert tiny.off(actual, expected) < EXACT
    assert handle.materialized == ([] if reason is None else [reason])
    assert [f"because of {reason}:" in message for message in caught] == [True] * len(handle.materialized)
    assert bool(watch.made) == (reason is not None)
    again, caught = step(handle.model, inputs, loss_function)
    assert caught == [] and tiny.off(again, actual) == 0
    assert handle.stats is not None


def changed(change):
    """A loss function that changes logits ``(..., V)``, and takes the mean over all tokens that are left."""

    def loss_function(logits, labels, model, cross_entropy):
        logits = change(logits)
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        count = logits.numel() // logits.shape[-1]
        labels = labels.reshape(-1).repeat(1 + count // labels.numel())[:count]
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.clamp(max=logits.shape[-1] - 1))

    return loss_function


FUSED = {
    "as it is": lambda x: x,
    "scale": lambda x: x * 0.5,
    "scale from the left": lambda x: 2 * x,
    "scale as an expression": lambda x: x * x.shape[-1] ** -0.5,
    "numpy's scale": lambda x: np.float64(0.5) * x,
    "scale, a buffer": lambda x: x * torch.tensor(0.5),
    "scale, a buffer of one": lambda x: torch.tensor([0.5]) * x,
    "scale of torch": lambda x: torch.mul(torch.tensor(0.5), x),
    "scale by name": lambda x: torch.mul(input=x, other=0.5),
    "negative scale": lambda x: x * -1,
    "no scale": lambda x: x * 0.0,
    "quotient": lambda x: torch.div(x / 2, other=0.25),
    "softcap": lambda x: 3.0 * torch.tanh(x / 3.0),
    "softcap by methods": lambda x: x.div(3.0).tanh().mul(3.0) * 0.5,
    "bias": lambda x: x + BIAS,
    "bias of one row": lambda x: torch.add(BIAS[None], x, alpha=1),
    "scale, bias, softcap": lambda x: 3.0 * torch.tanh((x * 2.0 + BIAS + BIAS) / 3.0),
    "dtypes": lambda x: x.float().to(torch.float64).to("cpu").type_as(x).contiguous(),
    "last token": lambda x: x[:, -1],
    "but the last token": lambda x: x[..., :-1, :],
    "one sequence": lambda x: x[1],
    "every other token": lambda x: x[:, ::2],
    "tokens by indices": lambda x: x[:, torch.tensor([3, 1, 1])],
    "tokens by a list": lambda x: x[[2, 0]],
    "tokens by two indices": lambda x: x[torch.tensor([[0], [3]]), torch.tensor([1, 2])],
    "tokens by a mask": lambda x: x[KEPT],
    "classes": lambda x: x[..., 5:40],
    "classes of classes": lambda x: x[..., 5:40][:, :, 2:-3],
    "classes after a bias": lambda x: (x + BIAS)[..., 5:40],
    "tokens by a mask, and classes": lambda x: x[KEPT, :40],
    "new dimensions": lambda x: x[None][:, :, None].unsqueeze(1).squeeze(0),
    "new dimension before the classes": lambda x: x[..., None, :],
    "views": lambda x: x.view(-1, VOCAB).view(x.size()).reshape(shape=(ROWS, -1, VOCAB)).flatten(0, 1),
    "functions": lambda x: torch.flatten(torch.reshape(x, shape=(LENGTH, ROWS, VOCAB)), 0, 1),
    "transposed tokens": lambda x: x.transpose(0, 1).contiguous(),
}
MADE = {
    "masked_fill": lambda x: x.masked_fill(torch.arange(VOCAB) < 3, -1e4),
    "__sub__": lambda x: x - 1.0,
    "__rsub__": lambda x: 1.0 - x,
    "__neg__": lambda x: -x,
    "__pow__": lambda x: x**2,
    "__matmul__": lambda x: x @ torch.eye(VOCAB, dtype=torch.float64),
    "__gt__": lambda x: torch.where(x > 0, x, x * 0.5),
    "__itruediv__": lambda x: _divided(x),
    "__iter__": lambda x: torch.stack(list(x)),
    "+": lambda x: x + 1.0,
    "*": lambda x: x * torch.linspace(1, 2, LENGTH)[:, None],
    "/": lambda x: x / np.float32(3),
    "[]": lambda x: torch.cat([x[..., ::2], x[..., 1::2]], dim=-1),
    "cat": lambda x: torch.cat([x, x[..., :2]], dim=-1),
    "stack": lambda x: torch.stack([x[0], x[1]]),
    "chunk": lambda x: torch.chunk(x, 2, dim=1)[1],
    "split": lambda x: x.split([4, 5], dim=1)[0],
    "unbind": lambda x: torch.unbind(x)[2],
    "clamp": lambda x: x.clamp(-1, 1),
    "tanh": lambda x: torch.tanh(torch.tanh(x)),
    "div": lambda x: x.div(0.1, rounding_mode="floor") + x,
    "dropout": lambda x: F.dropout(x, 0.0),
    "linear": lambda x: F.linear(x, torch.eye(VOCAB, dtype=torch.float64)),
    "einsum": lambda x: torch.einsum("bsv,vw->bsw", x, torch.eye(VOCAB, dtype=torch.float64)),
    "gather": lambda x: x.gather(-1, torch.arange(VOCAB).flip(0).expand(ROWS, LENGTH, -1)),
    "log_softmax": lambda x: torch.log_softmax(x, dim=-1),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "max": lambda x: x - x.max(dim=-1, keepdim=True).values,
    "permute": lambda x: x.permute(1, 0, 2),
    "transpose": lambda x: x.transpose(1, 2).transpose(1, 2),
    "mT": lambda x: x.mT.mT,
    "reshape": lambda x: x.reshape(-1).reshape(ROWS, LENGTH, -1),
    "flatten": lambda x: x.flatten(1).view(ROWS, LENGTH, VOCAB),
    "squeeze": lambda x: x[None].squeeze((0,)),
    "unsqueeze": lambda x: x.unsqueeze(-1)[..., 0],
    "expand": lambda x: x[:1].expand(2, -1, -1),
    "clone": lambda x: x.clone(),
    "logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True).detach(),
    "sum": lambda x: x / (50 + x[0, 0].sum().item()),
}


def _divided(x):
    x /= 2
    return x


@BALANCES
@pytest.mark.parametrize("name", FUSED)
def test_what_a_record_holds(name, balance):
    """A change that goes to the wrong side of the product, in the wrong order, or twice."""
    check(changed(FUSED[name]), balance)


@BALANCES
@pytest.mark.parametrize("name", MADE)
def test_what_makes_the_logits(name, balance):
    """A change that is left out, an error, or logits that cost memory and nobody knows why."""
    check(changed(MADE[name]), balance, name)


@BALANCES
def test_a_learned_temperature(balance):
    """A factor's gradient that is lost where its value is taken for a number."""

    def by_product(logits, labels, model, cross_entropy):
        return changed(lambda x: x * model.temperature)(logits, labels, model, cross_entropy)

    def by_quotient(logits, labels, model, cross_entropy):
        return changed(lambda x: x / model.temperature)(logits, labels, model, cross_entropy)

    check(by_product, balance, "*")
    check(by_quotient, balance, "/")


@BALANCES
def test_cross_entropy_of_classes_in_the_second_dimension(balance):
    """Classes that are taken for tokens, as PyTorch has them second."""

    def loss_function(logits, labels, model, cross_entropy):
        if cross_entropy is F.cross_entropy:
            return cross_entropy(logits.transpose(1, 2), labels)
        return cross_entropy(logits, labels)

    check(loss_function, balance, "transpose")


@BALANCES
def test_two_losses(balance):
    """A second loss of the same logits that stands for the first, or is left out."""

    def loss_function(logits, labels, model, cross_entropy):
        first = cross_entropy(logits[:, :4].reshape(-1, VOCAB), labels[:, :4].reshape(-1))
        return 2 * first + cross_entropy(logits[1:].view(-1, VOCAB), labels[1:].view(-1))

    check(loss_function, balance)


@BALANCES
@pytest.mark.parametrize("first", [True, False])
def test_a_loss_beside_the_cross_entropy(balance, first):
    """A z-loss of a model's own that loses its gradient, or takes away the cross-entropy's."""

    def loss_function(logits, labels, model, cross_entropy):
        ours = cross_entropy(logits.view(-1, VOCAB), labels.view(-1)) if first else 0
        z_loss = logits.logsumexp(-1).square().mean()
        return z_loss + (ours if first else cross_entropy(logits.view(-1, VOCAB), labels.view(-1)))

    check(loss_function, balance, "logsumexp")


@BALANCES
def test_a_metric_without_gradients_before_the_loss(balance):
    """Logits made without a graph for an accuracy, which the loss then takes: nothing would be trained."""

    def loss_function(logits, labels, model, cross_entropy):
        with torch.no_grad():
            model.accuracy = (logits.argmax(-1) == labels).double().mean()
        return changed(lambda x: x * 2)(logits, labels, model, cross_entropy)

    check(loss_function, balance, "argmax")


@BALANCES
def test_a_constant_beside_the_logits(balance):
    """A gradient through what the model made without gradients."""

    def loss_function(logits, labels, model, cross_entropy):
        with torch.no_grad():
            constant = logits * 2
        return changed(lambda x: x + constant)(logits, labels, model, cross_entropy)

    check(loss_function, balance, "no_grad")


# Losses that are not cross-entropy.


def nll(logits, labels, model, cross_entropy):
    return F.nll_loss(F.log_softmax(logits.view(-1, VOCAB), dim=-1), labels.view(-1))


def soft(logits, labels, model, cross_entropy):
    wanted = F.one_hot(labels.view(-1).clamp(min=0), VOCAB).double()
    return F.cross_entropy(logits.view(-1, VOCAB), wanted)


def one_row(logits, labels, model, cross_entropy):
    return F.cross_entropy(logits[1, 0], labels[1, 0])


def single(logits, labels, model, cross_entropy):
    return -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).mean()


@pytest.mark.parametrize("loss_function", [nll, soft, one_row, single])
def test_a_loss_of_another_kind(loss_function):
    """A balance that is lost without a word; or a loss that is right and refused."""
    plain, handle = tiny.twins()
    inputs = tiny.batch()
    expected, _ = step(plain, inputs, loss_function)
    actual, caught = step(handle.model, inputs, loss_function)
    assert tiny.off(actual, expected) < EXACT
    assert len(caught) == 2 and "its loss is its own, and not fused" in caught[1]
    assert step(handle.model, inputs, loss_function)[1] == []
    handle.balance = 0.05
    with pytest.raises(RuntimeError, match="its loss is its own, without the balance"):
        step(handle.model, inputs, loss_function)
    handle.restore()
    with pytest.raises(RuntimeError, match="its loss is its own, without the balance or the options"):
        step(fuse(handle.model, label_smoothing=0.1).model, inputs, loss_function)


# Writes.


def write_to_all(x):
    x[..., 0] = 5.0
    return x


def write_to_the_whole(x):
    view = x.view(-1, VOCAB)
    x[..., 0] = 5.0
    return view


def write_to_a_view(x):
    view = x.view(-1, VOCAB)[3:]
    view[..., 0] = 5.0
    view /= 2
    return x


def write_to_a_view_of_the_past(x):
    view = x[:, 1:]
    x.clamp_(-1, 1)
    view.mul_(2)
    return torch.cat([x, view], dim=1)


def write_after_a_product(x):
    product = x * 2
    x.zero_()
    return product + x


def write_after_a_copy(x):
    copy, same = x[:, torch.arange(LENGTH)], x.contiguous()
    x.zero_()
    return copy * 2 + same


def write_after_a_product_that_is_all(x):
    product = 3.0 * torch.tanh(x / 3.0)
    x.zero_()
    return product


def write_to_a_product(x):
    product = x * 2
    product[..., 0] = 5.0
    return x + product


WRITES = {
    write_to_all: "__setitem__",
    write_to_the_whole: "__setitem__",
    write_to_a_view: "__setitem__",
    write_to_a_view_of_the_past: "clamp_",
    write_after_a_product: "zero_",
    write_after_a_copy: "zero_",
    write_after_a_product_that_is_all: "zero_",
    write_to_a_product: "__setitem__",
}


@BALANCES
@pytest.mark.parametrize("write", WRITES)
def test_writes(write, balance):
    """A write that the loss or a view does not see, or that reaches a copy made before it."""
    check(changed(write), balance, WRITES[write])


@BALANCES
def test_a_write_to_what_the_loss_is_of(balance):
    """A write that the cross-entropy does not see, as nothing is done to the logits after it."""

    def loss_function(logits, labels, model, cross_entropy):
        rows = logits.view(-1, VOCAB)
        rows[:, 0] = 5.0
        return cross_entropy(rows, labels.view(-1))

    check(loss_function, balance, "__setitem__")
