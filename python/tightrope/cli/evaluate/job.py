"""The order of an evaluation: load and check, the judge's nuclei, each model's sweep, samples, the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor

from ... import evaluation
from .. import data, output
from ..errors import UserError
from ..progress import phase, progress_bar
from ..report import CsvLog, append_samples
from . import folders, report, samples

BATCH = 4
WINDOWS = 32
QUICK_WINDOWS = 4
QUICK_TEMPERATURES = (0.8, 1.0, 1.3, 1.6)
QUICK_MIN_PS = (0.05,)


@dataclass(frozen=True)
class Options:
    """The options of ``tightrope evaluate``; None where a person left them to ``quick``."""

    model: dict[str, Path]
    plain: str | None
    judge: Path | None
    trust_remote_code: bool
    text: Path | None
    out: Path
    temperature: list[float] | None
    min_p: list[float] | None
    windows: int | None
    sequence_length: int
    seed: int
    quick: bool

    @property
    def temperatures(self) -> list[float]:
        """In order; 1 is always among them, for that is what a model is compared at."""
        default = QUICK_TEMPERATURES if self.quick else evaluation.TEMPERATURES
        return sorted({1.0, *(self.temperature or default)})

    @property
    def min_ps(self) -> list[float]:
        return sorted(set(self.min_p or (QUICK_MIN_PS if self.quick else evaluation.MIN_PS)))


def load(options: Options) -> tuple[dict[str, folders.Loaded], str, folders.Loaded]:
    """The models by name, each mode of one with modes among them; which of them is the plain one; the judge.

    Where nobody is named judge, it is the least open mode of the first model with modes.

    Raises:
        UserError: a folder is not as it should be, there is no judge, or no model of a name.
    """
    if options.judge is not None:
        _, judge = next(iter(folders.load("--judge", options.judge, options.trust_remote_code).items()))
    found: dict[str, folders.Loaded] = {}
    for name, folder in options.model.items():
        modes = folders.load(f"--model {name}", folder, options.trust_remote_code)
        for mode, one in modes.items():
            found[(mode if len(options.model) == 1 else f"{name} {mode}") if mode else name] = one
    names = ", ".join(found)
    if options.judge is None:
        judge = found.get("judge") or next((one for one in found.values() if one.prefix), None)
    if judge is None:
        raise UserError(
            f"--judge: got none, and no model of {names} is called judge; expected a folder with a model "
            "that was trained longer, to say what is plausible"
        )
    if options.plain is not None and options.plain not in found:
        raise UserError(f"--plain: got {options.plain!r}, expected one of {names}")
    others = [name for name in found if name != "judge" or options.judge is not None]
    return found, options.plain or (others or ["judge"])[0], judge


def run(options: Options) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, report.WIDTH)
    text = data.read_text(options.text)
    with phase(console, "loading the models"):
        models, plain, judge = load(options)
    with phase(console, "tokenising the text"):
        windows = folders.make_windows(
            judge.tokenizer,
            text,
            length=options.sequence_length,
            count=options.windows,
            most=QUICK_WINDOWS if options.quick else WINDOWS,
        )
    with phase(console, "checking the models"):
        checked = {"--judge": judge, **{f"--model {name}": model for name, model in models.items()}}
        folders.check(checked, "--judge", windows)
    with output.opened(options.out, report.FILES):
        _run(options, console, plain, judge.subject, models, windows)
    console.print(f"written to {options.out}: {output.written(options.out, report.FILES)}")


def _run(
    options: Options,
    console: Console,
    plain: str,
    judge: evaluation.Subject,
    models: dict[str, folders.Loaded],
    windows: Tensor,
) -> None:
    rows: list[evaluation.Row] = []
    sampled: list[samples.Sampled] = []
    with CsvLog(options.out / "evaluate.csv", report.COLUMNS) as log:
        with phase(console, "the judge's nuclei"):
            plausible = evaluation.nuclei(judge, windows, batch_size=BATCH)
        with progress_bar(console) as progress:
            for name, model in models.items():
                total = len(options.temperatures) + len(options.min_ps)
                task = progress.add_task(name, total=total, note="")
                for row in evaluation.sweep(
                    name,
                    model.subject,
                    windows,
                    plausible,
                    temperatures=options.temperatures,
                    min_ps=options.min_ps,
                    batch_size=BATCH,
                ):
                    rows.append(row)
                    log.write(report.csv_line(row))
                    progress.update(task, advance=1, note=report.note(row))
        compared = evaluation.compare(rows, plain)
        if not options.quick:
            settings = _settings(list(models), plain, compared)
            with progress_bar(console) as progress:
                task = progress.add_task("samples", total=len(settings), note="")
                for name, temperature in settings:
                    drawn = samples.draw(name, models[name], judge, options.seed, temperature)
                    sampled.append(drawn)
                    log.write(report.csv_line(drawn))
                    append_samples(options.out / "samples.md", drawn.label, drawn.texts)
                    progress.update(task, advance=1, note=drawn.label)
    for table in report.write(options.out, plain, rows, compared, sampled, plausible.sizes):
        console.print(table)


def _settings(names: list[str], plain: str, compared: list[evaluation.Comparison]) -> list[tuple[str, float]]:
    """Who is sampled at which temperature: each model as it is, and the plain one at each one's entropy."""
    settings = [(plain, 1.0)]
    for name in names:
        if name != plain:
            settings.append((name, 1.0))
            match = next(c for c in compared if c.model == name and c.min_p is None)
            if match.plain_temperature is not None:
                settings.append((plain, match.plain_temperature))
    return settings
