"""The order of a run: for each case the truth, then every competitor in a process of its own; a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import UserError
from ..report import CsvLog
from . import report
from .cases import LOSSES, Case, Loss
from .competitors import Competitor, all_competitors
from .inputs import cache_file, real_inputs
from .machine import describe

CHILD_SECONDS = 900
WIDTH = 120  # of tables that go to a file or a pipe


@dataclass(frozen=True)
class Options:
    """cases to measure, on which loss, by whom (parts of names; none: everybody), where to write.

    budget: seconds of rounds for each competitor at each case, three rounds at least.
    """

    cases: list[Case]
    loss: str
    competitors: list[str]
    budget: float
    out: Path


class Failed(Exception):
    """A measuring process ended badly; the message is its last word."""


def run(options: Options) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    competitors = _chosen(options.competitors)
    loss = LOSSES[options.loss]
    if any(case.inputs == "real" for case in options.cases) and not cache_file().is_file():
        with console.status("running SmolLM2 on real text, once"):
            real_inputs()
    report.open_folder(options.out)
    rows = []
    with (
        CsvLog(options.out / "bench.csv", report.COLUMNS) as log,
        tempfile.TemporaryDirectory() as scratch,
        _progress(console) as progress,
    ):
        machine = describe(competitors)
        task = progress.add_task(
            "", total=sum(case.group in c.groups for case in options.cases for c in competitors)
        )
        for case in options.cases:
            for competitor, row in _measured(case, loss, competitors, options.budget, Path(scratch)):
                progress.update(task, description=f"{case.name or case.shape}: {competitor}", advance=1)
                log.write([row.get(c) if c in row else machine.get(c) for c in report.COLUMNS])
                rows.append(row)
    for table in report.write(options.out, rows, machine):
        console.print(table)
    console.print(f"written to {options.out}: {', '.join(report.FILES)}")


def _chosen(wanted: list[str]) -> list[Competitor]:
    known = all_competitors()
    for part in wanted:
        if not any(part in c.name for c in known):
            names = ", ".join(c.name for c in known)
            raise UserError(f"--competitor: got {part!r}, expected parts of: {names}")
    return [c for c in known if not wanted or any(part in c.name for part in wanted)]


def _measured(
    case: Case, loss: Loss, competitors: list[Competitor], budget: float, scratch: Path
) -> Iterator[tuple[str, dict]]:
    """(name of the competitor, its line) at a case; a line has figures or the reason why there are none."""
    truths: dict[str, Path] = {}
    for competitor in competitors:
        if case.group not in competitor.groups:
            continue
        compared = competitor.loss_compared(loss)
        row = {**asdict(case), "competitor": competitor.name, "loss": compared.name, "skipped": ""}
        reason = competitor.refuses(case, loss)
        if reason is None:
            request = {"case": asdict(case), "loss": loss.name, "budget": budget}
            try:
                if compared.name not in truths:
                    truth = scratch / f"{len(truths)}.pt"
                    _child({**request, "loss": compared.name, "competitor": None, "truth": str(truth)})
                    truths[compared.name] = truth
                row |= _child({**request, "competitor": competitor.name, "truth": str(truths[compared.name])})
            except Failed as failure:
                reason = f"failed: {failure}"
        yield competitor.name, row | {"skipped": reason or ""}


def _child(request: dict) -> dict:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tightrope.cli.bench.measure"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"more than {CHILD_SECONDS} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Failed(lines[-1][:200])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
