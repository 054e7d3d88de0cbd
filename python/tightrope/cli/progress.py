"""What a person sees while a command works: a bar where steps can be counted, else a spinner."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        expand=True,
    )


@contextmanager
def phase(console: Console, name: str) -> Iterator[None]:
    """A spinner while it lasts, and a line with its time after."""
    begin = time.perf_counter()
    with console.status(name):
        yield
    console.print(f"{name}: {time.perf_counter() - begin:.1f} s")
