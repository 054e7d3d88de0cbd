"""transformers' own Trainer on a fused model, beside the same on the model unfused.

Whole runs of a few steps: weights, logged losses and metrics are equal, and logits that nobody reads are
not made.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import numpy as np
import pytest
import tiny
import torch
from tiny import VOCAB, gpt2, llama
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from tightrope.integrations import DeferredLogits, fuse

pytestmark = [pytest.mark.one_in(2), pytest.mark.usefixtures("one_thread")]

LENGTH = 10
KINDS = pytest.mark.parametrize("make", [llama, gpt2])


def examples(count, seed=0):
    """Sentences of which more and more of the beginning is ignored."""
    ids = torch.randint(3, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[: i % (LENGTH - 2)] = -100
    return [{"input_ids": row, "labels": wanted} for row, wanted in zip(ids, labels)]


def trainer(model, folder, *, collator=None, metrics=None, preprocess=None, loss_func=None, **arguments):
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        **arguments,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **settings),
        train_dataset=examples(24),
        eval_dataset=examples(11, seed=3),
        data_collator=collator,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=preprocess,
        compute_loss_func=loss_func,
    )


def trained(model, folder, **settings):
    """Weights, and losses and norms of gradients as they were logged, after three steps."""
    training = trainer(model, folder, **settings)
    training.train()
    logged = [(log["loss"], float(log["grad_norm"])) for log in training.state.log_history if "loss" in log]
    assert len(logged) == 3
    return {"logged": torch.tensor(logged).double(), **model.state_dict()}


# Training.


@KINDS
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ],
)
def test_training(make, settings, tmp_path):
    """Steps that are others than those of the model unfused, or that make logits."""
    start = {"logged": torch.zeros(3, 2), **make().state_dict()}
    handle = fuse(make())
    expected, actual = (trained(model, tmp_path, **settings) for model in (make(), handle.model))
    assert tiny.off(actual, expected) < (1e-2 if "bf16" in settings else 1e-5) < tiny.off(start, expected)
    assert handle.materialized == [] and handle.stats is not None


@KINDS
def test_accumulation(make, tmp_path):
    """Four batches of one that are not one batch of four: tokens that are weighted by their batch."""
    one, four = ({"per_device_train_batch_size": b, "gradient_accumulation_steps": 4 // b} for b in (4, 1))
    for balance in (0.0, 0.05):
        models = [fuse(make(dtype=torch.float64), balance).model for _ in range(2)]
        weights = [trained(model, tmp_path, **settings) for model, settings in zip(models, (one, four))]
        for each in weights:
            del each["logged"]  # Trainer rounds the losses of steps that it adds
        assert tiny.off(*weights) < 1e-12
    plain = trained(make(dtype=torch.float64), tmp_path, **four)
    assert tiny.off(weights[0], {name: plain[name] for name in weights[0]}) > 1e-6


def test_a_step_without_tokens(tmp_path):
    """A loss of NaN, logged and perhaps trained on, from a batch whose labels are all ignored."""
    data = examples(8)
    for example in data[:4]:
        example["labels"][:] = -100
    weights, losses = [], []
    for model in (llama(), fuse(llama()).model):
        how = {"max_steps": 2, "train_sampling_strategy": "sequential", "logging_nan_inf_filter": False}
        training = trainer(model, tmp_path, **how)
        training.train_dataset = data
        training.train()
        weights.append(model.state_dict())
        losses.append(training.state.log_history[0]["loss"])
    assert np.isnan(losses[0]) and losses[1] == 0
    assert tiny.off(*weights[::-1]) < 1e-5


def test_packed_sequences(tmp_path):
    """A padding-free batch, of one row, that is counted or shifted otherwise than its sequences."""
    settings = {"collator": DataCollatorWithFlattening(return_tensors="pt")}
    models = llama(use_cache=False), fuse(llama(use_cache=False)).model
    packed = [trained(model, tmp_path, **settings) for model in models]
    assert tiny.off(packed[1], packed[0]) < 1e-5
    apart = trained(fuse(llama(use_cache=False)).model, tmp_path)
    assert tiny.off(packed[1], apart) < 1e-5


def smooth(output, labels, num_items_in_batch=None):
    return output.logits.logsumexp(-1).mean()


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.1}, {"loss_func": smooth}])
def test_labels_that_trainer_takes_away(settings, tmp_path):
    """A balance that is lost without a word, as the model is called without labels."""
    handle = fuse(llama(), balance=0.05)
    with pytest.raises(RuntimeError, match="Trainer takes them away where it has label_smoothing"):
        trainer(handle.model, tmp_path, **settings).train()
    handle.restore()
    trained(handle.model, tmp_path, **settings)


def test_label_smoothing(tmp_path):
    """The option of fuse that is another smoothing than the one of Trainer's that it stands for."""
    expected = trained(llama(), tmp_path, label_smoothing_factor=0.1)
    actual = trained(fuse(llama(), label_smoothing=0.1).model, tmp_path)
    assert tiny.off(actual, expected) < 1e-5 < 1e-3 < tiny.off(trained(llama(), tmp_path), expected)


