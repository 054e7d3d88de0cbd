"""Tightrope: the reality-creativity loss at large vocabularies, without the logits in memory."""

from . import integrations
from .control import EntropyTarget
from .distributed.layout import VocabParallel
from .functional import (
    linear_reality_creativity_loss,
    linear_vocab_loss,
    linear_vocab_stats,
)
from .head import LMHead
from .logits import reality_creativity_loss, vocab_loss, vocab_stats
from .losses import BalanceWarning
from .modules import LinearRealityCreativityLoss, RealityCreativityLoss
from .statistics import RowStats
from .strategies import flops as _flops  # noqa: F401
from .support import Classes, MinP
from .targets import TeacherTarget, TopKTarget

__version__ = "0.1.0"

__all__ = [
    "BalanceWarning",
    "Classes",
    "EntropyTarget",
    "LMHead",
    "LinearRealityCreativityLoss",
    "MinP",
    "RealityCreativityLoss",
    "RowStats",
    "TeacherTarget",
    "TopKTarget",
    "VocabParallel",
    "integrations",
    "linear_reality_creativity_loss",
    "linear_vocab_loss",
    "linear_vocab_stats",
    "reality_creativity_loss",
    "vocab_loss",
    "vocab_stats",
]
