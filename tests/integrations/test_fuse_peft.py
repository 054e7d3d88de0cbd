"""Adapters of PEFT on a fused model: beside its head, on its head, in place of its head.

Each stands on a tiny model before `fuse` and after it; the loss and every gradient are those of the same
model unfused, in float64. No logits are made, but where the adapter adds to them.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import torch
from accelerate import dispatch_model

pytest.importorskip("peft")

import peft
import tiny

import tightrope
from tightrope.integrations import Handle, fuse

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's use of transformers' old names, and what it says of Conv1D and of tied heads.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

EXACT = 1e-11
BODY = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}
WHEN = ["before", "after"]


def lora(model_type, more=(), **settings):
    return peft.LoraConfig(r=4, target_modules=[*BODY[model_type], *more], task_type="CAUSAL_LM", **settings)


BESIDE = {
    "lora": lora,
    "dora": lambda model_type: lora(model_type, use_dora=True),
    "saved head": lambda model_type: lora(model_type, modules_to_save=["lm_head"]),
    "tokens": lambda model_type: lora(model_type, trainable_token_indices=[3, 5, 9]),
    "prompt": lambda model_type: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": lambda model_type: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
ON_HEAD = {
    "lora": lambda model_type: lora(model_type, ["lm_head"]),
    "dora": lambda model_type: lora(model_type, ["lm_head"], use_dora=True),
}


def plain(model_type="llama", dtype=torch.float64):
    return tiny.lively(getattr(tiny, model_type)(dtype=dtype))


def adapted(model, config):
    """The model in an adapter that changes what it gives."""
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def fused(config, when, model_type="llama", **settings):
    """The same as `adapted` gives, with the model in it fused before or after."""
    model = plain(model_type)
    if when == "before":
        fuse(model, **settings)
        return adapted(model, config)
    model = adapted(model, config)
    fuse(model, **settings)
    return model


# Where the adapter is.


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(
    ("model_type", "adapter"),
    # Tied heads have the tokens' adapter on them, and GPT-2 has no use for PEFT's prefixes.
    [("llama", name) for name in BESIDE] + [("gpt2", name) for name in ("lora", "saved head", "prompt")],
)
def test_adapters_beside_the_head(model_type, adapter, when):
    """Would catch a head that is not found under a wrapper, labels that part from their tokens, logits."""
    config, batch = BESIDE[adapter](model_type), tiny.batch()
    expected = tiny.loss_and_gradients(adapted(plain(model_type), config), batch)
    model = fused(config, when, model_type)
    with tiny.Watch(batch) as watch:
        got = tiny.loss_and_gradients(model, batch)
    assert tiny.off(got, expected) < EXACT
    assert watch.made == [] and Handle.of(model).materialized == []


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("adapter", ON_HEAD)
@pytest.mark.parametrize("model_type", BODY)
def test_adapters_on_the_head(model_type, adapter, when):
    """Would catch an adapter that the loss leaves out, one without gradient, or a warning at each step."""
    config, batch = ON_HEAD[adapter](model_type), tiny.batch()
    expected = tiny.loss_and_gradients(adapted(plain(model_type), config), batch)
    model = fused(config, when, model_type)
    with pytest.warns(UserWarning, match="makes its N x V logits, because of") as warned:
        first = tiny.loss_and_gradients(model, batch)
    assert len([w for w in warned if "N x V" in str(w.message)]) == 1
    assert tiny.off(first, expected) < EXACT
    assert tiny.off(tiny.loss_and_gradients(model, batch), expected) < EXACT


@pytest.mark.filterwarnings("ignore:tightrope. LlamaForCausalLM makes its N x V logits:UserWarning")
@pytest.mark.parametrize("when", WHEN)
def test_the_balance_reaches_an_adapted_head(when):
    """Would catch made logits that plain cross-entropy scores, or a balance of other tokens."""
    config, batch = lora("llama", ["lm_head"]), tiny.batch()
    balance = torch.rand(batch["input_ids"].shape, dtype=torch.float64)
    reference, model = adapted(plain(), config), fused(config, when)
    with tiny.Double():
        logits = reference(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = tightrope.reality_creativity_loss(
            logits[:, :-1], batch["labels"][:, 1:], balance=balance[:, :-1]
        )
        expected.backward()
    got = tiny.loss_and_gradients(model, {**batch, "balance": balance})
    assert tiny.off(got, {"loss": expected.detach(), **gradients(reference)}) < EXACT
    assert Handle.of(model).stats.entropy.shape == (balance.numel(),)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_tokens_of_a_tied_head():
    """Would catch the head's own rows where an adapter trains others, or silent plain cross-entropy."""
    config, batch = BESIDE["tokens"]("gpt2"), tiny.batch()
    expected = tiny.loss_and_gradients(adapted(plain("gpt2"), config), batch)
    model = fused(config, "after", "gpt2")
    with pytest.warns(UserWarning, match="because of its head, a TrainableTokensWrapper"):
        assert tiny.off(tiny.loss_and_gradients(model, batch), expected) < EXACT
    # The adapter multiplies with rows of its own, and never calls the head that was fused.
    with pytest.raises(RuntimeError, match="TrainableTokensWrapper gave, expected one: its loss is its own"):
        fused(config, "before", "gpt2", balance=0.1)(**batch)


