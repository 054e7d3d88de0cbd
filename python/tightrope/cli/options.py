"""The options of ``tightrope train`` and ``tightrope generate``, and how options are read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line: the usage is a `--help` away."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def number(kind: type, accepts: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return value

    return parse


count = number(int, lambda x: x >= 1, "a whole number from 1")
seed = number(int, lambda x: 0 <= x < 2**63, "a whole number from 0")
rate = number(float, lambda x: 0 < x < math.inf, "a positive number")
share = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
positive_share = number(float, lambda x: 0 < x <= 1, "a number above 0, up to 1")
length = number(int, lambda x: x >= 2, "a whole number from 2")
noise = number(float, lambda x: 0 <= x < 1, "a number from 0, below 1")


def named_share(text: str) -> tuple[str, float]:
    """``NAME=VALUE`` or ``VALUE`` as a mode's name and balance."""
    name, equals, value = text.rpartition("=")
    if equals and not name.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE or VALUE")
    balance = share(value)
    return name.strip() or f"balance {balance:g}", balance


def named_rate(text: str) -> tuple[str, float]:
    """``NAME=VALUE`` as a mode's name and a positive number."""
    name, equals, value = text.rpartition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE")
    return name.strip(), rate(value)


def formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=30, width=100)


def add_train(commands: argparse._SubParsersAction, modes: Sequence[str], run: Callable) -> None:
    train = commands.add_parser(
        "train",
        help="fine-tune one language model that has several modes, precise to creative",
        description="Fine-tunes a language model so that it has several modes, told apart by a few tokens "
        "before a text. Each sequence is trained in one of them; a mode is a balance b in the loss "
        "(1 - b) * reality + b * creativity: 0 only matches the data, higher keeps the predictions more "
        "open. Without options: SmolLM2-135M on the King James text, in the modes " + ", ".join(modes) + ".",
        epilog="Written to the output folder: model, a folder that from_pretrained loads, with its tokenizer "
        "and a card; checkpoints; samples.md, sampled continuations; summary.md, the modes compared. "
        "What an earlier run left is replaced. `tightrope generate --model FOLDER/model` writes with it, "
        "`tightrope evaluate` holds its modes against temperature.",
        formatter_class=formatter,
    )
    what = train.add_argument_group("what to train on")
    what.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text, or .jsonl with lines of text, or of prompt and response, each with a mode if you "
        "like; up to 16 million characters (King James)",
    )
    what.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="model in a folder: of transformers, or with one .gguf file (SmolLM2-135M-Instruct)",
    )
    what.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with the model"
    )
    what.add_argument("--out", type=Path, metavar="FOLDER", default=Path("runs"), help="(%(default)s)")
    loss = train.add_argument_group("the loss")
    loss.add_argument(
        "--balance",
        type=named_share,
        action="append",
        metavar="[NAME=]VALUE",
        help="a mode, its balance from 0 to 1; repeat for several (" + " ".join(modes) + ")",
    )
    loss.add_argument(
        "--target-entropy",
        type=named_rate,
        action="append",
        metavar="NAME=NATS",
        help="steer a mode's balance so that its predictions have this entropy; repeat",
    )
    loss.add_argument(
        "--reality",
        choices=["cross_entropy", "squared_error"],
        default="cross_entropy",
        help="the reality term (%(default)s)",
    )
    loss.add_argument(
        "--creativity",
        choices=["entropy", "collision", "support_entropy"],
        default="collision",
        help="the creativity term (%(default)s)",
    )
    loss.add_argument(
        "--min-p",
        type=positive_share,
        metavar="X",
        help="of support_entropy: the entropy of the classes whose probability is at least X times the "
        "largest (0.02)",
    )
    loss.add_argument(
        "--gradient-noise",
        type=noise,
        nargs="+",
        metavar="SHARE",
        help="gradients from some of the columns, with this error: one number, or two, of hidden states and "
        "of the head (exact)",
    )
    how = train.add_argument_group("how to train")
    how.add_argument(
        "--train",
        choices=["lora", "blocks", "all"],
        default="lora",
        help="adapters in every layer, the last blocks and the head, or everything (%(default)s)",
    )
    for option, parse, default, text in (
        ("--steps", count, 60, "optimizer steps"),
        ("--batch-size", count, 6, "sequences at a time"),
        ("--accumulate", count, 1, "batches in a step"),
        ("--sequence-length", length, 96, "tokens"),
        ("--rank", count, 16, "of the adapters"),
        ("--blocks", count, 2, "last blocks to train"),
        ("--mode-learning-rate", rate, 0.2, "peak rate of the modes' tokens"),
        ("--seed", seed, 0, "fixes the batches and the samples"),
    ):
        how.add_argument(option, type=parse, default=default, metavar="N", help=f"{text} (%(default)s)")
    how.add_argument(
        "--learning-rate",
        type=rate,
        metavar="N",
        help="peak rate of AdamW (lora 2e-3, blocks 3e-4, all 5e-5)",
    )
    how.add_argument("--bf16", action="store_true", help="bfloat16 where that is safe (autocast)")
    run_group = train.add_argument_group("the run")
    run_group.add_argument("--eval-steps", type=count, metavar="N", help="evaluate each mode every N steps")
    run_group.add_argument(
        "--save-steps", type=count, default=500, metavar="N", help="a checkpoint every N steps (%(default)s)"
    )
    run_group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    run_group.add_argument(
        "--report-to", action="append", default=[], metavar="NAME", help="tensorboard, wandb, ...; repeat"
    )
    train.set_defaults(run=run)


def add_generate(commands: argparse._SubParsersAction, run: Callable) -> None:
    generate = commands.add_parser(
        "generate",
        help="text from a model that train made, in a mode or in all side by side",
        description="Continues a prompt: in each mode of the model, side by side, where none is named.",
        formatter_class=formatter,
    )
    generate.add_argument(
        "--model", type=Path, metavar="FOLDER", default=Path("runs/model"), help="(%(default)s)"
    )
    generate.add_argument("--mode", action="append", default=[], metavar="NAME", help="repeat for several")
    generate.add_argument(
        "--balance", type=share, metavar="VALUE", help="between two modes: the embeddings of both, mixed"
    )
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--tokens", type=count, default=60, metavar="N", help="(%(default)s)")
    generate.add_argument("--temperature", type=rate, default=1.0, metavar="T", help="(%(default)s)")
    generate.add_argument("--min-p", type=positive_share, metavar="X", help="(none)")
    generate.add_argument("--seed", type=seed, default=0, metavar="N", help="(%(default)s)")
    generate.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with the model"
    )
    generate.set_defaults(run=run)
