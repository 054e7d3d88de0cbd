"""What a run leaves behind: tables that grow line by line, and samples.

Lines are flushed as they are written, so that a run that is cut short leaves files that read well.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from rich import box
from rich.table import Table

from .output import cannot_write, writing
from .probe import Cost
from .sample import NEW_TOKENS, PROMPTS, SAMPLES


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
