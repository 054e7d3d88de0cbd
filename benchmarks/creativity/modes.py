"""The evidence on one model with three modes: what each is worth, and whether it is obeyed.

For every seed `tightrope train` makes a model with three modes and one that has the precise mode alone, and
once a judge, trained for longer. On the same held-out text each mode is swept over temperatures, and so are
places of the dial between two modes. Then each mode writes on, after prompts like the text and prompts of
another kind, and its entropy is taken token by token; the same where the mode changes on the way. All of it
out of Tightrope's statistics, in pieces: a training run that is there is kept, and so is what a CSV has.

    python benchmarks/creativity/modes.py --seed 0 --seed 1 --seed 2 --pictures docs/creativity
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tightrope import evaluation
from tightrope.cli import data, model, modes
from tightrope.evaluation import Curve, Row

JUDGE_STEPS = 180
LENGTH, WINDOWS, BATCH = 96, 24, 8
TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.45)
DIAL = (0.25, 0.5, 0.75)  # shares of the way from the least open mode to the most open one
PROMPTS = {
    "like the text": (
        "In the beginning",
        "And the king said unto his servants,",
    ),
    "of another kind": (
        "A computer is a machine that",
        "def main():\n    parser = argparse.ArgumentParser()\n",
    ),
}
SAMPLES, TOKENS, CHANGE = 4, 200, 100
FRONTIER = ("seed", *Row._fields)
POSITIONS = ("seed", "prompts", "mode", "position", "entropy")


def train(out: Path, *options: object) -> Path:
    """The model of a run, trained unless it is there."""
    if not (out / "model" / "config.json").is_file():
        arguments = [sys.executable, "-m", "tightrope", "train", "--out", str(out), *map(str, options)]
        subprocess.run(arguments, check=True)
    return out / "model"


def load(folder: Path) -> tuple[torch.nn.Module, object, dict[str, modes.Mode]]:
    """A model of a run, its tokenizer and its modes."""
    network, tokenizer = model.load(folder)
    return network, tokenizer, modes.of(network)


def subject(network: torch.nn.Module, tokenizer, mode: modes.Mode) -> evaluation.Subject:
    """A mode as a model of the words that all modes share."""
    own = min(index for other in modes.of(network).values() for index in other.tokens)
    whole = evaluation.Subject.of(network, modes.prefix(tokenizer, mode))
    return evaluation.Subject(whole.hidden, whole.head.first(own))


def frontiers(folders: dict[str, Path], judge: Path) -> Iterator[Row]:
    """Every mode of the models, and places of the dial, on held-out text."""
    network, tokenizer, known = load(judge)
    windows = data.make_windows(tokenizer, data.king_james(), length=LENGTH, batch_size=1).held_out[:WINDOWS]
    plausible = evaluation.nuclei(subject(network, tokenizer, known["precise"]), windows, batch_size=BATCH)

    def sweep(name: str, who: evaluation.Subject, temperatures: Sequence[float]) -> Iterator[Row]:
        yield from evaluation.sweep(
            name, who, windows, plausible, temperatures=temperatures, min_ps=(), batch_size=BATCH
        )

    for name, folder in folders.items():
        network, tokenizer, known = load(folder)
        for mode in known.values():
            label = mode.name if len(known) > 1 else name
            yield from sweep(label, subject(network, tokenizer, mode), TEMPERATURES)
        if len(known) > 1:
            table, last = network.get_input_embeddings().weight, list(known.values())[-1]
            kept = table.detach().clone()
            for share in DIAL:
                balance = share * last.balance
                with torch.no_grad():  # the last mode's tokens stand in for what no token is
                    table[list(last.tokens)] = modes.dialled(known, balance, kept)
                yield from sweep(f"dial {balance:g}", subject(network, tokenizer, last), (1.0,))


@torch.no_grad()
def positions(network, tokenizer, before: Sequence[int], prompts: Sequence[str], then: Sequence[int] = ()):
    """Mean entropy at each of `TOKENS` tokens that a mode writes, ``(TOKENS,)``.

    then: tokens of a mode that stand after `CHANGE` of them.
    """
    entropies = torch.zeros(TOKENS, dtype=torch.float64)
    for prompt in prompts:
        ids = torch.tensor([*before, *tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        ids = ids.expand(SAMPLES, -1)
        start = ids.shape[1]
        ids = write(network, ids, CHANGE if then else TOKENS)
        kept = torch.arange(start - 1, ids.shape[1] - 1)
        if then:
            change = torch.tensor(then).expand(SAMPLES, -1)
            begin = ids.shape[1] + change.shape[1] - 1
            ids = write(network, torch.cat([ids, change], 1), TOKENS - CHANGE)
            kept = torch.cat([kept, torch.arange(begin, ids.shape[1] - 1)])
        who = evaluation.Subject.of(network)
        entropies += who.head.stats(who.hidden(ids)[:, kept], None).entropy.double().mean(0)
    return entropies / len(prompts)


def write(network, ids: Tensor, tokens: int) -> Tensor:
    """The ids with as many tokens more, drawn from the model's own distribution."""
    return network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )


