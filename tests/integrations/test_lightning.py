"""Lightning's Trainer with the recipes of docs/integrations.md: a fused model, and a model of one's own.

Its steps are compared with those of a plain loop over the same loss, of logits that the same model makes.
"""

from __future__ import annotations

import copy
import csv

import pytest
import torch
from torch import Tensor, nn

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("transformers")

from lightning.pytorch.loggers import CSVLogger
from tiny import VOCAB, batch, llama

import tightrope
from tightrope.integrations import fuse

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
]

STEPS, MOST = 4, 0.2
F64 = torch.float64


def scheduled(step: int) -> float:
    """From no creativity to the most of it."""
    return MOST * min(1.0, step / 3)


class Fused(lightning.LightningModule):
    """Of a Hugging Face model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.handle = fuse(model, creativity="collision")

    def training_step(self, batch, index):
        self.handle.balance = scheduled(self.global_step)
        loss = self.model(**batch).loss
        stats = self.handle.stats
        self.log("loss", loss)
        self.log("balance", self.handle.balance)
        self.log("entropy", stats.entropy.sum() / (stats.argmax >= 0).sum())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Own(lightning.LightningModule):
    """Of a body of one's own, with a head that is its loss."""

    def __init__(self, body: nn.Module, head: nn.Linear):
        super().__init__()
        self.body = body
        self.head = tightrope.LMHead.from_linear(head, creativity="collision", shift=1)

    def training_step(self, batch, index):
        hidden = self.body(batch["input_ids"])
        balance = scheduled(self.global_step)
        loss, stats = self.head(hidden, batch["labels"], balance=balance, return_stats=True)
        self.log("loss", loss)
        self.log("balance", balance)
        self.log("entropy", stats.entropy.sum() / (stats.argmax >= 0).sum())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Body(nn.Module):
    """Hidden states of a Llama."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).last_hidden_state


def made(kind: type, model: nn.Module) -> lightning.LightningModule:
    return kind(model) if kind is Fused else kind(Body(model.model), model.lm_head)


def batches() -> list[dict[str, Tensor]]:
    return [batch(seed=seed) for seed in range(STEPS)]


def by_hand(model: nn.Module) -> list[dict[str, float]]:
    """The same steps on logits, and what is logged of them."""
    optimizer, logs = torch.optim.SGD(model.parameters(), lr=0.5), []
    for step, inputs in enumerate(batches()):
        logits = model(inputs["input_ids"]).logits[:, :-1].reshape(-1, VOCAB)
        labels = inputs["labels"][:, 1:].reshape(-1)
        loss, stats = tightrope.reality_creativity_loss(
            logits, labels, balance=scheduled(step), creativity="collision", return_stats=True
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropy = stats.entropy[labels != -100].mean().item()
        logs.append({"loss": loss.item(), "balance": scheduled(step), "entropy": entropy})
    return logs


@pytest.mark.parametrize("kind", [Fused, Own])
def test_lightning_takes_the_steps_of_a_plain_loop(kind, tmp_path):
    """Would catch a forward that Lightning takes around the loss, a schedule that is late, or wrong logs."""
    model = llama(dtype=F64)
    expected = copy.deepcopy(model)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(made(kind, model), torch.utils.data.DataLoader(batches(), batch_size=None))
    wanted = by_hand(expected)
    found = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    for logged, by_name in zip(found, wanted, strict=True):
        for name, value in by_name.items():
            assert float(logged[name]) == pytest.approx(value, rel=1e-6)
    for (name, value), other in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12, msg=name)
