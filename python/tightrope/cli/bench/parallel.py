"""`tightrope bench --processes P`: one step of the loss, shared by P processes of this machine.

Each way of sharing it gets P processes of its own, over gloo on a CPU and NCCL on GPUs (`ways`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from .. import output
from ..errors import UserError
from ..report import CsvLog, markdown_table, rich_table
from . import process
from .cases import LOSSES, Case, Loss, choose
from .competitors import all_competitors
from .machine import describe
from .runner import Options, matching, new_console, progress_of_cases
from .truth import write_truths
from .ways import WAYS, measure

SHAPES = {"cpu": (512, 576, 49152), "cuda": (8192, 4096, 128256)}
FILES = ("parallel.csv", "parallel.md")
HEADER = ["", "ms", "spread", "x ours", "collectives", "MB sent", "MB of memory", "loss error"]
COLUMNS = [
    *("rows", "dim", "vocab", "dtype", "device", "processes", "loss", "way", "ms", "spread", "x_ours"),
    *("rounds", "collectives", "sent_mb", "memory_mb", "loss_error", "skipped"),
    *("date", "machine", "gpu", "threads", "python", "versions", "commit"),
]


def command(args: argparse.Namespace) -> None:
    """``tightrope bench --processes P``, from its arguments."""
    if args.case or args.scenario or args.inputs != "random":
        raise UserError("--case, --scenario, --inputs: expected none with --processes, only --shape")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = choose(
        device=args.device,
        dtype=args.dtype,
        shapes=args.shape or [SHAPES[device]],
        scenarios=None,
        inputs="random",
        names=None,
    )
    run(Options(cases, args.loss, args.competitor or [], args.seconds, args.out), args.processes)


def run(options: Options, processes: int) -> None:
    """options.competitors: parts of the names of ways."""
    console = new_console()
    ways = matching(options.competitors, list(WAYS))
    _check(processes, options.cases[0].device, console)
    with output.opened(options.out, FILES):
        for table in _report(options.out, _run(options, processes, ways, console)):
            console.print(table)
    console.print(f"written to {options.out}: {output.written(options.out, FILES)}")


def _check(processes: int, device: str, console: Console) -> None:
    """Raise where so many cannot work together here; say so where they will be in each other's way."""
    gpus, backend = torch.cuda.device_count(), "nccl" if device == "cuda" else "gloo"
    if not (dist.is_available() and dist.is_backend_available(backend)):
        raise UserError(f"--processes: this PyTorch has no torch.distributed with {backend}")
    if device == "cuda" and processes > gpus:
        raise UserError(f"--processes: got {processes}, expected at most one for each of {gpus} GPUs")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device == "cpu" and processes > cores:
        console.print(f"warning: {processes} processes take turns on {cores} cores, as their times will show")


def _run(options: Options, processes: int, ways: Sequence[str], console: Console) -> list[dict]:
    rows = []
    machine = describe([c for c in all_competitors() if c.package in ("tightrope", "torch")])
    with (
        CsvLog(options.out / "parallel.csv", COLUMNS) as log,
        output.scratch() as scratch,
        progress_of_cases(console) as progress,
    ):
        task = progress.add_task("", total=len(options.cases) * len(ways))
        for case in options.cases:
            progress.update(task, description=f"{case.shape}: the loss in float64")
            for row in _measured(case, LOSSES[options.loss], ways, processes, options.budget, scratch):
                progress.update(task, description=f"{case.shape}: {row['way']}", advance=1)
                log.write([row.get(c) if c in row else machine.get(c) for c in COLUMNS])
                rows.append(row)
    return rows


def _measured(
    case: Case, loss: Loss, ways: Sequence[str], processes: int, budget: float, scratch: Path
) -> Iterator[dict]:
    """Lines of the CSV: figures, or the reason why there are none."""
    compared = {name: WAYS[name].loss_compared(loss) for name in ways}
    truths, reason = scratch / "truths.pt", ""
    try:
        process.call(write_truths, case, list(set(compared.values())), truths)
    except process.Failed as failure:
        reason = f"no truth to compare with: {failure}"
    for name, own in compared.items():
        row = {**asdict(case), "processes": processes, "way": name, "loss": own.name, "skipped": reason}
        if not reason:
            store = scratch / f"store-{case.rows}-{case.dim}-{case.vocab}-{list(WAYS).index(name)}"
            each = [(rank, processes, store, name, case, own, truths, budget) for rank in range(processes)]
            try:
                row |= process.call_all(measure, each)[0]
            except process.Failed as failure:
                row["skipped"] = f"failed: {failure}"
        yield row


def _report(folder: Path, rows: Sequence[dict]) -> list[Table]:
    """Writes parallel.md, and returns the tables to print."""
    tables: dict[str, list[list[str]]] = {}
    for row in rows:
        title = f"N {row['rows']}, D {row['dim']}, V {row['vocab']}, {row['dtype']} on {row['device']}"
        title += f", {row['processes']} processes"
        lines = tables.setdefault(title, [HEADER])
        if not row["skipped"]:
            lines.append(_line(row))
    text = "# One step, shared\n"
    for title, lines in tables.items():
        text += f"\n## {title}\n\n{markdown_table(lines)}\n"
    names = dict.fromkeys(row["way"] for row in rows)
    text += "\n## The ways\n\n" + "\n".join(f"- {name}: {WAYS[name].says}" for name in names) + "\n"
    skipped = [f"- {row['way']}: {row['skipped']}" for row in rows if row["skipped"]]
    if skipped:
        text += "\n## Not run\n\n" + "\n".join(skipped) + "\n"
    with output.writing(folder / "parallel.md"):
        (folder / "parallel.md").write_text(text, encoding="utf-8")
    return [rich_table(lines, title) for title, lines in tables.items()]


def _line(row: dict) -> list[str]:
    return [
        row["way"] + ("" if WAYS[row["way"]].entropy else f" ({row['loss']})"),
        f"{row['ms']:.3g}" if row["ms"] < 100 else f"{row['ms']:.0f}",
        f"{row['spread']:.0%}",
        f"{row['x_ours']:.2f}",
        f"{row['collectives']:.0f}",
        f"{row['sent_mb']:.3g}",
        f"{row['memory_mb']:.0f}",
        f"{row['loss_error']:.0e}",
    ]
