"""What else changes a model that is fused: accelerate's hooks, Liger's patch, quantised and unusual heads.

All of it works on instances: it puts functions in place of forwards, weights in place of weights. Before
`fuse` and after it, the loss and the gradients are those of the same model unfused, or an error says why not.
"""

import os
import types

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from torch import nn
from transformers import LlamaForCausalLM

import tightrope
from tightrope.integrations import Handle, fuse

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-11
WHEN = ["before", "after"]


def plain(**settings):
    return tiny.lively(tiny.llama(**{"dtype": torch.float64, **settings}))


def fused(change, when, model=None, **settings):
    """A handle, and what ``change(model)`` gives, or the model itself where it gives nothing."""
    model = plain() if model is None else model
    if when == "before":
        handle = fuse(model, **settings)
        return handle, change(model) or model
    model = change(model) or model
    return fuse(model, **settings), model


def expected_of(model=None):
    return tiny.loss_and_gradients(plain() if model is None else model, tiny.batch())


def is_fused(model, expected=None, tolerance=EXACT):
    """Whether its step is that of the model unfused, without logits."""
    batch, expected = tiny.batch(), expected or expected_of()
    with tiny.Watch(batch) as watch:
        got = tiny.loss_and_gradients(model, batch)
    return tiny.off(got, expected) < tolerance and watch.made == []


# accelerate.


@pytest.fixture
def accelerator():
    yield lambda precision: Accelerator(cpu=True, mixed_precision=precision)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])  # which leaves float64 as it is
@pytest.mark.parametrize("when", WHEN)
def test_prepared(accelerator, when, precision):
    """Would catch a forward on the instance that goes past the fused one, or stays when it is restored."""
    handle, model = fused(accelerator(precision).prepare, when)
    assert is_fused(model) and handle.stats is not None
    handle.restore()
    assert tiny.off(tiny.loss_and_gradients(model, tiny.batch()), expected_of()) == 0


@pytest.mark.parametrize("when", WHEN)
def test_prepared_for_bfloat16(accelerator, when):
    """Would catch logits that are made when accelerate converts outputs, or that are another dtype then."""
    batch, expected = tiny.batch(), expected_of(plain(dtype=torch.float32))
    handle, model = fused(accelerator("bf16").prepare, when, plain(dtype=torch.float32))
    with tiny.Watch(batch) as watch:
        output = model(**batch)
        output.loss.backward()
    assert watch.made == [] and handle.materialized == []
    assert output.logits.dtype == output.loss.dtype == torch.float32
    assert abs(output.loss / expected["loss"] - 1) < 5e-3
    reference = accelerator("bf16").prepare(plain(dtype=torch.float32))
    torch.testing.assert_close(output.logits + 0, reference(**batch).logits, rtol=0, atol=0)
    assert (output.logits + 0).dtype == torch.float32


@pytest.mark.parametrize("when", WHEN)
def test_unwrapped(accelerator, when):
    """Would catch a forward that accelerate puts back, and that is not the fused one's any more."""
    made = accelerator("bf16")
    handle, model = fused(made.prepare, when)
    model = made.unwrap_model(model, keep_fp32_wrapper=False)
    assert tiny.off(tiny.loss_and_gradients(model, tiny.batch()), expected_of()) < EXACT
    assert handle.stats is not None and "forward" in vars(model)
    handle.restore()
    assert tiny.off(tiny.loss_and_gradients(model, tiny.batch()), expected_of()) == 0


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "copy", [torch.Tensor.float, torch.Tensor.clone, torch.Tensor.detach, lambda x: x.to(torch.bfloat16)]
)
def test_outputs_that_are_copied(copy, grad):
    """Would catch logits that are made because a wrapper casts or copies whatever a model gives."""
    batch = tiny.batch()
    original = plain()(**batch).logits
    output = fuse(plain()).model(**batch)
    with tiny.Watch(batch) as watch, torch.set_grad_enabled(grad):
        logits = copy(output.logits)
    with torch.set_grad_enabled(grad):
        expected = copy(original)
    assert watch.made == [] and logits.dtype == expected.dtype
    torch.testing.assert_close(logits + 0, expected, rtol=1e-12, atol=0)
    assert (logits + 0).requires_grad == expected.requires_grad
    with torch.no_grad():
        expected[0], logits[0] = 7.0, 7.0
    torch.testing.assert_close(output.logits + 0, original, rtol=1e-12, atol=0)


