"""What is evaluated: hidden states and a head, and the sets of classes that are found in its logits.

A model of transformers becomes a `Subject`, once it is sure that its logits are its head on its last hidden
states; so does anything else that has both, such as the states of a training script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..functional import linear_vocab_stats
from ..statistics import RowStats

# The judge's nucleus: the smallest set of most likely classes that holds this much.
NUCLEUS = 0.999
# Logits that exist at a time, 64 MB in float32; sorting them takes a few times that.
CHUNK_LOGITS = 2**24
CHUNK_ROWS = 512
IGNORED = -100


@dataclass(frozen=True)
class Head:
    """A vocabulary head, as Tightrope's functions take it: weight (V, D), bias (V), and their transform."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a model of transformers, scaled and capped as its config says.

        Raises:
            ValueError: it has none.
        """
        head = model.get_output_embeddings()
        if getattr(head, "weight", None) is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: expected a vocabulary head")
        config = model.config.get_text_config()
        scale = _number(config, "logit_scale", 1.0) / _number(config, "logits_scaling", 1.0)
        softcap = _number(config, "final_logit_softcapping", None)
        bias = getattr(head, "bias", None)
        return cls(head.weight.detach(), None if bias is None else bias.detach(), scale, softcap)

    def first(self, classes: int) -> Head:
        """The head of the first classes alone."""
        bias = None if self.bias is None else self.bias[:classes]
        return replace(self, weight=self.weight[:classes], bias=bias)

    @property
    def chunk(self) -> int:
        """How many rows of logits may exist at a time."""
        return max(1, min(CHUNK_ROWS, CHUNK_LOGITS // len(self.weight)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D): for a few rows."""
        z = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def stats(self, hidden: Tensor, target: Tensor | None, **options: object) -> RowStats:
        """`tightrope.linear_vocab_stats` of hidden states (..., D) under this head."""
        return linear_vocab_stats(
            hidden,
            self.weight,
            target,
            self.bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            **options,
        )


def _number(config: object, name: str, default: float | None) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and value else default


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a head, and the hidden states that it reads.

    Args:
        hidden: hidden states ``(W, L, D)`` of all windows where they exist already, or a function that makes
            those of a batch of windows, ``(B, L)`` token ids to ``(B, L, D)``.
        head: the :class:`Head`.
    """

    hidden: Tensor | Callable[[Tensor], Tensor]
    head: Head

    @classmethod
    def of(cls, model: nn.Module | Subject, prefix: Sequence[int] = ()) -> Subject:
        """A causal language model of transformers as a subject; a subject is one already.

        Args:
            prefix: token ids that stand before each window, and are not scored: those of a mode.

        Raises:
            TypeError: it is neither.
            ValueError: a model without a head.
        """
        if isinstance(model, Subject):
            return model
        if not hasattr(model, "get_output_embeddings") or not hasattr(model, "base_model"):
            raise TypeError(
                f"model: got {type(model).__name__}, expected a causal language model of "
                "transformers or a Subject"
            )
        before = torch.tensor(prefix, dtype=torch.long)

        def hidden(windows: Tensor) -> Tensor:
            ids = torch.cat([before.to(windows.device).expand(len(windows), -1), windows], 1)
            return model.base_model(ids, use_cache=False)[0][:, len(before) :]

        return cls(hidden, Head.of(model))

    @torch.no_grad()
    def rows(self, windows: Tensor, batch_size: int) -> Tensor:
        """The hidden states that predict, [W * (L - 1), D], of windows (W, L), made a batch at a time."""
        if isinstance(self.hidden, Tensor):
            return self.hidden[:, :-1].flatten(0, 1)
        device = self.head.weight.device
        batches = [self.hidden(w.to(device))[:, :-1].flatten(0, 1) for w in windows.split(batch_size)]
        return torch.cat(batches).to(self.head.weight.dtype)

    @torch.no_grad()
    def check(self, model: nn.Module, window: Tensor) -> None:
        """Compare with the model's own logits on one window (L).

        Raises:
            ValueError: they differ, so no statistic here would be that of the model.
        """
        window = window[None].to(self.head.weight.device)
        got = self.head.logits(self.hidden(window))
        expected = model(window, use_cache=False).logits[..., : got.shape[-1]]
        if expected.shape != got.shape or not torch.allclose(got, expected, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"the logits of {type(model).__name__} are not its head on its last hidden states, "
                "with the softcap and the scale that its config names"
            )


class ClassSets:
    """A set of classes for each of N rows, kept without padding."""

    def __init__(self) -> None:
        self._classes: list[Tensor] = []
        self._sizes: list[Tensor] = []

    def append(self, mask: Tensor) -> None:
        """Adds rows, [n, V] bool: which classes are in their sets."""
        self._sizes.append(mask.sum(-1).cpu())
        self._classes.append(mask.nonzero()[:, 1].int().cpu())

    @property
    def sizes(self) -> Tensor:
        """How many classes each row has, [N]."""
        return torch.cat(self._sizes)

    def chunks(self) -> Iterator[Tensor]:
        """Padded with `IGNORED`, [n, K] int64, a chunk of rows for each `append`."""
        for classes, sizes in zip(self._classes, self._sizes):
            padded = torch.full((len(sizes), max(1, int(sizes.max()))), IGNORED)
            padded[torch.arange(padded.shape[1]) < sizes[:, None]] = classes.long()
            yield padded


@torch.no_grad()
def nuclei(
    judge: nn.Module | Subject, windows: Tensor, *, mass: float = NUCLEUS, batch_size: int = 4
) -> ClassSets:
    """The judge's nucleus at each position that predicts, of windows (W, L): W * (L - 1) sets.

    The smallest set of most likely classes whose mass reaches ``mass``, in (0, 1). It takes 4 bytes a class
    to keep, and the logits of a chunk of rows to find.
    """
    judge = Subject.of(judge)
    sets = ClassSets()
    for hidden in judge.rows(windows, batch_size).split(judge.head.chunk):
        probs, order = judge.head.logits(hidden).softmax(-1).sort(-1, descending=True)
        before = probs.cumsum(-1) - probs
        sets.append(torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before < mass))
    return sets


def min_p_mask(head: Head, hidden: Tensor, x: float) -> Tensor:
    """The classes with ``p >= x max p``, [n, V] bool, of a few rows of hidden states [n, D]."""
    z = head.logits(hidden)
    return z >= z.amax(-1, keepdim=True) + math.log(x)
