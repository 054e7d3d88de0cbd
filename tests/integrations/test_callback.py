"""The trainer callback: what real Trainers log of a fused model, and a balance that is steered and resumed.

Models are in float64, so that means can be compared with what dense float64 arithmetic makes of the plain
model's logits.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("transformers")

from tiny import VOCAB, llama
from transformers import Trainer, TrainerCallback, TrainingArguments

from tightrope import EntropyTarget
from tightrope.integrations import fuse
from tightrope.integrations.callback import TightropeCallback

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 10
NAMES = ("entropy", "support_entropy", "reality", "token_accuracy", "balance")


def tiny_model():
    model = llama(num_hidden_layers=1, dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight *= 40  # sharp enough to be opened
    return model


def examples(count, seed=0):
    """Sentences of which more and more of the beginning is ignored."""
    ids = torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[: 1 + i % (LENGTH - 2)] = -100
    labels[0, -1] = tiny_model()(input_ids=ids[:1]).logits[0, -2].argmax()  # one that is right
    return [{"input_ids": row, "labels": wanted} for row, wanted in zip(ids, labels)]


def means(data, model=None):
    """The means over all tokens of the data, by a plain model's logits."""
    model = model or tiny_model()
    with torch.no_grad():
        logits = model(input_ids=torch.stack([example["input_ids"] for example in data])).logits[:, :-1]
    target = torch.stack([example["labels"] for example in data])[:, 1:]
    logits, target = logits[target != -100], target[target != -100]
    log_p = logits.log_softmax(-1)
    unlikely = log_p < log_p.amax(-1, keepdim=True) + torch.tensor(0.02).log()
    of_set = log_p.masked_fill(unlikely, -torch.inf).log_softmax(-1)
    values = {
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "support_entropy": -(of_set.exp() * of_set.masked_fill(unlikely, 0.0)).sum(-1),
        "reality": -log_p.gather(-1, target[:, None]),
        "token_accuracy": (log_p.argmax(-1) == target).double(),
    }
    return {name: pytest.approx(value.mean().item(), rel=1e-9) for name, value in values.items()}


def part(logs, prefix="", names=NAMES[:-1]):
    """What the callback has added to logs, by its names."""
    return {name: logs[prefix + name] for name in names}


class Reporter(TrainerCallback):
    """What a reporting callback is handed, copied as it would be sent away."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trained_by(folder, data, *callbacks, entropy_target=None, kind=Trainer, **arguments):
    """A Trainer of a fused tiny model, and the callback, which is the last that its user gives."""
    handle = fuse(tiny_model(), balance=0.05, creativity="support_entropy")
    callback = TightropeCallback(handle, entropy_target)
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    args = TrainingArguments(str(folder), **settings)
    sets = {"train_dataset": data, "eval_dataset": examples(3, seed=1)}
    return kind(handle.model, args, callbacks=[*callbacks, callback], **sets), callback


@pytest.mark.parametrize("added", [False, True], ids=["given", "added"])
def test_values_reach_all_that_report(added, tmp_path, monkeypatch):
    """Values that TensorBoard, an earlier callback or log_history does not get: they are told before us."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    early = Reporter()
    trainer, callback = trained_by(tmp_path, examples(16), early, report_to=["tensorboard"])
    if added:
        trainer.remove_callback(callback)
        trainer.add_callback(callback)
    trainer.train()
    trainer.evaluate(examples(4, seed=1))
    history = trainer.state.log_history
    assert [set(NAMES) <= set(logs) for logs in history] == [True, True, False, False]
    assert {f"eval_{name}" for name in NAMES} <= set(history[-1])
    assert [{**logs, "step": logs["step"]} for logs in history] == [
        {**logs, "step": kept["step"]} for logs, kept in zip(early.logs, history)
    ]
    board = events.EventAccumulator(str(tmp_path / "board")).Reload()
    for name in NAMES:
        written = [scalar.value for scalar in board.Scalars(f"train/{name}")]
        assert written == pytest.approx([logs[name] for logs in history[:2]], rel=1e-6)
        (written,) = board.Scalars(f"eval/{name}")
        assert written.value == pytest.approx(history[-1][f"eval_{name}"], rel=1e-6)


