"""The ``tightrope`` command.

This file knows the options and how a command ends: 0, 2 with one line on stderr for what a person can
put right, 1 where it cannot print, 130 after Ctrl-C, or 143 after SIGTERM. The work is in the other files,
one role each, which are imported when they are needed so that ``--help`` and ``info`` stay quick and run
without the ``train`` extra.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .. import __version__
from .bench.cases import DTYPES, LOSSES, SCENARIOS, choose
from .errors import UserError
from .options import (
    Parser,
    add_generate,
    add_train,
    count,
    formatter,
    length,
    named_share,
    positive_share,
    rate,
    seed,
)

DEFAULT_MODES = ("precise=0", "balanced=0.12", "creative=0.25")
BENCH_EXTRA = ("matplotlib", "psutil", "rich")
EVALUATE_EXTRA = ("transformers", "accelerate", "gguf", "matplotlib", "nltk", "rich")
TRAIN_EXTRA = ("transformers", "accelerate", "peft", "gguf", "psutil", "rich")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tightrope",
        description="Train language models on a balance of reality (match the data) and creativity "
        "(keep the predictions open).",
    )
    parser.add_argument("--version", action="version", version=f"tightrope {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser(
        "info", help="what is built, and which backend serves which device", description=""
    )
    info.set_defaults(run=_info)

    add_train(commands, DEFAULT_MODES, run=_train)
    add_generate(commands, run=_generate)
    _add_evaluate(commands)
    _add_bench(commands)
    return parser


def _model(text: str) -> tuple[str, Path]:
    """``NAME=FOLDER`` or ``FOLDER`` as a model's name and folder."""
    name, equals, folder = text.partition("=")
    if not equals:
        name, folder = Path(text).resolve().name, text
    if not name.strip() or not folder:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=FOLDER or FOLDER")
    return name.strip(), Path(folder)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="models beside what temperature makes of the plain one",
        description="Sweeps temperature and min-p of each model over a text, and compares each with the "
        "plain model at the same entropy by temperature alone: cross-entropy, and the implausible mass, what "
        "is given to classes outside of a judge's 99.9 %% nucleus. Also top-1 accuracy, and on samples "
        "distinct n-grams, self-BLEU and the judge's perplexity.",
        epilog="Written to the output folder: evaluate.csv, every figure; evaluate.md, the tables; "
        "frontier.png, the two frontiers; samples.md. Files of these names are replaced. Ctrl-C leaves what "
        "was written. docs/evaluate.md says how to read them.",
        formatter_class=formatter,
    )
    what = evaluate.add_argument_group("what is compared")
    what.add_argument(
        "--model",
        type=_model,
        action="append",
        metavar="[NAME=]FOLDER",
        help="a model in a folder: of transformers, or with one .gguf file; one that train made is compared "
        "mode by mode; repeat for several",
    )
    what.add_argument("--plain", metavar="NAME", help="whose temperatures the others are held to (the first)")
    what.add_argument(
        "--judge", type=Path, metavar="FOLDER", help="says what is plausible (the model called judge)"
    )
    what.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with a model")
    what.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text that none was trained on (King James)"
    )
    what.add_argument("--out", type=Path, metavar="FOLDER", default=Path("evaluation"), help="(%(default)s)")
    how = evaluate.add_argument_group("how")
    how.add_argument(
        "--temperature",
        type=rate,
        action="append",
        metavar="T",
        help="repeat for several; 1 is always one (0.8 0.9 1 1.1 1.2 1.3 1.45 1.6)",
    )
    how.add_argument(
        "--min-p", type=positive_share, action="append", metavar="X", help="repeat (0.02 0.05 0.1)"
    )
    how.add_argument("--windows", type=count, metavar="N", help="of the text (32, or as many as it has)")
    how.add_argument(
        "--sequence-length",
        type=length,
        default=96,
        metavar="N",
        help="tokens; at that of train the windows are those that it held out (%(default)s)",
    )
    how.add_argument("--seed", type=seed, default=0, metavar="N", help="fixes the samples (0)")
    how.add_argument(
        "--quick",
        action="store_true",
        help="a first look: no samples; 4 windows, temperatures 0.8 1 1.3 1.6, min-p 0.05, where not given",
    )
    evaluate.set_defaults(run=_evaluate)


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.split(",")
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected N,D,V")
    return tuple(count(size) for size in sizes)


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="the loss beside its peers: time, memory, error",
        description="Times a step of the loss, forward and backward, beside the libraries that compute the "
        "same, with the three matrix products alone as the floor; and measures memory, and the error against "
        "float64. Without options: six scenarios, shapes from many rows with a small vocabulary to one row "
        "with a huge one, and how time and memory grow with N and V.",
        epilog="Written to the output folder: bench.csv, every figure with machine, versions and commit; "
        "bench.md, the tables; floor.png, and against-V.png and against-N.png where V or N has several "
        "values. With --processes: parallel.csv and parallel.md. Files of these names are replaced. "
        "benchmarks/README.md says what the columns mean. "
        "Ctrl-C leaves what was written.",
        formatter_class=formatter,
    )
    bench.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="N,D,V",
        help="measure this shape; repeat for several",
    )
    bench.add_argument(
        "--case", action="append", metavar="NAME", help="of the default cases, only those named so"
    )
    bench.add_argument(
        "--scenario",
        choices=list(SCENARIOS),
        action="append",
        help="what --shape is filled with; repeat for several (pretraining)",
    )
    bench.add_argument(
        "--inputs",
        choices=["random", "real"],
        default="random",
        help="of --shape; real ones are of SmolLM2, D 576, V 49152, N up to 4096 (%(default)s)",
    )
    bench.add_argument("--dtype", choices=list(DTYPES), help="(float32; bfloat16 on cuda)")
    bench.add_argument("--device", choices=["cpu", "cuda"], help="(cuda where there is one)")
    bench.add_argument("--loss", choices=list(LOSSES), default=next(iter(LOSSES)), help="(%(default)s)")
    bench.add_argument(
        "--competitor",
        action="append",
        metavar="NAME",
        help="only those with NAME in their name; repeat for several",
    )
    bench.add_argument(
        "--seconds",
        type=rate,
        default=2.0,
        metavar="S",
        help="of rounds a competitor; long rounds take more, three of them or fewer (%(default)s)",
    )
    bench.add_argument("--processes", type=count, metavar="P", help="share the step among P processes here")
    bench.add_argument(
        "--out", type=Path, metavar="FOLDER", default=Path("bench-results"), help="(%(default)s)"
    )
    bench.set_defaults(run=_bench)


