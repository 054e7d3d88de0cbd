"""The reality-creativity loss in torchtitan's Trainer, in the place of its chunked cross-entropy.

torchtitan has a seam for losses that apply the head themselves: to a `ChunkedLossWrapper` its Trainer hands
the model's ``lm_head``, and the model then returns hidden states. `TightropeLoss` is one without chunks, as
it makes no logits. It calls the head, so that FSDP gathers the weight before and reduces its gradient after.
In that call the head's own forward runs with a record in the place of its product (`deferred`), so that what
a head does to its logits is part of the loss. Of DTensors, and of tensors that are one rank's part by what
the mesh says, it takes what is here, as torchtitan's own losses do, and gives back what they would.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.overrides import TorchFunctionMode

from ..distributed.layout import VocabParallel
from ..distributed.tensors import Layout
from ..statistics import RowStats
from .deferred import DeferredLogits
from .objective import Objective, Request

_EXPECTED = "expected its losses as they are in torchtitan 0.3.0 (pip install torchtitan==0.3.0)"
try:
    import spmd_types as spmd
    import tyro
    from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper
    from torchtitan.config import CompileConfig
    from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
except ImportError as error:
    raise ImportError(f"tightrope.integrations.torchtitan: {error}; {_EXPECTED}") from error


def moved() -> list[str]:
    """What of torchtitan's seam for losses is not where this module expects it, in words."""
    found = []
    names = ["self", "pred", "labels", "global_valid_tokens", "loss_inputs"]
    given = list(inspect.signature(ChunkedLossWrapper.__call__).parameters)
    if given != names:
        found.append(f"ChunkedLossWrapper.__call__ takes {', '.join(given)}, not {', '.join(names)}")
    if not hasattr(ChunkedLossWrapper, "set_lm_head"):
        found.append("ChunkedLossWrapper has no set_lm_head")
    if "compile_config" not in inspect.signature(ChunkedLossWrapper.__init__).parameters:
        found.append("ChunkedLossWrapper takes no compile_config")
    return found


if _moved := moved():
    raise ImportError(
        f"tightrope.integrations.torchtitan: in torchtitan {version('torchtitan')} {'; '.join(_moved)}; "
        f"{_EXPECTED}"
    )


