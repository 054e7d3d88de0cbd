"""All that can be passed to a fused model, and what it gives back, beside the same model unfused.

Models are in float64, and so are the losses and norms of the unfused one (`tiny.Double`): what differs is no
rounding. `check` also watches that no logits are made on the way.
"""

import gc
import inspect
import os
import weakref

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import VOCAB, gpt2, llama
from transformers import DataCollatorWithFlattening

from tightrope.integrations import DeferredLogits, fuse

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-12
KINDS = pytest.mark.parametrize("make", [llama, gpt2])


def check(inputs, make=llama):
    """A step of the fused model is that of the unfused one, which it gives, and makes no logits."""
    plain, handle = tiny.twins(make)
    expected = tiny.loss_and_gradients(plain, inputs)
    with tiny.Watch(inputs) as watch:
        actual = tiny.loss_and_gradients(handle.model, inputs)
    assert actual["loss"].shape == expected["loss"].shape
    assert tiny.off(actual, expected) < EXACT
    assert watch.made == handle.materialized == []
    return expected


def shifted(labels):
    return F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()


# Labels.


@KINDS
def test_shifted_labels_beside_labels(make):
    """Labels that are shifted though they are already: those of the next token but one."""
    inputs = tiny.batch()
    expected = check({**inputs, "shift_labels": shifted(inputs["labels"])}, make)
    assert tiny.off(expected, check(inputs, make)) == 0


def test_shifted_labels_without_labels():
    """A balance that is lost without a word, where a loss outside the model takes its logits."""
    inputs = tiny.batch()
    inputs["shift_labels"] = shifted(inputs.pop("labels"))
    with pytest.raises(RuntimeError, match="calls no cross-entropy"):
        fuse(llama(), balance=0.1).model(**inputs)
    plain, handle = tiny.twins()
    with pytest.warns(UserWarning, match="its loss is its own"):
        output = handle.model(**inputs)
    assert output.loss is None and torch.equal(output.logits + 0, plain(**inputs).logits)


def test_labels_by_position():
    """Labels that are looked for among the keywords alone."""
    plain, handle = tiny.twins()
    names = list(inspect.signature(plain.forward).parameters)
    inputs = tiny.batch()
    args = [inputs.get(name) for name in names[: names.index("labels") + 1]]
    with tiny.Double(), tiny.Watch(inputs) as watch:
        loss = handle.model(*args).loss
    with tiny.Double():
        torch.testing.assert_close(loss, plain(**inputs).loss, rtol=EXACT, atol=0)
    assert watch.made == [] and handle.stats is not None


@KINDS
def test_all_labels_ignored(make):
    """A mean over no tokens: NaN without the fused loss, and in all that is trained after it."""
    inputs = tiny.batch()
    inputs["labels"].fill_(-100)
    plain, handle = tiny.twins(make)
    assert plain(**inputs).loss.isnan()
    got = tiny.loss_and_gradients(handle.model, inputs)
    assert len(got) == 1 + len(list(plain.parameters()))
    assert all(not value.any() for value in got.values())
    assert (handle.stats.argmax == -1).all()


COUNTS = [17, 17.5, torch.tensor(17), torch.tensor(17.0), torch.tensor([17]), torch.tensor([17.0])]


@pytest.mark.parametrize("count", COUNTS)
@KINDS
def test_num_items_in_batch(count, make):
    """A form of the count that is not divided by, or divided by twice."""
    expected = check({**tiny.batch(), "num_items_in_batch": count}, make)
    assert expected["loss"].shape == (count.shape if isinstance(count, torch.Tensor) else ())


@pytest.mark.parametrize("count", [0, 0.0, torch.tensor(0), torch.tensor([0.0])])
def test_num_items_in_batch_that_is_0(count):
    """0 / 0, where a step has no token to train on."""
    inputs = {**tiny.batch(), "num_items_in_batch": count}
    inputs["labels"].fill_(-100)
    plain, handle = tiny.twins()
    if isinstance(count, torch.Tensor):
        assert plain(**inputs).loss.isnan()
    got = tiny.loss_and_gradients(handle.model, inputs)
    assert got["loss"].shape in ((), (1,)) and all(not value.any() for value in got.values())