def _info(args: argparse.Namespace) -> None:
    from .info import print_info

    print_info()


def _train(args: argparse.Namespace) -> None:
    modes = args.balance or [named_share(text) for text in DEFAULT_MODES]
    targets = args.target_entropy or []
    _refuse_repeated("--balance", "mode", [name for name, _ in modes])
    _refuse_repeated("--target-entropy", "mode", [name for name, _ in targets])
    for name, _ in targets:
        if name not in dict(modes):
            raise UserError(f"--target-entropy: got {name!r}, expected one of {', '.join(dict(modes))}")
    if args.min_p is not None and args.creativity != "support_entropy":
        raise UserError(f"--min-p: got {args.min_p:g}, expected none with --creativity {args.creativity}")
    if args.gradient_noise is not None and len(args.gradient_noise) > 2:
        raise UserError(f"--gradient-noise: got {len(args.gradient_noise)} numbers, expected one or two")
    _need("train", TRAIN_EXTRA)
    from .job import Options, run

    given = {k: v for k, v in vars(args).items() if k not in ("command", "run", "balance", "target_entropy")}
    run(Options(modes=dict(modes), target_entropy=dict(targets), **given))


def _generate(args: argparse.Namespace) -> None:
    _need("train", TRAIN_EXTRA)
    from .generate import Options, run

    run(Options(**{k: v for k, v in vars(args).items() if k not in ("command", "run")}))


def _evaluate(args: argparse.Namespace) -> None:
    if not args.model:
        raise UserError("--model: got none, expected [NAME=]FOLDER, one at least")
    _refuse_repeated("--model", "model", [name for name, _ in args.model])
    _need("evaluate", EVALUATE_EXTRA)
    from .evaluate.job import Options, run

    options = {k: v for k, v in vars(args).items() if k not in ("command", "run", "model")}
    run(Options(model=dict(args.model), **options))


def _refuse_repeated(option: str, what: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{option}: more than one {what} is called {', '.join(repeated)}")


def _bench(args: argparse.Namespace) -> None:
    _need("bench", BENCH_EXTRA)
    if args.processes is not None:
        from .bench.parallel import command

        return command(args)
    from .bench.inputs import cache_file
    from .bench.runner import Options, run

    cases = choose(
        device=args.device,
        dtype=args.dtype,
        shapes=args.shape,
        scenarios=args.scenario,
        inputs=args.inputs,
        names=args.case,
    )
    if any(case.inputs == "real" for case in cases) and not cache_file().is_file():
        _need("train", TRAIN_EXTRA)  # the model that makes them
    run(Options(cases, args.loss, args.competitor or [], args.seconds, args.out))


def _need(command: str, packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"`{command}` needs {', '.join(missing)}, not installed here: pip install 'tightrope[{command}]'"
        )


class _Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a command as Ctrl-C does, so that files are closed and no process is left over."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Raises _Terminated at SIGTERM, unless someone else has decided what that does."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(*_: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line ``arguments`` (default: the process's) and returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        with _terminable():
            args.run(args)
            sys.stdout.flush()
    except UserError as error:
        return _ended(2, str(error))
    except KeyboardInterrupt as stop:
        word, number = ("terminated", 15) if isinstance(stop, _Terminated) else ("interrupted", 2)
        said = [*stop.args] or ["nothing was written"] * ("out" in args)
        return _ended(128 + number, "; ".join([word, *said]))
    except OSError as error:
        # Files are written by what names their option; left is what was printed.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
            raise
        # Python writes what is left once more at its end, and would complain of that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _ended(1, f"cannot print: {error.strerror}")
    return 0


def _ended(code: int, message: str) -> int:
    print(f"tightrope: {message}", file=sys.stderr)
    return code
