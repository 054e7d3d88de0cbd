"""The loss of a fused model: its options, and balances of a handle, a call and a token.

Compared, in float64, with the same model unfused whose cross-entropy is replaced by that loss of logits. What
cannot be is an error that names what came.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import VOCAB, llama

import tightrope
from tightrope.integrations import fuse

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-12
OUT_OF_RANGE = r"balance: got .*, expected (a finite number of at least 0 and at most 1|\[0, 1\])"


def shifted(labels):
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def with_loss(model, function):
    """Unfused, with ``function(logits, labels)`` in place of cross-entropy."""

    def loss(logits, labels, vocab_size, **kwargs):
        return function(logits.reshape(-1, vocab_size), shifted(labels).reshape(-1))

    model.loss_function = loss
    return model


def check_against(function, balance=0.0, inputs=None, **options):
    """A step of the fused model is that of an unfused one with that loss of logits."""
    plain, handle = tiny.twins(balance=balance, **options)
    expected = tiny.loss_and_gradients(with_loss(plain, function), tiny.batch())
    actual = tiny.loss_and_gradients(handle.model, {**tiny.batch(), **(inputs or {})})
    assert tiny.off(actual, expected) < EXACT
    return handle


ASKED = [
    {"reduction": "sum"},
    {"reduction": "none"},
    {"ignore_index": 7},
    {"label_smoothing": 0.1},
    {"weight": torch.linspace(0.1, 2, VOCAB, dtype=torch.float64)},
]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("change", [lambda x: x, torch.abs])
@pytest.mark.parametrize("balance", [0.0, 0.05])
@pytest.mark.filterwarnings("ignore:.*because of abs:UserWarning")
def test_what_the_model_asks_its_cross_entropy_for(asked, change, balance):
    """An argument of a model's own call that is dropped, of logits that are there or not."""
    ours = {"class_weight" if name == "weight" else name: value for name, value in asked.items()}

    def own(logits, labels):
        return F.cross_entropy(change(logits), without_ignored(labels), **asked).sum()

    def expected(logits, labels):
        labels, logits = without_ignored(labels), change(logits)
        if not balance:
            return F.cross_entropy(logits, labels, **asked).sum()
        return tightrope.reality_creativity_loss(logits, labels, balance=balance, **ours).sum()

    def without_ignored(labels):
        return labels.clamp(min=0) if "ignore_index" in asked else labels

    plain, handle = tiny.twins(balance=balance)
    results = [
        tiny.loss_and_gradients(with_loss(model, loss), tiny.batch())
        for model, loss in ((handle.model, own), (plain, expected))
    ]
    assert tiny.off(*results) < EXACT


def test_label_smoothing():
    """The option, which stands for Trainer's, that is another smoothing than PyTorch's."""
    check_against(lambda *args: F.cross_entropy(*args, label_smoothing=0.1), label_smoothing=0.1)


def test_class_weight():
    """The same of the weights of classes."""
    weight = torch.linspace(0.1, 2, VOCAB, dtype=torch.float64)
    check_against(lambda *args: F.cross_entropy(*args, weight=weight), class_weight=weight)


def test_loss_fn():
    """A loss of statistics that the balance's goes before."""

    def focal(stats):
        return -((1 - stats.target_log_prob.exp()) ** 2) * stats.target_log_prob

    def dense(logits, target):
        log_p = logits.log_softmax(-1)[target != -100].gather(-1, target[target != -100, None]).squeeze(-1)
        return -((1 - log_p.exp()) ** 2 * log_p).mean()

    check_against(dense, loss_fn=focal)


def mixed(balance, **options):
    return lambda *args: tightrope.reality_creativity_loss(*args, balance=balance, **options)


def test_balance():
    """A balance, of the handle or of one call, that is not used, or that stays for the next call."""
    handle = check_against(mixed(0.05), 0.05)
    assert handle.balance == 0.05
    handle = check_against(mixed(0.03), 0.05, {"balance": 0.03})
    handle.balance = 0.04
    plain = with_loss(tiny.twins()[0], mixed(0.04))
    assert (
        tiny.off(
            tiny.loss_and_gradients(handle.model, tiny.batch()), tiny.loss_and_gradients(plain, tiny.batch())
        )
        < EXACT
    )
    check_against(mixed(0.2, creativity="support_entropy"), 0.2, creativity="support_entropy")


def test_balance_of_each_token():
    """Balances that are given to the tokens beside theirs."""
    balance = torch.linspace(0, 0.08, 45, dtype=torch.float64).reshape(5, 9)
    check_against(mixed(balance.reshape(-1)), balance)
    check_against(mixed(balance.reshape(-1)), 0.01, {"balance": balance})


