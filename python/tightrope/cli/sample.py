"""Sampled continuations, and how varied they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

PROMPTS = (
    "In the beginning",
    "And the king said unto his servants,",
    "The river of the city",
    "A computer is a machine that",
)
SAMPLES = 4  # per prompt
NEW_TOKENS = 40


@torch.no_grad()
def sample(
    model, tokenizer, prefixes: Sequence[Sequence[int]], seed: int, temperature: float = 1.0
) -> list[list[list[int]]]:
    """For each prefix, token ids of `SAMPLES` continuations of each of `PROMPTS`, in order, drawn from the
    model's own distribution (nothing cut off). All have `NEW_TOKENS` tokens, none of them the end.

    prefixes: what stands before each prompt: the tokens of a mode. All are sampled in one batch, as a step
    of a batch takes little longer than that of a part of it.
    """
    ids = tokenizer(list(PROMPTS), add_special_tokens=False)["input_ids"]
    rows = [
        {"input_ids": [*prefix, *prompt]} for prefix in prefixes for prompt in ids for _ in range(SAMPLES)
    ]
    batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    drawn = output[:, batch["input_ids"].shape[1] :]
    return [part.tolist() for part in drawn.chunk(len(prefixes))]


def distinct(continuations: list[list[int]], n: int) -> float:
    """Distinct n-grams of tokens over all n-grams of the continuations, from 0 to 1."""
    grams = [tuple(ids[i : i + n]) for ids in continuations for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams)


def self_bleu(continuations: list[list[int]]) -> float:
    """How alike the continuations are, from 0 to 1: the mean BLEU-4, in tokens, of each against the others.

    After Zhu et al., Texygen (arXiv 1802.01886), by NLTK with its first smoothing, as they have it.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method1
    scores = [
        sentence_bleu(continuations[:i] + continuations[i + 1 :], ids, smoothing_function=smoothing)
        for i, ids in enumerate(continuations)
    ]
    return sum(scores) / len(scores)
