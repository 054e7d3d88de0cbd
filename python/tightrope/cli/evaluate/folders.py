"""Models out of folders, ready to be compared: one vocabulary, and logits that Tightrope makes too.

Whatever does not fit is said before anything is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ... import evaluation
from .. import data, model
from ..errors import UserError


class Loaded(NamedTuple):
    """A model with its tokenizer, and how Tightrope sees it."""

    network: object
    tokenizer: object
    subject: evaluation.Subject


def load(folders: dict[str, Path]) -> dict[str, Loaded]:
    """Loads each folder once; keys are the options that chose them, as they are said in an error."""
    for option, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"{option}: no folder {folder}")
    loaded: dict[Path, Loaded] = {}
    result: dict[str, Loaded] = {}
    for option, folder in folders.items():
        place = folder.resolve()
        if place not in loaded:
            network, tokenizer = model.load(folder, option)
            try:
                loaded[place] = Loaded(network, tokenizer, evaluation.Subject.of(network))
            except ValueError as error:
                raise UserError(f"{option}: {error}") from None
        result[option] = loaded[place]
    return result


def check(loaded: dict[str, Loaded], judge: str, windows: Tensor) -> None:
    """Raise UserError where a model is not to be compared with the judge, or does not take such windows."""
    vocabulary = loaded[judge].tokenizer.get_vocab()
    length = windows.shape[1]
    # A folder may have been given twice.
    different = {id(one.network): (option, *one) for option, one in loaded.items()}
    for option, network, tokenizer, subject in different.values():
        ours = tokenizer.get_vocab()
        if ours != vocabulary:
            differ = sum(vocabulary.get(token) != index for token, index in ours.items())
            raise UserError(
                f"{option}: its tokenizer is not the judge's: got {len(ours)} tokens, {differ} of which the "
                f"judge's {len(vocabulary)} have not, or have by another number; expected the same vocabulary"
            )
        longest = getattr(network.config, "max_position_embeddings", None) or length
        if length > longest:
            raise UserError(f"--sequence-length: got {length}, {option} takes up to {longest}")
        try:
            evaluation.check_vocabulary(option, subject, loaded[judge].subject)
            subject.check(network, windows[0])
        except ValueError as error:
            message = str(error).removeprefix(f"{option}: ")
            raise UserError(f"{option}: {message}") from None


def make_windows(
    tokenizer: object, text: str, *, length: int, count: int | None, most: int, seed: int
) -> Tensor:
    """Windows of a text, ``(W, length)``: first those that `tightrope train` holds out under the same seed.

    count: as many as a person asked for, or None: what there is, ``most`` at most.
    """
    cut = data.make_windows(tokenizer, text, length=length, batch_size=1, seed=seed)
    available = len(cut.held_out) + len(cut.train)
    if count is not None and count > available:
        raise UserError(f"--windows: got {count}, the text has {available} of {length} tokens")
    wanted = count or min(most, available)
    held_out = cut.held_out[:wanted]
    if len(held_out) == wanted:
        return held_out
    return torch.cat([held_out, cut.train[: wanted - len(held_out)]])
