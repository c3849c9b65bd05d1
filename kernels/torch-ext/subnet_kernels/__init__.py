"""Masked gradient and optimizer operations: the torch twins of every kernel."""

from . import reference

__all__ = ["reference"]
