"""The order of a training run: load, give the model its modes, train, judge, save.

All modes are one model's: each sequence is trained in one of them, and the balance of the loss follows it.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn

from ..control import EntropyTarget
from ..integrations import fuse
from ..support import MinP
from . import card, data, model, modes, output, probe
from .errors import UserError
from .progress import phase
from .train import Collator, ModeTrainer, Steps, Turns

CHECKPOINTS, MODEL, OPTIONS = "checkpoints", "model", "options.json"
LEARNING_RATES = {"lora": 2e-3, "blocks": 3e-4, "all": 5e-5}
# Options that may change between a run and its resumption.
_FREE = ("resume", "out", "report_to", "save_steps", "eval_steps")


@dataclass(frozen=True)
class Options:
    """The options of ``tightrope train``; modes are names with their balances."""

    modes: dict[str, float]
    text: Path | None
    model: Path | None
    out: Path
    trust_remote_code: bool
    reality: str
    creativity: str
    min_p: float | None
    target_entropy: dict[str, float]
    gradient_noise: list[float] | None
    train: str
    rank: int
    blocks: int
    steps: int
    batch_size: int
    accumulate: int
    sequence_length: int
    learning_rate: float | None
    mode_learning_rate: float
    bf16: bool
    eval_steps: int | None
    save_steps: int
    resume: bool
    report_to: list[str]
    seed: int

    def stored(self) -> dict[str, object]:
        """What a resumed run has to have in common with the one that it goes on with."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in _FREE}
        return json.loads(json.dumps(values, default=str))


def run(options: Options) -> None:
    console = Console(highlight=False, markup=False)
    checkpoint = _checkpoint(options)
    _refuse_to_replace(options.out / MODEL)
    installed = transformers.integrations.get_available_reporting_integrations()
    for name in options.report_to:
        if name not in installed:
            raise UserError(f"--report-to: got {name!r}, installed: {', '.join(installed) or 'none'}")
    text = data.read_text(options.text)
    with phase(console, "loading the model"):
        network, tokenizer = model.load(options.model, trust_remote_code=options.trust_remote_code)
    if modes.of(network):
        raise UserError(f"--model: {options.model} has modes already, {', '.join(modes.of(network))}")
    with phase(console, "tokenising the text"):
        split = data.make_sequences(
            tokenizer,
            text,
            options.text,
            length=options.sequence_length,
            batch_size=options.batch_size,
            seed=options.seed,
            modes=list(options.modes),
        )
    longest = model.longest(network) or options.sequence_length + 2 * modes.TOKENS
    if options.sequence_length + modes.TOKENS + 1 > longest:
        raise UserError(
            f"--sequence-length: got {options.sequence_length}, the model takes up to "
            f"{longest - modes.TOKENS - 1} behind a mode"
        )
    with output.opened(options.out, card.FILES), warnings.catch_warnings():
        # Of transformers and peft about each other; and modes may have any balance, to be compared.
        warnings.simplefilter("ignore")
        _run(options, console, network, tokenizer, split, checkpoint)
    console.print(f"written to {options.out}: {output.written(options.out, (*card.FILES, MODEL))}")


def _refuse_to_replace(folder: Path) -> None:
    """Raise UserError where a folder is there that no run has made, such as the model to be trained."""
    if folder.exists() and "tightrope" not in _json(folder / "config.json"):
        raise UserError(f"--out: {folder} is there, and no model that train made: expected another folder")


def _checkpoint(options: Options) -> Path | None:
    """The last whole checkpoint of the run that is to be resumed."""
    folder, stored = options.out / CHECKPOINTS, options.out / CHECKPOINTS / OPTIONS
    if not options.resume:
        return None
    before = _json(stored)
    if not before:
        raise UserError(f"--resume: {options.out} has no run to resume: no {stored}")
    now = options.stored()
    changed = sorted(name for name in now if now[name] != before.get(name))
    if changed:
        name = changed[0]
        raise UserError(
            f"--resume: the run in {options.out} has --{name.replace('_', '-')} {before.get(name)}, "
            f"got {now[name]}"
        )
    return _last(folder)


