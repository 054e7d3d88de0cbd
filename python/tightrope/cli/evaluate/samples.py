"""What is sampled from the models, and measured on it: variety, and what the judge makes of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ... import evaluation
from .. import sample
from .folders import Loaded


class Sampled(NamedTuple):
    """The continuations of one model at one temperature; `texts` are for samples.md."""

    model: str
    temperature: float
    distinct_1: float
    distinct_2: float
    #: from 0 to 1, higher where the continuations are alike
    self_bleu: float
    judge_perplexity: float
    texts: list[str]

    @property
    def label(self) -> str:
        return f"{self.model}, temperature {self.temperature:.3g}"


def draw(name: str, loaded: Loaded, judge: evaluation.Subject, seed: int, temperature: float) -> Sampled:
    """Samples a model and measures the continuations."""
    network, tokenizer, _, prefix = loaded
    (continuations,) = sample.sample(network, tokenizer, [prefix], seed, temperature)
    return Sampled(
        name,
        temperature,
        sample.distinct(continuations, 1),
        sample.distinct(continuations, 2),
        sample.self_bleu(continuations),
        _perplexity(judge, tokenizer, continuations),
        tokenizer.batch_decode(continuations),
    )


def _perplexity(judge: evaluation.Subject, tokenizer, continuations: list[list[int]]) -> float:
    """Of all continuations, each after its prompt."""
    found = []
    for index, prompt in enumerate(sample.PROMPTS):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ours = continuations[index * sample.SAMPLES : (index + 1) * sample.SAMPLES]
        sequences = torch.tensor([ids + continuation for continuation in ours])
        found.append(evaluation.token_log_probs(judge, sequences, len(ids)).flatten())
    return math.exp(-torch.cat(found).mean().item())
