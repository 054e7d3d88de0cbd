"""TRL's trainers on Tightrope: its fused LM head for all of them, and an `SFTTrainer` with a balance.

SFT, DPO, KTO, RLOO and GRPO of TRL score tokens through one function, ``add_fused_lm_head``, whose kernel is
a global of ``trl.trainer.utils`` that it looks up at each call. `install` puts another object in its place,
so no trainer is changed. These names are private to TRL: `install` compares what it depends on with what is
there, and where that has moved it says how, and touches nothing.

`SFTTrainer` does not need that: it trains on the model's own forward, fused.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
import trl
import trl.trainer.utils as _utils
from torch import Tensor, nn
from trl.kernels import chunked_logprob as _kernels

from ..control import EntropyTarget
from ..functional import linear_vocab_stats
from .callback import TightropeCallback
from .fuse import fuse

# What TRL 1.16 has, as far as `install` depends on it.
_KERNEL, _COMPACT = "_ChunkedLogProbFunction", "_use_triton"
_ARGUMENTS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
_OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_FIELDS = ("loss", "log_probs", *_OPTIONAL, "label_mask", "aux_loss")

_theirs: dict[str, object] = {}  # TRL's own objects by name, while ours are in their place


class _LogProbs:
    """In place of TRL's autograd Function, which is used by `apply` alone."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OPTIONAL,
    ) -> tuple[Tensor | None, ...]:
        """What TRL's gives for hidden ``[N, D]``, each ``[N]``, or None where it is not among outputs.

        Every floating output has a gradient, where TRL's has those of the log-probabilities and the entropy.
        chunk_size is for TRL's, which plans nothing itself.
        """
        if hasattr(weight, "ds_id"):
            # DeepSpeed's stage 3 takes a gathered head away after the forward; TRL's backward gathers again.
            return _theirs[_KERNEL].apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
        # As a linear layer does, and TRL: else a GPU would multiply in float32 under autocast.
        kind, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        stats = linear_vocab_stats(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            bias,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            temperature=temperature,
        )
        return (
            stats.target_log_prob,
            stats.entropy if "entropy" in outputs else None,
            stats.collision.log() if "log_sum_sq_probs" in outputs else None,
            stats.logit_sum / weight.shape[0] if "mean_logits" in outputs else None,
            stats.argmax == targets if "is_top1" in outputs else None,
        )


def _everywhere(device: torch.device) -> bool:
    """In place of TRL's test for a GPU, where alone it leaves out the tokens that do not count."""
    return True


def install() -> None:
    """Put Tightrope under TRL's fused LM head, for all of its trainers, those that exist already included.

    Losses and metrics stay TRL's, up to rounding. Once is as good as twice.

    Raises:
        RuntimeError: TRL's private names are not as in 1.16. It says what was found, and nothing is changed.
    """
    if installed():
        return
    moved = _moved()
    if moved:
        raise RuntimeError(
            f"trl {trl.__version__}: its fused LM head is not that of 1.16, which tightrope.integrations.trl "
            "goes under, and is left as it is:\n- " + "\n- ".join(moved)
        )
    for name, ours in {_KERNEL: _LogProbs, _COMPACT: _everywhere}.items():
        _theirs[name] = getattr(_utils, name)
        setattr(_utils, name, ours)


def uninstall() -> None:
    """Give TRL its own objects back."""
    while _theirs:
        setattr(_utils, *_theirs.popitem())


def installed() -> bool:
    """Whether Tightrope is under TRL's fused LM head."""
    return bool(_theirs)


def _moved() -> list[str]:
    """What of TRL is not as expected, a sentence each."""
    kernel = getattr(_utils, _KERNEL, None)
    head = getattr(_utils, "add_fused_lm_head", None)
    output = getattr(_utils, "FusedCausalLMOutput", None)
    found = {
        f"trl.trainer.utils.{_KERNEL}.forward takes": (
            _parameters(getattr(kernel, "forward", None))[1:],
            _ARGUMENTS,
        ),
        "trl.trainer.utils.add_fused_lm_head takes": (
            _parameters(head),
            ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
        ),
        "of the globals it depends on, add_fused_lm_head looks up": (
            tuple(n for n in (_KERNEL, _COMPACT) if n in _globals_of(head) and hasattr(_utils, n)),
            (_KERNEL, _COMPACT),
        ),
        "trl.trainer.utils.FusedCausalLMOutput has": (
            tuple(f.name for f in dataclasses.fields(output)) if dataclasses.is_dataclass(output) else (),
            _FIELDS,
        ),
        "trl.kernels.chunked_logprob.OPTIONAL_OUTPUTS is": (
            getattr(_kernels, "OPTIONAL_OUTPUTS", ()),
            _OPTIONAL,
        ),
    }
    return [
        f"{what} ({', '.join(got)}), expected ({', '.join(expected)})"
        for what, (got, expected) in found.items()
        if tuple(got) != expected
    ]


def _parameters(function: object) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters) if callable(function) else ()


