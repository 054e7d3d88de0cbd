"""Tightrope's SFTTrainer: TRL's without a balance, and with one the loss that is computed by hand."""

import copy
import subprocess
import sys

import pytest
import tiny
import torch

trl = pytest.importorskip("trl", reason="trl is not installed")
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PromptTuningConfig
from trl.trainer import utils
from trl_trainers import WARNINGS, V, history, largest_allocation, sft

import tightrope
from tightrope.integrations import trl as integration
from tightrope.strategies import workspace

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(WARNINGS)]


def ours(model, path, **options):
    return sft(model, path, integration.SFTTrainer, **options)


def mixture():
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return tiny.build("qwen3_moe", output_router_logits=True, **sizes)


def low_rank():
    return LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
FINE_TUNED = {
    "capped": (tiny.gemma2, {}),
    "accumulated": (tiny.llama, ACCUMULATED),
    "packed": (tiny.llama, {"packing": True, "max_length": 16}),
    "experts": (mixture, {"router_aux_loss_coef": 0.5, **ACCUMULATED}),
    "adapted": (tiny.llama, {"peft_config": low_rank}),
    "prompted": (tiny.llama, {"peft_config": lambda: PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)}),
}


@pytest.mark.parametrize("name", FINE_TUNED)
def test_without_a_balance_it_is_trls(name, tmp_path):
    """A count, an average, an auxiliary loss, a metric or a step that is not TRL's."""
    make, options = FINE_TUNED[name]
    entries = []
    for trainer in (sft, ours):
        given = {k: v() if k == "peft_config" else v for k, v in options.items()}
        torch.manual_seed(0)
        entries.append(history(trainer(make(), tmp_path, **given)))
    for theirs, mine in zip(*entries, strict=True):
        assert {k: mine[k] for k in theirs} == pytest.approx(theirs, rel=2e-5, abs=2e-6)
    if name != "experts":
        assert entries[1][0]["reality"] == pytest.approx(entries[1][0]["loss"], rel=1e-5)


def focal(stats):
    return (1 - stats.target_prob).square() * -stats.target_log_prob


def loss_of(log_p, target, name):
    """Of each token."""
    reality = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if name == "balance":
        return 0.9 * reality + 0.1 * (log_p.exp() * log_p).sum(-1)
    if name == "collision":
        smooth = 0.8 * reality - 0.2 * log_p.mean(-1)
        return 0.7 * smooth + 0.3 * log_p.exp().square().sum(-1).log()
    return (1 - (-reality).exp()).square() * reality