def on_head(model):
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def on_all(model):
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("hook", [on_head, on_all])
@pytest.mark.parametrize("when", WHEN)
def test_hooks(when, hook):
    """Would catch a hook that is left out, that drops what the loss needs, or that calls the old class."""
    handle, model = fused(hook, when)
    assert is_fused(model)
    handle.stats = None
    model.forward(**tiny.batch())
    assert handle.stats is not None


@pytest.mark.parametrize("then", ["restored", "removed", "removed, restored", "restored, removed"])
@pytest.mark.parametrize("hook", [on_head, on_all])
@pytest.mark.parametrize("when", WHEN)
def test_hooks_and_the_way_back(when, hook, then):
    """Would catch a forward of a class that the module has no longer, whatever is undone first."""
    batch = tiny.batch()
    handle, model = fused(hook, when)
    for step in then.split(", "):
        if step == "restored":
            handle.restore()
        else:
            remove_hook_from_module(model, recurse=True)
    assert tiny.off(tiny.loss_and_gradients(model, batch), expected_of()) < EXACT
    assert (Handle.find(model) is None) == ("restored" in then)
    if "restored" in then:
        assert [type(m) for m in model.modules()] == [type(m) for m in plain().modules()]


@pytest.mark.parametrize("when", WHEN)
def test_a_head_that_is_elsewhere_between_calls(when):
    """Would catch a loss that takes the head's weight without the hook that brings it."""
    batch = tiny.batch()
    handle, model = fused(lambda model: cpu_offload(model, "cpu"), when)
    assert model.lm_head.weight.device.type == "meta"
    with torch.no_grad(), tiny.Double(), tiny.Watch(batch) as watch:
        loss = model(**batch).loss
    torch.testing.assert_close(loss, expected_of()["loss"], rtol=EXACT, atol=0)
    assert watch.made == [] and handle.materialized == []


# Liger.


def lce_forward(self, input_ids=None, labels=None, **kwargs):
    """Stands for Liger's where that is not installed: it takes the head's weight, and calls no head."""


lce_forward.__module__ = "liger_kernel.transformers.model.llama"
REFUSED = pytest.raises(RuntimeError, match=r"got Liger's forward.*use_liger_kernel=False")


@pytest.fixture(params=["ours", "theirs"])
def ligers(request):
    """A forward of Liger's for Llama."""
    if request.param == "ours":
        return lce_forward
    return pytest.importorskip("liger_kernel.transformers.model.llama").lce_forward


@pytest.mark.parametrize("when", WHEN)
def test_ligers_forward_on_the_instance(ligers, when):
    """Would catch a loss that is Liger's, in place of the balance that was asked for."""

    def patch(model):
        model.forward = types.MethodType(ligers, model)

    with REFUSED:
        fused(patch, when)


@pytest.mark.parametrize("when", WHEN)
def test_ligers_forward_on_the_class(ligers, when, monkeypatch):
    """The same where all models of the class are patched, for which Liger has another function."""
    model = fuse(plain()).model if when == "before" else plain()
    monkeypatch.setattr(LlamaForCausalLM, "forward", ligers)
    with REFUSED:
        model(**tiny.batch()) if when == "before" else fuse(model)


def test_ligers_cross_entropy(monkeypatch):
    """Would catch a kernel that is handed what is no tensor."""
    model = fuse(plain()).model
    monkeypatch.setattr(F, "cross_entropy", lce_forward)
    with REFUSED:
        model(**tiny.batch())


@pytest.mark.parametrize("when", WHEN)
def test_liger_itself(when):
    """Would catch a way of Liger's to patch that is none of the above."""
    patches = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    others = dict.fromkeys(("rope", "rms_norm", "swiglu"), False)  # which are patched for good, in all models
    with REFUSED:
        fused(lambda model: patches._apply_liger_kernel_to_instance(model, **others), when)


# Heads.


def quantised(model, part="lm_head"):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        lambda module, name: isinstance(module, nn.Linear) and (name == "lm_head") == (part == "lm_head"),
    )