def test_an_evaluation_without_training_is_reported(tmp_path):
    """A callback added late that only finds its place when training begins."""
    trainer, callback = trained_by(tmp_path, None)
    trainer.remove_callback(callback)
    early = Reporter()
    trainer.add_callback(early)
    trainer.add_callback(callback)
    trainer.evaluate(examples(3))
    assert part(early.logs[0], "eval_") == means(examples(3))


class Measuring(TrainerCallback):
    """A loss of its user's own after each step, for which Trainer has no log."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model(**{name: value[None] for name, value in examples(1, seed=3)[0].items()})


def test_means_are_over_tokens(tmp_path):
    """A mean of the batches' means, or of the last one; one with ignored tokens, or those of other losses."""
    data = examples(32)
    trainer, _ = trained_by(tmp_path, data, Measuring(), logging_steps=2, learning_rate=0.0)
    trainer.train()
    first, second, end = trainer.state.log_history
    assert [first["balance"], second["balance"]] == pytest.approx([0.05, 0.05], rel=1e-12)
    # Which batches come first is Trainer's choice: of all of them together we know the mean.
    again, _ = trained_by(tmp_path, data, Measuring(), logging_steps=4, learning_rate=0.0)
    again.train()
    whole = again.state.log_history[0]
    assert part(whole) == means(data)
    assert whole["token_accuracy"] > 0.0
    assert (
        min(first["reality"], second["reality"]) < whole["reality"] < max(first["reality"], second["reality"])
    )
    # Of the whole of training Trainer logs other values.
    assert not {*NAMES, *(f"train_{name}" for name in NAMES)} & set(end)


def test_evaluations_have_their_own_means_and_prefixes(tmp_path):
    """Training tokens in an evaluation's means, another set's tokens, or metrics that nobody gets back."""
    sets = {"plain": examples(5, seed=1), "other": examples(3, seed=2)}
    trainer, _ = trained_by(tmp_path, examples(16), learning_rate=0.0, per_device_eval_batch_size=2)
    trainer.train()
    metrics = trainer.evaluate(sets)
    for name, data in sets.items():
        assert part(metrics, f"eval_{name}_") == means(data)
        assert metrics[f"eval_{name}_balance"] == pytest.approx(0.05, rel=1e-12)
    assert part(trainer.predict(sets["other"]).metrics, "test_") == means(sets["other"])


class Counting(Trainer):
    """A Trainer with an entropy of its own."""

    def log(self, logs, *args, **kwargs):
        logs["entropy"] = -1.0
        super().log(logs, *args, **kwargs)


def test_a_trainers_own_value_is_kept(tmp_path):
    """A value of the same name, as TRL's trainers log an entropy, that is written over."""
    reporter = Reporter()
    trainer, _ = trained_by(tmp_path, examples(8), reporter, kind=Counting)
    trainer.train()
    for logs in trainer.state.log_history[0], reporter.logs[0]:
        assert logs["entropy"] == -1.0 and logs["reality"] > 0.0


