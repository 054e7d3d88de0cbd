"""Is a model more creative than temperature would make it? What `tightrope evaluate` measures, as functions.

A balance raises a model's entropy, and so does a temperature, for nothing. So a figure says something only
beside the plain model's at the same entropy: how well the text is predicted there, and how much is given to
classes that a judge, a model trained longer, holds for impossible. All of it follows from Tightrope's row
statistics; only the judge's nucleus, and what min-p keeps, are looked for in logits, some rows at a time.
"""

from .frontier import BEATEN, Comparison, Curve, compare
from .subject import IGNORED, NUCLEUS, ClassSets, Head, Subject, min_p_mask, nuclei
from .sweep import (
    MIN_PS,
    TEMPERATURES,
    Row,
    check_settings,
    check_vocabulary,
    evaluate,
    perplexity,
    sweep,
    token_log_probs,
)

__all__ = [
    "BEATEN",
    "IGNORED",
    "MIN_PS",
    "NUCLEUS",
    "TEMPERATURES",
    "ClassSets",
    "Comparison",
    "Curve",
    "Head",
    "Row",
    "Subject",
    "check_settings",
    "check_vocabulary",
    "compare",
    "evaluate",
    "min_p_mask",
    "nuclei",
    "perplexity",
    "sweep",
    "token_log_probs",
]
