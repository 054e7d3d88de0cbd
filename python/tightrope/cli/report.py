"""What a run leaves behind: tables that grow line by line, samples, and the picture of the trade-off.

Lines are flushed as they are written, so that a run that is cut short leaves files that read well.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .output import cannot_write, writing
from .probe import Cost
from .sample import NEW_TOKENS, PROMPTS, SAMPLES

FILES = ("steps.csv", "samples.md", "summary.csv", "cost.csv", "summary.md", "tradeoff.png")


class Row(NamedTuple):
    """One mode in the summary; the untrained model has no balance and no step."""

    mode: str
    balance: float | None
    cross_entropy: float
    entropy: float
    distinct_1: float
    distinct_2: float
    step_seconds: float | None

    @property
    def label(self) -> str:
        """The mode with its balance, said once where it has no name of its own."""
        if self.balance is None or self.mode == f"balance {self.balance:g}":
            return self.mode
        return f"{self.mode} (balance {self.balance:g})"


class CsvLog:
    """A CSV file of whole lines, each flushed. Floats keep all their digits."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path = path
        with writing(path):
            self._file: IO[str] = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self.write(columns)

    def write(self, values: Sequence[object]) -> None:
        end = self._file.tell()
        try:
            self._writer.writerow(values)
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # it tries once more
                self._file.close()
            with suppress(OSError):
                os.truncate(self._path, end)
            raise cannot_write("--out", self._path, error) from None

    def __enter__(self) -> CsvLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with CsvLog(path, columns) as log:
        for row in rows:
            log.write(row)


def append_samples(path: Path, mode: str, texts: Sequence[str]) -> None:
    """Adds the continuations of one mode, `SAMPLES` of each prompt in order."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(
                "# Sampled continuations\n\n"
                f"Temperature 1 where none is named, nothing cut off, {NEW_TOKENS} tokens each.\n"
            )
        file.write(f"\n## {mode}\n")
        for index, text in enumerate(texts):
            if index % SAMPLES == 0:
                file.write(f"\n**{PROMPTS[index // SAMPLES]}** ...\n\n")
            file.write(f"- {' '.join(text.split())}\n")


def summary_table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of the comparison of the modes."""
    header = ["mode", "balance", "cross-entropy", "entropy", "distinct-1", "distinct-2", "step (s)"]
    return [header] + [
        [
            row.mode,
            "" if row.balance is None else f"{row.balance:g}",
            f"{row.cross_entropy:.3f}",
            f"{row.entropy:.3f}",
            f"{row.distinct_1:.3f}",
            f"{row.distinct_2:.3f}",
            "" if row.step_seconds is None else f"{row.step_seconds:.2f}",
        ]
        for row in rows
    ]


def write_summary(folder: Path, rows: Sequence[Row], costs: Sequence[Cost], tokens: int) -> list[Table]:
    """Writes summary.md and tradeoff.png, and returns the tables to print."""
    tables = {
        "Held-out text (nats a token), distinct n-grams of the samples": summary_table(rows),
        f"The loss of {tokens} tokens, forward and backward": cost_table(costs),
    }
    text = "# Reality against creativity\n"
    for title, lines in tables.items():
        text += f"\n## {title}\n\n{markdown_table(lines)}\n"
    with writing(folder / "summary.md"):
        (folder / "summary.md").write_text(text, encoding="utf-8")
    draw_tradeoff(folder / "tradeoff.png", rows)
    return [rich_table(lines, title) for title, lines in tables.items()]


def cost_table(costs: Sequence[Cost]) -> list[list[str]]:
    """Header and lines of the comparison of the loss with eager PyTorch."""
    lines = [[c.implementation, f"{c.loss:.6f}", f"{c.seconds:.2f}", f"{c.peak_mb:.0f}"] for c in costs]
    return [["implementation", "value", "time (s)", "peak memory (MB)"], *lines]


def rich_table(lines: list[list[str]], title: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    for index, name in enumerate(lines[0]):
        table.add_column(name, justify="right" if index else "left")
    for line in lines[1:]:
        table.add_row(*line)
    return table


def markdown_table(lines: list[list[str]]) -> str:
    header, *rest = lines
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rest])


def draw_tradeoff(path: Path, rows: Sequence[Row]) -> None:
    """Held-out reality against creativity, one point a mode."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    middle = (min(row.entropy for row in rows) + max(row.entropy for row in rows)) / 2
    for row in rows:
        trained = row.balance is not None
        axes.plot(row.entropy, row.cross_entropy, "o" if trained else "s", markersize=9)
        axes.annotate(
            row.label,
            (row.entropy, row.cross_entropy),
            textcoords="offset points",
            xytext=(0, 10),
            ha="left" if row.entropy < middle else "right",
            parse_math=False,
        )
    modes = sorted((row for row in rows if row.balance is not None), key=lambda row: row.balance)
    axes.plot([r.entropy for r in modes], [r.cross_entropy for r in modes], ":", color="grey", zorder=0)
    axes.margins(0.15)
    axes.set_xlabel("creativity: held-out entropy (nats), more open to the right")
    axes.set_ylabel("reality: held-out cross-entropy (nats), truer below")
    axes.set_title("Reality against creativity")
    axes.grid(alpha=0.3)
    with writing(path):
        figure.savefig(path, dpi=120)
