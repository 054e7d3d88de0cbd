"""Tightrope in the libraries that people train with. Each of its modules imports its own library alone."""

from .deferred import DeferredLogits
from .fuse import fuse
from .handle import Handle
from .verify import Differences, verify

__all__ = ["DeferredLogits", "Differences", "Handle", "fuse", "verify"]
