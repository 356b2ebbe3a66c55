"""Failures that several processes share. Torch-free."""

from __future__ import annotations


class SharedError(ValueError):
    """Raised by all processes that work together, in the same place and for the same reason: one of them says so."""
