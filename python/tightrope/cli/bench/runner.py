"""The order of a run: for each case the truth, then every competitor in a process of its own; a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import output
from ..errors import UserError
from ..report import CsvLog
from . import process, report
from .cases import LOSSES, Case, Loss
from .competitors import Competitor, all_competitors
from .inputs import cache_file, real_inputs
from .machine import describe
from .measure import measure
from .truth import write_truths

WIDTH = 120  # of tables that go to a file or a pipe


@dataclass(frozen=True)
class Options:
    """cases to measure, on which loss, by whom (parts of names; none: everybody), where to write.

    budget: seconds of rounds for each competitor at each case (see figures.rounds_for).
    """

    cases: list[Case]
    loss: str
    competitors: list[str]
    budget: float
    out: Path


def new_console() -> Console:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    return console


def run(options: Options) -> None:
    console = new_console()
    competitors = _chosen(options.competitors)
    loss = LOSSES[options.loss]
    if any(case.inputs == "real" for case in options.cases) and not cache_file().is_file():
        with console.status("running SmolLM2 on real text, once"):
            real_inputs()
    with output.opened(options.out, report.FILES):
        _run(options, console, loss, competitors)
    console.print(f"written to {options.out}: {output.written(options.out, report.FILES)}")


def _run(options: Options, console: Console, loss: Loss, competitors: list[Competitor]) -> None:
    rows = []
    with (
        CsvLog(options.out / "bench.csv", report.COLUMNS) as log,
        output.scratch() as scratch,
        progress_of_cases(console) as progress,
    ):
        machine = describe(competitors)
        task = progress.add_task(
            "", total=sum(case.group in c.groups for case in options.cases for c in competitors)
        )
        truths = scratch / "truths.pt"
        for case in options.cases:
            for competitor, row in _measured(case, loss, competitors, options.budget, truths):
                progress.update(task, description=f"{case.name or case.shape}: {competitor}", advance=1)
                log.write([row.get(c) if c in row else machine.get(c) for c in report.COLUMNS])
                rows.append(row)
    for table in report.write(options.out, rows, machine):
        console.print(table)


def matching(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that have one of the wanted parts in them; all of them where no part is wanted."""
    for part in wanted:
        if not any(part in name for name in names):
            raise UserError(f"--competitor: got {part!r}, expected parts of: {', '.join(names)}")
    return [name for name in names if not wanted or any(part in name for part in wanted)]


def _chosen(wanted: list[str]) -> list[Competitor]:
    known = all_competitors()
    names = matching(wanted, [c.name for c in known])
    return [c for c in known if c.name in names]


def _measured(
    case: Case, loss: Loss, competitors: list[Competitor], budget: float, truths: Path
) -> Iterator[tuple[str, dict]]:
    """(name of the competitor, its line) at a case; a line has figures or the reason why there are none."""
    competitors, loss = [c for c in competitors if case.group in c.groups], case.scored(loss)
    reasons = {c.name: c.refuses(case, loss) for c in competitors}
    compared = {c.loss_compared(loss) for c in competitors if reasons[c.name] is None}
    try:
        if compared:
            process.call(write_truths, case, list(compared), truths)
    except process.Failed as failure:
        reasons = {name: reason or f"no truth to compare with: {failure}" for name, reason in reasons.items()}
    for competitor in competitors:
        own, reason = competitor.loss_compared(loss), reasons[competitor.name]
        row = {**asdict(case), "competitor": competitor.name, "loss": own.name}
        if reason is None:
            try:
                row |= process.call(measure, competitor.name, case, own, truths, budget)
            except process.Failed as failure:
                reason = f"failed: {failure}"
        yield competitor.name, row | {"skipped": reason or ""}


def progress_of_cases(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
