"""What a fused model learns, in the logs of transformers' Trainer; and the balance steered from there.

Trainer hands one dict of values to its callbacks in turn, to those that report to TensorBoard and the like
before those of the user, after it has copied the dict to ``state.log_history``. So this callback goes to the
head of the queue, and adds its values to the dict and to the copy. Events come after a batch, for which a
model may have asked for several losses: statistics are taken where they are made, by subscription to the
fused model's handle, and events only say where a mean ends.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..control import EntropyTarget, TokenSums
from ..statistics import RowStats
from . import Handle

# What is logged but for support_entropy, which not every loss has.
_SUMMED = ("entropy", "reality", "token_accuracy", "balance")
# Of the checkpoint's TrainerState. Not the name of the class: what has a callback's name there Trainer makes
# a new callback of, where it is told to restore callbacks, and no handle is in a checkpoint.
_STATE_KEY = "tightrope.EntropyTarget"


class TightropeCallback(TrainerCallback):
    """Logs what the loss knows of the tokens, and steers the balance to an entropy if it is told to.

    ``Trainer(..., callbacks=[TightropeCallback(handle)])``, or ``trainer.add_callback``. To whatever Trainer
    logs to, and to ``trainer.state.log_history``, it adds

    - ``entropy`` of the prediction, in nats, and with ``support=`` also ``support_entropy``;
    - ``reality``: cross-entropy of the target, without label smoothing;
    - ``token_accuracy``: how often the target is the most likely class;
    - ``balance`` of the handle

    where Trainer logs ``loss``; and with the prefix that is Trainer's there (``eval_``) in `evaluate` and
    `predict`, whose returned metrics have them too. Each is a mean over all tokens that are not ignored, each
    token counting once: of all micro-batches, steps and ranks since the last log; or of all losses without
    gradients since the last evaluation, those included of examples that accelerate repeats so that all ranks
    have as many. A name that Trainer's own values have already keeps their value.

    With an ``entropy_target``, its balance is the handle's from the start of training, and is updated after
    each optimizer step. Its state is in Trainer's checkpoints, and ``train(resume_from_checkpoint=...)``
    restores it.

    Args:
        handle: of the model that is trained, as `tightrope.integrations.fuse` returns it.
        entropy_target: an `EntropyTarget`, or None: the balance is left alone.

    Raises:
        TypeError: handle or entropy_target is none.
    """

    def __init__(self, handle: Handle, entropy_target: EntropyTarget | None = None):
        if not isinstance(handle, Handle):
            raise TypeError(
                f"handle: got {type(handle).__name__}, expected what tightrope.integrations.fuse returns"
            )
        if entropy_target is not None and not isinstance(entropy_target, EntropyTarget):
            raise TypeError(
                f"entropy_target: got {type(entropy_target).__name__}, expected an EntropyTarget or None"
            )
        self.handle, self.entropy_target = handle, entropy_target
        self._training, self._evaluation = TokenSums(len(_SUMMED) + 3), TokenSums(len(_SUMMED) + 3)
        handle.subscribe(self._observe)

    def on_init_end(self, args, state, control, **kwargs) -> None:
        self._go_first()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._go_first()
        self._training.clear()
        self._evaluation.clear()
        if (target := self.entropy_target) is not None:
            # Its own where it has none in a checkpoint: that forgets losses of before, too.
            target.load_state_dict(state.stateful_callbacks.get(_STATE_KEY, target.state_dict()))
            self.handle.balance = target.balance

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.entropy_target is not None:
            self.handle.balance = self.entropy_target.update()
            # A checkpoint is made after this event, and asks nobody.
            state.stateful_callbacks[_STATE_KEY] = self.entropy_target.state_dict()

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        self._go_first()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            values = _means(self._training.close())
        elif (prefix := _prefix(logs)) is not None:
            values = _means(self._evaluation.close(), prefix)
        else:
            return
        copy = state.log_history[-1] if state.log_history else {}
        own = copy if logs.keys() <= copy.keys() else {}
        for name, value in values.items():
            logs.setdefault(name, value)
            own.setdefault(name, value)

    def on_predict(self, args, state, control, metrics, **kwargs) -> None:
        prefix = _prefix(metrics)
        if prefix is not None:
            for name, value in _means(self._evaluation.close(), prefix).items():
                metrics.setdefault(name, value)

    def _observe(self, stats: RowStats, target: Tensor) -> None:
        """The statistics of a loss, and the classes that it was of, in the shape of the statistics."""
        training = torch.is_grad_enabled()
        if training and self.entropy_target is not None:
            self.entropy_target.observe(stats)
        counted = stats.argmax >= 0
        tokens = counted.sum()
        of_set = stats.support_entropy is not None
        (self._training if training else self._evaluation).add(
            tokens,
            _sum(stats.entropy),
            -_sum(stats.target_log_prob),
            (counted & (stats.argmax == target)).sum(),
            tokens * self.handle.balance.mean(),
            tokens if of_set else 0.0,
            _sum(stats.support_entropy) if of_set else 0.0,
        )

    def _go_first(self) -> None:
        """To the head of the queue of callbacks, from which this event comes, if it stands in one.

        Moving there while the queue is gone through neither skips a callback nor calls one twice.
        """
        handler = _handler()
        if handler is not None and self in handler.callbacks and handler.callbacks[0] is not self:
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)


def _handler() -> CallbackHandler | None:
    """What calls the callbacks, up the stack: an event says nothing of where it comes from."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler):
            return owner
        frame = frame.f_back
    return None


def _prefix(logs: Mapping[str, object]) -> str | None:
    """``eval_``, say: what the names of an evaluation's values begin with; None for other values."""
    # Of every evaluation; the metrics of a user may end like it, but are longer. What ends training has one.
    names = [name for name in logs if name.endswith("_runtime") and name != "train_runtime"]
    return min(names, key=len).removesuffix("runtime") if names else None


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)


def _means(sums: list[float], prefix: str = "") -> dict[str, float]:
    """What is logged, from the sums; nothing where there were no tokens."""
    tokens, *summed, of_set, support_entropy = sums
    means = {name: value / tokens for name, value in zip(_SUMMED, summed)} if tokens else {}
    if of_set:
        means["support_entropy"] = support_entropy / of_set
    return {prefix + name: value for name, value in means.items()}
