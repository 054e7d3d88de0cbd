"""The modes of one model: a few tokens before a text, whose embeddings say how open the text is to be.

They are tokens of the tokenizer and rows of the embedding, so that a folder with them loads wherever its
model loads. The head has rows for them too, as heads do, made never to matter: the mean of all others, whose
logit is the mean logit, far below those that are sampled. Head and embedding of a tied model part, since a
row that says "be open" to the model is nothing that it should say itself. What a model's modes are stands in
its config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .errors import UserError

TOKENS = 8  # of a mode
# What the embeddings of a mode's tokens start from, words of one token each: the closest to a meaning that
# there is before training. Modes of other names start from those.
_MEANINGS = {
    "precise": "precise exact certain sure",
    "balanced": "balanced even fair plain",
    "creative": "creative wild strange free",
}


@dataclass(frozen=True)
class Mode:
    """A name, the balance it was trained with, and its tokens."""

    name: str
    balance: float
    tokens: tuple[int, ...]


def of(model: nn.Module) -> dict[str, Mode]:
    """The modes of a model, by name, the least open first; none where it was trained without."""
    stored = (getattr(model.config, "tightrope", None) or {}).get("modes", {})
    modes = [Mode(name, mode["balance"], tuple(mode["tokens"])) for name, mode in stored.items()]
    return {mode.name: mode for mode in sorted(modes, key=lambda mode: (mode.balance, mode.tokens))}


def named(modes: dict[str, Mode], name: str, option: str) -> Mode:
    """One of the modes.

    Raises:
        UserError: there is none of that name.
    """
    if name not in modes:
        raise UserError(f"{option}: got {name!r}, the model has {', '.join(modes) or 'no modes'}")
    return modes[name]


def add(model: nn.Module, tokenizer, balances: dict[str, float], **about: object) -> dict[str, Mode]:
    """Gives a model and its tokenizer the tokens of modes, and notes them, and ``about``, in its config.

    The embeddings start from those of words, of `_MEANINGS` or of a mode's name.
    """
    words = {name: _words(tokenizer, name) for name in balances}
    strings = {name: [f"<|{name}:{i + 1}|>" for i in range(TOKENS)] for name in balances}
    taken = sorted(set(tokenizer.get_vocab()) & {s for many in strings.values() for s in many})
    if taken:
        raise UserError(
            f"--model: its tokenizer has {', '.join(taken)} already: expected a model without modes"
        )
    tokenizer.add_tokens([s for many in strings.values() for s in many], special_tokens=True)
    tokens = {name: tokenizer.convert_tokens_to_ids(many) for name, many in strings.items()}
    new = [index for many in tokens.values() for index in many]
    _make_room(model, max(new) + 1, new)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        for name in balances:
            embedding[tokens[name]] = embedding[words[name]]
    model.config.tightrope = {
        **about,
        "modes": {name: {"balance": b, "tokens": tokens[name]} for name, b in balances.items()},
    }
    # Nobody wants to read them.
    kept = list(model.generation_config.suppress_tokens or [])
    model.generation_config.suppress_tokens = kept + new
    return of(model)


def _words(tokenizer, name: str) -> list[int]:
    """As many tokens as a mode has, of its words over and over."""
    ids = tokenizer(f" {_MEANINGS.get(name, name)}", add_special_tokens=False)["input_ids"]
    return [ids[i % len(ids)] for i in range(TOKENS)]


@torch.no_grad()
def _make_room(model: nn.Module, rows: int, new: Sequence[int]) -> None:
    """Rows for the new tokens, in an embedding and a head that share nothing."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    mean = {name: p.detach().mean(0) for name, p in head.named_parameters(recurse=False)}
    if rows > embedding.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    for name, parameter in head.named_parameters(recurse=False):
        parameter[list(new)] = mean[name]


def prefix(tokenizer, mode: Mode | None) -> list[int]:
    """What stands before a text: the token that a tokenizer begins texts with, if it does, and the mode's."""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [*([tokenizer.bos_token_id] if begins else []), *(mode.tokens if mode else ())]


def dialled(modes: dict[str, Mode], balance: float, embedding: Tensor) -> Tensor:
    """Embeddings ``(TOKENS, D)`` between those of the two modes whose balances enclose a balance.

    Raises:
        UserError: it is outside of all modes.
    """
    ordered = sorted(modes.values(), key=lambda mode: mode.balance)
    for low, high in pairwise(ordered):
        if low.balance <= balance <= high.balance:
            share = (balance - low.balance) / (high.balance - low.balance)
            return torch.lerp(embedding[list(low.tokens)], embedding[list(high.tokens)], share)
    known = ", ".join(f"{mode.name} {mode.balance:g}" for mode in ordered)
    raise UserError(f"--balance: got {balance:g}, expected one between those of two modes: {known or 'none'}")
