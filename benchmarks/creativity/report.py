"""Tables and pictures of ``frontier.py``'s CSV: objectives beside temperature, with the spread over seeds.

Every run is compared with the temperatures of the plain run of its own text, steps, windows and seed, at
equal entropy, so that what is spread over seeds is the difference itself. Prints Markdown; with
``--pictures`` draws, by text and length of training, both frontiers and the differences from temperature, of
the objectives that have every seed:

    python benchmarks/creativity/report.py --csv runs/creativity/frontier.csv --pictures docs/creativity
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import frontier
from matplotlib.figure import Figure

from tightrope.evaluation import Curve, Row

Setting = tuple[str, int, int, int]  # text, windows, steps, judge's steps
Runs = dict[str, dict[int, list[Row]]]  # objective, seed
PLAIN = "ce"


def settings(path: Path) -> dict[Setting, Runs]:
    """The runs of the CSV by what may be compared; the judge's own rows are left out."""
    found: dict[Setting, Runs] = defaultdict(lambda: defaultdict(dict))
    for (text, name, steps, windows, seed, judged), rows in frontier.read(path).items():
        if name != "judge":
            found[text, int(windows), int(steps), int(judged)][name][int(seed)] = rows
    return {setting: runs for setting, runs in sorted(found.items()) if PLAIN in runs}


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and in brackets the least and the largest where there are several."""
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def at(rows: list[Row], temperature: float) -> Row:
    return next(row for row in rows if row.temperature == temperature)


def beside(
    runs: dict[int, list[Row]], plain: dict[int, list[Row]], temperature: float
) -> list[tuple[Row, Row]]:
    """Each seed's row at a temperature, and the plain row of that entropy, where the curve reaches it."""
    pairs = []
    for seed in sorted(set(runs) & set(plain)):
        row = at(runs[seed], temperature)
        same = Curve(plain[seed]).at(row.entropy)
        if same is not None:
            pairs.append((row, same))
    return pairs


def compared(pairs: list[tuple[Row, Row]]) -> list[str]:
    """Cross-entropy less, and implausible mass over, that of temperature."""
    if not pairs:
        return ["out of reach", ""]
    return [
        spread([row.cross_entropy - same.cross_entropy for row, same in pairs], "+.3f"),
        spread([row.implausible_mass / same.implausible_mass for row, same in pairs], ".2f"),
    ]


def line(name: str, runs: dict[int, list[Row]], plain: dict[int, list[Row]]) -> list[str]:
    """An objective's cells, over the seeds that the plain run has too."""
    seeds = [seed for seed in sorted(runs) if seed in plain]
    own = [at(runs[seed], 1.0) for seed in seeds]
    cells = [
        name,
        str(len(seeds)),
        spread([row.entropy for row in own], ".2f"),
        spread([row.cross_entropy for row in own], ".3f"),
        f"{sum(row.implausible_mass for row in own) / len(own):.2%}",
        f"{sum(row.top1_accuracy for row in own) / len(own):.1%}",
    ]
    if name == PLAIN:
        return [*cells, *[""] * 4]
    return [*cells, *compared(beside(runs, plain, 1.0)), *compared(beside(runs, plain, COOL))]


# A temperature that models are sampled at, beside 1.
COOL = 0.9
HEADER = (
    "| objective | seeds | entropy | cross-entropy | implausible | top-1 "
    f"| CE less temperature's | implausible over temperature's | CE, sampled at {COOL} "
    f"| implausible, sampled at {COOL} |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def title(setting: Setting) -> str:
    text, windows, steps, judged = setting
    drawn = f"{steps} steps of {frontier.BATCH} windows out of {windows}"
    return f"{Path(text).stem}, {drawn}, judge of {judged} steps"


def draw(path: Path, setting: Setting, runs: Runs) -> None:
    """Means over seeds, with a band from the least to the largest."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    (truth, mass), (difference, ratio) = figure.subplots(2, 2)
    curves = {seed: Curve(rows) for seed, rows in runs[PLAIN].items()}
    for index, name in enumerate(sorted(runs, key=lambda name: (name != PLAIN, name))):
        per_seed = {seed: Curve(rows).rows for seed, rows in runs[name].items() if seed in curves}
        if len(per_seed) < len(curves):
            continue
        style = {"color": f"C{index}", "linewidth": 2.2 if name == PLAIN else 1.2}
        columns = list(zip(*per_seed.values()))  # one tuple over seeds for each temperature
        entropies = [sum(row.entropy for row in column) / len(column) for column in columns]
        at_one = next(i for i, column in enumerate(columns) if column[0].temperature == 1)
        relative: list[list[tuple[Row, Row]]] = [
            [
                (row, plain)
                for seed, row in zip(per_seed, column)
                if (plain := curves[seed].at(row.entropy)) is not None
            ]
            for column in columns
        ]
        panels = [
            (truth, [[row.cross_entropy for row in column] for column in columns]),
            (mass, [[row.implausible_mass for row in column] for column in columns]),
        ]
        if name != PLAIN:
            panels += [
                (difference, [[r.cross_entropy - p.cross_entropy for r, p in pairs] for pairs in relative]),
                (ratio, [[r.implausible_mass / p.implausible_mass for r, p in pairs] for pairs in relative]),
            ]
        for axes, values in panels:
            kept = [(h, v) for h, v in zip(entropies, values) if len(v) == len(per_seed)]
            xs, lists = [h for h, _ in kept], [v for _, v in kept]
            axes.plot(xs, [sum(v) / len(v) for v in lists], label=name, **style)
            axes.fill_between(
                xs,
                [min(v) for v in lists],
                [max(v) for v in lists],
                alpha=0.2,
                color=f"C{index}",
                linewidth=0,
            )
            if len(values[at_one]) == len(per_seed):
                mean = sum(values[at_one]) / len(per_seed)
                axes.plot([entropies[at_one]], [mean], "o", color=f"C{index}")
    mass.set_yscale("log")
    ratio.set_yscale("log")
    difference.axhline(0, color="C0", linewidth=2.2)
    ratio.axhline(1, color="C0", linewidth=2.2)
    for axes, label in (
        (truth, "cross-entropy, nats"),
        (mass, "implausible mass"),
        (difference, "cross-entropy less temperature's, nats"),
        (ratio, "implausible mass over temperature's"),
    ):
        axes.set(xlabel="entropy, nats", ylabel=label)
        axes.grid(alpha=0.3)
    truth.legend(fontsize="small")
    figure.suptitle(
        f"{title(setting)}\nby temperature; the dot is temperature 1; the band is the range over seeds"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--csv", type=Path, default=Path("runs/creativity/frontier.csv"), help="(%(default)s)"
    )
    parser.add_argument("--pictures", type=Path, help="a folder for them; default none")
    args = parser.parse_args()
    if not args.csv.is_file():
        parser.error(f"--csv: there is no {args.csv}; frontier.py writes it")
    for setting, runs in settings(args.csv).items():
        print(f"\n### {title(setting)}\n\n{HEADER}")
        for name in sorted(runs, key=lambda name: (name != PLAIN, name)):
            if set(runs[name]) & set(runs[PLAIN]):
                print("| " + " | ".join(line(name, runs[name], runs[PLAIN])) + " |")
        if args.pictures:
            text, windows, steps, _ = setting
            draw(args.pictures / f"{Path(text).stem}-{windows}-{steps}.png", setting, runs)


if __name__ == "__main__":
    main()
