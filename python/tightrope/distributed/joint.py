"""How a public function is called by ranks that share a call: the vocabulary, the tokens, or both.

They say so by ``vocab_parallel``, or by DTensors. A call of neither kind pays for two looks at a class's
name: the package of DTensors is half a second to import, and is not loaded before there is one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar, cast

from .layout import Agreement, VocabParallel, check_vocab_parallel

_Function = TypeVar("_Function", bound=Callable)


def joint(function: _Function) -> _Function:
    """A function that takes DTensors, and to which ``vocab_parallel`` comes as the ranks' `Agreement`."""
    signature = inspect.signature(function)
    names = tuple(signature.parameters)

    @functools.wraps(function)
    def wrapped(*args, vocab_parallel: VocabParallel | None = None, **options):
        if _has_dtensor(args, options):
            if vocab_parallel is not None:
                raise ValueError(
                    "vocab_parallel: got one beside DTensors, expected None: placements say who holds what"
                )
            from .tensors import run

            return run(function, signature, names, args, options)
        if vocab_parallel is None:
            return function(*args, **options)
        check_vocab_parallel(vocab_parallel)
        with Agreement(vocab_parallel) as agreement:
            return function(*args, vocab_parallel=agreement, **options)

    return cast(_Function, wrapped)


def is_dtensor(value: object) -> bool:
    return type(value).__name__ == "DTensor"


def _has_dtensor(args: tuple, options: dict[str, object]) -> bool:
    """Whether hidden states, head or logits are DTensors; the first two arguments where they have no name."""
    for value in args[:2]:
        if is_dtensor(value):
            return True
    if len(args) > 1:
        return False
    return any(is_dtensor(options.get(name)) for name in ("input", "weight", "logits"))
