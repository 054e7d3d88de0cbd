"""transformers' Trainer, told of modes: each sequence has one, and with it a balance.

The model is fused (`tightrope.integrations.fuse`), so a step takes its loss, and what the log shows of it by
mode, from one pass over the vocabulary whose logits never exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

import tightrope
from tightrope.control import TokenSums
from tightrope.integrations import Handle

from . import modes
from .data import Sequence as Tokens
from .progress import progress_bar

_TARGETS = "tightrope.modes"
_MEANS = ("cross_entropy", "entropy", "token_accuracy", "support_entropy")


class Turns(Dataset):
    """Sequences, over and over, each in the mode that it names, or in one after the other.

    So every batch has all modes in it, and a sequence that comes again comes in another one.
    """

    def __init__(self, sequences: Sequence[Tokens], names: Sequence[str], length: int | None = None):
        self._sequences, self._names = sequences, list(names)
        self._length = len(sequences) if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tokens, int]:
        turn, place = divmod(index, len(self._sequences))
        sequence = self._sequences[place]
        number = place + turn if sequence.mode is None else self._names.index(sequence.mode)
        return sequence, number % len(self._names)


class Collator:
    """Batches of token ids, each behind its mode's tokens; what is not to be predicted has the label -100."""

    def __init__(self, tokenizer, known: dict[str, modes.Mode]):
        self._prefixes = [modes.prefix(tokenizer, mode) for mode in known.values()]
        self._pad = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)

    def __call__(self, items: Sequence[tuple[Tokens, int]]) -> dict[str, Tensor]:
        rows = []
        for sequence, mode in items:
            prefix = self._prefixes[mode]
            ignored = [-100] * (len(prefix) + sequence.prompt)
            rows.append(
                {
                    "input_ids": prefix + sequence.ids,
                    "attention_mask": [1] * (len(prefix) + len(sequence.ids)),
                    "labels": ignored + sequence.ids[sequence.prompt :],
                }
            )
        return {**self._pad(rows), "mode": torch.tensor([mode for _, mode in items])}


class ModeTrainer(transformers.Trainer):
    """Trainer of a fused model on batches of `Collator`.

    Args:
        handle: of the fused model.
        names: of the modes, in their order.
        balances: of the modes, to start from.
        targets: for some modes, by name, what steers their balance.
        rows_rate: the learning rate of the embeddings of the modes' tokens.
        new: these tokens.
    """

    def __init__(
        self,
        *args,
        handle: Handle,
        names: Sequence[str],
        balances: Sequence[float],
        targets: dict[str, tightrope.EntropyTarget],
        rows_rate: float,
        new: Sequence[int],
        **options,
    ):
        self.handle, self._names, self._targets = handle, list(names), targets
        self._balances = torch.tensor(balances, dtype=torch.float64)
        self._rows_rate, self._new = rows_rate, list(new)
        self._sums = {training: [TokenSums(len(_MEANS) + 1) for _ in names] for training in (True, False)}
        super().__init__(*args, **options)
        self.add_callback(_Steering(self))

    @property
    def balances(self) -> dict[str, float]:
        return dict(zip(self._names, self._balances.tolist()))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = inputs.pop("mode")
        balance = self._balances.to(mode.device)[mode]
        inputs["balance"] = balance[:, None].expand(inputs["labels"].shape)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._observe(mode.repeat_interleave(inputs["labels"].shape[1]), model.training)
        return result

    def _observe(self, mode: Tensor, training: bool) -> None:
        stats, target = self.handle.stats, self.handle.target
        for number, name in enumerate(self._names):
            mine = (mode == number) & (stats.argmax >= 0)
            values = (-stats.target_log_prob, stats.entropy, stats.argmax == target, stats.support_entropy)
            sums = [(value * mine).sum(dtype=torch.float64) for value in values if value is not None]
            missing = [0.0] * (len(_MEANS) - len(sums))
            self._sums[training][number].add(mine.sum(), *sums, *missing)
            if training and name in self._targets:
                self._targets[name].observe(sums[1] / mine.sum(), mine.sum())

    def steer(self) -> None:
        """After an optimizer step: the balances of the modes that have a target."""
        for name, target in self._targets.items():
            self._balances[self._names.index(name)] = target.update()

    def create_optimizer(self, model=None):
        trained = self.model if model is None else model
        if self.optimizer is None:
            named = [(name, p) for name, p in trained.named_parameters() if p.requires_grad]
            rows = [p for name, p in named if "trainable_tokens" in name]
            rest = [p for name, p in named if "trainable_tokens" not in name]
            groups = [{"params": rest, "lr": self.args.learning_rate}]
            if rows:
                groups.append({"params": rows, "lr": self._rows_rate})
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay)
            if not rows:
                weight = trained.get_input_embeddings().weight
                _faster(self.optimizer, weight, self._new, self._rows_rate / self.args.learning_rate)
        return self.optimizer

    def log(self, logs, start_time=None):
        training = "loss" in logs
        if training or any(name.endswith("_runtime") for name in logs):
            prefix = "" if training else "eval_"
            for name, sums in zip(self._names, self._sums[training]):
                tokens, *values = sums.close()
                if tokens:
                    means = {key: value / tokens for key, value in zip(_MEANS, values)}
                    logs.update({f"{prefix}{name}/{key}": value for key, value in means.items() if value})
            if training:
                logs.update({f"{name}/balance": balance for name, balance in self.balances.items()})
        super().log(logs, start_time)


class Steps(transformers.TrainerCallback):
    """A bar of Trainer's steps, with the loss and, by mode, the entropy."""

    def __init__(self, console: Console, steps: int):
        self._progress = progress_bar(console)
        self._task = self._progress.add_task("training", total=steps, note="")

    def on_train_begin(self, args, state, control, **others) -> None:
        self._progress.update(self._task, completed=state.global_step)
        self._progress.start()

    def on_log(self, args, state, control, logs=None, **others) -> None:
        if "loss" in logs:
            open_by = [f"{k.partition('/')[0]} {v:.2f}" for k, v in logs.items() if k.endswith("/entropy")]
            note = f"loss {logs['loss']:.3f}  entropy: {', '.join(open_by)}"
            self._progress.update(self._task, completed=state.global_step, note=note)

    def on_train_end(self, args, state, control, **others) -> None:
        self._progress.stop()


class _Steering(transformers.TrainerCallback):
    """Moves the balances after each step; their state is in the checkpoints' own."""

    def __init__(self, trainer: ModeTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **others) -> None:
        for name, stored in state.stateful_callbacks.get(_TARGETS, {}).items():
            if name in self._trainer._targets:
                target = self._trainer._targets[name]
                target.load_state_dict(stored)
                self._trainer._balances[self._trainer._names.index(name)] = target.balance

    def on_step_end(self, args, state, control, **others) -> None:
        if self._trainer._targets:
            self._trainer.steer()
            stored = {name: target.state_dict() for name, target in self._trainer._targets.items()}
            state.stateful_callbacks[_TARGETS] = stored


def _faster(optimizer: torch.optim.Optimizer, weight: nn.Parameter, rows: list[int], factor: float) -> None:
    """Rows of a parameter take steps ``factor`` times as long: an optimizer has one rate for all of it."""
    before: list[Tensor] = []

    def note(*_: object) -> None:
        before.append(weight.detach()[rows].clone())

    @torch.no_grad()
    def lengthen(*_: object) -> None:
        start = before.pop()
        weight[rows] = start + factor * (weight[rows] - start)

    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(lengthen)
