"""What an evaluation leaves behind: every figure in a CSV, the comparisons in tables, two frontiers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from ... import evaluation
from ...evaluation import Comparison, Row
from ..output import writing
from ..report import markdown_table, rich_table
from .samples import Sampled

FILES = ("evaluate.csv", "samples.md", "evaluate.md", "frontier.png")
WIDTH = 120  # of tables that go to a file or a pipe
OF_SAMPLES = ("distinct_1", "distinct_2", "self_bleu", "judge_perplexity")
COLUMNS = ("of", *Row._fields, *OF_SAMPLES)


def csv_line(row: Row | Sampled) -> list[object]:
    """A line of evaluate.csv, of the text or of samples; what does not apply is empty."""
    kind = "text" if isinstance(row, Row) else "samples"
    values = {"of": kind, **row._asdict()}
    return [values.get(name) for name in COLUMNS]


def note(row: Row) -> str:
    setting = f"temperature {row.temperature:g}" if row.min_p is None else f"min-p {row.min_p:g}"
    return f"{setting}: entropy {row.entropy:.3f} implausible {row.implausible_mass:.2%}"


def write(
    folder: Path,
    plain: str,
    rows: Sequence[Row],
    compared: Sequence[Comparison],
    sampled: Sequence[Sampled],
    sizes: Tensor,
) -> list[Table]:
    """Writes evaluate.md and frontier.png, and returns the tables to print.

    sizes: how many classes the judge's nucleus has at each token.
    """
    tables = {
        f"As they are, beside {plain} at the same entropy by temperature alone": comparison_table(compared),
        "What min-p sampling keeps at temperature 1": min_p_table(rows, compared),
        "By temperature": sweep_table(rows),
        "Samples": samples_table(sampled),
    }
    tables = {title: lines for title, lines in tables.items() if len(lines) > 1}
    text = (
        "# Is it better than temperature?\n\n"
        f"{rows[0].tokens} tokens of text. Cross-entropy and entropy in nats a token; implausible: the mass "
        f"outside of the judge's {evaluation.NUCLEUS:.1%} nucleus, which has {sizes.double().mean():.0f} "
        "classes in the mean. In brackets: the plain model at that entropy by temperature alone, between its "
        "temperatures. ± is a standard error over windows.\n"
    )
    for title, lines in tables.items():
        text += f"\n## {title}\n\n{markdown_table(lines)}\n"
    beaten = [c.model for c in compared if c.verdict == evaluation.BEATEN]
    if beaten:
        text += f"\nOf {', '.join(beaten)}: {evaluation.BEATEN}.\n"
    with writing(folder / "evaluate.md"):
        (folder / "evaluate.md").write_text(text, encoding="utf-8")
    draw(folder / "frontier.png", plain, rows)
    return [rich_table(lines, title) for title, lines in tables.items()]


def _beside(value: str, plain: str | None) -> str:
    return value if plain is None else f"{value} ({plain})"


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.2%}"


def _nats(value: float | None, sign: str = "") -> str | None:
    return None if value is None else f"{value:{sign}.3f}"


def comparison_table(compared: Sequence[Comparison]) -> list[list[str]]:
    """Header and lines: each model but the plain one, at temperature 1."""
    header = ["model", "entropy", "at temperature", "cross-entropy", "difference", "implausible", "ratio", ""]
    return [header] + [
        [
            c.model,
            f"{c.entropy:.3f}",
            "" if c.plain_temperature is None else f"{c.plain_temperature:.3f}",
            _beside(f"{c.cross_entropy:.3f}", _nats(c.plain_cross_entropy)),
            _nats(c.cross_entropy_difference, "+") or "",
            _beside(f"{c.implausible_mass:.2%}", _share(c.plain_implausible_mass)),
            "" if c.implausible_ratio is None else f"{c.implausible_ratio:.2f}",
            c.verdict,
        ]
        for c in compared
        if c.min_p is None
    ]


def min_p_table(rows: Sequence[Row], compared: Sequence[Comparison]) -> list[list[str]]:
    """Header and lines: each model at each min-p."""
    kept = {(row.model, row.min_p): row.kept_mass for row in rows}
    return [["model", "min-p", "mass kept", "entropy", "implausible", "ratio"]] + [
        [
            c.model,
            f"{c.min_p:g}",
            f"{kept[c.model, c.min_p]:.1%}",
            f"{c.entropy:.3f}",
            _beside(f"{c.implausible_mass:.2%}", _share(c.plain_implausible_mass)),
            "" if c.implausible_ratio is None else f"{c.implausible_ratio:.2f}",
        ]
        for c in compared
        if c.min_p is not None
    ]


def sweep_table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines: each model at each temperature."""

    def spread(value: float, error: float | None, form: str) -> str:
        return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")

    header = ["model", "temperature", "cross-entropy", "entropy", "implausible", "top-1 accuracy"]
    return [header] + [
        [
            row.model,
            f"{row.temperature:g}",
            spread(row.cross_entropy, row.cross_entropy_error, ".3f"),
            spread(row.entropy, row.entropy_error, ".3f"),
            spread(row.implausible_mass, row.implausible_mass_error, ".2%"),
            f"{row.top1_accuracy:.1%}",
        ]
        for row in rows
        if row.min_p is None
    ]


