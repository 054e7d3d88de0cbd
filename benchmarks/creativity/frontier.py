"""The evidence on creativity: what each objective gives beside temperature, over steps, seeds and two texts.

Trains the last blocks and the head of SmolLM2-135M (the demo's model) on one objective at a time, from the
same start, and appends its temperature sweep on held-out text to a CSV: cross-entropy, entropy, top-1
accuracy, and the mass outside the 99.9 % nucleus of a judge, plain cross-entropy trained for longer on the
same batches in reverse. A seed shuffles the windows that are trained on; held-out windows and judge are the
same for all. What lies below the trained blocks is computed once and kept, and a run that the CSV has is
skipped, so that a list of runs can be stopped and started again:

    python benchmarks/creativity/frontier.py --text kjv --steps 100 --seed 0 --seed 1
    python benchmarks/creativity/frontier.py --objective ce --objective collision-0.2 --steps 30
    python benchmarks/creativity/frontier.py --windows 200 --steps 400 --judge-steps 500

``report.py`` makes tables and pictures of the CSV.
"""

from __future__ import annotations

import argparse
import csv
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tail import Tail
from torch import Tensor

import tightrope
from tightrope import evaluation
from tightrope.cli import data, model

LENGTH, BATCH, BLOCKS, LEARNING_RATE = 128, 4, 2, 3e-4
MAX_GRADIENT_NORM = 1.0


