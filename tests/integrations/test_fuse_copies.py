"""A fused model that is saved, loaded, pickled, copied, restored or given another head.

What comes back is what transformers' tools expect, or fused as its handle says, and never a mixture.
"""

import copy
import inspect
import io
import os
import types

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import tiny
import torch
from tiny import VOCAB, gpt2, llama
from torch import nn
from transformers import AutoModelForCausalLM, LlamaModel

from tightrope.integrations import Handle, fuse

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-12
KINDS = pytest.mark.parametrize("make", [llama, gpt2])


def same_step(model, other):
    """Whether a step is the same, to the last bit."""
    return tiny.off(*(tiny.loss_and_gradients(m, tiny.batch()) for m in (model, other))) == 0


# Names.


@KINDS
def test_names_stay(make):
    """A class of another name, where libraries ask for names, signatures and classes."""
    plain, handle = tiny.twins(make)
    model = handle.model
    assert isinstance(model, type(plain)) and isinstance(model.get_output_embeddings(), nn.Linear)
    for module, other in zip(model.modules(), plain.modules()):
        assert (type(module).__name__, type(module).__module__) == (
            type(other).__name__,
            type(other).__module__,
        )
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert inspect.signature(type(model).forward) == inspect.signature(type(plain).forward)
    assert type(model).forward.__qualname__ == type(plain).forward.__qualname__
    assert str(model) == str(plain) and model.state_dict().keys() == plain.state_dict().keys()
    assert model.config.to_dict() == plain.config.to_dict()


# Files.


@KINDS
def test_save_and_load_pretrained(make, tmp_path):
    """A configuration that names a class which nobody has, or a head's weight that is not saved."""
    plain, handle = tiny.twins(make)
    handle.model(**tiny.batch()).loss.backward()
    handle.model.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    texts = [(tmp_path / name / "config.json").read_text() for name in ("fused", "plain")]
    assert texts[0] == texts[1] and f'"{type(plain).__name__}"' in texts[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float64)
    assert type(loaded) is type(plain) and Handle.find(loaded) is None
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), plain.parameters()))
    assert type(loaded.get_output_embeddings()) is nn.Linear
    again = fuse(loaded, balance=0.05)
    assert (
        tiny.off(
            *(
                tiny.loss_and_gradients(m, tiny.batch())
                for m in (again.model, tiny.twins(make, 0.05)[1].model)
            )
        )
        < 1e-14  # a file's weights may lie otherwise in memory, and be added up in another order
    )