LOSSES = {
    "balance": {"balance": 0.1},
    "collision": {"balance": 0.3, "loss_options": {"creativity": "collision", "label_smoothing": 0.2}},
    "focal": {"loss_fn": focal},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_one_computed_by_hand(name, tmp_path):
    """Another loss than was asked for, or gradients of another; or one forward more than it takes."""
    model = tiny.gemma2(dtype=torch.float64)
    plain = copy.deepcopy(model)
    trainer = ours(model, tmp_path, **LOSSES[name])
    batch = next(iter(trainer.get_train_dataloader()))
    calls = []
    hook = model.model.register_forward_hook(lambda *_: calls.append(1))
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=50)
    loss.backward()
    hook.remove()
    labels = batch["labels"][:, 1:]
    log_p = (
        plain(**{k: v for k, v in batch.items() if k != "labels"})
        .logits[:, :-1][labels != -100]
        .log_softmax(-1)
    )
    expected = loss_of(log_p, labels[labels != -100], name).sum() / 50
    expected.backward()
    assert calls == [1]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_a_model_that_trl_does_not_know_is_right(tmp_path):
    """A loss from names of a config: TRL's misses RecurrentGemma's softcap, which has another name."""
    model = tiny.build(
        "recurrent_gemma",
        logits_soft_cap=0.5,
        attention_window_size=16,
        block_types=["recurrent", "attention"],
    )
    plain = copy.deepcopy(model)
    trainer = ours(model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(loss, plain(**batch).loss, rtol=1e-5, atol=0)


def test_it_makes_no_logits(tmp_path, small_tiles, monkeypatch):
    """N x V numbers in a step on a balance, or for a metric: TRL's own would make them of this V."""
    monkeypatch.setattr(workspace, "_LARGEST_KEPT", 0)  # a block that is allocated for its size alone
    model = tiny.gemma2(vocab_size=V)
    logits = largest_allocation(sft(copy.deepcopy(model), tmp_path).train)
    trainer = ours(model, tmp_path, balance=0.05, loss_options={"workspace_mb": 0.5})
    assert largest_allocation(trainer.train) <= model.lm_head.weight.nbytes < logits / 4
    assert trainer.handle.materialized == []


def test_an_entropy_target_steers_it(tmp_path):
    """A target that the trainer takes for a number, or never moves."""
    target = tightrope.EntropyTarget(4.5, rate=0.1, vocab_size=tiny.VOCAB)
    trainer = ours(tiny.llama(), tmp_path, balance=target)
    entries = history(trainer)
    assert entries[0]["balance"] == 0.0 < entries[1]["balance"] < target.balance
    assert float(trainer.handle.balance) == target.balance


@pytest.mark.filterwarnings(
    "ignore:`return_outputs=True`:FutureWarning"
)  # TRL's, of what compute_metrics takes
def test_evaluation_with_metrics_has_its_logits(tmp_path):
    """Logits that are not those of the model, or an evaluation's loss that is not the balanced one."""
    seen = []
    model = tiny.llama()
    plain = copy.deepcopy(model)
    trainer = ours(model, tmp_path, balance=0.1, per_device_eval_batch_size=8)
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {}
    metrics = trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))
    expected = plain(**batch)
    torch.testing.assert_close(torch.from_numpy(seen[0].predictions), expected.logits.detach())
    combined = 0.9 * metrics["eval_reality"] - 0.1 * metrics["eval_entropy"]
    assert metrics["eval_loss"] == pytest.approx(combined, rel=1e-5)
    assert metrics["eval_reality"] == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
def test_another_loss_of_trls_is_refused(options, tmp_path):
    """A loss_type or a smoothing that would silently not be there, or be on top of the balance."""
    with pytest.raises(ValueError, match=rf"{next(iter(options))}: got .*, expected .* loss_fn="):
        ours(tiny.llama(), tmp_path, **options)


def test_a_trainer_of_trl_that_has_changed_is_an_error(tmp_path, monkeypatch):
    """A compute_loss of TRL's that goes another way: the balance would silently not be in the loss."""
    trainer = ours(tiny.llama(), tmp_path, balance=0.1)
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", lambda self, model, inputs, *rest: 0.0)
    with pytest.raises(RuntimeError, match="asks for no fused head"):
        trainer.compute_loss(trainer.model, {})


@pytest.mark.filterwarnings("ignore:tightrope. Llama:UserWarning", "ignore:fuse. got a forward:UserWarning")
def test_a_loss_of_the_models_own_is_refused(tmp_path):
    """Metrics and a division of a loss that Tightrope did not compute."""
    trainer = ours(tiny.llama(), tmp_path)
    trainer.model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(RuntimeError, match="LlamaForCausalLM with a loss of its own"):
        trainer.compute_loss(trainer.model, dict(batch))


def test_a_hook_of_accelerates_stays():
    """A model on several devices whose hook goes with TRL's head, and moves no input any more."""
    model = tiny.llama()
    add_hook_to_module(model, ModelHook())
    hooked = model.forward
    utils.add_fused_lm_head(model)
    integration._remove_head(model)
    assert model.forward is hooked
    plain = tiny.llama()
    utils.add_fused_lm_head(plain)
    integration._remove_head(plain)
    integration._remove_head(plain)
    assert "forward" not in vars(plain)


def test_importing_tightrope_imports_no_trainer():
    """A second of imports, or an error where TRL is not installed, for everyone."""
    code = "import sys, tightrope.integrations; print({'trl', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "set()\n"
