"""Tightrope's loss as torchtitan's Trainer calls it, on each of its meshes, beside its own cross-entropy.

All that makes a Trainer runs in processes of a pool (`tiny_titan`), as a Trainer changes what is global.
"""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tightrope

pytest.importorskip("torchtitan", reason="torchtitan is not installed")
pytestmark = [
    # torchtitan imports what warns, and torchao's binaries are of another torch.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

# float32: sums over 60 tokens and 102 classes in another order.
NEAR = 3e-6


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(off(found[name], value) for name, value in expected.items())


def tightropes(balance: float = 0.0, **more):
    from tightrope.integrations.torchtitan import TightropeLoss

    return TightropeLoss.Config(balance=balance, **more)


# In torchtitan's Trainer.


def trained(rank: int, folder: str, ours: bool, more: dict) -> list[tuple]:
    import tiny_titan

    made = tiny_titan.trainer(
        tightropes() if ours else tiny_titan.cross_entropy(2), folder=folder, steps=4, **more
    )
    made.train()
    return made.logged


@pytest.mark.parametrize("more", [{}, {"accumulate": 2}, {"tied": True}], ids=["", "accumulated", "tied"])
def test_the_trainer_trains_as_on_its_own_cross_entropy(ranks, tmp_path, more):
    """Would catch a loss that its Trainer cannot build or call, or steps that part from cross-entropy's."""
    (ours,) = ranks(1).run(trained, str(tmp_path), True, more)
    (theirs,) = ranks(1).run(trained, str(tmp_path), False, more)
    assert len(ours) == 4 and ours[3][1] < ours[0][1]
    for mine, other in zip(ours, theirs):
        assert mine == pytest.approx(other, rel=1e-4)


def steered(rank: int, folder: str) -> tuple[list[float], float, float]:
    """The balances of a Trainer as docs/integrations.md has it, the next one, and the last entropy."""
    import tiny_titan

    class Steered(tiny_titan.titan.Trainer):
        target = tightrope.EntropyTarget(6.0, vocab_size=tiny_titan.VOCAB)
        balances = ()

        def forward_backward_step(self, **batch):
            loss = super().forward_backward_step(**batch)
            self.target.observe(self.loss_fn.stats)
            return loss

        def train_step(self, data_iterator):
            self.balances = (*self.balances, float(self.loss_fn.balance))
            super().train_step(data_iterator)
            self.loss_fn.balance = self.target.update()

    made = Steered(tiny_titan.config(tightropes(), folder=folder, steps=3, accumulate=2))
    made.metrics_processor.log = lambda *_, **__: None
    made.train()
    return made.balances, float(made.loss_fn.balance), made.target.entropy


def test_a_trainer_can_steer_the_balance(ranks, tmp_path):
    """Would catch statistics or a balance that the Trainer's own steps do not see."""
    ((balances, last, entropy),) = ranks(1).run(steered, str(tmp_path))
    assert balances[0] == 0 and sorted({*balances, last}) == [*balances, last]
    assert 3 < entropy < 4.7


def compared(rank: int, setting: dict) -> tuple[float, float]:
    """How far loss and worst gradient of a step are from torchtitan's own."""
    import tiny_titan

    made = tiny_titan.trainer(tightropes(), **setting)
    expected, their_grads = tiny_titan.step(made, tiny_titan.cross_entropy().build(compile_config=None))
    loss, grads = tiny_titan.step(made, tightropes().build(compile_config=None))
    assert type(made.loss_fn).__name__ == "TightropeLoss" and loss.dtype == torch.float32
    if setting.get("backend") == "full_dtensor":
        assert loss.placements == expected.placements
    return off(tiny_titan.here(loss), tiny_titan.here(expected)), worst(grads, their_grads)


MESHES = [
    (1, {}),
    (1, {"tied": True}),
    (1, {"backend": "full_dtensor"}),
    (2, {"backend": "partial_dtensor"}),
    (2, {"backend": "partial_dtensor", "tied": True}),
    (2, {"backend": "full_dtensor"}),
    (2, {"backend": "partial_dtensor", "tp": 2}),
    (2, {"backend": "full_dtensor", "tp": 2}),
    (2, {"backend": "spmd_types", "tp": 2}),
    (2, {"backend": "spmd_types", "tp": 2, "sequence_parallel": False}),
]


@pytest.mark.parametrize(("size", "setting"), MESHES, ids=str)
def test_loss_and_gradients_are_those_of_its_own_cross_entropy(ranks, size, setting):
    """Would catch a gradient that is lost, or counted once for each rank, on one of torchtitan's meshes."""
    for loss, grads in ranks(size).run(compared, setting):
        assert loss < NEAR and grads < NEAR


def stepped(rank: int, setting: dict) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, metrics and gradients of a step that has it all."""
    import tiny_titan

    loss_fn = tightropes(0.05, options={"creativity": "support_entropy", "z_loss": 1e-3}).build()
    metrics = {}

    class Kept(type(loss_fn)):
        def __call__(self, *args, **kwargs):
            loss, found = super().__call__(*args, **kwargs)
            metrics.update(found)
            return loss, found

    loss_fn.__class__ = Kept
    loss, grads = tiny_titan.step(tiny_titan.trainer(tightropes(), **setting), loss_fn)
    return loss, metrics, grads


def test_two_processes_under_fsdp_are_one(ranks):
    """Would catch sums and metrics of which a rank's tokens are lost, weighted, or counted twice."""
    ((loss, metrics, grads),) = ranks(1).run(stepped, {})
    (first, here, found), (second, there, _) = ranks(2).run(stepped, {"backend": "partial_dtensor"})
    assert off(first + second, loss) < NEAR and abs(first - second) > 1e-3
    assert worst(found, grads) < NEAR
    assert set(metrics) == {f"{k}/mean" for k in ("entropy", "reality", "token_accuracy", "support_entropy")}
    for name, value in metrics.items():
        torch.testing.assert_close(here[name] + there[name], value)


def unlike_the_reference(rank: int) -> float:
    """How far a step is from the same loss of logits that the model makes, worst of loss and gradients."""
    import tiny_titan

    options = {"creativity": "collision", "label_smoothing": 0.1, "logit_l2": 1e-3}
    made = tiny_titan.trainer(tightropes())
    loss, grads = tiny_titan.step(made, tightropes(0.2, options=options).build())
    (model,) = made.model_parts
    model.zero_grad()
    model._skip_lm_head = False
    inputs, labels = next(iter(made.dataloader))
    logits = model(inputs["input"], inputs["positions"])
    expected = tightrope.reality_creativity_loss(logits, labels, balance=0.2, **options)
    expected.backward()
    wanted = {name: tiny_titan.whole(p.grad) for name, p in model.named_parameters()}
    return max(off(loss, expected), worst(grads, wanted))


def test_the_balance_and_the_options_are_those_of_the_loss(ranks):
    """Would catch an option that does not arrive, or a mean over other tokens."""
    assert ranks(1).run(unlike_the_reference)[0] < NEAR


# The loss by itself.


def built(head: nn.Module, balance: float = 0.0, **more):
    loss = tightropes(balance, **more).build(compile_config=None)
    loss.set_lm_head(head)
    return loss


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had that was made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


def linear(width: int = 16, classes: int = 200, kind: str = "Linear", **more) -> nn.Module:
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.muse_glimmer.model import SoftCappedLinear

    made = {"Linear": Linear, "SoftCappedLinear": SoftCappedLinear}[kind]
    return made.Config(in_features=width, out_features=classes, **more).build()


def batch(width: int = 16, classes: int = 200, tokens: int = 96) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, classes, (2, tokens // 2))
    labels[0, :7] = -100
    return torch.randn(2, tokens // 2, width, requires_grad=True), labels


def test_no_logits_are_made():
    """Would catch a head that runs to its logits, which torchtitan's own loss shows the watch to see."""
    from torchtitan.components.loss import ChunkedLossWrapper

    head, (hidden, labels) = linear(), batch()
    theirs = ChunkedLossWrapper.Config(num_chunks=1).build(compile_config=None)
    theirs.set_lm_head(head)
    for loss, made in ((theirs, True), (built(head), False)):
        with Largest() as seen:
            loss(hidden, labels, torch.tensor(89))[0].backward()
        assert (seen.numbers >= hidden[..., 0].numel() * head.out_features) is made


CAPPED = {"kind": "SoftCappedLinear", "output_multiplier": 0.7, "output_soft_cap_temp": 2.0}
SCALED = {"kind": "SoftCappedLinear", "output_multiplier": 1.7}


@pytest.mark.parametrize(
    "more", [{}, {"bias": True}, CAPPED, SCALED], ids=["plain", "bias", "capped", "scaled"]
)
@pytest.mark.parametrize("tokens", [None, 89])
def test_what_a_head_does_to_its_logits_is_part_of_the_loss(more, tokens):
    """Would catch a head of which only the weight is used; in validation there is no number of tokens."""
    head, (hidden, labels) = linear(**more), batch()
    tokens = None if tokens is None else torch.tensor(tokens)
    expected = nn.functional.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    expected = expected if tokens is None else expected / tokens
    wanted = torch.autograd.grad(expected, [hidden, *head.parameters()])
    loss, metrics = built(head)(hidden, labels, tokens, positions=None)
    grads = torch.autograd.grad(loss, [hidden, *head.parameters()])
    assert off(loss, expected) < NEAR and max(map(off, grads, wanted)) < NEAR
    assert (metrics == {}) is (tokens is None)
    assert "forward" not in vars(head)


def test_metrics_and_statistics():
    """Would catch metrics of ignored tokens, or of other numbers than their names say."""
    head, (hidden, labels) = linear(), batch()
    loss = built(head, options={"support": tightrope.MinP(0.1)})
    assert loss.stats is None
    _, metrics = loss(hidden, labels, torch.tensor(89))
    counted = (labels != -100).flatten()
    logits = head(hidden).flatten(0, 1)[counted].detach()
    expected = tightrope.vocab_stats(logits, labels.flatten()[counted], support=tightrope.MinP(0.1))
    torch.testing.assert_close(loss.stats.entropy[counted], expected.entropy)
    for name, value in {
        "entropy": expected.entropy,
        "reality": -expected.target_log_prob,
        "token_accuracy": (expected.argmax == labels.flatten()[counted]).float(),
        "support_entropy": expected.support_entropy,
    }.items():
        torch.testing.assert_close(metrics.pop(f"{name}/mean"), value.mean())
    assert not metrics


def test_a_balance_that_is_assigned():
    """Would catch one that does not arrive, or a tensor that a captured graph does not read."""
    head, (hidden, labels) = linear(), batch()
    expected, loss = built(head, 0.05)(hidden, labels)[0], built(head)
    place = loss.balance.data_ptr()
    loss.balance = 0.05
    assert loss.balance.data_ptr() == place and float(loss.balance) == 0.05
    assert torch.equal(loss(hidden, labels)[0], expected)
    with pytest.raises(ValueError, match="balance: got"):
        loss.balance = 1.5
    assert float(loss.balance) == 0.05


def test_a_loss_of_ones_own():
    """Would catch a loss_fn that is not asked."""
    head, (hidden, labels) = linear(), batch()
    loss, _ = built(head, loss_fn=lambda stats: stats.target_prob)(hidden, labels)
    assert off(loss, head(hidden).softmax(-1)[labels >= 0].gather(-1, labels[labels >= 0, None]).sum()) < NEAR


def test_what_is_wrong_is_said():
    """Would catch a misuse that trains on something else, or an error that leaves the head changed."""
    from torchtitan.components.lora import _get_lora_cls

    head, (hidden, labels) = linear(), batch()
    with pytest.raises(RuntimeError, match="lm_head: got none, expected set_lm_head"):
        tightropes().build()(hidden, labels)
    with pytest.raises(TypeError, match="loss_inputs: got advantages, expected none but positions"):
        built(head)(hidden, labels, None, advantages=labels)
    with pytest.raises(TypeError, match="pred: got tuple"):
        built(head)((hidden, hidden), (labels, labels))
    with pytest.raises(TypeError, match="got an unknown option colour"):
        tightropes(options={"colour": 1}).build()
    with pytest.raises(ValueError, match="balance: got"):
        tightropes(2.0).build()
    adapted = _get_lora_cls(type(head)).Config(in_features=16, out_features=200, rank=2, alpha=1.0).build()
    with pytest.raises(TypeError, match=r"got LoRALinear, whose forward makes its logits because of \+"):
        built(adapted)(hidden, labels)
    assert "forward" not in vars(adapted)
    other = linear()
    own = other.forward = lambda hidden: hidden @ other.weight.t()
    with pytest.raises(TypeError, match="lm_head: got Linear, whose forward is no product with its weight"):
        built(other)(hidden, labels)
    assert other.forward is own


def test_from_the_command_line():
    """Would catch a Config that torchtitan's parser of arguments cannot take."""
    import tyro
    from torchtitan.trainer import Trainer

    default = Trainer.Config(loss=tightropes(0.1, options={"creativity": "collision"}))
    parsed = tyro.cli(Trainer.Config, args=["--loss.balance", "0.07"], default=default).loss
    assert parsed == tightropes(0.07, options={"creativity": "collision"})


# The seam.


def test_the_seam_is_where_it_was():
    """Would catch a torchtitan whose Trainer asks, hands over or drops something else than that of 0.3.0."""
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.models.common.decoder import Decoder
    from torchtitan.trainer import Trainer

    from tightrope.integrations.torchtitan import TightropeLoss, moved

    assert moved() == []
    assert issubclass(TightropeLoss, ChunkedLossWrapper), "the Trainer asks for a ChunkedLossWrapper"
    own = inspect.signature(TightropeLoss.__call__).parameters
    theirs = inspect.signature(ChunkedLossWrapper.__call__).parameters
    assert list(own) == list(theirs), "it is called with other arguments"
    assert Decoder._skip_lm_head is False, "models no longer return hidden states where _skip_lm_head is set"
    makes, runs = inspect.getsource(Trainer.__init__), inspect.getsource(Trainer._forward_backward_body)
    for text, meaning in {
        "isinstance(self.loss_fn, ChunkedLossWrapper)": "the Trainer asks for another class",
        "self.loss_fn.set_lm_head(": "the Trainer hands the head over in another way",
        "_skip_lm_head = True": "the Trainer tells the model otherwise to keep its head back",
    }.items():
        assert text in makes, meaning
    assert "loss, _ = self.loss_fn(" in runs, "the Trainer keeps metrics: say so in the docs"
    assert 'loss_kwargs["positions"]' in runs and runs.count("loss_kwargs[") == 1, "losses are given more"


@pytest.mark.parametrize("change", ["argument", "method", "module"])
def test_a_seam_that_moved_is_named(monkeypatch, change):
    """Would catch an integration that fails on another torchtitan with an error that does not say why."""
    from torchtitan.components import loss

    if change == "argument":
        monkeypatch.setattr(loss.ChunkedLossWrapper, "__call__", lambda self, hidden, labels: None)
        said = "ChunkedLossWrapper.__call__ takes self, hidden, labels, not self, pred, labels"
    elif change == "method":
        monkeypatch.delattr(loss.ChunkedLossWrapper, "set_lm_head")
        said = "ChunkedLossWrapper has no set_lm_head"
    else:
        monkeypatch.delattr(loss, "ChunkedLossWrapper")
        said = "cannot import name 'ChunkedLossWrapper'"
    monkeypatch.delitem(sys.modules, "tightrope.integrations.torchtitan", raising=False)
    with pytest.raises(ImportError, match=f"{said}.*torchtitan==0.3.0"):
        importlib.import_module("tightrope.integrations.torchtitan")