# Sequences.


@pytest.mark.parametrize("side", ["left", "right"])
@KINDS
def test_padding(side, make):
    """Positions that lose their place when padding is left out of the loss."""
    inputs = tiny.batch()
    for row, length in enumerate([9, 4, 6, 1, 8]):
        padding = slice(0, 9 - length) if side == "left" else slice(length, 9)
        inputs["attention_mask"][row, padding] = 0
        inputs["labels"][row, padding] = -100
        inputs["input_ids"][row, padding] = 0
    check(inputs, make)


def test_packed_sequences():
    """A sequence's last token that is asked for the next one's first, or positions that are not passed on."""
    sentences = [list(range(3, 3 + length)) for length in (7, 1, 4, 9)]
    inputs = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": s} for s in sentences])
    assert inputs["input_ids"].shape == (1, 21) and (inputs["position_ids"] == 0).sum() == 4
    packed, total = check({**inputs, "use_cache": False})["loss"], 0.0
    for sentence in sentences:
        if len(sentence) > 1:
            ids = torch.tensor([sentence])
            total += check({"input_ids": ids, "labels": ids})["loss"] * (len(sentence) - 1)
    torch.testing.assert_close(packed * 17, total, rtol=EXACT, atol=0)


def test_logits_to_keep():
    """Hidden states that are cut twice, or labels that are compared with the tokens before."""
    inputs = tiny.batch()
    inputs["labels"] = inputs["labels"][:, -4:]
    check({**inputs, "logits_to_keep": 4})
    kept = torch.tensor([2, 5, 7])
    labels = tiny.batch()["labels"][:, kept + 1]
    inputs |= {"labels": labels, "shift_labels": labels, "logits_to_keep": kept}
    check(inputs)
    plain, handle = tiny.twins()
    logits = handle.model(**inputs).logits
    assert logits.shape == (5, 3, VOCAB) and torch.equal(logits + 0, plain(**inputs).logits)


# What comes back.


def test_no_labels():
    """Outputs that are not tensors, or not those of the model."""
    plain, handle = tiny.twins()
    inputs = tiny.batch()
    del inputs["labels"]
    output = handle.model(**inputs)
    assert output.loss is None and type(output.logits) is torch.Tensor and output.logits.requires_grad
    assert torch.equal(output.logits, plain(**inputs).logits)
    assert handle.stats is None


@KINDS
def test_generate(make):
    """Generation that is refused or changed, before, between and after steps of training."""
    plain, handle = tiny.twins(make)
    prompt = tiny.batch()["input_ids"][:, :3]
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "pad_token_id": 0}
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, handle.model)]
    for how in ({"do_sample": False}, {"num_beams": 2}, {"do_sample": False}):
        tokens = []
        for model, optimizer in zip((plain, handle.model), optimizers):
            tokens.append(model.generate(prompt, **asked, **how))
            assert model.train().training
            tiny.loss_and_gradients(model, tiny.batch())
            optimizer.step()
        assert torch.equal(*tokens)
    assert handle.materialized == []


def test_return_dict():
    """A tuple that is another one, or keeps what is no tensor."""
    plain, handle = tiny.twins()
    inputs = {**tiny.batch(), "return_dict": False, "output_hidden_states": True, "use_cache": False}
    with tiny.Double():
        actual, expected = handle.model(**inputs), plain(**inputs)
    assert isinstance(actual, tuple) and len(actual) == len(expected) == 3
    torch.testing.assert_close(actual[0], expected[0], rtol=EXACT, atol=0)
    assert torch.equal(actual[1] + 0, expected[1])
    assert all(torch.equal(*pair) for pair in zip(actual[2], expected[2]))


