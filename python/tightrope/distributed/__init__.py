"""Vocabulary-parallel heads: who holds what, what travels, and what it costs."""

from .cost import Collective, Estimate, estimate
from .counts import full_weight, token_count

__all__ = ["Collective", "Estimate", "estimate", "full_weight", "token_count"]
