"""Text from a model in a mode, or in all of its modes side by side, as it comes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from . import model, modes
from .errors import UserError


@dataclass(frozen=True)
class Options:
    """The options of ``tightrope generate``."""

    model: Path
    mode: list[str]
    balance: float | None
    prompt: str
    tokens: int
    temperature: float
    min_p: float | None
    seed: int
    trust_remote_code: bool


def run(options: Options) -> None:
    console = Console(highlight=False, markup=False)
    network, tokenizer = model.load(options.model, trust_remote_code=options.trust_remote_code)
    prefixes = _prefixes(options, network, tokenizer)
    ids = torch.tensor(tokenizer(options.prompt, add_special_tokens=False)["input_ids"], dtype=torch.long)
    if not prefixes or (not len(ids) and not len(next(iter(prefixes.values())))):
        raise UserError("--prompt: got an empty one, expected some text")
    embedding = network.get_input_embeddings()
    with torch.no_grad():
        inputs = torch.stack([torch.cat([prefix, embedding(ids)]) for prefix in prefixes.values()])
    longest = model.longest(network)
    if longest is not None and inputs.shape[1] + options.tokens > longest:
        raise UserError(
            f"--tokens: got {options.tokens}, the model takes up to {longest - inputs.shape[1]} after this "
            "prompt"
        )
    torch.manual_seed(options.seed)
    with _Shown(console, tokenizer, list(prefixes), options.prompt) as shown:
        network.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
            do_sample=True,
            temperature=options.temperature,
            min_p=options.min_p,
            top_k=0,
            top_p=1.0,
            max_new_tokens=options.tokens,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=transformers.StoppingCriteriaList([shown]),
        )


def _prefixes(options: Options, network, tokenizer) -> dict[str, Tensor]:
    """The embeddings ``(k, D)`` that stand before the prompt, by what they are called."""
    known = modes.of(network)
    table = network.get_input_embeddings().weight.detach()
    begin = table[modes.prefix(tokenizer, None)]
    if options.balance is not None:
        if options.mode:
            raise UserError(f"--balance: got one beside --mode {options.mode[0]}, expected one of the two")
        return {
            f"balance {options.balance:g}": torch.cat([begin, modes.dialled(known, options.balance, table)])
        }
    chosen = [modes.named(known, name, "--mode") for name in options.mode] or list(known.values())
    if not chosen:
        return {"": begin}
    return {mode.name: torch.cat([begin, table[list(mode.tokens)]]) for mode in chosen}


class _Shown(transformers.StoppingCriteria):
    """Shows what has been generated after each token: one text as it comes, several side by side.

    Never stops anything. Where there is no terminal several texts are printed at the end, one by one.
    """

    def __init__(self, console: Console, tokenizer, names: list[str], prompt: str):
        self._console, self._tokenizer, self._names, self._prompt = console, tokenizer, names, prompt
        self._texts = [""] * len(names)
        self._live: Live | None = None

    def __enter__(self) -> _Shown:
        if len(self._names) == 1:
            self._console.print(self._prompt, end="", soft_wrap=True)
        elif self._console.is_terminal:
            self._live = Live(self._panels(), console=self._console, vertical_overflow="visible")
            self._live.start()
        return self

    def __call__(self, input_ids: Tensor, scores: object, **others: object) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        # A character of several tokens is not there before its last one.
        before, self._texts = self._texts, [text.rstrip("�") for text in texts]
        if len(texts) == 1:
            self._console.print(self._texts[0][len(before[0]) :], end="", soft_wrap=True)
        elif self._live is not None:
            self._live.update(self._panels())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(self._panels())
            self._live.stop()
        elif len(self._names) == 1:
            self._console.print()
        else:
            for name, text in zip(self._names, self._texts):
                self._console.print(f"{name}: {self._prompt}{text}\n", soft_wrap=True)

    def _panels(self) -> Columns:
        width = max(20, self._console.width // len(self._names) - 1)
        texts = zip(self._names, self._texts)
        return Columns([Panel(Text(self._prompt + text), title=name, width=width) for name, text in texts])