def test_statistics():
    """Statistics of other tokens, of an earlier call, or with a graph that keeps the call's memory."""
    plain, handle = tiny.twins(balance=0.05)
    assert handle.stats is None
    inputs = tiny.batch()
    with tiny.Double():
        handle.model(**tiny.batch(seed=1))
        handle.model(**inputs)
        log_p = plain(**inputs).logits.log_softmax(-1).flatten(0, 1)
    stats, target = handle.stats, shifted(inputs["labels"]).flatten()
    kept = target != -100
    expected = {
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "target_log_prob": log_p.gather(-1, target.clamp(min=0)[:, None]).squeeze(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name), value * kept, rtol=1e-12, atol=0)
    assert torch.equal(stats.argmax, log_p.argmax(-1).where(kept, -1)) and 0 < kept.sum() < 45
    assert not any(value.requires_grad for value in stats if value is not None)


@pytest.mark.parametrize(
    "balance", [-0.1, 1.5, float("nan"), torch.tensor([0.2, 1.5]), torch.tensor(float("nan"))]
)
def test_balances_out_of_range(balance):
    """A balance that turns the loss around."""
    handle = fuse(llama(), balance=0.1)
    with pytest.raises(ValueError, match=OUT_OF_RANGE):
        handle.balance = balance
    assert handle.balance == 0.1
    with pytest.raises(ValueError, match=OUT_OF_RANGE):
        fuse(llama(), balance=balance)
    if isinstance(balance, torch.Tensor) and balance.dim():
        balance = torch.full((5, 9), 1.5)
    with pytest.raises(ValueError, match=OUT_OF_RANGE):
        handle.model(**tiny.batch(), balance=balance)
    assert handle.model(**tiny.batch()).loss.isfinite()


@pytest.mark.parametrize("shape", [(5,), (5, 8), (45,), (9, 5)])
def test_balances_of_another_shape(shape):
    """Balances that are stretched over other tokens than they were meant for."""
    handle = fuse(llama())
    handle.balance = torch.full(shape, 0.1)
    with pytest.raises(ValueError, match=r"balance: got shape .* expected .*\[5, 9\]"):
        handle.model(**tiny.batch())


def test_a_balance_without_labels():
    """A balance that has no loss to be in."""
    with pytest.raises(ValueError, match="balance: got one without labels"):
        fuse(llama()).model(tiny.batch()["input_ids"], balance=0.1)


def loss_fn(stats):
    return stats.lse


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temprature": 2.0}, TypeError, "unknown option temprature, expected one of .*temperature"),
        *[
            ({name: value}, TypeError, f"got {name}, which the model's own forward says")
            for name, value in {
                "softcap": 30.0,
                "logit_scale": 2.0,
                "reduction": "sum",
                "ignore_index": 0,
                "shift": 1,
                "normalizer": 3,
                "row_weight": torch.ones(3),
            }.items()
        ],
        ({"loss_fn": loss_fn, "label_smoothing": 0.1}, TypeError, "unknown option label_smoothing"),
        ({"loss_fn": loss_fn, "balance": 0.1}, ValueError, "balance: got one beside loss_fn"),
        ({"loss_fn": 3}, TypeError, "loss_fn: got int"),
        ({"creativity": "noise"}, ValueError, "creativity: got 'noise'"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing: got 2.0"),
    ],
)
def test_options_that_cannot_be(options, error, message):
    """An option that is taken and not used."""
    model = llama()
    with pytest.raises(error, match=message):
        fuse(model, **options)
    assert type(model).__mro__[1] is not type(model) and not hasattr(model, "_tightrope")


def test_a_balance_beside_a_loss_of_ones_own_later():
    """A balance that is set and does nothing."""
    handle = fuse(llama(), loss_fn=loss_fn)
    with pytest.raises(ValueError, match="balance: got one beside loss_fn"):
        handle.balance = 0.1


def test_a_balance_for_each_token_of_reordered_logits_is_refused():
    """Balances that silently go to other tokens, where a model makes its logits and reorders them."""
    model, ids = llama(), torch.randint(0, 50, (2, 9))

    def loss(logits, labels, **others):
        swapped = logits.permute(1, 0, 2).reshape(-1, logits.shape[-1])
        return F.cross_entropy(swapped, labels.t().reshape(-1))

    model.loss_function = loss
    fuse(model)
    with (
        pytest.warns(UserWarning, match="permute"),
        pytest.raises(ValueError, match=r"balance: .* each token"),
    ):
        model(input_ids=ids, labels=ids, balance=torch.full((2, 9), 0.01))


def test_a_balance_for_one_call_beside_a_loss_of_ones_own_is_refused():
    """A balance that is silently ignored."""
    model, ids = llama(), torch.randint(0, 50, (2, 9))
    fuse(model, loss_fn=lambda stats: -stats.target_log_prob)
    with pytest.raises(ValueError, match="balance: got one beside loss_fn"):
        model(input_ids=ids, labels=ids, balance=0.05)