# What is done with adapters.


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("make", [ON_HEAD["lora"], BESIDE["saved head"]])
def test_disabled_adapters(make, when):
    """Would catch an adapter that is left in the loss, and logits that need not be made without it."""
    model, batch = fused(make("llama"), when), tiny.batch()
    expected = plain()(**batch).loss
    with model.disable_adapter(), tiny.Watch(batch) as watch:
        loss = model(**batch).loss
    torch.testing.assert_close(loss, expected.double(), rtol=1e-6, atol=0)
    assert watch.made == []


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging:UserWarning")
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("make", [lora, ON_HEAD["lora"], BESIDE["saved head"]])
@pytest.mark.parametrize("model_type", BODY)
def test_merging_and_restoring(model_type, make, when):
    """Would catch a merged model with another head, one not fused, or a class left behind."""
    config, batch = make(model_type), tiny.batch()
    reference = adapted(plain(model_type), config).merge_and_unload().requires_grad_()
    expected = tiny.loss_and_gradients(reference, batch)
    model = fused(config, when, model_type).merge_and_unload().requires_grad_()
    with tiny.Watch(batch) as watch:
        assert tiny.off(tiny.loss_and_gradients(model, batch), expected) < EXACT
    assert watch.made == []
    Handle.of(model).restore()
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert tiny.off(tiny.loss_and_gradients(model, batch), expected) == 0


@pytest.mark.parametrize("when", WHEN)
def test_restoring_under_adapters(when):
    """Would catch a head that stays fused where PEFT has copied or wrapped it."""
    config, batch = BESIDE["saved head"]("llama"), tiny.batch()
    reference, model = adapted(plain(), config), fused(config, when)
    Handle.of(model).restore()
    assert Handle.find(model) is None
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert tiny.off(tiny.loss_and_gradients(model, batch), tiny.loss_and_gradients(reference, batch)) == 0


@pytest.mark.parametrize("make", [lora, BESIDE["saved head"]])
def test_saved_and_loaded(make, tmp_path):
    """Would catch names of parameters that change, and a copy of the head that is not fused."""
    config, batch = make("llama"), tiny.batch()
    expected = tiny.loss_and_gradients(adapted(plain(), config), batch)
    fused(config, "after").save_pretrained(tmp_path)
    assert tiny.off(loaded(plain(), tmp_path, batch), expected) < EXACT
    model = plain()
    fuse(model)
    with tiny.Watch(batch) as watch:
        assert tiny.off(loaded(model, tmp_path, batch), expected) < EXACT
    assert watch.made == []


def loaded(model, folder, batch):
    return tiny.loss_and_gradients(peft.PeftModel.from_pretrained(model, folder, is_trainable=True), batch)


def test_a_second_adapter():
    """Would catch a head that PEFT copies later, from what is fused already."""
    config, batch = BESIDE["saved head"]("llama"), tiny.batch()
    results = []
    for model in (adapted(plain(), config), fused(config, "after")):
        torch.manual_seed(2)
        model.add_adapter("second", config)
        model.set_adapter("second")
        results.append(tiny.loss_and_gradients(model, batch))
    assert tiny.off(results[1], results[0]) < EXACT
    assert Handle.of(model).materialized == [] and Handle.of(model).stats is not None


# How it is trained.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", WHEN)
def test_gradient_checkpointing(when, reentrant):
    """Would catch hidden states without gradients, or a recomputed layer that meets an open call."""
    results, batch = [], tiny.batch()
    for model in (adapted(plain("gpt2"), lora("gpt2")), fused(lora("gpt2"), when, "gpt2")):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        results.append(tiny.loss_and_gradients(model, batch))
    assert tiny.off(results[1], results[0]) < EXACT


@pytest.mark.parametrize("when", WHEN)
def test_autocast(when):
    """Would catch a product of two dtypes, or a loss that is rounded to bfloat16."""
    config, batch = lora("llama"), tiny.batch()
    expected = tiny.loss_and_gradients(adapted(plain(), config), batch)
    model = fused(config, when).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = tiny.loss_and_gradients(model, batch)
    assert got["loss"].dtype == torch.float32
    assert tiny.off({name: value.double() for name, value in got.items()}, expected) < 0.1
    assert abs(got["loss"] / expected["loss"] - 1) < 5e-3


@pytest.mark.parametrize("when", WHEN)
def test_hooks_under_an_adapter(when):
    """Would catch a forward that accelerate keeps on the instance, and that PEFT gets to before ours."""
    batch, model = tiny.batch(), plain()
    if when == "before":
        fuse(model)
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    model = adapted(model, lora("llama"))
    if when == "after":
        fuse(model)
    expected = tiny.loss_and_gradients(adapted(plain(), lora("llama")), batch)
    assert tiny.off(tiny.loss_and_gradients(model, batch), expected) < EXACT
    assert Handle.of(model).stats is not None