def rate_at(step: int, steps: int) -> float:
    """A tenth of the steps of linear warmup, then a linear decay to a tenth of the peak."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - 0.9 * (step - warmup) / max(1, steps - warmup)


@dataclass(frozen=True)
class Objective:
    """What is trained on, by its name: ``ce``, or a term of creativity with its balance, such as
    ``entropy-0.1``, ``collision-0.2`` and ``minp0.02-0.2`` (support entropy).

    With min-p three more: ``gate2-minp...`` has the balance only at tokens of an entropy below 2 nats;
    ``reference-minp...`` takes the sets of the model before training; ``...-tail0.05`` adds so much times
    ``-support_log_mass``, which pushes what is outside of the set down.
    """

    name: str
    term: str
    min_p: float | None
    balance: float
    gate: float | None
    reference: bool
    tail: float

    @classmethod
    def of(cls, name: str) -> Objective:
        pattern = (
            r"(?:gate([\d.]+)-|(reference)-)?(entropy|collision|minp([\d.]+))-([\d.]+)(?:-tail([\d.]+))?"
        )
        if name == "ce":
            return cls(name, "entropy", None, 0.0, None, False, 0.0)
        match = re.fullmatch(pattern, name)
        if match is None or (match[4] is None and (match[1] or match[2] or match[6])):
            raise argparse.ArgumentTypeError(
                f"got {name!r}, expected ce, entropy-B, collision-B, minpX-B, gateH-minpX-B, "
                "reference-minpX-B or minpX-B-tailC"
            )
        gate, reference, term, min_p, balance, tail = match.groups()
        return cls(
            name,
            "support_entropy" if min_p else term,
            float(min_p) if min_p else None,
            float(balance),
            float(gate) if gate else None,
            bool(reference),
            float(tail or 0),
        )

    def __call__(self, hidden: Tensor, weight: Tensor, target: Tensor, reference: Tensor | None) -> Tensor:
        """The mean loss of rows; reference: the classes [rows, K] of a set that is not found anew."""
        support = None if self.min_p is None else tightrope.MinP(self.min_p)
        if reference is not None:
            support = tightrope.Classes(reference)
        if self.gate is None and not self.tail:
            return tightrope.linear_reality_creativity_loss(
                hidden, weight, target, balance=self.balance, creativity=self.term, support=support
            )
        return tightrope.linear_vocab_loss(hidden, weight, target, self.per_row, support=support)

    def per_row(self, stats: tightrope.RowStats) -> Tensor:
        b = self.balance
        if self.gate is not None:
            b = b * (stats.entropy.detach() < self.gate)
        loss = -(1 - b) * stats.target_log_prob - b * stats.support_entropy
        return loss - self.tail * stats.support_log_mass


DEFAULT = ("ce", "entropy-0.1", "collision-0.2", "minp0.02-0.2", "minp0.05-0.24")

KEY = ("text", "objective", "steps", "windows", "seed", "judge_steps")
COLUMNS = (*KEY, "train_seconds", *evaluation.Row._fields[1:])


def read_text(name: str) -> str:
    """``kjv``, ``pydoc`` (the topics of Python's help, reference prose that every CPython has), or a file."""
    if name == "kjv":
        return data.king_james()
    if name == "pydoc":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    return data.read_text(Path(name))


class KeptLogits(evaluation.Head):
    """A head that keeps the logits of held-out text, 0.8 GB: they are made once for all temperatures."""

    def stats(self, hidden: Tensor, target: Tensor | None, **options: object) -> tightrope.RowStats:
        kept = self.__dict__.setdefault("kept", {})
        key = hidden.data_ptr(), hidden.shape
        if key not in kept:
            kept[key] = self.logits(hidden)
        return tightrope.vocab_stats(kept[key], target, **options)


@dataclass
class Bench:
    """A model, a text and a judge: what all runs on a text share."""

    tail: Tail
    start: dict[str, Tensor]
    train: tuple[Tensor, Tensor]  # tokens [W, LENGTH], frozen states [W, LENGTH, D]
    held_out: tuple[Tensor, Tensor]
    plausible: evaluation.ClassSets | None = None

    def batches(self, order: Tensor) -> list[Tensor]:
        """Windows of each batch, as indices; whole batches only."""
        return list(order[: len(order) // BATCH * BATCH].split(BATCH))

    def rows(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states that predict, [BATCH * (LENGTH - 1), D], and their targets."""
        tokens, frozen = (part[batch] for part in self.train)
        return self.tail(frozen)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()

    def head(self) -> evaluation.Head:
        return evaluation.Head(self.tail.head.weight.detach())

    def fit(self, objective: Objective, steps: int, order: Tensor) -> float:
        """Trains from the start, over the windows in this order and over again, and returns the seconds."""
        self.tail.load_state_dict(self.start)
        batches = self.batches(order)
        batches = [batches[step % len(batches)] for step in range(steps)]
        references = self.references(objective, batches)
        optimizer = torch.optim.AdamW(self.tail.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
        begin = time.perf_counter()
        for step, batch in enumerate(batches):
            hidden, target = self.rows(batch)
            loss = objective(hidden, self.tail.head.weight, target, references[step])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.tail.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if (step + 1) % 20 == 0 or step + 1 == steps:
                seconds = (time.perf_counter() - begin) / (step + 1)
                print(
                    f"  {objective.name}: step {step + 1}/{steps}, loss {loss.item():.3f}, {seconds:.2f} s",
                    flush=True,
                )
        return time.perf_counter() - begin

    @torch.no_grad()
    def references(self, objective: Objective, batches: list[Tensor]) -> list[Tensor | None]:
        """For each batch, the classes that the untrained model keeps, [rows, K]; or None of each."""
        if not objective.reference:
            return [None] * len(batches)
        sets, head = evaluation.ClassSets(), self.head()
        for batch in batches:
            parts = self.rows(batch)[0].split(head.chunk)
            sets.append(torch.cat([evaluation.min_p_mask(head, part, objective.min_p) for part in parts]))
        return list(sets.chunks())

    @torch.no_grad()
    def subject(self) -> evaluation.Subject:
        hidden = torch.cat([self.tail(frozen) for frozen in self.held_out[1].split(BATCH)])
        return evaluation.Subject(hidden, KeptLogits(self.tail.head.weight.detach()))


def prepare(text: str, windows: int, held_out: int, cache: Path) -> Bench:
    """Loads the model and what its frozen blocks make of the text, which is computed where it is not kept."""
    network, tokenizer = model.load(None)
    tail = Tail(network, BLOCKS)
    cut = data.make_windows(tokenizer, read_text(text), length=LENGTH, batch_size=BATCH)
    tail.trace(network, cut.held_out[0])
    parts = []
    for kind, tokens in (("train", cut.train[:windows]), ("held-out", cut.held_out[:held_out])):
        path = cache / f"{Path(text).stem}-{kind}-{len(tokens)}.pt"
        kept = torch.load(path, mmap=True) if path.is_file() else None
        if kept is None or not torch.equal(kept[0], tokens):
            print(f"{path}: frozen blocks on {len(tokens)} windows", flush=True)
            kept = tokens, torch.cat(list(tail.frozen(tokens, BATCH)))
            save(kept, path)
        parts.append(tuple(kept))
    return Bench(tail, {k: v.clone() for k, v in tail.state_dict().items()}, *parts)


def save(what: object, path: Path) -> None:
    """Whole or not at all."""
    half = path.with_suffix(".part")
    torch.save(what, half)
    half.replace(path)


def judge(bench: Bench, text: str, steps: int, cache: Path) -> list[evaluation.Row]:
    """Trains the judge, or takes the kept one's nuclei; returns its rows where it was trained now."""
    held_out = bench.held_out[0]
    path = cache / f"{Path(text).stem}-judge-{steps}-{len(bench.train[0])}-{len(held_out)}.pt"
    if path.is_file():
        bench.plausible = torch.load(path, weights_only=False)
        return []
    print(f"{path}: training the judge for {steps} steps", flush=True)
    bench.fit(Objective.of("ce"), steps, torch.arange(len(bench.train[0])).flip(0))
    bench.plausible = evaluation.nuclei(bench.subject(), held_out)
    rows = list(evaluation.sweep("judge", bench.subject(), held_out, bench.plausible, min_ps=()))
    save(bench.plausible, path)
    return rows


def write(path: Path, key: tuple, seconds: float, rows: list[evaluation.Row]) -> None:
    """Appends the rows of one run at once: a run is in the file, or it is not."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        lines = [(*key, round(seconds, 1), *row[1:]) for row in rows]
        csv.writer(file).writerows(([COLUMNS] if new else []) + lines)


def read(path: Path) -> dict[tuple, list[evaluation.Row]]:
    """The rows of each run."""
    runs: dict[tuple, list[evaluation.Row]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                values = {name: float(line[name]) if line[name] else None for name in COLUMNS[len(KEY) + 1 :]}
                key = tuple(line[name] for name in KEY)
                runs.setdefault(key, []).append(evaluation.Row(model=line["objective"], **values))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="kjv", help="kjv, pydoc, or a UTF-8 file (%(default)s)")
    parser.add_argument(
        "--objective",
        type=Objective.of,
        action="append",
        metavar="NAME",
        help="such as minp0.02-0.2; repeat; default " + ", ".join(DEFAULT),
    )
    parser.add_argument("--steps", type=int, action="append", help="optimizer steps; repeat (100)")
    parser.add_argument("--seed", type=int, action="append", help="order of the windows; repeat (0)")
    parser.add_argument("--judge-steps", type=int, default=240, help="(%(default)s)")
    parser.add_argument(
        "--held-out", type=int, default=32, help="held-out windows of 128 tokens (%(default)s)"
    )
    parser.add_argument(
        "--csv", type=Path, default=Path("runs/creativity/frontier.csv"), help="(%(default)s)"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/creativity"), help="(%(default)s)")
    parser.add_argument(
        "--windows", type=int, help="windows to train on, over and over; default as many as there are"
    )
    args = parser.parse_args()
    steps_wanted, seeds = args.steps or [100], args.seed or [0]
    available = args.judge_steps * BATCH
    windows = args.windows or available
    if not BATCH <= windows <= available:
        parser.error(f"--windows: got {windows}, expected {BATCH} to {available}, four times --judge-steps")
    if min(max(steps_wanted) * BATCH, windows) >= available:
        parser.error(f"--judge-steps: got {args.judge_steps}, expected more than --steps {max(steps_wanted)}")
    done = read(args.csv)
    todo = [
        (objective, key)
        for steps in steps_wanted
        for seed in seeds
        for objective in args.objective or map(Objective.of, DEFAULT)
        if (key := tuple(map(str, (args.text, objective.name, steps, windows, seed, args.judge_steps))))
        not in done
    ]
    if not todo:
        print(f"{args.csv} has them all")
        return
    args.cache.mkdir(parents=True, exist_ok=True)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    bench = prepare(args.text, available, args.held_out, args.cache)
    judged = judge(bench, args.text, args.judge_steps, args.cache)
    if judged:
        key = args.text, "judge", args.judge_steps, available, 0, args.judge_steps
        write(args.csv, key, 0.0, judged)
    for objective, key in todo:
        _, name, steps, _, seed, _ = key
        order = torch.arange(len(bench.train[0]))
        if int(seed):
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(int(seed)))
        seconds = bench.fit(objective, int(steps), order[:windows])
        begin = time.perf_counter()
        rows = evaluation.sweep(name, bench.subject(), bench.held_out[0], bench.plausible, min_ps=())
        rows = list(rows)
        write(args.csv, key, seconds, rows)
        here = next(row for row in rows if row.temperature == 1)
        print(
            f"{' '.join(key)}: CE {here.cross_entropy:.4f} H {here.entropy:.4f} implausible "
            f"{here.implausible_mass:.4f}; {seconds:.0f} s, and {time.perf_counter() - begin:.0f} s to judge",
            flush=True,
        )


if __name__ == "__main__":
    main()