# Evaluation.


def metrics(prediction):
    """Of all logits and labels: an accuracy, and a number that sees each of them."""
    logits, labels = prediction
    assert (
        isinstance(logits, np.ndarray) and logits.shape == (11, LENGTH, VOCAB) and logits.dtype == np.float32
    )
    hits = (logits.argmax(-1)[:, :-1] == labels[:, 1:]).mean()
    return {"accuracy": float(hits), "logits": float((logits * np.arange(VOCAB)).sum())}


def ranks(prediction):
    """Of ranks in place of logits."""
    assert prediction.predictions.shape == (11, LENGTH, VOCAB)
    return {"ranks": float((prediction.predictions * np.arange(VOCAB)).sum())}


def ordered(logits, labels):
    return logits.argsort(dim=-1)


def evaluated(model, folder, **settings):
    values = trainer(model, folder, **settings).evaluate()
    return {name: value for name, value in values.items() if "_per_second" not in name and "time" not in name}


@KINDS
@pytest.mark.parametrize(
    "settings",
    [
        {"metrics": metrics},
        {"metrics": metrics, "eval_accumulation_steps": 1},
        {"metrics": metrics, "bf16": True},
        {"metrics": metrics, "bf16_full_eval": True},
        {"metrics": ranks, "preprocess": ordered},
        {"metrics": ranks, "preprocess": ordered, "eval_accumulation_steps": 2},
        {"metrics": metrics, "label_smoothing_factor": 0.1},
    ],
)
def test_metrics(make, settings, tmp_path):
    """Logits that Trainer cannot gather, that are not the model's, or in another dtype; another mean."""
    handle = fuse(tiny.lively(make()))
    expected, actual = (
        evaluated(model, tmp_path, **settings) for model in (tiny.lively(make()), handle.model)
    )
    loss, other = expected.pop("eval_loss"), actual.pop("eval_loss")
    assert abs(other / loss - 1) < (5e-3 if "bf16" in str(settings) else 1e-6)
    assert actual == expected and len(expected) > 1
    assert handle.materialized == []


@KINDS
def test_evaluation_of_the_loss_alone(make, tmp_path, monkeypatch):
    """Logits that are made for nobody: N x V of every batch."""

    def materialize(self, reason=None):
        raise AssertionError(f"logits were made: {reason}")

    expected = evaluated(tiny.lively(make()), tmp_path)
    monkeypatch.setattr(DeferredLogits, "materialize", materialize)
    for settings in ({}, {"bf16": True}, {"metrics": metrics, "prediction_loss_only": True}):
        actual = evaluated(fuse(tiny.lively(make())).model, tmp_path, **settings)
        tolerance = 5e-3 if "bf16" in settings else 1e-6
        assert abs(actual["eval_loss"] / expected["eval_loss"] - 1) < tolerance
    with pytest.raises(AssertionError, match="logits were made"):
        evaluated(fuse(make()).model, tmp_path, metrics=metrics)


def test_evaluation_between_steps(tmp_path):
    """A training that goes on otherwise once logits were asked for; a prediction not the model's."""
    handle, results = fuse(llama(), balance=0.05), []
    for model, settings in (
        (handle.model, {"eval_strategy": "steps", "eval_steps": 1}),
        (fuse(llama(), 0.05).model, {}),
    ):
        results.append(trained(model, tmp_path, metrics=metrics, **settings))
    assert tiny.off(*results) == 0
    prediction = trainer(handle.model, tmp_path).predict(examples(5))
    logits = handle.model(torch.stack([e["input_ids"] for e in examples(5)])).logits
    assert (torch.from_numpy(prediction.predictions) - logits).abs().max() < 1e-5