def samples_table(sampled: Sequence[Sampled]) -> list[list[str]]:
    """Header and lines: what was sampled."""
    header = ["model", "temperature", "distinct-1", "distinct-2", "self-BLEU", "judge's perplexity"]
    return [header] + [
        [
            s.model,
            f"{s.temperature:.3f}",
            f"{s.distinct_1:.3f}",
            f"{s.distinct_2:.3f}",
            f"{s.self_bleu:.3f}",
            f"{s.judge_perplexity:.1f}",
        ]
        for s in sampled
    ]


def draw(path: Path, plain: str, rows: Sequence[Row]) -> None:
    """Two frontiers over the entropy: cross-entropy, and implausible mass; lower is better in both."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    truth, mass = figure.subplots(1, 2)
    names = list(dict.fromkeys([plain, *(row.model for row in rows)]))
    for index, name in enumerate(names):
        curve = evaluation.Curve([row for row in rows if row.model == name]).rows
        style = {"color": f"C{index}", "linewidth": 2.2 if name == plain else 1.0}
        label = name.replace("$", r"\$") + (" (plain), by temperature" if name == plain else "")
        entropies = [row.entropy for row in curve]
        here = [row for row in curve if row.temperature == 1]
        for axes, field in ((truth, "cross_entropy"), (mass, "implausible_mass")):
            axes.plot(entropies, [getattr(r, field) for r in curve], ".-", label=label, **style)
            axes.plot(
                [r.entropy for r in here],
                [getattr(r, field) for r in here],
                "s" if name == plain else "o",
                color=style["color"],
                markersize=9,
            )
        cut = [row for row in rows if row.model == name and row.min_p is not None]
        mass.plot([r.entropy for r in cut], [r.implausible_mass for r in cut], "x", color=style["color"])
        if name == plain:
            _temperatures(truth, curve)
    truth.set_ylabel("cross-entropy (nats), truer below")
    mass.set_ylabel("mass outside of the judge's nucleus, more plausible below")
    if any(row.implausible_mass > 0 for row in rows):
        mass.set_yscale("log")
    truth.set_title("Reality")
    mass.set_title("Plausibility (× what min-p keeps)")
    for axes in (truth, mass):
        axes.set_xlabel("entropy (nats), more open to the right")
        axes.grid(alpha=0.3)
    truth.legend()
    with writing(path):
        figure.savefig(path, dpi=120)


def _temperatures(axes: Axes, curve: Sequence[Row]) -> None:
    for row in curve:
        axes.annotate(
            f"{row.temperature:g}",
            (row.entropy, row.cross_entropy),
            textcoords="offset points",
            xytext=(0, -13),
            fontsize=8,
            ha="center",
        )
