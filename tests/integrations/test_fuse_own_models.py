"""Models that transformers has never heard of: fused by what they do, and not by what they are called."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import VOCAB
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tightrope.integrations import fuse

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-12


class Bigrams(PreTrainedModel):
    """A head of another name, with a bias, and a forward with a cross-entropy in it."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(VOCAB, 16)
        self.unembed = nn.Linear(16, VOCAB)
        self.post_init()

    def get_output_embeddings(self):
        return self.unembed

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.logits(self.table(input_ids))
        loss = (
            None
            if labels is None
            else self.loss(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        )
        return CausalLMOutput(loss=loss, logits=logits)

    def logits(self, hidden):
        return 2.0 * torch.tanh(self.unembed(hidden) / 2.0)

    def loss(self, rows, labels):
        return nn.CrossEntropyLoss()(rows, labels)


class Half(Bigrams):
    """A second loss, of logits that are made without gradients."""

    def logits(self, hidden):
        with torch.no_grad():
            self.frozen = self.unembed(hidden[:, :-1].flatten(0, 1))
        return self.unembed(hidden)

    def loss(self, rows, labels):
        return F.cross_entropy(rows, labels) + F.cross_entropy(self.frozen, labels)


class WithCounts(Bigrams):
    """The loss is a sum, as of a model that divides by a count of its own."""

    def loss(self, rows, labels):
        return F.cross_entropy(rows, labels, reduction="sum") / (labels != -100).sum().clamp(min=1)


@pytest.mark.parametrize("kind", [Bigrams, Half, WithCounts])
def test_a_model_of_ones_own(kind):
    """A model that is known by its name, its head's or its loss function's; a gradient of a constant."""
    torch.manual_seed(0)
    model = kind(PretrainedConfig()).double()
    inputs = tiny.batch()
    expected = tiny.loss_and_gradients(model, inputs)
    handle = fuse(model)
    if kind is Half:
        with pytest.warns(UserWarning, match="because of cross_entropy"):
            actual = tiny.loss_and_gradients(model, inputs)
    else:
        with tiny.Watch(inputs) as watch:
            actual = tiny.loss_and_gradients(model, inputs)
        assert watch.made == handle.materialized == []
    assert tiny.off(actual, expected) < EXACT
