"""Models out of folders, ready to be compared: one vocabulary, and logits that Tightrope makes too.

Whatever does not fit is said before anything is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ... import evaluation
from .. import data, model, modes
from ..errors import UserError


class Loaded(NamedTuple):
    """A model with its tokenizer, how Tightrope sees it, and a mode's tokens, which stand before texts."""

    network: object
    tokenizer: object
    subject: evaluation.Subject
    prefix: tuple[int, ...] = ()


def load(option: str, folder: Path, trust_remote_code: bool) -> dict[str, Loaded]:
    """A model; or one with modes, as many as it has, by their names. Without modes its name is empty.

    Their tokens are no classes here: nothing that is to be predicted, and never sampled.

    Raises:
        UserError: the folder cannot be loaded, or what is in it has no head.
    """
    network, tokenizer = model.load(folder, option, trust_remote_code)
    known = modes.of(network)
    try:
        head = evaluation.Head.of(network)
        if known:
            head = head.first(min(index for mode in known.values() for index in mode.tokens))
        found = {}
        for mode in known.values() or (None,):
            prefix = tuple(modes.prefix(tokenizer, mode)) if mode else ()
            hidden = evaluation.Subject.of(network, prefix).hidden
            found[mode.name if mode else ""] = Loaded(
                network, tokenizer, evaluation.Subject(hidden, head), prefix
            )
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None
    return found


def check(loaded: dict[str, Loaded], judge: str, windows: Tensor) -> None:
    """Raise UserError where a model is not to be compared with the judge, or does not take such windows."""
    vocabulary = _words(loaded[judge])
    length = windows.shape[1]
    # A folder may have been given twice.
    different = {id(one.network): (option, *one) for option, one in loaded.items()}
    for option, network, _, subject, prefix in different.values():
        ours = _words(loaded[option])
        if ours != vocabulary:
            differ = sum(vocabulary.get(token) != index for token, index in ours.items())
            raise UserError(
                f"{option}: its tokenizer is not the judge's: got {len(ours)} tokens, {differ} of which the "
                f"judge's {len(vocabulary)} have not, or have by another number; expected the same vocabulary"
            )
        longest = model.longest(network) or length
        if length + len(prefix) > longest:
            longest -= len(prefix)
            raise UserError(f"--sequence-length: got {length}, {option} takes up to {longest}")
        try:
            evaluation.check_vocabulary(option, subject, loaded[judge].subject)
            evaluation.Subject(evaluation.Subject.of(network).hidden, subject.head).check(network, windows[0])
        except ValueError as error:
            message = str(error).removeprefix(f"{option}: ")
            raise UserError(f"{option}: {message}") from None


def _words(one: Loaded) -> dict[str, int]:
    """The tokens of a tokenizer, but for those of modes."""
    told = {index for mode in modes.of(one.network).values() for index in mode.tokens}
    return {token: index for token, index in one.tokenizer.get_vocab().items() if index not in told}


def make_windows(tokenizer: object, text: str, *, length: int, count: int | None, most: int) -> Tensor:
    """Windows of a text, ``(W, length)``: first those that `tightrope train` holds out at the same length.

    count: as many as a person asked for, or None: what there is, ``most`` at most.
    """
    cut = data.make_windows(tokenizer, text, length=length, batch_size=1)
    available = len(cut.held_out) + len(cut.train)
    if count is not None and count > available:
        raise UserError(f"--windows: got {count}, the text has {available} of {length} tokens")
    wanted = count or min(most, available)
    held_out = cut.held_out[:wanted]
    if len(held_out) == wanted:
        return held_out
    return torch.cat([held_out, cut.train[: wanted - len(held_out)]])
