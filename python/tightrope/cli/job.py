"""The order of a training run: load, freeze, then per mode reset, train, evaluate, sample; then compare.

Every mode starts from the same weights and sees the same batches in the same order, so that the balance
is all that differs.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ..support import MinP
from . import data, model, output, probe, report, sample
from .progress import phase, progress_bar
from .train import Batches, Step, evaluate, train


@dataclass(frozen=True)
class Options:
    """The options of ``tightrope train``; modes are names with their balances."""

    modes: dict[str, float]
    text: Path | None
    model: Path | None
    out: Path
    reality: str
    creativity: str
    min_p: float | None
    steps: int
    batch_size: int
    sequence_length: int
    blocks: int
    learning_rate: float
    seed: int


def run(options: Options) -> None:
    console = Console(highlight=False, markup=False)
    text = data.read_text(options.text)
    with output.opened(options.out, report.FILES):
        _run(options, console, text)
    console.print(f"written to {options.out}: {output.written(options.out, report.FILES)}")


def _run(options: Options, console: Console, text: str) -> None:
    with phase(console, "loading the model"):
        network, tokenizer = model.load(options.model)
        tail = model.Tail(network, options.blocks)
    with phase(console, "tokenising the text"):
        windows = data.make_windows(
            tokenizer,
            text,
            length=options.sequence_length,
            batch_size=options.batch_size,
            seed=options.seed,
        )
    tail.trace(network, windows.held_out[0])
    # Only whole batches: where the text is short, training starts over at its first batch.
    count = min(options.steps, len(windows.train) // options.batch_size) * options.batch_size
    training = _freeze(console, tail, windows.train[:count], options.batch_size, "training")
    held_out = _freeze(console, tail, windows.held_out, options.batch_size, "held-out")

    with phase(console, "measuring the loss beside eager PyTorch"):
        hidden, weight, target = _probe_inputs(tail, training)
        costs = probe.measure(hidden, weight, target, max(options.modes.values()))
    report.write_csv(options.out / "cost.csv", probe.Cost._fields, costs)

    rows = _train_modes(console, options, network, tokenizer, tail, training, held_out)
    for table in report.write_summary(options.out, rows, costs, len(target)):
        console.print(table)


def _freeze(console: Console, tail: model.Tail, windows: Tensor, batch_size: int, name: str) -> Batches:
    frozen = []
    with progress_bar(console) as progress:
        task = progress.add_task(f"frozen blocks, {name} text", total=len(windows), note="")
        for states in tail.frozen(windows, batch_size):
            frozen.append(states)
            progress.advance(task, len(states))
    return Batches(list(windows.split(batch_size)), frozen)


def _train_modes(
    console: Console,
    options: Options,
    network,
    tokenizer,
    tail: model.Tail,
    training: Batches,
    held_out: Batches,
) -> list[report.Row]:
    """Trains and judges every mode, beside the model as it was, and logs it all."""
    start = {name: value.clone() for name, value in tail.state_dict().items()}
    rows = []
    with (
        report.CsvLog(options.out / "steps.csv", ("mode", "balance", *Step._fields)) as steps_csv,
        report.CsvLog(options.out / "summary.csv", report.Row._fields) as summary_csv,
    ):
        for mode, balance in [("untrained", None), *options.modes.items()]:
            steps: list[Step] = []
            if balance is not None:
                tail.load_state_dict(start)
                with progress_bar(console) as progress:
                    task = progress.add_task(mode, total=options.steps, note="")
                    for step in train(
                        tail,
                        training,
                        balance=balance,
                        reality=options.reality,
                        creativity=options.creativity,
                        support=None if options.min_p is None else MinP(options.min_p),
                        steps=options.steps,
                        learning_rate=options.learning_rate,
                    ):
                        steps.append(step)
                        steps_csv.write((mode, balance, *step))
                        progress.update(task, advance=1, note=_note(step))
            with phase(console, f"evaluating and sampling {mode}"):
                quality = evaluate(tail, held_out)
                continuations = sample.sample(network, tokenizer, options.seed)
            rows.append(
                report.Row(
                    mode,
                    balance,
                    *quality,
                    sample.distinct(continuations, 1),
                    sample.distinct(continuations, 2),
                    statistics.median(s.step_seconds for s in steps) if steps else None,
                )
            )
            summary_csv.write(rows[-1])
            report.append_samples(options.out / "samples.md", mode, tokenizer.batch_decode(continuations))
    return rows


@torch.no_grad()
def _probe_inputs(tail: model.Tail, training: Batches) -> tuple[Tensor, Tensor, Tensor]:
    """Real hidden states, the head, and real targets: up to `probe.rows` tokens of training text."""
    weight = tail.head.weight.detach()
    limit = probe.rows(weight)
    hidden, target, rows = [], [], 0
    for tokens, frozen in zip(*training):
        hidden.append(tail(frozen)[:, :-1].flatten(0, 1))
        target.append(tokens[:, 1:].flatten())
        rows += len(target[-1])
        if rows >= limit:
            break
    return torch.cat(hidden)[:limit], weight, torch.cat(target)[:limit]


def _note(step: Step) -> str:
    return (
        f"loss {step.loss:.3f} reality {step.reality:.3f} entropy {step.entropy:.3f} "
        f"{step.tokens_per_second:.0f} tok/s"
    )
