"""How a public function is called by the ranks that hold the vocabulary together."""

from __future__ import annotations

import functools
from collections.abc import Callable

from .layout import Agreement, VocabParallel


def joint(function: Callable) -> Callable:
    """A function whose ``vocab_parallel``, where it is given, comes as an `Agreement` that all ranks join."""

    @functools.wraps(function)
    def wrapped(*args, vocab_parallel: VocabParallel | None = None, **options):
        if vocab_parallel is None:
            return function(*args, **options)
        if not isinstance(vocab_parallel, VocabParallel):
            kind = type(vocab_parallel).__name__
            raise TypeError(f"vocab_parallel: got {kind}, expected tightrope.VocabParallel or None")
        with Agreement(vocab_parallel) as agreement:
            return function(*args, vocab_parallel=agreement, **options)

    return wrapped