def along(folder: Path, seed: int) -> Iterator[tuple[object, ...]]:
    """Lines of positions.csv of one model."""
    network, tokenizer, known = load(folder)
    names = list(known)
    for kind, prompts in PROMPTS.items():
        wanted = {name: (mode, ()) for name, mode in known.items()}
        for one, other in ((names[0], names[-1]), (names[-1], names[0])):
            wanted[f"{one}, then {other}"] = (known[one], known[other].tokens)
        for name, (mode, then) in wanted.items():
            torch.manual_seed(seed)
            means = positions(network, tokenizer, modes.prefix(tokenizer, mode), prompts, then)
            yield from ((seed, kind, name, i, value) for i, value in enumerate(means.tolist()))


def append(path: Path, columns: Sequence[str], rows: Iterator[Sequence[object]], seed: int) -> None:
    """Adds the lines of a seed, all of them or none, unless it has some."""
    if path.is_file() and any(line["seed"] == str(seed) for line in read(path)):
        return
    found = list(rows)
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(columns)
        writer.writerows(found)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows_of(path: Path) -> dict[int, dict[str, list[Row]]]:
    """modes.csv: the temperatures of each model by seed and name."""
    found: dict[int, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for line in read(path):
        texts = [line[name] for name in Row._fields]
        values = [float(text) if text else None for text in texts[1:]]
        found[int(line["seed"])][line["model"]].append(Row(texts[0], *values))
    return found


def spread(values: Sequence[float], digits: str = ".3f") -> str:
    """Mean, and the range where there are several."""
    low, high, mean = min(values), max(values), sum(values) / len(values)
    return f"{mean:{digits}}" + (f" ({low:{digits}} to {high:{digits}})" if len(values) > 1 else "")


def report(path: Path) -> str:
    """The Markdown table of modes.csv: means over seeds, with their range.

    The last columns are beside the precise mode, and beside the model of that mode alone, at the temperature
    of the same entropy: cross-entropy less theirs, and the implausible mass as a share of theirs.
    """
    seeds = rows_of(path)
    lines = [
        "| model | entropy | cross-entropy | implausible | top-1 "
        "| beside precise | its share | beside precise alone | its share |\n" + "|---|" + "---:|" * 8
    ]
    for name in next(iter(seeds.values())):
        own = [next(r for r in found[name] if r.temperature == 1) for found in seeds.values()]
        columns = [
            spread([r.entropy for r in own]),
            spread([r.cross_entropy for r in own]),
            spread([r.implausible_mass for r in own], ".2%"),
            spread([r.top1_accuracy for r in own], ".1%"),
        ]
        for other in ("precise", "precise alone"):
            same = [Curve(found[other]).at(r.entropy) for r, found in zip(own, seeds.values())]
            if name == other or not all(same):
                columns += ["", ""]
                continue
            columns += [
                spread([r.cross_entropy - s.cross_entropy for r, s in zip(own, same)], "+.3f"),
                spread([r.implausible_mass / s.implausible_mass for r, s in zip(own, same)], ".2f"),
            ]
        lines.append("| " + " | ".join([name, *columns]) + " |")
    return "\n".join(lines)


def draw_frontiers(path: Path, source: Path) -> None:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    seeds = rows_of(source)
    names = list(next(iter(seeds.values())))
    for index, name in enumerate(name for name in names if not name.startswith("dial")):
        for number, found in enumerate(seeds.values()):
            rows = sorted(found[name], key=lambda r: r.temperature)
            own = next(r for r in rows if r.temperature == 1)
            style = {"color": f"C{index}", "label": None if number else name, "linewidth": 1.2}
            for axes, field in ((left, "cross_entropy"), (right, "implausible_mass")):
                axes.plot([r.entropy for r in rows], [getattr(r, field) for r in rows], **style)
                axes.plot([own.entropy], [getattr(own, field)], "o", color=f"C{index}")
    dial = [
        row for found in seeds.values() for name in found if name.startswith("dial") for row in found[name]
    ]
    left.plot([r.entropy for r in dial], [r.cross_entropy for r in dial], "x", color="0.3", label="the dial")
    right.plot([r.entropy for r in dial], [r.implausible_mass for r in dial], "x", color="0.3")
    left.set(xlabel="entropy, nats", ylabel="cross-entropy, nats")
    right.set(xlabel="entropy, nats", ylabel="implausible mass", yscale="log")
    left.legend(fontsize="small")
    figure.suptitle("Modes of one model by temperature (dots: 1), a line a seed")
    figure.savefig(path, dpi=80)


def draw_positions(path: Path, source: Path) -> None:
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    values: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in read(source):
        values[line["prompts"], line["mode"]][int(line["position"])].append(float(line["entropy"]))
    for column, kind in zip(panels.T, PROMPTS):
        for (prompts, name), at in values.items():
            if prompts != kind:
                continue
            means = torch.tensor([sum(v) / len(v) for _, v in sorted(at.items())])
            smooth = means.unfold(0, 10, 5).mean(-1)
            column[int("then" in name)].plot(range(5, 5 + 5 * len(smooth), 5), smooth, label=name)
        column[0].set(title=f"prompts {kind}")
        column[1].axvline(CHANGE, color="0.5", linewidth=0.8)
        column[1].set(xlabel="tokens written")
    for row in panels:
        row[0].set(ylabel="entropy, nats")
        row[0].legend(fontsize="small")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/modes"), help="(%(default)s)")
    parser.add_argument("--seed", type=int, action="append", help="repeat for several (0)")
    parser.add_argument("--pictures", type=Path, help="a folder for them (that of --out)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    judged = ("--balance", "precise=0", "--steps", JUDGE_STEPS, "--learning-rate", 1e-3, "--seed", 1000)
    judge = train(args.out / "judge", *judged)
    for seed in args.seed or [0]:
        folders = {
            "modes": train(args.out / f"modes-{seed}", "--seed", seed),
            "precise alone": train(args.out / f"alone-{seed}", "--seed", seed, "--balance", "precise=0"),
        }
        frontier = ((seed, *row) for row in frontiers(folders, judge))
        append(args.out / "modes.csv", FRONTIER, frontier, seed)
        append(args.out / "positions.csv", POSITIONS, along(folders["modes"], seed), seed)
    print(report(args.out / "modes.csv"))
    pictures = args.pictures or args.out
    draw_frontiers(pictures / "modes.png", args.out / "modes.csv")
    draw_positions(pictures / "modes-positions.png", args.out / "positions.csv")


if __name__ == "__main__":
    main()