def test_logits_of_an_output():
    """Logits that are not the model's, or have no gradient for a loss beside the model's."""
    plain, handle = tiny.twins()
    inputs = tiny.batch()
    for model in (plain, handle.model):
        with tiny.Double():
            output = model(**inputs)
        (output.loss + output.logits.logsumexp(-1).square().mean()).backward()
    for p, q in zip(plain.parameters(), handle.model.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=EXACT * p.grad.abs().max())
    assert isinstance(output.logits, torch.Tensor) and handle.materialized == []


def test_logits_of_an_output_that_nobody_reads(monkeypatch):
    """Logits that are made by whoever carries them about, or asks for their shape."""
    handle = fuse(llama())
    monkeypatch.setattr(DeferredLogits, "materialize", None)
    logits = handle.model(**tiny.batch()).logits
    for carried in (logits, logits.detach(), logits.float(), logits.detach().float()):
        assert isinstance(carried, torch.Tensor) and carried.shape == (5, 9, VOCAB) and carried.dim() == 3
        assert (carried.dtype, carried.device, len(carried)) == (torch.float32, torch.device("cpu"), 5)


@pytest.mark.parametrize("reads", [True, False])
def test_nothing_is_kept(reads):
    """Hidden states that stay in memory after a step, until Python looks for cycles."""
    handle, kept = fuse(llama()), []
    handle.model.model.norm.register_forward_hook(
        lambda module, args, output: kept.append(weakref.ref(output))
    )
    gc.disable()
    try:
        output = handle.model(**tiny.batch(), use_cache=False)
        assert kept[0]() is not None
        output.loss.backward()
        if reads:
            output.logits.sum()
        del output
        assert kept[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_logits_of_an_output_without_gradients(without):
    """Logits made with a graph when they are read later, which numpy and copies refuse."""
    plain, handle = tiny.twins()
    with without():
        output, expected = handle.model(**tiny.batch()), plain(**tiny.batch())
    assert (output.logits.numpy() == expected.logits.numpy()).all()
    assert not (output.logits + 0).requires_grad


@KINDS
def test_logits_of_an_output_after_a_step(make):
    """Logits of the weights after a step, where those of the model unfused are of the weights before."""
    plain, handle = tiny.twins(make)
    optimizer = torch.optim.SGD(handle.model.parameters(), lr=0.1)
    output, read = handle.model(**tiny.batch()), handle.model(**tiny.batch())
    expected = plain(**tiny.batch()).logits
    assert torch.equal(read.logits + 0, expected)
    output.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="read before the optimizer's step"):
        output.logits.argmax(-1)
    assert torch.equal(read.logits + 0, expected)
    assert handle.model(**tiny.batch()).logits.argmax(-1).shape == (5, 9)


@KINDS
def test_autocast(make):
    """A loss in bfloat16, logits made for it, or other logits when they are read later."""
    inputs = tiny.batch()
    plain, fused = tiny.lively(make()), fuse(tiny.lively(make()))
    exact = tiny.loss_and_gradients(tiny.lively(make()).double(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected, reference = tiny.loss_and_gradients(plain, inputs), plain(**inputs)
        with tiny.Watch(inputs) as watch:
            actual, output = tiny.loss_and_gradients(fused.model, inputs), fused.model(**inputs)
    assert watch.made == fused.materialized == []
    assert tiny.off(actual, exact) < 1.1 * tiny.off(expected, exact) < 0.2
    assert output.loss.dtype == torch.float32
    assert output.logits.dtype == (output.logits + 0).dtype == torch.bfloat16
    assert torch.equal(output.logits + 0, reference.logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    """A part of the model that is run again outside the call whose head defers."""

    inputs, results = tiny.batch(), []
    for model in (tiny.lively(llama()), fuse(tiny.lively(llama())).model):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model.config.use_cache = False
        results.append(tiny.loss_and_gradients(model.train(), inputs))
    assert tiny.off(results[1], results[0]) < 1e-5
    assert tiny.off(results[0], tiny.loss_and_gradients(tiny.lively(llama()), inputs)) < 1e-5
