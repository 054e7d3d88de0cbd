"""The evidence on sampled gradients: the same fine-tuning with exact gradients and with sampled ones.

Trains the last blocks and the head of SmolLM2-135M on the King James text by AdamW, at several balances, with
exact gradients, with sampled ones, and with sampled ones of the hidden states and an exact head; and appends
cross-entropy and entropy on held-out text to a CSV. A seed orders the windows that are trained on. A run that
the CSV has is skipped, so that a list of runs can be stopped and started again:

    python benchmarks/sampled/harmless.py --steps 30 --steps 150 --seed 0 --seed 1 --seed 2
    python benchmarks/sampled/harmless.py --report --picture docs/sampled.png

``--report`` prints, for every way, its difference from the exact run of the same seed beside the spread of
the exact runs over seeds, and draws them.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import tightrope

sys.path.append(str(Path(__file__).parents[1] / "creativity"))
import frontier

WAYS = {"exact": 0.0, "sampled": 0.005, "sampled, exact head": (0.005, 0.0), "sampled, 0.02": 0.02}
BALANCES = (0.0, 0.1, 0.25)
KEY = ("steps", "balance", "seed", "way")
COLUMNS = (*KEY, "cross_entropy", "entropy", "share", "train_seconds")
Runs = dict[tuple[str, ...], dict[str, float]]


@dataclass
class Objective:
    """What `frontier.Bench.fit` trains on: collision at a balance, its gradients made in one of the ways."""

    name: str
    balance: float
    reference: bool = False
    shares: float = 0.0  # of the columns multiplied, summed over steps

    def __call__(self, hidden: Tensor, weight: Tensor, target: Tensor, _: None) -> Tensor:
        loss, stats = tightrope.linear_reality_creativity_loss(
            hidden,
            weight,
            target,
            balance=self.balance,
            creativity="collision",
            gradient_noise=WAYS[self.name],
            return_stats=True,
        )
        self.shares += 1.0 if stats.sampled_share is None else float(stats.sampled_share)
        return loss


def read(path: Path) -> Runs:
    """The figures of every run."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return {tuple(line[k] for k in KEY): {k: float(line[k]) for k in COLUMNS[len(KEY) :]} for line in lines}


def append(path: Path, key: tuple[str, ...], figures: tuple[float, ...]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        rows = [COLUMNS] if new else []
        csv.writer(file).writerows([*rows, (*key, *(f"{x:.6g}" for x in figures))])


@torch.no_grad()
def held_out(bench: frontier.Bench) -> tuple[float, float]:
    """Mean cross-entropy and entropy on held-out windows, nats a token."""
    tokens, frozen = bench.held_out
    hidden = torch.cat([bench.tail(part)[:, :-1] for part in frozen.split(frontier.BATCH)]).flatten(0, 1)
    stats = bench.head().stats(hidden, tokens[:, 1:].flatten())
    return -stats.target_log_prob.mean().item(), stats.entropy.mean().item()


def train(args: argparse.Namespace) -> None:
    done = read(args.csv)
    wanted = [
        (str(steps), f"{balance:g}", str(seed), way)
        for steps in args.steps or [30]
        for balance in args.balance or BALANCES
        for seed in args.seed or [0]
        for way in args.way or WAYS
    ]
    todo = [key for key in wanted if key not in done]
    if not todo:
        print(f"{args.csv} has them all")
        return
    args.cache.mkdir(parents=True, exist_ok=True)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    windows = max(int(key[0]) for key in wanted) * frontier.BATCH
    bench = frontier.prepare("kjv", windows, args.held_out, args.cache)
    for key in todo:
        steps, balance, seed, way = key
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(int(seed)))
        torch.manual_seed(int(seed))
        objective = Objective(way, float(balance))
        seconds = bench.fit(objective, int(steps), order)
        figures = held_out(bench)
        append(args.csv, key, (*figures, objective.shares / int(steps), seconds))
        print(f"{' '.join(key)}: CE {figures[0]:.4f} H {figures[1]:.4f}; {seconds:.0f} s", flush=True)


def spread(values: list[float]) -> float:
    return max(values) - min(values)


def report(path: Path, picture: Path | None) -> None:
    runs = read(path)
    by_setting: dict[tuple[str, str], dict[str, dict[str, dict[str, float]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for (steps, balance, seed, way), figures in runs.items():
        by_setting[steps, balance][way][seed] = figures
    print("| steps | balance | way | columns | cross-entropy less exact's | entropy less exact's |")
    print("|---|---|---|---|---|---|")
    for (steps, balance), ways in by_setting.items():
        exact = ways["exact"]
        for way, seeds in ways.items():
            shared = [seed for seed in seeds if seed in exact]
            columns = sum(seeds[seed]["share"] for seed in seeds) / len(seeds)
            cells = [steps, balance, way, f"{columns:.1%}"]
            for name in ("cross_entropy", "entropy"):
                if way == "exact":
                    values = [figures[name] for figures in seeds.values()]
                    cells.append(f"{sum(values) / len(values):.4f}, spread {spread(values):.4f}")
                else:
                    less = [seeds[seed][name] - exact[seed][name] for seed in shared]
                    cells.append(", ".join(f"{x:+.4f}" for x in less))
            print("| " + " | ".join(cells) + " |")
    if picture is not None:
        draw(by_setting, picture)


def draw(by_setting: dict, path: Path) -> None:
    """Differences from the exact run of a seed; the band is the range of exact runs about their mean."""
    from matplotlib.figure import Figure

    settings = sorted(by_setting, key=lambda key: (int(key[0]), float(key[1])))
    figure = Figure(figsize=(3.2 * len(settings), 6), layout="constrained")
    for column, setting in enumerate(settings):
        ways = by_setting[setting]
        for row, name in enumerate(("cross_entropy", "entropy")):
            axes = figure.add_subplot(2, len(settings), row * len(settings) + column + 1)
            exact = [figures[name] for figures in ways["exact"].values()]
            mean = sum(exact) / len(exact)
            axes.axhspan(min(exact) - mean, max(exact) - mean, color="0.85", label="exact, over seeds")
            for index, way in enumerate(way for way in WAYS if way != "exact" and way in ways):
                less = [f[name] - ways["exact"][seed][name] for seed, f in ways[way].items()]
                axes.plot([index] * len(less), less, "o", label=way)
            axes.axhline(0, color="0.4", linewidth=0.8)
            axes.set(xticks=[], title=f"{setting[0]} steps, balance {setting[1]}" if row == 0 else "")
            if column == 0:
                axes.set_ylabel(f"{name.replace('_', '-')} less exact's, nats")
    figure.axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, action="append", help="optimizer steps; repeat (30)")
    parser.add_argument("--seed", type=int, action="append", help="order of the windows; repeat (0)")
    parser.add_argument("--balance", type=float, action="append", help="of collision; repeat (0, 0.1, 0.25)")
    parser.add_argument("--way", choices=WAYS, action="append", help="of making gradients; repeat (all)")
    parser.add_argument(
        "--held-out", type=int, default=32, help="held-out windows of 128 tokens (%(default)s)"
    )
    parser.add_argument("--csv", type=Path, default=Path("runs/sampled/harmless.csv"), help="(%(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("runs/sampled"), help="(%(default)s)")
    parser.add_argument("--report", action="store_true", help="train nothing: a table of the CSV")
    parser.add_argument("--picture", type=Path, help="with --report: a file for it; default none")
    args = parser.parse_args()
    if args.report:
        report(args.csv, args.picture)
    else:
        train(args)


if __name__ == "__main__":
    main()
