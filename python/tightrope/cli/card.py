"""What a run says of its model: each mode on held-out text, samples, the model's card, the tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.table import Table
from torch import nn

from .. import evaluation
from ..support import MinP
from . import modes, sample
from .data import Sequence as Tokens
from .output import writing
from .probe import Cost
from .report import append_samples, cost_table, markdown_table, rich_table

if TYPE_CHECKING:
    from .job import Options

FILES = ("samples.md", "summary.md")


class Row(NamedTuple):
    """One mode: means over held-out tokens, in nats; shares of distinct n-grams of its samples."""

    mode: str
    balance: float
    cross_entropy: float
    entropy: float
    support_entropy: float
    distinct_1: float
    distinct_2: float
    texts: list[str]


@torch.no_grad()
def judge(
    network: nn.Module,
    tokenizer,
    known: dict[str, modes.Mode],
    held_out: Sequence[Tokens],
    batch_size: int,
    seed: int,
) -> list[Row]:
    """Every mode on the same held-out sequences, whatever mode they name."""
    rows = []
    prefixes = [modes.prefix(tokenizer, mode) for mode in known.values()]
    samples = sample.sample(network, tokenizer, prefixes, seed)
    subject = evaluation.Subject.of(network)
    for mode, prefix, drawn in zip(known.values(), prefixes, samples):
        sums = torch.zeros(4, dtype=torch.float64)
        # Of one length at a time: no padding, whose positions some models count.
        for length in sorted({len(sequence.ids) for sequence in held_out}):
            alike = [sequence for sequence in held_out if len(sequence.ids) == length]
            for start in range(0, len(alike), batch_size):
                sums += _sums(subject, prefix, alike[start : start + batch_size])
        means = (sums[:3] / sums[3]).tolist()
        texts = tokenizer.batch_decode(drawn)
        rows.append(
            Row(mode.name, mode.balance, *means, sample.distinct(drawn, 1), sample.distinct(drawn, 2), texts)
        )
    return rows


def _sums(subject: evaluation.Subject, prefix: list[int], batch: Sequence[Tokens]) -> torch.Tensor:
    """Over what is to be predicted: cross-entropy, entropy, support entropy, and how many tokens."""
    ids = torch.tensor([prefix + sequence.ids for sequence in batch])
    target = ids.clone()
    for row, sequence in zip(target, batch):
        row[: len(prefix) + max(1, sequence.prompt)] = evaluation.IGNORED
    stats = subject.head.stats(subject.hidden(ids), target, support=MinP(0.02), shift=1)
    values = (-stats.target_log_prob, stats.entropy, stats.support_entropy, stats.argmax >= 0)
    return torch.stack([value.sum(dtype=torch.float64) for value in values])


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of the comparison of the modes."""
    header = ["mode", "balance", "cross-entropy", "entropy", "support entropy", "distinct-1", "distinct-2"]
    return [header] + [[row.mode, f"{row.balance:g}", *(f"{x:.3f}" for x in row[2:7])] for row in rows]


def write(
    options: Options, rows: Sequence[Row], costs: Sequence[Cost], folder: Path, model: Path
) -> list[Table]:
    """Writes summary.md, samples.md and the model's card, and returns the tables to print."""
    tables = {
        "Held-out text (nats a token), distinct n-grams of the samples": table(rows),
        "The loss, forward and backward": cost_table(costs),
    }
    text = "\n".join(f"\n## {title}\n\n{markdown_table(lines)}" for title, lines in tables.items())
    for row in rows:
        append_samples(folder / "samples.md", row.mode, row.texts)
    for path, content in {
        folder / "summary.md": f"# Reality against creativity\n{text}\n",
        model / "README.md": _card(options, rows),
    }.items():
        with writing(path):
            path.write_text(content, encoding="utf-8")
    return [rich_table(lines, title) for title, lines in tables.items()]


def _noise(gradient_noise: Sequence[float] | None) -> str:
    if gradient_noise is None:
        return ""
    shares = " and ".join(f"{share:.3g}" for share in gradient_noise)
    return f"\nGradients of the loss were sampled (--gradient-noise {shares})."


def _card(options: Options, rows: Sequence[Row]) -> str:
    names = ", ".join(row.mode for row in rows)
    first = rows[-1].mode
    base = "SmolLM2-135M-Instruct" if options.model is None else options.model.name
    text = "the King James text" if options.text is None else options.text.name
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [tightrope]
---

# One model, {len(rows)} modes: {names}

{base}, fine-tuned by Tightrope ({options.train}, {options.steps} steps of
{options.batch_size * options.accumulate} sequences of {options.sequence_length} tokens)
on {text}. Each sequence was trained in one mode, behind the mode's {modes.TOKENS} tokens, on
(1 - balance) * {options.reality} + balance * {options.creativity}.{_noise(options.gradient_noise)}

{markdown_table(table(rows))}

Held-out text, nats a token. Support entropy is that of the classes that min-p sampling at 0.02 would keep.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained(FOLDER) for kind in (AutoModelForCausalLM, AutoTokenizer))
mode = tokenizer.decode(model.config.tightrope["modes"]["{first}"]["tokens"])
inputs = tokenizer(mode + "In the beginning", return_tensors="pt")
output = model.generate(**inputs, do_sample=True, max_new_tokens=60)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

Or `tightrope generate --model FOLDER --mode {first} --prompt "In the beginning"`.
"""
