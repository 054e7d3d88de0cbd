"""Vocabulary-parallel heads: who holds what, what travels, and what it costs."""
