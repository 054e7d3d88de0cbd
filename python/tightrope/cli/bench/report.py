"""What a run of the bench leaves behind: a CSV of every figure, tables, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.table import Table

from ..output import writing
from ..report import markdown_table, rich_table

COLUMNS = [
    "group",
    "name",
    "scenario",
    "rows",
    "dim",
    "vocab",
    "dtype",
    "device",
    "inputs",
    "loss",
    "competitor",
    "ms",
    "spread",
    "gemms_ms",
    "x_gemms",
    "x_ours",
    "memory_mb",
    "loss_error",
    "hidden_grad_error",
    "weight_grad_error",
    "hidden_noise",
    "weight_noise",
    "hidden_noise_expected",
    "weight_noise_expected",
    "sampled_share",
    "rounds",
    "skipped",
    "date",
    "machine",
    "gpu",
    "threads",
    "python",
    "versions",
    "commit",
]
PICTURES = {"floor.png": None, "against-V.png": "vocab", "against-N.png": "rows"}
FILES = ("bench.csv", "bench.md", *PICTURES)
HEADER = ["", "ms", "spread", "x GEMMs", "x ours", "MB", "loss error", "dh error", "dW error"]


def write(folder: Path, rows: Sequence[dict], machine: dict[str, str]) -> list[Table]:
    """Writes bench.md and those pictures that show something, and returns the tables to print."""
    tables = {title: _lines(part) for title, part in _by_case(rows).items()}
    where = "; ".join(f"{key}: {value}" for key, value in machine.items() if value)
    text = f"# The loss beside its peers\n\n{where}\n"
    for title, lines in tables.items():
        text += f"\n## {title}\n\n{markdown_table(lines)}\n"
    skipped = _skipped(rows)
    if skipped:
        text += "\n## Not run\n\n" + "\n".join(f"- {line}" for line in skipped) + "\n"
    with writing(folder / "bench.md"):
        (folder / "bench.md").write_text(text, encoding="utf-8")
    for name, axis in PICTURES.items():
        figure = _sweep(rows, axis) if axis else _floor(rows)
        if figure is not None:
            with writing(folder / name):
                figure.savefig(folder / name, dpi=120)
    return [rich_table(lines, title) for title, lines in tables.items()]


def _ran(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if not row["skipped"]]


def _by_case(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Lines of the competitors that ran, under a title for each case."""
    cases: dict[str, list[dict]] = {}
    for row in _ran(rows):
        shape = f"N {row['rows']}, D {row['dim']}, V {row['vocab']}"
        title = f"{row['name']}: {shape}, " if row["name"] else f"{shape}, "
        title += f"{row['dtype']} on {row['device']}, {row['scenario']}, {row['inputs']} inputs"
        cases.setdefault(title, []).append(row)
    return cases


def _lines(rows: Sequence[dict]) -> list[list[str]]:
    """Header and lines of a case's table: the floor, then the competitors, the fastest first on each loss."""
    floor = min(row["gemms_ms"] for row in rows)
    lines = [HEADER, ["three bare GEMMs", _figure(floor), "", "1.00", "", "", "", "", ""]]
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    for row in sorted(rows, key=lambda row: (losses.index(row["loss"]), row["x_ours"])):
        name = row["competitor"]
        if "sampled_share" in row:
            name += f", {row['sampled_share']:.1%} of the columns"
        if row["loss"] != losses[0]:
            name += f" ({row['loss']} alone)"
        lines.append(
            [
                name,
                _figure(row["ms"]),
                f"{row['spread']:.0%}",
                f"{row['x_gemms']:.2f}",
                f"{row['x_ours']:.2f}",
                f"{row['memory_mb']:.0f}",
                "" if row["loss_error"] is None else f"{row['loss_error']:.0e}",
                *(_gradient_error(row, name) for name in ("hidden", "weight")),
            ]
        )
    return lines


