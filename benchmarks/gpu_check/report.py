"""One JSON and one page of Markdown: what was found, what was not checked, and what was predicted.

Both are written again after each stage, so that a run that is cut short leaves what it knew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .machine import Machine

OK, FAILED, SKIPPED = "ok", "failed", "not run"
FILES = ("report.json", "report.md")
MOST_ROWS = 40  # of a table on the page; the JSON has all


@dataclass(frozen=True)
class Outcome:
    """What became of a stage. missing: what of it could not be checked here, and why."""

    name: str
    says: str
    status: str
    seconds: float
    line: str
    missing: str | None = None
    rows: list[dict] = field(default_factory=list)
    tail: str = ""


def write(folder: Path, machine: Machine, outcomes: Sequence[Outcome], quick: bool) -> None:
    whole = {"machine": machine.facts(), "quick": quick, "stages": [asdict(o) for o in outcomes]}
    (folder / FILES[0]).write_text(json.dumps(whole, indent=1) + "\n")
    (folder / FILES[1]).write_text(page(machine, outcomes, quick), encoding="utf-8")


def page(machine: Machine, outcomes: Sequence[Outcome], quick: bool) -> str:
    parts = [f"# GPU check{', quick' if quick else ''}", _where(machine), _overview(outcomes)]
    for outcome in outcomes:
        parts += _section(outcome)
    return "\n\n".join(parts) + "\n"


def _where(machine: Machine) -> str:
    capability = ".".join(map(str, machine.capability)) if machine.capability else ""
    gpu = f"**{machine.gpu}** ({capability}, {machine.memory_gib} GiB)" if machine.gpu else "**no GPU**"
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    rest = [
        f"driver {machine.driver}" if machine.driver else "",
        f"CUDA {machine.cuda}" if machine.cuda else "",
    ]
    facts = ", ".join(filter(None, [*rest, f"Python {machine.python}", versions]))
    words = f"{gpu}, {facts}. Commit {machine.commit or 'unknown'}."
    return words + (f"\n\n{machine.error}" if machine.error else "")


def _overview(outcomes: Sequence[Outcome]) -> str:
    lines = ["| stage | | seconds | |", "|---|---|---|---|"]
    for o in outcomes:
        said = "; ".join(filter(None, [o.line, o.missing]))
        lines.append(f"| {o.name}: {o.says} | {o.status} | {o.seconds:.0f} | {_cell(said)} |")
    return "\n".join(lines)


def _section(outcome: Outcome) -> list[str]:
    """The stage's tables: its records, and the last words of what failed."""
    parts = []
    make = _predicted if outcome.name == "predictions" else _table
    if outcome.rows:
        parts += [f"## {outcome.name}", make(outcome.rows)]
    if outcome.tail and outcome.status == FAILED:
        parts += [f"## {outcome.name}: the end of its output", f"```\n{outcome.tail}\n```"]
    return parts


def _table(rows: Sequence[dict]) -> str:
    """A column for each field of the first records; the shape and what says nothing are left out."""
    rows = [{k: v for k, v in row.items() if k not in ("shape", "ok")} | _marked(row) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows[:MOST_ROWS]:
        lines.append(f"| {' | '.join(_cell(row.get(key)) for key in columns)} |")
    if len(rows) > MOST_ROWS:
        lines.append(f"\n{len(rows) - MOST_ROWS} more in {FILES[0]}.")
    return "\n".join(lines)


def _marked(row: dict) -> dict:
    return {"": "wrong"} if row.get("ok") is False else {}


def _predicted(rows: Sequence[dict]) -> str:
    """A line a prediction; those that were not measured are counted."""
    lines = ["| | predicted | measured | |", "|---|---|---|---|"]
    known = [row for row in rows if row["held"] is not None]
    for row in known:
        verdict = "held" if row["held"] else "**did not hold**"
        where = f"{row['predicted']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        lines.append(
            f"| {_cell(row['name'])}, {row['field']} | {where} | {row['measured']:.2f} | {verdict} |"
        )
    rest = len(rows) - len(known)
    held = sum(row["held"] for row in known)
    said = f"{held} of {len(known)} predictions held" + (f"; {rest} were not measured" if rest else "")
    return "\n".join(lines) + f"\n\n{said}." if known else f"{said}."


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
