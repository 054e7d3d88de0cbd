"""From what a stage's commands printed to what the report says: plain functions of text.

A reader takes the commands that ran (`process.Ran`) and gives a `Reading`. Nothing is taken as good that did
not say so: output that ends early, or that no rule knows, is not ok.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from .process import Ran

MARK = "@ "  # begins a line that is a record: of a child of this program
TAIL_LINES = 12  # of the output of what failed


@dataclass(frozen=True)
class Reading:
    """line: what the stage found. rows: its records. tail: the last words of what failed."""

    ok: bool
    line: str
    rows: list[dict] = field(default_factory=list)
    tail: str = ""


def records(output: str) -> list[dict]:
    """What a child recorded; a last line that was cut off is dropped."""
    found = []
    for line in output.splitlines():
        if line.startswith(MARK):
            try:
                found.append(json.loads(line[len(MARK) :]))
            except ValueError:
                continue
    return found


def ended(ran: Ran) -> str:
    """How a command ended, in words; empty where it ended well."""
    if ran.timed_out:
        return f"{ran.name} took more than {ran.seconds:.0f} s"
    return "" if ran.code == 0 else f"{ran.name} ended with code {ran.code}"


def tail(output: str) -> str:
    plain = [line for line in output.splitlines() if line.strip() and not line.startswith(MARK)]
    return "\n".join(line[:200] for line in plain[-TAIL_LINES:])


def _reading(ran: Sequence[Ran], ok: bool, words: Sequence[str], rows: Sequence[dict] = ()) -> Reading:
    """The same for every reader: how the commands ended is part of the line."""
    ends = [end for end in map(ended, ran) if end]
    last = "\n".join(tail(r.output) for r in ran if ended(r) or not ok)
    return Reading(ok and not ends, "; ".join([*filter(None, words), *ends]), list(rows), last)


def build(ran: Sequence[Ran]) -> Reading:
    return _reading(ran, True, [f"{sum(r.seconds for r in ran):.0f} s"])


def recorded(ran: Sequence[Ran]) -> Reading:
    """Records with "ok" where they were checked, and "skipped" where they could not run."""
    rows = [row for r in ran for row in records(r.output)]
    skipped = sum("skipped" in row for row in rows)
    bad = [row for row in rows if row.get("ok") is False]
    words = [f"{len(rows) - skipped} lines"] if rows else ["nothing was recorded"]
    words += [f"{skipped} not run"] if skipped else []
    words += [f"{len(bad)} wrong: " + ", ".join(str(row.get("name")) for row in bad)] if bad else []
    return _reading(ran, bool(rows) and not bad, words, rows)


_VERDICT = re.compile(
    r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*$|^(FAILED|ERROR) (\S+::.*?)(?: - .*)?$", re.M
)
_COLLECTED = re.compile(
    r"\bcollected (\d+) items?(?: / \d+ errors?)?(?: / (\d+) deselected)?|^(\d+)(?:/\d+)? tests? collected",
    re.M,
)


def _expected(output: str) -> list[int]:
    """How many tests pytest said it would run."""
    return [int(m[1] or m[3]) - int(m[2] or 0) for m in _COLLECTED.finditer(output)]


def pytest(ran: Sequence[Ran]) -> Reading:
    """Of ``pytest -v``, whose verdicts come one a line: a run that was ended counts as far as it came."""
    rows, words, whole = [], [], True
    for r in ran:
        verdicts = {m[1] or m[4]: m[2] or m[3] for m in _VERDICT.finditer(r.output)}
        counts = {kind: list(verdicts.values()).count(kind) for kind in dict.fromkeys(verdicts.values())}
        expected = sum(_expected(r.output))
        whole &= bool(verdicts) and len(verdicts) >= expected
        said = ", ".join(f"{count} {kind.lower()}" for kind, count in counts.items())
        words.append(f"{r.name}: {said or 'no verdict'} of {expected}")
        rows += [
            {"name": name, "ok": False, "verdict": kind}
            for name, kind in verdicts.items()
            if kind in ("FAILED", "ERROR", "XPASS")
        ]
    return _reading(ran, whole and not rows, words, rows)


def collected(ran: Sequence[Ran]) -> Reading:
    """Of ``pytest --collect-only -q``: that the tests import."""
    counts = [count for r in ran for count in _expected(r.output)]
    words = [f"{sum(counts)} tests collected, none run"]
    return _reading(ran, bool(counts) and min(counts) > 0, words)


# As Compute Sanitizer 2025.1 to 2025.3 (CUDA 12.8 to 13.0) print it. Beyond --print-limit a second "ERROR
# SUMMARY" says how many of the first were not printed. A report begins one blank after the mark ("Invalid
# __global__ read", "Uninitialized", "Error: Race reported", "Potential invalid"); the rest of it is indented.
_SUMMARY = re.compile(
    r"^=+ (?:ERROR SUMMARY: (\d+) errors?|"
    r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\))\s*$",
    re.M,
)
_REPORT = re.compile(r"^=+ (?!COMPUTE-SANITIZER|[A-Z]+ SUMMARY)(\S[^\n]*)", re.M)


def sanitizer(ran: Sequence[Ran]) -> Reading:
    """Of compute-sanitizer, commands called TOOL or TOOL-PART; one without a summary found out nothing."""
    rows, words, tools, ok = [], [], {}, True
    for r in ran:
        tools.setdefault(r.name.partition("-")[0], []).append(r)
    for tool, parts in tools.items():
        found = [list(_SUMMARY.finditer(r.output)) for r in parts]
        silent = [r.name for r, summaries in zip(parts, found) if not summaries]
        errors = sum(int(m[1] or m[2]) for summaries in found for m in summaries)
        warnings = sum(int(m[3] or 0) for summaries in found for m in summaries)
        what = list(dict.fromkeys(m[1].strip() for r in parts for m in _REPORT.finditer(r.output)))[:5]
        if len(silent) < len(parts):
            words.append(f"{tool}: {errors} errors" + (f", {warnings} warnings" if warnings else ""))
            row = {"name": tool, "ok": errors == 0, "errors": errors, "warnings": warnings, "what": what}
            rows.append(row)
        words += [f"{name}: no summary" for name in silent]
        ok &= not errors and not silent
    return _reading(ran, ok, words, rows)


_BANDWIDTH = re.compile(
    r"^ *(\w+) V +(\d+) x +(\d+) +(\S.*?) +([\d.]+) ms +([\d.]+) GB/s +([\d.]+) of copy", re.M
)


def bandwidth(ran: Sequence[Ran]) -> Reading:
    """Of benchmarks/bandwidth.py, a line a kernel."""
    rows = [
        {
            "dtype": m[1],
            "vocab": int(m[2]),
            "name": m[4],
            "ms": float(m[5]),
            "gb_per_s": float(m[6]),
            "of_copy": float(m[7]),
        }
        for r in ran
        for m in _BANDWIDTH.finditer(r.output)
    ]
    kernels = [row for row in rows if row["name"] != "copy"]
    if not kernels:
        return _reading(ran, False, ["no line of a kernel"])
    worst = min(kernels, key=lambda row: row["of_copy"])
    words = [
        f"{len(kernels)} lines; the slowest {worst['name']}, {worst['dtype']} V {worst['vocab']}: "
        f"{worst['of_copy']:.2f} of a copy"
    ]
    return _reading(ran, True, words, rows)


# The parameters of a demangled kernel, after a name whose template arguments have casts: "f<(int)4>(A *, B)".
_PARAMETERS = re.compile(r"\((?:[^()]|\([^()]*\))*\)$")


def ncu(ran: Sequence[Ran]) -> Reading:
    """Of ``ncu --csv``: one row a kernel launch and metric, under a header; other lines are the program's.

    As ncu 2024 and 2025 print it; with sections there are columns about rules behind. A counter that the card
    has not is "n/a".
    """
    rows: dict[tuple[str, str], dict] = {}
    for r in ran:
        lines = r.output.splitlines()
        start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
        if start is None:
            refused = "ERR_NVGPUCTRPERM" in r.output
            words = ["the driver lets administrators alone read its counters" if refused else "no table"]
            return _reading(ran, False, words)
        table = io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"')))
        for line in csv.DictReader(table):
            key = line["ID"], line["Kernel Name"]
            row = rows.setdefault(key, {"name": _PARAMETERS.sub("", line["Kernel Name"])})
            with suppress(ValueError):
                row[line["Metric Name"]] = float(line["Metric Value"].replace(",", ""))
    return _reading(ran, bool(rows), [f"{len(rows)} launches"], list(rows.values()))