def _gradient_error(row: dict, name: str) -> str:
    """Of gradients that are drawn their noise, which is no matter of rounding, and what was expected."""
    if f"{name}_noise" not in row:
        error = row[f"{name}_grad_error"]
        return "" if error is None else f"{error:.0e}"
    expected = row.get(f"{name}_noise_expected")
    return f"{row[f'{name}_noise']:.2%}" + ("" if expected is None else f" ({expected:.2%})")


def _figure(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _skipped(rows: Sequence[dict]) -> list[str]:
    """Who did not run, why and where; sweeps are not worth a line each."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["skipped"] and not row["group"].startswith("against"):
            where = row["name"] or f"N {row['rows']}, D {row['dim']}, V {row['vocab']}"
            reasons.setdefault((row["competitor"], row["skipped"]), []).append(where)
    everywhere = len({(r["group"], r["name"]) for r in rows if not r["group"].startswith("against")})
    return [
        f"{competitor}: {reason}" + ("" if len(cases) == everywhere else f" ({', '.join(cases)})")
        for (competitor, reason), cases in reasons.items()
    ]


def _floor(rows: Sequence[dict]) -> Figure | None:
    """Time as a multiple of the three bare GEMMs: one group of bars a case; None where there is no case."""
    rows = [row for row in _ran(rows) if not row["group"].startswith("against")]
    if not rows:
        return None
    cases = list(
        dict.fromkeys(row["name"] or f"{row['rows']} x {row['dim']} x {row['vocab']}" for row in rows)
    )
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    figure = Figure(figsize=(max(10, 1.3 * len(cases) + 6), 5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        points = {
            row["name"] or f"{row['rows']} x {row['dim']} x {row['vocab']}": row["x_gemms"]
            for row in rows
            if row["competitor"] == name
        }
        places = [cases.index(case) + (index - len(names) / 2 + 0.5) * width for case in points]
        axes.bar(places, list(points.values()), width, label=name, color=_colour(index))
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label="three bare GEMMs")
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    axes.set_ylabel("time, as a multiple of the three bare GEMMs")
    axes.grid(axis="y", which="both", alpha=0.3)
    # Beside the bars: with a dozen competitors there is no place among them.
    figure.legend(fontsize="small", loc="outside right upper")
    return figure


def _sweep(rows: Sequence[dict], axis: str) -> Figure | None:
    """Time, memory and the multiple of the floor against one size, the others fixed; None for one value."""
    group = {"vocab": "against V", "rows": "against N"}[axis]
    rows = [row for row in _ran(rows) if row["group"] == group]
    if len({row[axis] for row in rows}) < 2:
        return None
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    for column, label, panel in (
        ("ms", "time, ms", panels[0]),
        ("memory_mb", "memory beyond the gradients, MB", panels[1]),
        ("x_gemms", "time, as a multiple of the three bare GEMMs", panels[2]),
    ):
        for index, name in enumerate(names):
            points = sorted((row[axis], row[column]) for row in rows if row["competitor"] == name)
            # A logarithm of no memory at all does not exist: below a megabyte nothing can be measured.
            panel.plot(
                [x for x, _ in points],
                [max(y, 1) if column == "memory_mb" else y for _, y in points],
                "o-",
                label=name,
                color=_colour(index),
            )
        if column == "ms":
            floor = {row[axis]: row["gemms_ms"] for row in rows}
            panel.plot(sorted(floor), [floor[x] for x in sorted(floor)], "k--", label="three bare GEMMs")
        panel.set_xscale("log", base=2)
        if column != "x_gemms":
            panel.set_yscale("log")
        panel.set_xlabel({"vocab": "V", "rows": "N"}[axis])
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    fixed = {"vocab": "rows", "rows": "vocab"}[axis]
    letter = {"rows": "N", "vocab": "V"}[fixed]
    figure.suptitle(f"{letter} {rows[0][fixed]}, D {rows[0]['dim']}, {rows[0]['dtype']}")
    return figure


def _colour(index: int) -> tuple[float, ...]:
    return colormaps["tab20"](index % 20)
