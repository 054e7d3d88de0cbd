"""The types of what callers pass: for type checkers, and nothing at run time.

The overloads of the public functions need all options once more beside the functions' own signatures; a test
holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, SupportsFloat, SupportsIndex, TypeAlias, TypedDict

from torch import Tensor

from .distributed.layout import VocabParallel
from .support import Classes, MinP

# A number of Python or numpy, or a tensor of one element.
Number: TypeAlias = SupportsFloat
Integer: TypeAlias = SupportsIndex
Reality: TypeAlias = Literal["cross_entropy", "squared_error", "reverse_kl", "jensen_shannon"]
Creativity: TypeAlias = Literal["entropy", "collision", "support_entropy"]
Reduction: TypeAlias = Literal["none", "mean", "sum"]
Strategy: TypeAlias = Literal["chunked", "streaming"]
BackendName: TypeAlias = Literal["cpu", "cuda", "triton", "eager"]


class _Rows(TypedDict, total=False):
    ignore_index: Integer
    row_weight: Tensor | None
    logit_scale: Number
    softcap: Number | None
    temperature: Number | Tensor
    support: MinP | Classes | None
    reduction: Reduction
    normalizer: Number | Tensor | None
    shift: Integer
    backend: BackendName | None
    vocab_parallel: VocabParallel | None


class _Terms(TypedDict, total=False):
    balance: Number | Tensor
    reality: Reality
    creativity: Creativity
    label_smoothing: Number
    class_weight: Tensor | None
    z_loss: Number
    logit_l2: Number


class _Driver(TypedDict, total=False):
    skip_ignored: bool | None
    workspace_mb: Number | None
    strategy: Strategy | None
    gradient_noise: Number | tuple[Number, Number]


class LogitsLossOptions(_Rows, _Terms, total=False):
    """Of `reality_creativity_loss`, but for return_stats."""


class LinearLossOptions(_Rows, _Terms, _Driver, total=False):
    """Of `linear_reality_creativity_loss`, but for return_stats."""


class OwnLogitsLossOptions(_Rows, total=False):
    """Of `vocab_loss`, but for return_stats."""

    row_args: Sequence[Tensor]


class OwnLinearLossOptions(_Rows, _Driver, total=False):
    """Of `linear_vocab_loss`, but for return_stats."""

    row_args: Sequence[Tensor]
