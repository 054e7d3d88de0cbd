"""Fused models beside themselves unfused: the named ones, each of which a patch by name would get wrong.

All are compared in float64, with the model as it is or with dense mathematics on the logits that it makes
unfused. One test watches what memory a step takes.
"""

import contextlib
import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import tiny
import torch
from named_models import BATCH, BUILDERS, LENGTH, Case, V, case_of
from torch import Tensor

from helpers import assert_within, rand, randn
from tightrope import reference
from tightrope.integrations import fuse

pytestmark = [pytest.mark.one_in(3), pytest.mark.usefixtures("one_thread")]
FUSED = [name for name in BUILDERS if name != "chameleon"]


@functools.cache
def unfused(name: str):
    """Output, and loss with gradients, of the model as it is."""
    return case_of(name).step()


@contextlib.contextmanager
def fused(case: Case, **options):
    handle = fuse(case.model, **options)
    try:
        yield handle
    finally:
        handle.restore()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Each relative to its own norm; one that is zero but for rounding, to the largest gradient's."""
    assert found.keys() == expected.keys()
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert_within(found[name], value, rtol, floor=1e-3 * rtol * largest, what=name)


@pytest.mark.parametrize("name", FUSED)
def test_loss_and_gradients(name):
    """A scale, cap, bias or second loss that is lost or counted twice; a shift; a gradient of a tied head."""
    case = case_of(name)
    with fused(case) as handle:
        _, found = case.step()
    assert_same(found, unfused(name)[1], 1e-12)
    assert handle.materialized == []


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
@pytest.mark.parametrize("name", FUSED)
def test_a_step_makes_no_logits(name, strategy):
    """N x V numbers anywhere in a step, in the loss or around it; float32 off by more than rounding."""
    case = case_of(name, torch.float32)
    counted = int((case.labels() != -100).sum())
    logits, eight_rows = (4 * V * rows for rows in (counted, 8))
    steps = []
    assert tiny.largest_allocation(lambda: steps.append(case.step()[1])) >= logits
    with fused(case, strategy=strategy, workspace_mb=eight_rows / 2**20):
        assert tiny.largest_allocation(lambda: steps.append(case.step()[1])) < logits / 2
    assert_same(steps[1], steps[0], 1e-4)


def collision(logits: Tensor, labels: Tensor, balance=0.2) -> Tensor:
    return reference.reality_creativity_loss(logits, labels, balance=balance, creativity="collision")


@pytest.mark.parametrize("name", FUSED)
def test_a_balance(name):
    """Creativity of other logits than the model's, or a balance that weighs its auxiliary loss too."""
    case = case_of(name)
    with fused(case, balance=0.2, creativity="collision"):
        _, found = case.step()
    assert_same(found, case.dense(collision), 1e-12)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_a_balance_for_each_token(name):
    """A balance at the position of the label instead of that which predicts it, or of another sequence."""
    case = case_of(name)
    balance = rand(BATCH, LENGTH, seed=6, dtype=torch.float64)
    with fused(case, balance=0.5, creativity="collision"):
        _, found = case.step(balance=balance)
    assert_same(found, case.dense(collision, balance), 1e-12)


def focal(stats) -> Tensor:
    return (1 - stats.target_log_prob.exp()) ** 2 * -stats.target_log_prob


def dense_focal(logits: Tensor, labels: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)[labels != -100].gather(-1, labels[labels != -100].unsqueeze(-1))
    return ((1 - log_p.exp()) ** 2 * -log_p).mean()


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "bart"])
def test_a_loss_of_ones_own(name):
    """A loss_fn that gets the statistics of logits before the cap, or loses the auxiliary loss."""
    case = case_of(name)
    with fused(case, loss_fn=focal):
        _, found = case.step()
    assert_same(found, case.dense(dense_focal), 1e-12)