class TightropeLoss(ChunkedLossWrapper):
    """``Trainer.Config(loss=TightropeLoss.Config(balance=0.05), ...)``: trains without logits.

    With a balance of 0 it is torchtitan's ``CrossEntropyLoss``. It is called as torchtitan calls its losses,
    with hidden states ``(..., D)`` and class indices ``(...)`` of which -100 is ignored, and returns

    - the sum of the losses of the tokens that are here, over ``global_valid_tokens`` if that is given:
      float32, 0-dimensional; a DTensor where the labels are one;
    - metrics, float32: ``entropy/mean``, ``reality/mean`` (the cross-entropy), ``token_accuracy/mean``, with
      ``support=`` also ``support_entropy/mean``: sums over the tokens that are here, over the same number, so
      that the sum over micro-batches and ranks is the mean over tokens. Without that number none. The Trainer
      of torchtitan 0.3.0 drops them.

    Where a tensor parallel group holds the vocabulary, ignored tokens go through the GEMMs, as that needs no
    word between host and device; ``options={"skip_ignored": None}`` skips them. ``compile_config`` changes
    nothing.

    Attributes:
        stats: detached :class:`tightrope.RowStats` of the last call, ``[tokens]`` that are here; zeros, and
            argmax -1, for ignored tokens. None before the first.
        lm_head: the head, as `set_lm_head` was given it.

    Raises:
        TypeError, ValueError: an option is unknown or not as the loss expects. From a call: there are other
            loss inputs than positions; the head does more to its product than to scale, cap and shift it; or
            it lies on the mesh as torchtitan's plans never lay it.
        RuntimeError: a call before `set_lm_head`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        balance: float = 0.0
        """Weight of creativity against reality, in [0, 1]."""

        loss_fn: Annotated[Callable[..., Tensor] | None, tyro.conf.Suppress] = None
        """A loss of the statistics, as of tightrope.linear_vocab_loss, in place of the balance."""

        options: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
        """More options of tightrope.linear_reality_creativity_loss, or of tightrope.linear_vocab_loss."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        self._options = dict(config.options)
        self._objective = Objective(config.balance, config.loss_fn, self._options)
        self.stats: RowStats | None = None
        self.lm_head: nn.Module | None = None

    @property
    def balance(self) -> Tensor:
        """Of the loss, 0-dimensional. A number may be assigned, also where CUDA graphs are replayed."""
        return self._objective.balance

    @balance.setter
    def balance(self, value: float) -> None:
        kept, self._objective.balance = self._objective.balance, value
        self._objective.balance = kept.copy_(self._objective.balance)  # in place: a graph reads it there

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        head = self.lm_head
        if head is None:
            raise RuntimeError(
                "lm_head: got none, expected set_lm_head to be called first, as the Trainer does"
            )
        for name, value in (("pred", pred), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
        if others := loss_inputs.keys() - {"positions"}:
            raise TypeError(f"loss_inputs: got {', '.join(sorted(others))}, expected none but positions")
        if self.balance.device != pred.device:
            self._objective.balance = self.balance.to(pred.device)
        with spmd.no_typecheck():
            score = functools.partial(self._score, head, head.forward, labels, global_valid_tokens)
            with _forward_of(head, score):
                loss = head(pred)
            metrics = {} if global_valid_tokens is None else self._metrics(labels, global_valid_tokens)
        if spmd.is_type_checking():
            spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, metrics

    def _score(
        self, head: nn.Module, forward: Callable, labels: Tensor, divisor: Tensor | None, hidden: Tensor
    ) -> Tensor:
        """The loss, as the forward of the head."""
        with _Product(head, self) as product:
            logits = forward(hidden)
        if not isinstance(logits, DeferredLogits):
            raise TypeError(
                f"lm_head: got {type(head).__name__}, whose forward is no product with its weight, expected "
                "an nn.Linear, or a subclass whose forward calls that of nn.Linear"
            )
        target = _here(labels).reshape(-1)
        logits = logits.reshape(-1, logits.shape[-1])
        loss = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
        loss = loss if divisor is None else loss / divisor
        return product.joined(loss) if isinstance(labels, DTensor) else loss

    def _metrics(self, labels: Tensor, divisor: Tensor) -> dict[str, Tensor]:
        stats = self.stats
        found = {
            "entropy": stats.entropy,
            "reality": -stats.target_log_prob,
            "token_accuracy": stats.argmax == _here(labels).reshape(-1),
        }
        if stats.support_entropy is not None:
            found["support_entropy"] = stats.support_entropy
        return {f"{name}/mean": value.sum(dtype=torch.float32) / divisor for name, value in found.items()}


class _Product(TorchFunctionMode):
    """Within it the product of a head with its weight is a record, of what is here of both.

    It is what the record turns to for its loss.
    """

    def __init__(self, head: nn.Module, loss: TightropeLoss):
        super().__init__()
        self._head, self._loss = head, loss
        self._layout: Layout | None = None
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._parallel: VocabParallel | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and len(args) > 1 and args[1] is self._head.weight:
            return self._record(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _record(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> DeferredLogits:
        if isinstance(weight, DTensor):
            hidden, weight, bias = self._unwrapped(hidden, weight, bias)
        elif spmd_mesh_size("tp") > 1:
            group = current_spmd_mesh().get_group("tp")
            self._parallel = _of_chunks(group, self._head.out_features)
            # Each rank gets the whole of this gradient, and not a part of a sum as is meant there.
            hidden = spmd.convert(hidden, group, src=spmd.R, dst=spmd.I, expert_mode=True)
        self._weight, self._bias = weight, bias
        return DeferredLogits(self, self._head, hidden, weight.shape[0], hidden.dtype, None)

    def _unwrapped(self, hidden: Tensor, weight: DTensor, bias: Tensor | None) -> list[Tensor | None]:
        self._layout = layout = Layout.of_head(hidden, weight, bias)
        if layout.vocab is not None:
            if layout.rows[layout.vocab].is_shard():
                raise ValueError(
                    f"pred: got placements {list(layout.rows)} with a weight of {list(layout.head)}, "
                    "expected Replicate() where the vocabulary is cut"
                )
            self._parallel = _of_chunks(layout.mesh.get_group(layout.vocab), layout.vocab_size)
        parts = layout.parts({"input": hidden, "weight": weight, "bias": bias})
        return [parts["input"], parts["weight"], parts["bias"]]

    def joined(self, loss: Tensor) -> DTensor:
        """The loss of the tokens that are here, as a part of that of all tokens."""
        placements = [Partial() if rows.is_shard() else Replicate() for rows in self._layout.rows]
        return DTensor.from_local(loss, self._layout.mesh, placements, run_check=False)

    # What the record asks.

    open = False  # it has no logits that others could write to

    @property
    def balance(self) -> Tensor:
        return self._loss.balance

    def loss(self, head: nn.Module, hidden: Tensor, request: Request) -> Tensor:
        loss, objective = self._loss, self._loss._objective
        if self._parallel is not None:
            objective.options = {"skip_ignored": False, **loss._options, "vocab_parallel": self._parallel}
        result, loss.stats = objective.of_head(hidden, self._weight, self._bias, request)
        return result

    def materializes(self, reason: str | None) -> None:
        raise TypeError(
            f"lm_head: got {type(self._head).__name__}, whose forward makes its logits because of {reason}, "
            "expected one that scales, caps or shifts them at most; leave adapters off the head"
        )


def _here(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _of_chunks(group: ProcessGroup, vocab_size: int) -> VocabParallel:
    """Ranks that hold a vocabulary as torch.chunk cuts it."""
    share = -(-vocab_size // group.size())
    return VocabParallel(group, vocab_size, min(share * group.rank(), vocab_size))


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Another forward for a module, under the same hooks. torchtitan has given it one of its own, mostly."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