def _globals_of(function: object) -> set[str]:
    """The names that a function, and the functions within it, look up."""
    code = [getattr(function, "__code__", None)]
    names: set[str] = set()
    while code:
        one = code.pop()
        if one is not None:
            names.update(one.co_names)
            code += [c for c in one.co_consts if isinstance(c, CodeType)]
    return names


class SFTTrainer(trl.SFTTrainer):
    """TRL's, on the reality-creativity loss of the model's own forward, without its logits.

    The loss is that of :func:`tightrope.integrations.fuse`: it has the scale and the softcap of every model,
    also those unknown to TRL. Its metrics stay, beside those of `TightropeCallback`: reality (the
    cross-entropy) and balance. ``trainer.handle`` is the fused model's: ``trainer.handle.balance = 0.05``.

    Args:
        args, kwargs: as ``trl.SFTTrainer``'s.
        balance: of the loss: a number in [0, 1], or a :class:`tightrope.EntropyTarget` that steers it.
        loss_fn: a loss of the statistics in place of the balance, as :func:`tightrope.linear_vocab_loss`'s.
        loss_options: further options of `fuse`: creativity, support, label_smoothing, z_loss.

    Raises:
        ValueError: args ask for a loss of TRL's own (dft, label smoothing, compute_loss_func).
        TypeError, ValueError, RuntimeError: as ``trl.SFTTrainer`` and `fuse`.
    """

    def __init__(
        self,
        *args: Any,
        balance: float | Tensor | EntropyTarget = 0.0,
        loss_fn: Callable[..., Tensor] | None = None,
        loss_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._refuse_other_losses()
        target = balance if isinstance(balance, EntropyTarget) else None
        model = getattr(self.model, "get_base_model", lambda: self.model)()
        _remove_head(model)
        balance = balance if target is None else target.balance
        self.handle = fuse(model, balance, loss_fn, **(loss_options or {}))
        self.add_callback(TightropeCallback(self.handle, target))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        # TRL's, which asks a model for the outputs of a fused head: its counting, averaging and logging stay.
        asked = []

        def scored(fused_lm_head: bool = False, **inputs: Any):
            asked.append(fused_lm_head)
            return self._outputs(model(**inputs)) if fused_lm_head else model(**inputs)

        result = super().compute_loss(scored, inputs, return_outputs, num_items_in_batch)
        if not any(asked):
            raise RuntimeError(
                f"trl {trl.__version__}: got a compute_loss of its SFTTrainer that asks for no fused head, "
                "expected that of 1.16, which does: this loss is not Tightrope's"
            )
        return result

    def _outputs(self, outputs: Any) -> _utils.FusedCausalLMOutput:
        """A model's outputs as those of TRL's fused head, of which it takes sums over the tokens."""
        stats, target = self.handle.stats, self.handle.target
        if stats is None:
            raise RuntimeError(
                f"model: got a {type(self.handle.model).__name__} with a loss of its own, expected one whose "
                "loss is a cross-entropy of what its head gave"
            )
        counted = stats.argmax >= 0
        loss = outputs.loss
        if self.aux_loss_enabled:  # TRL adds it, times its own coefficient
            loss = loss - self._model_coefficient() * outputs.aux_loss
        return _utils.FusedCausalLMOutput(
            # The one thing with a gradient: minus the sum of the tokens' losses.
            log_probs=-loss * counted.sum(),
            entropy=stats.entropy,
            is_top1=counted & (stats.argmax == target),
            label_mask=counted,
            aux_loss=outputs.get("aux_loss"),
        )

    def _model_coefficient(self) -> float:
        """By which the model's own forward has multiplied the auxiliary loss that it added."""
        model = self.handle.model
        for owner in (model, model.config.get_text_config()):
            for name in ("router_aux_loss_coef", "aux_loss_coef"):
                if hasattr(owner, name):
                    return getattr(owner, name)
        raise RuntimeError(f"got a {type(model).__name__} with an auxiliary loss and no coefficient of it")

    def _refuse_other_losses(self) -> None:
        given = {
            "loss_type": (self.args.loss_type, "nll"),
            "label_smoothing_factor": (self.args.label_smoothing_factor, 0),
            "compute_loss_func": (self.compute_loss_func, None),
        }
        for name, (value, expected) in given.items():
            if value != expected:
                raise ValueError(
                    f"{name}: got {value!r}, expected {expected!r}: give tightrope's SFTTrainer loss_fn= or "
                    'loss_options={"label_smoothing": ...} instead'
                )


def _remove_head(model: nn.Module) -> None:
    """Take TRL's fused head off a model: PEFT calls forward, where it is, past what `fuse` puts in place."""
    patched = vars(model).get("forward")
    before = inspect.getclosurevars(patched).nonlocals.get("original_forward") if patched else None
    if before is not None:
        del model.forward
        if getattr(before, "__func__", None) is not type(model).forward:  # accelerate's hook
            model.forward = before