def _last(folder: Path) -> Path | None:
    """The last whole checkpoint in a folder."""
    # Trainer writes this file last: a folder without it was cut short.
    whole = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json") if _json(p)]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _json(path: Path) -> dict:
    """What a file holds; nothing where it is not there, or was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _run(
    options: Options,
    console: Console,
    network: nn.Module,
    tokenizer,
    split: data.Split,
    checkpoint: Path | None,
) -> None:
    torch.manual_seed(options.seed)
    with phase(console, "measuring the loss beside eager PyTorch"):
        costs = probe.measure(*_probe_inputs(network, split.train), max(options.modes.values()))
    known = modes.add(network, tokenizer, options.modes, creativity=options.creativity)
    trainer = _trainer(options, console, network, tokenizer, split, known)
    transformers.utils.logging.disable_progress_bar()  # of files being written, which Trainer may switch on
    with output.writing(options.out):
        if checkpoint is None:
            shutil.rmtree(options.out / CHECKPOINTS, ignore_errors=True)
            (options.out / CHECKPOINTS).mkdir(parents=True)
            (options.out / CHECKPOINTS / OPTIONS).write_text(json.dumps(options.stored(), indent=1), "utf-8")
        _train(options, trainer, checkpoint)
        trainer.save_state()
    trained = trainer.model
    if options.train == "lora":
        trained = trained.merge_and_unload()
    trainer.handle.restore()
    trained.eval()
    for name, balance in trainer.balances.items():  # a target may have moved them
        trained.config.tightrope["modes"][name]["balance"] = balance
    with phase(console, "judging the modes"):
        rows = card.judge(
            trained, tokenizer, modes.of(trained), split.held_out, options.batch_size, options.seed
        )
    # Beside the model of an earlier run, which goes when this one is whole.
    folder, saved = options.out / f"{MODEL}.new", options.out / MODEL
    with phase(console, "saving the model"), output.writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        trained.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    tables = card.write(options, rows, costs, options.out, folder)
    with output.writing(saved):
        shutil.rmtree(saved, ignore_errors=True)
        folder.rename(saved)
    for table in tables:
        console.print(table)


def _train(options: Options, trainer: ModeTrainer, checkpoint: Path | None) -> None:
    """Trains; a run that is cut short says what of it can be gone on with."""
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt as stop:
        last = _last(options.out / CHECKPOINTS)
        stop.args = (f"--resume goes on from {last}" if last else "no checkpoint was written (--save-steps)",)
        raise
    except Exception as error:
        if checkpoint is None or not _unreadable(error):
            raise
        raise UserError(
            f"--resume: cannot read {checkpoint}: a file of it is damaged, or holds code, which is not run"
        ) from None


def _unreadable(error: Exception) -> bool:
    """Whether torch.load, which reads weights only, or safetensors has met another file than they wrote."""
    words = ("PytorchStreamReader", "deserializ")
    return isinstance(error, (pickle.UnpicklingError, EOFError)) or any(w in str(error) for w in words)


def _trainer(
    options: Options,
    console: Console,
    network: nn.Module,
    tokenizer,
    split: data.Split,
    known: dict[str, modes.Mode],
) -> ModeTrainer:
    support = None if options.min_p is None else MinP(options.min_p)
    noise = tuple(options.gradient_noise or (0.0, 0.0))
    handle = fuse(
        network,
        reality=options.reality,
        creativity=options.creativity,
        support=support,
        gradient_noise=noise[0] if len(noise) == 1 else noise,
    )
    new = [index for mode in known.values() for index in mode.tokens]
    rate = options.learning_rate or LEARNING_RATES[options.train]
    if options.train == "lora":
        network = model.with_adapters(network, options.rank, new)
    elif options.train == "blocks":
        model.train_blocks(network, options.blocks, new)
    arguments = transformers.TrainingArguments(
        output_dir=str(options.out / CHECKPOINTS),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=rate,
        warmup_steps=max(1, options.steps // 10),
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),  # or bf16 asks for a GPU
        logging_steps=1,
        eval_strategy="no" if options.eval_steps is None else "steps",
        eval_steps=options.eval_steps,
        # A run that is shorter has nothing to go on with before its model is there.
        save_strategy="steps" if options.save_steps < options.steps else "no",
        save_steps=options.save_steps,
        save_total_limit=2,
        report_to=options.report_to or "none",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=options.seed,
    )
    count = options.steps * options.batch_size * options.accumulate
    trainer = ModeTrainer(
        model=network,
        args=arguments,
        train_dataset=Turns(split.train, list(known), count),
        eval_dataset=Turns(split.held_out, list(known)) if options.eval_steps else None,
        data_collator=Collator(tokenizer, known),
        callbacks=[Steps(console, options.steps)],
        handle=handle,
        names=list(known),
        balances=[mode.balance for mode in known.values()],
        targets={
            name: _target(nats, known[name].balance, options.creativity, support, len(tokenizer))
            for name, nats in options.target_entropy.items()
        },
        rows_rate=options.mode_learning_rate,
        new=new,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _target(
    nats: float, balance: float, creativity: str, support: MinP | None, vocab_size: int
) -> EntropyTarget:
    """Steers a mode to an entropy, from its balance on, short of the cliff of the creativity."""
    about = {"creativity": creativity, "support": support, "vocab_size": vocab_size, "statistic": "entropy"}
    highest = EntropyTarget(nats, **about).bounds[1]
    return EntropyTarget(nats, balance=min(balance, highest), **about)


@torch.no_grad()
def _probe_inputs(network: nn.Module, sequences: list[data.Sequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Real hidden states, the head, and real targets: up to `probe.rows` tokens of training text."""
    weight = network.get_output_embeddings().weight.detach()
    limit = probe.rows(weight)
    hidden, target, rows = [], [], 0
    for sequence in sequences:
        ids = torch.tensor([sequence.ids])
        hidden.append(network.base_model(ids, use_cache=False)[0][0, :-1])
        target.append(ids[0, 1:])
        rows += len(target[-1])
        if rows >= limit:
            break
    return torch.cat(hidden)[:limit], weight, torch.cat(target)[:limit]
