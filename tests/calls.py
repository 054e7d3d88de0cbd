"""Every public function as one of the same arguments: what is true of one is asked of all."""

import pytest

import tightrope


def own(stats):
    """A user's loss that says the same as the built-in one: cross-entropy less a tenth of the entropy."""
    return -0.9 * stats.target_log_prob - 0.1 * stats.entropy


def _built_in(hidden, weight, target, **options):
    return tightrope.linear_reality_creativity_loss(hidden, weight, target, balance=0.1, **options)


def _own(hidden, weight, target, **options):
    return tightrope.linear_vocab_loss(hidden, weight, target, own, **options)


def _built_in_of_logits(hidden, weight, target, **options):
    return tightrope.reality_creativity_loss(hidden @ weight.t(), target, balance=0.1, **options)


def _own_of_logits(hidden, weight, target, **options):
    return tightrope.vocab_loss(hidden @ weight.t(), target, own, **options)


def _statistics(hidden, weight, target):
    return own(tightrope.linear_vocab_stats(hidden, weight, target)).mean()


def _statistics_of_logits(hidden, weight, target):
    return own(tightrope.vocab_stats(hidden @ weight.t(), target)).mean()


# name -> (function of hidden states, head and class indices; what else it takes)
CALLS = {
    "chunked": (_built_in, {"strategy": "chunked"}),
    "streaming": (_built_in, {"strategy": "streaming"}),
    "own chunked": (_own, {"strategy": "chunked"}),
    "own streaming": (_own, {"strategy": "streaming"}),
    "logits": (_built_in_of_logits, {}),
    "own logits": (_own_of_logits, {}),
    "statistics": (_statistics, {}),
    "statistics of logits": (_statistics_of_logits, {}),
}
every_call = pytest.mark.parametrize("call", CALLS)
every_loss = pytest.mark.parametrize("call", [name for name in CALLS if "statistics" not in name])
