"""The plugin of axolotl, in the hands of a stand-in: axolotl 0.19 pins a transformers of its own.

The stand-in has the names and signatures of axolotl 0.19.0's ``BasePlugin``, and does with a plugin what its
loader, its config and its trainer builder do, in their order.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")
pydantic = pytest.importorskip("pydantic")

from tiny import VOCAB, batch, lively, llama, loss_and_gradients
from transformers import Trainer, TrainingArguments

import tightrope
from tightrope.integrations import Handle, fuse

pytestmark = pytest.mark.usefixtures("one_thread")

PLUGIN = "tightrope.integrations.axolotl.TightropePlugin"


class BasePlugin:
    """Those of its hooks that an integration of a loss could be in."""

    def __init__(self): ...

    def register(self, cfg: dict): ...

    def get_input_args(self): ...

    def pre_model_load(self, cfg): ...

    def post_model_build(self, cfg, model): ...

    def pre_lora_load(self, cfg, model): ...

    def post_lora_load(self, cfg, model): ...

    def post_model_load(self, cfg, model): ...

    def get_trainer_cls(self, cfg): ...

    def post_trainer_create(self, cfg, trainer): ...

    def add_callbacks_pre_trainer(self, cfg, model):
        return []

    def add_callbacks_post_trainer(self, cfg, trainer):
        return []

    def post_train(self, cfg, model): ...

    def post_train_unload(self, cfg): ...


class DictDefault(dict):
    """A config: attributes, and None where there is no such key."""

    def __getattr__(self, name):
        return self.get(name)


class Axolotl:
    """What it does with the plugins of a YAML."""

    def __init__(self, **yaml):
        self.plugins = []
        for name in yaml["plugins"]:
            module, kind = name.rsplit(".", 1)
            self.plugins.append(getattr(importlib.import_module(module), kind)())
            self.plugins[-1].register(yaml)
        args = [plugin.get_input_args().rsplit(".", 1) for plugin in self.plugins]
        bases = [getattr(sys.modules[module], kind) for module, kind in args]
        own = pydantic.create_model(
            "AxolotlInputConfigBase", plugins=(list[str], ...), learning_rate=(float, 0.1)
        )
        config = type("AxolotlInputConfig", (own, *bases), {})
        self.cfg = DictDefault(config(**yaml).model_dump(exclude_none=True))

    def model(self, make=llama, adapters=lambda model: model):
        for plugin in self.plugins:
            plugin.pre_model_load(self.cfg)
        model = make()
        for plugin in self.plugins:
            plugin.post_model_build(self.cfg, model)
            plugin.pre_lora_load(self.cfg, model)
        model = adapters(model)
        for plugin in self.plugins:
            plugin.post_lora_load(self.cfg, model)
            plugin.post_model_load(self.cfg, model)
        return model

    def trainer(self, folder, model):
        args = TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            max_steps=3,
            logging_steps=1,
            learning_rate=self.cfg.learning_rate,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = batch(rows=6)
        data = [{name: value[i] for name, value in rows.items()} for i in (0, 1, 3, 4, 5)]
        trainer = Trainer(model, args, train_dataset=data)
        for plugin in self.plugins:
            for callback in plugin.add_callbacks_post_trainer(self.cfg, trainer):
                trainer.add_callback(callback)
            plugin.post_trainer_create(self.cfg, trainer)
        return trainer


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    names = ("axolotl", "axolotl.integrations", "axolotl.integrations.base")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].BasePlugin = BasePlugin
    sys.modules.pop("tightrope.integrations.axolotl", None)
    yield
    sys.modules.pop("tightrope.integrations.axolotl", None)  # which is made of the stand-in


SETTINGS = [
    ({}, {}),
    ({"tightrope_balance": 0.1}, {"balance": 0.1}),
    (
        {"tightrope_balance": 0.1, "tightrope_creativity": "collision"},
        {"balance": 0.1, "creativity": "collision"},
    ),
    (
        {"tightrope_balance": 0.1, "tightrope_creativity": "support_entropy", "tightrope_min_p": 0.5},
        {"balance": 0.1, "creativity": "support_entropy", "support": tightrope.MinP(0.5)},
    ),
]


@pytest.mark.parametrize(("yaml", "options"), SETTINGS)
def test_the_yaml_says_what_fuse_is_given(yaml, options):
    """Would catch a key of the YAML that does not arrive, or arrives as another option."""
    model, expected = Axolotl(plugins=[PLUGIN], **yaml).model(lambda: lively(llama())), lively(llama())
    fuse(expected, **options)
    wanted = loss_and_gradients(expected, batch())
    for name, value in loss_and_gradients(model, batch()).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_model_is_complete_when_it_is_fused():
    """Would catch a plugin that fuses a head which axolotl then replaces, as it does to resize embeddings."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")

    def completed(model):
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
        return peft.get_peft_model(model, config)

    model = Axolotl(plugins=[PLUGIN], tightrope_balance=0.1).model(adapters=completed)
    handle = Handle.of(model)
    assert handle.model is model.get_base_model()
    model(**batch())
    assert handle.stats is not None and not handle.materialized


def test_its_trainer_logs_and_steers(tmp_path):
    """Would catch callbacks that are not added, or a target whose bounds are those of another vocabulary."""
    axolotl = Axolotl(plugins=[PLUGIN], tightrope_balance=0.01, tightrope_entropy_target=10.0)
    trainer = axolotl.trainer(tmp_path, axolotl.model())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3 and all({"entropy", "reality", "token_accuracy"} <= log.keys() for log in logs)
    balances = [log["balance"] for log in logs]
    assert balances[0] == pytest.approx(0.01) and balances == sorted(set(balances))
    (callback,) = axolotl.plugins[0].add_callbacks_post_trainer(axolotl.cfg, trainer)
    expected = tightrope.EntropyTarget(10.0, vocab_size=VOCAB)
    assert callback.entropy_target.bounds == expected.bounds


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        (
            {"liger_fused_linear_cross_entropy": True},
            "liger_fused_linear_cross_entropy: got True beside tightrope",
        ),
        ({"cut_cross_entropy": True}, "cut_cross_entropy: got True"),
        ({"rl": "dpo"}, "rl: got dpo .*tightrope.integrations.trl is for"),
        ({"tightrope_balance": 1.5}, "tightrope_balance"),
        ({"tightrope_creativity": "chaos"}, "tightrope_creativity"),
        ({"tightrope_min_p": 0}, "tightrope_min_p"),
    ],
)
def test_a_yaml_that_would_train_on_something_else_is_refused(yaml, said):
    """Would catch a setting with which axolotl trains on, and tightrope has no part in it."""
    with pytest.raises(ValueError, match=f"(?s){said}"):
        Axolotl(plugins=[PLUGIN], **yaml)
