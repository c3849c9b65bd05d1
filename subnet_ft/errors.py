"""Errors of this library: each is a `SubnetError` and also the builtin error callers expect.

A message is one line in three parts: what was expected, what was found, what to do.
"""


class SubnetError(Exception):
    """Base of every error that bad input can cause; the CLI turns it into exit code 2."""


class MaskFormatError(SubnetError, ValueError):
    """A mask, or a file that should hold one, breaks the format."""


class MaskMismatchError(SubnetError, ValueError):
    """A mask (or adapter) does not belong to the model, or to the other mask, it is used with."""


class CheckpointError(SubnetError, ValueError):
    """A checkpoint is missing, damaged, or not a pair with the other one."""


class ConfigError(SubnetError, ValueError):
    """An option has a value that cannot be used."""


class UnsupportedError(SubnetError, TypeError):
    """The input is valid, but of a kind this library does not handle."""


class StaleGraphError(SubnetError, ValueError):
    """Weights changed between a forward pass and the backward pass that needed them."""