@pytest.mark.parametrize("rule", ["dual", "step"])
def test_the_balance_follows_each_optimizer_step(rule, tmp_path):
    """An update for each micro-batch, one by an evaluation, or a balance that the next step does not use."""

    def steered():
        return EntropyTarget(1.6, creativity="support_entropy", rule=rule, rate=0.02, balance=0.1)

    trainer, callback = trained_by(
        tmp_path,
        examples(32),
        entropy_target=steered(),
        learning_rate=0.03,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.model(**{name: value[None] for name, value in examples(1, seed=3)[0].items()})  # no step's
    trainer.train()
    steps = [logs for logs in trainer.state.log_history if "loss" in logs]
    by_hand, balances = steered(), []
    for logs in steps:
        balances.append(by_hand.balance)
        by_hand.update(logs["support_entropy"])
    assert [logs["balance"] for logs in steps] == pytest.approx(balances, rel=1e-9, abs=1e-12)
    assert len(steps) == 4 and len(set(balances)) > 2
    assert callback.handle.balance.item() == callback.entropy_target.balance
    assert callback.entropy_target.coefficient == pytest.approx(by_hand.coefficient, rel=1e-9)


@pytest.mark.parametrize("restore_callbacks", [False, True])
def test_a_resumed_training_goes_on_as_it_was(restore_callbacks, tmp_path):
    """A controller that starts anew, or breaks where Trainer makes callbacks again from the checkpoint."""

    def training(folder):
        return trained_by(
            folder,
            examples(64),
            entropy_target=EntropyTarget(3.9, creativity="support_entropy", rate=0.005),
            learning_rate=0.03,
            save_strategy="steps",
            save_steps=4,
            restore_callback_states_from_checkpoint=restore_callbacks,
        )

    straight, whole = training(tmp_path)
    straight.train()
    resumed, half = training(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == straight.state.global_step == 8
    assert half.entropy_target.state_dict() == whole.entropy_target.state_dict()
    assert half.handle.balance == whole.handle.balance > 0.0
    for one, other in zip(straight.state.log_history[:8], resumed.state.log_history[:8]):
        assert part(one, names=NAMES) == part(other, names=NAMES)
    for one, other in zip(straight.model.parameters(), resumed.model.parameters()):
        assert torch.equal(one, other)


def test_a_checkpoint_without_a_target_leaves_it_as_it_is(tmp_path):
    """A target that cannot be added to a training that goes on."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    before, _ = trained_by(tmp_path, examples(16), **settings)
    before.train()
    target = EntropyTarget(1.6, creativity="support_entropy", balance=0.1)
    after, callback = trained_by(tmp_path, examples(16), entropy_target=target, **settings)
    after.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert after.state.log_history[1]["balance"] == pytest.approx(0.1, rel=1e-12)
    assert callback.entropy_target.entropy is not None


# Of torch, where it traces an autograd Function.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be:DeprecationWarning")
def test_a_compiled_model_is_one_graph(tmp_path):
    """An observer that breaks the graph, or state of it, or a balance, of which there is a graph for each."""
    torch._dynamo.reset()
    data = examples(32)
    target = EntropyTarget(3.9, creativity="support_entropy")
    trainer, callback = trained_by(tmp_path, data, entropy_target=target, learning_rate=0.0, logging_steps=4)
    graphs = torch._dynamo.testing.CompileCounter()
    trainer.model.compile(backend=graphs, fullgraph=True)
    trainer.train()
    assert part(trainer.state.log_history[0]) == means(data)
    assert graphs.frame_count == 1
    assert callback.handle.balance > 0.0


def of_rank(rank):
    """What a rank logs that has data of its own, and its balance."""
    handle = fuse(tiny_model(), creativity="support_entropy")
    target = EntropyTarget(9.0, creativity="support_entropy", rate=0.01)
    callback = TightropeCallback(handle, target)
    state = SimpleNamespace(log_history=[], stateful_callbacks={})
    for example in data_of(rank):
        handle.model(**{name: value[None] for name, value in example.items()})
    callback.on_step_end(None, state, None)
    logs = {"loss": 0.0}
    callback.on_log(None, state, None, logs=logs)
    return logs, handle.balance.item()


def data_of(rank):
    """Of the second rank nothing."""
    return examples(5) if rank == 0 else []


def test_ranks_log_the_mean_over_all_tokens(ranks):
    """A rank that logs its own tokens, or, having none, is waited for; balances that part."""
    (logs, balance), (others, other) = ranks(2).run(of_rank)
    assert part(logs) == part(others) == means(examples(5))
    assert balance == other > 0.0


def test_what_it_is_given_is_checked():
    """A model in place of its handle, found out at the end of the first step."""
    model = tiny_model()
    with pytest.raises(
        TypeError, match=r"handle: got LlamaForCausalLM, expected what tightrope.integrations"
    ):
        TightropeCallback(model)
    with pytest.raises(TypeError, match="entropy_target: got float, expected an EntropyTarget or None"):
        TightropeCallback(fuse(model), 2.0)