@pytest.mark.parametrize("when", WHEN)
def test_a_quantised_body(when):
    """Would catch a head that is taken for quantised because the rest is."""
    reference = plain(dtype=torch.float32)
    quantised(reference, "body")
    _, model = fused(lambda model: quantised(model, "body"), when, plain(dtype=torch.float32))
    assert is_fused(model, expected_of(reference), 1e-4)


@pytest.mark.parametrize("when", WHEN)
def test_a_quantised_head(when):
    """Would catch a weight of integers that is multiplied as it stands."""
    reference = plain(dtype=torch.float32)
    quantised(reference)
    expected = expected_of(reference)
    _, model = fused(quantised, when, plain(dtype=torch.float32))
    with pytest.warns(UserWarning, match="because of its head, a Linear of Int8Tensor"):
        got = tiny.loss_and_gradients(model, tiny.batch())
    assert tiny.off(got, expected) < 1e-4


class Doubling(nn.Linear):
    """As transformers' Dory has one: a linear layer, and more in its forward."""

    def forward(self, input):
        return 2 * super().forward(input)


class Decoupled(nn.Linear):
    """As Idefics has one: rows of another weight after its own, of which it counts its own alone."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features - 4, bias=False, dtype=torch.float64)
        self.additional = nn.Linear(linear.in_features, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.weight.copy_(linear.weight[:-4])
            self.additional.weight.copy_(linear.weight[-4:])

    def forward(self, input):
        return torch.cat([super().forward(input), self.additional(input)], dim=-1)


def doubling(model):
    model.lm_head.__class__ = Doubling


def decoupled(model):
    model.lm_head = Decoupled(model.lm_head)


def on_its_instance(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda input: 2 * forward(input)


def on_its_instance_under_a_hook(model):
    on_its_instance(model)
    on_head(model)


@pytest.mark.parametrize(
    ("change", "when"),
    [
        # A class, or a head, that comes later is another story: that of a head that fuse has not seen.
        *[(doubling, "after"), (decoupled, "after")],
        *[(change, when) for change in (on_its_instance, on_its_instance_under_a_hook) for when in WHEN],
    ],
)
@pytest.mark.parametrize("balance", [0.0, 0.1])
def test_a_head_with_a_forward_of_its_own(change, when, balance):
    """Would catch a product with the weight alone, where the head does more than that."""
    batch, reference = tiny.batch(), plain()
    change(reference)
    with tiny.Double():
        logits = reference(input_ids=batch["input_ids"]).logits
        loss = tightrope.reality_creativity_loss(logits[:, :-1], batch["labels"][:, 1:], balance=balance)
    loss.backward()
    expected = {"loss": loss.detach(), **{name: p.grad for name, p in reference.named_parameters()}}
    _, model = fused(change, when, balance=balance)
    with pytest.warns(UserWarning, match="because of its head, a"):
        got = tiny.loss_and_gradients(model, batch)
    assert tiny.off(got, expected) < EXACT


@pytest.mark.parametrize("when", WHEN)
def test_a_head_in_another_dtype_than_the_body(when):
    """Would catch a head's hooks that are passed by, in the loss or in logits that are read."""
    expected = expected_of(with_a_wide_head(plain(dtype=torch.float32)))
    _, model = fused(with_a_wide_head, when, plain(dtype=torch.float32))
    assert is_fused(model, expected, 1e-5)
    assert model.lm_head.weight.grad.dtype == torch.float64
    logits = with_a_wide_head(plain(dtype=torch.float32))(**tiny.batch()).logits
    torch.testing.assert_close(model(**tiny.batch()).logits + 0, logits, rtol=0, atol=0)


def with_a_wide_head(model):
    """What TRL's cast_lm_head_to_fp32 does: the head in a wider dtype than the hidden states it is given."""
    model.lm_head.double()
    model.lm_head.register_forward_pre_hook(lambda head, args: (args[0].double(), *args[1:]))
    return model


# DataParallel.


def test_data_parallel():
    """Would catch replicas that share one handle, and so the state of each other's calls."""
    handle = fuse(plain())
    assert is_fused(nn.DataParallel(handle.model).module)
    with pytest.raises(RuntimeError, match="expected DistributedDataParallel"):
        handle.model._replicate_for_data_parallel()  # as replicate() calls it, for each of the devices