@pytest.mark.parametrize("name", FUSED)
def test_statistics(name):
    """Statistics of logits that are not the model's, in another order, or of ignored tokens."""
    case = case_of(name)
    logits = unfused(name)[0].logits.detach().flatten(0, 1)
    ignored = case.labels() == -100
    log_p = logits.log_softmax(-1)
    with fused(case) as handle:
        assert handle.stats is None
        case.step()
    assert_within(handle.stats.entropy, -(log_p.exp() * log_p).sum(-1).masked_fill(ignored, 0), 1e-12)
    assert torch.equal(handle.stats.argmax, logits.argmax(-1).masked_fill(ignored, -1))
    assert not handle.stats.entropy.requires_grad


@pytest.mark.parametrize("name", FUSED)
def test_logits_are_there_when_they_are_read(name):
    """Logits in the outputs without the model's scale or cap, without a gradient, or with a warning."""
    case = case_of(name)

    def loss_of(output):
        return output.loss + (output.logits * randn(*output.logits.shape, seed=7, dtype=torch.float64)).mean()

    expected, values = case.step(loss_of)
    with fused(case) as handle:
        output, found = case.step(loss_of)
    assert_within(output.logits, expected.logits, 1e-12)
    assert_same(found, values, 1e-12)
    assert handle.materialized == []


def test_logits_that_are_first_read_without_gradients_have_them():
    """A gradient that is silently lost where a metric has read the logits before a loss does."""
    case = case_of("gemma2")

    def loss_of(output):
        with torch.no_grad():
            assert not (output.logits + 0).requires_grad
        return output.loss + output.logits.float().square().mean()

    with fused(case):
        _, found = case.step(loss_of)
    assert_same(found, case.step(loss_of)[1], 1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_of_evaluation_have_no_gradients(mode):
    """Logits that are read after the mode has ended, and so keep a graph, or cannot be read at all."""
    case = case_of("gemma2")
    with fused(case), mode(), tiny.Double():
        output = case.model(**case.batch)
    assert not (output.logits + 0).requires_grad
    assert_within(torch.from_numpy(output.logits.numpy()), unfused("gemma2")[0].logits, 1e-12)


def test_logits_that_are_read_outside_autocast():
    """Logits of another dtype than the unfused model's, or an error: of two dtypes, or when read again."""
    case = case_of("gemma2", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = case.model(**case.batch).logits
        with fused(case):
            logits = case.model(**case.batch).logits
    assert logits.dtype == (logits + 0).dtype == torch.bfloat16
    assert torch.equal(logits + 0, expected)
    assert torch.equal(logits.float(), expected.float())


@pytest.mark.parametrize("name", FUSED)
def test_outputs_in_a_tuple(name):
    """An output that is missing, out of place, still a record, or lost with restore(): return_dict=False."""
    case = case_of(name)
    expected, values = case.step(lambda output: output[0], return_dict=False)
    with fused(case):
        output, found = case.step(lambda output: output[0], return_dict=False)
    assert_same(found, values, 1e-12)
    for ours, theirs in zip(output, expected, strict=True):
        if isinstance(theirs, Tensor):
            assert_within(ours, theirs, 1e-12)
        else:
            assert type(ours) is type(theirs)


@pytest.mark.parametrize("balance", [0.0, 0.2])
def test_chameleon_makes_its_logits(balance):
    """Logits made without a warning, with two, or before what the model writes to them."""
    case = case_of("chameleon")
    said = "ChameleonForConditionalGeneration makes its N x V logits, because of __setitem__"
    with fused(case, balance=balance, creativity="collision") as handle:
        with pytest.warns(UserWarning, match=said) as caught:
            _, found = case.step()
        output, again = case.step()  # where a warning would be an error
    assert len(caught) == 1
    assert handle.materialized == ["__setitem__"]
    expected = case.dense(functools.partial(collision, balance=balance))
    assert_same(found, expected, 1e-12)
    assert_same(again, expected, 1e-12)
    assert torch.equal(output.logits, unfused("chameleon")[0].logits)