@KINDS
def test_a_pickled_model(make):
    """A class made at run time that a pickle cannot name, or a handle that is another model's."""
    handle = tiny.twins(make, balance=0.05)[1]
    file = io.BytesIO()
    torch.save(handle.model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(handle.model) and loaded is not handle.model
    assert Handle.of(loaded) is not handle and Handle.of(loaded).model is loaded
    assert Handle.of(loaded).balance == 0.05
    assert same_step(loaded, handle.model)
    handle.balance = 0.0
    assert not same_step(loaded, handle.model)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (make is gpt2)


@KINDS
def test_state_dicts(make):
    """Names of weights that a model which is not fused does not know, or the other way round."""
    plain, handle = tiny.twins(make)
    with torch.no_grad():
        plain.get_output_embeddings().weight.mul_(2)
    handle.model.load_state_dict(plain.state_dict())
    assert tiny.off(*(tiny.loss_and_gradients(m, tiny.batch()) for m in (handle.model, plain))) < EXACT
    plain.load_state_dict(handle.model.state_dict())


# Copies.


@KINDS
def test_deepcopy(make):
    """A copy that is steered by the handle of its original, or whose head is the original's."""
    handle = tiny.twins(make, balance=0.05)[1]
    other = copy.deepcopy(handle.model)
    copied = Handle.of(other)
    assert copied is not handle and copied.model is other and Handle.of(handle.model) is handle
    assert copied.balance == 0.05 and same_step(other, handle.model)
    copied.balance = 0.01
    assert handle.balance == 0.05 and not same_step(other, handle.model)
    assert (other.get_output_embeddings().weight is other.get_input_embeddings().weight) == (make is gpt2)
    with torch.no_grad():
        other.get_output_embeddings().weight.zero_()
    assert handle.model.get_output_embeddings().weight.any()
    handle.stats = None
    other(**tiny.batch())
    assert handle.stats is None and copied.stats is not None
    copied.restore()
    assert Handle.find(other) is None and Handle.of(handle.model) is handle
    assert not same_step(other, handle.model)


def test_a_copy_of_a_copy_in_a_wrapper():
    """A copy by way of what it is in: exponential averages of weights copy so."""
    handle = fuse(llama(), balance=0.05)
    other = copy.deepcopy(copy.deepcopy(nn.ModuleList([handle.model])))
    Handle.of(other).balance = 0.02
    assert handle.balance == 0.05 and Handle.of(other).model is other[0]
    assert copy.copy(handle.model).lm_head is handle.model.lm_head


# The way back.


@KINDS
@pytest.mark.parametrize("loss_fn", [None, lambda stats: -stats.target_log_prob])
def test_restore(make, loss_fn):
    """Something that is left behind: a class, an attribute, a hook; or a model that cannot be fused again."""
    model = tiny.twins(make)[0]
    modules = list(model.modules())
    before = [(type(module), dict(vars(module))) for module in modules]
    expected = tiny.loss_and_gradients(model, tiny.batch())
    logits = model(**tiny.batch()).logits
    for balance in (0.0, 0.05):
        handle = fuse(model, 0.0 if loss_fn else balance, loss_fn)
        tiny.loss_and_gradients(model, tiny.batch())
        with torch.no_grad():
            model(**tiny.batch()).logits.sum()
        handle.restore()
        assert list(model.modules()) == modules
        assert all(
            type(module) is kind and vars(module) == attributes
            for module, (kind, attributes) in zip(modules, before)
        )
        assert tiny.off(tiny.loss_and_gradients(model, tiny.batch()), expected) == 0
        output = model(**tiny.batch())
        assert type(output.logits) is torch.Tensor and torch.equal(output.logits, logits)
        assert Handle.find(model) is None
        with pytest.raises(ValueError, match="expected a fused one"):
            Handle.of(model)
    handle.restore()  # nothing is left to do
    assert [type(module) for module in modules] == [kind for kind, _ in before]


def test_an_error_in_a_forward():
    """A call that ends in an error, after which the head defers for ever."""
    plain, handle = tiny.twins()

    def fails(logits, labels, vocab_size, **kwargs):
        raise KeyError("mine")

    handle.model.loss_function = fails
    with pytest.raises(KeyError, match="mine"):
        handle.model(**tiny.batch())
    assert type(handle.model.lm_head(torch.ones(2, 32, dtype=torch.float64))) is torch.Tensor
    handle.model.loss_function = plain.loss_function
    assert tiny.off(*(tiny.loss_and_gradients(m, tiny.batch()) for m in (handle.model, plain))) < EXACT


# What cannot be fused, or is not any more.


def test_fused_twice():
    """Two handles of one model, of which one does nothing."""
    handle = fuse(llama())
    for model in (handle.model, nn.ModuleList([handle.model])):
        with pytest.raises(
            ValueError, match="model: got a LlamaForCausalLM that is fused, expected one that is not"
        ):
            fuse(model)
    handle.restore()
    fuse(handle.model)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (None, TypeError),
        ("llama", TypeError),
        (llama, TypeError),
        (nn.Linear(3, 3), ValueError),
        (nn.Linear, TypeError),
        (LlamaModel(llama().config), ValueError),
    ],
)
def test_what_is_no_model(model, error):
    """A model without a head that is taken and never fused."""
    with pytest.raises(error, match=r"model: got \w+, expected a transformers.PreTrainedModel"):
        fuse(model)


def in_a_larger_vocabulary(model):
    torch.manual_seed(1)
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)


def with_a_new_head(model):
    torch.manual_seed(1)
    model.set_output_embeddings(nn.Linear(32, VOCAB, bias=False, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "make"), [(in_a_larger_vocabulary, llama), (with_a_new_head, llama), (with_a_new_head, gpt2)]
)
def test_a_head_that_is_replaced(change, make):
    """A head that fuse does not know: a balance that is lost without a word, or a loss that is another."""
    plain, handle = tiny.twins(make)
    change(plain), change(handle.model)
    expected = tiny.loss_and_gradients(plain, tiny.batch())
    with pytest.warns(UserWarning, match="its loss is its own, and not fused"):
        actual = tiny.loss_and_gradients(handle.model, tiny.batch())
    assert tiny.off(actual, expected) == 0 and handle.stats is None
    handle.balance = 0.05
    with pytest.raises(RuntimeError, match="calls no cross-entropy of what its head Linear gave"):
        handle.model(**tiny.batch())
    handle.restore()
    handle = fuse(handle.model)
    assert tiny.off(tiny.loss_and_gradients(handle.model, tiny.batch()), expected) < EXACT
    assert handle.stats is not None


def test_a_tied_head_that_grows():
    """A head whose weight is another one, of more rows, than when it was fused."""
    plain, handle = tiny.twins(gpt2)
    for model in (plain, handle.model):
        in_a_larger_vocabulary(model)
    assert tiny.off(*(tiny.loss_and_gradients(m, tiny.batch()) for m in (handle.model, plain))) < EXACT
    assert handle.stats is not None and handle.materialized == []


def test_a_forward_that_is_wrapped():
    """A forward on the instance, as accelerate puts one there, that goes past the fused one."""
    handle = tiny.twins(balance=0.05)[1]
    expected = tiny.loss_and_gradients(handle.model, tiny.batch())
    inner = handle.model.forward
    handle.model.forward = types.MethodType(
        lambda self, *args, **kwargs: inner(*args, **kwargs), handle.model
    )
    assert tiny.off(tiny.loss_and_gradients(handle.model, tiny.batch()), expected) == 0
    assert handle.stats is not None
