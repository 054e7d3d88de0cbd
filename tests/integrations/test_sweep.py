"""The sweep over model types: a sample of it beside the page that records it, and what it would see."""

import os
import time
import types
import warnings

import model_sweep
import pytest
import torch
import transformers
from tiny_configs import causal_types

import tightrope.integrations

# Every eighth, and those that make their logits: each for a reason of its own.
RECORDED = model_sweep.recorded()
MATERIALISED = [name for name, status in RECORDED.items() if status == model_sweep.MATERIALISED]
SAMPLE = sorted({*causal_types()[::8], *MATERIALISED})


def test_a_sample_of_the_types_is_as_recorded():
    """A type whose loss or gradients became wrong, that crashes, or that makes its logits now."""
    results = {result.model_type: result for result in model_sweep.sweep(SAMPLE)}
    failed = [result for result in results.values() if result.status in model_sweep.FAILURES]
    assert not failed
    found = {name: results[name].status for name in SAMPLE}
    assert found == {name: RECORDED.get(name) for name in SAMPLE}, (
        f"transformers {transformers.__version__}: docs/models.md is of another: sweep_models.py --write"
    )


def test_the_page_has_every_type_and_enough_of_them_are_fused():
    """A page that is not of the transformers that is installed, or that records failures."""
    assert sorted(RECORDED) == causal_types()
    trained = [status for status in RECORDED.values() if status != model_sweep.UNTRAINED]
    assert set(trained) <= {model_sweep.FUSED, model_sweep.MATERIALISED}
    assert trained.count(model_sweep.FUSED) >= 0.95 * len(trained)


def _status(model_type: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model_sweep.compare(model_type, lambda: None)[0]


def _lose_cap(model):
    model.config.final_logit_softcapping = None


def _lose_quotient(model):
    model.config.logits_scaling = 1.0


def _lose_factor(model):
    model.logit_scale = 1.0


def _lose_bias(model):
    torch.nn.init.zeros_(model.lm_head.bias)


def _lose_auxiliary_loss(model):
    model.router_aux_loss_coef = 0.0


@pytest.mark.parametrize(
    ("model_type", "lose"),
    [
        ("gemma2", _lose_cap),
        ("granite", _lose_quotient),
        ("cohere", _lose_factor),
        ("phi", _lose_bias),
        ("mixtral", _lose_auxiliary_loss),
    ],
)
def test_what_a_fused_model_would_lose_is_wrong(model_type, lose, monkeypatch):
    """Tiny models on which a cap, a scale, a bias or an auxiliary loss has no effect to be seen."""
    fuse = tightrope.integrations.fuse
    assert _status(model_type) == model_sweep.FUSED
    monkeypatch.setattr(tightrope.integrations, "fuse", lambda model: (lose(model), fuse(model))[1])
    assert _status(model_type) == model_sweep.WRONG


def test_logits_that_are_made_without_a_warning_are_no_success(monkeypatch):
    """A sweep that believes what the library says of itself: here that all is well, and it does nothing."""
    says = types.SimpleNamespace(materialized=[], stats=())
    monkeypatch.setattr(tightrope.integrations, "fuse", lambda model: says)
    assert _status("llama") == model_sweep.SILENT


def _behave(name: str, trains) -> tuple[str, str, float]:
    if name == "hangs":
        trains()
        time.sleep(60)
    if name == "dies":
        os._exit(7)
    return model_sweep.FUSED, name, 0.0


def test_a_type_that_hangs_or_dies_is_a_row():
    """A sweep that ends with the first type that takes its process down."""
    results = list(model_sweep.sweep(["works", "hangs", "dies"], workers=1, time_limit=2.0, check=_behave))
    assert [(result.model_type, result.status) for result in results] == [
        ("works", model_sweep.FUSED),
        ("hangs", model_sweep.CRASHED),
        ("dies", model_sweep.UNTRAINED),
    ]
    assert "2 s" in results[1].remark and "7" in results[2].remark
