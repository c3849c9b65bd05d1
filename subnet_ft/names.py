"""Parameters chosen by regular expressions on their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from subnet_ft.errors import ConfigError

Patterns = str | Sequence[str] | None


def select_names(
    names: Iterable[str], include: Patterns = None, exclude: Patterns = None
) -> list[str]:
    """Select parameter names by regular expressions, each of which must match a whole name.

    Args:
        names: the names to choose from; their order is kept.
        include: keep what one of these matches; None keeps all.
        exclude: then drop what one of these matches.

    Raises:
        ConfigError: a pattern is no regular expression, a pattern matches nothing, or nothing is
            left.

    Example:
        >>> select_names(["a.weight", "a.bias"], exclude=r".*bias")
        ['a.weight']
    """
    names = list(names)
    kept = set(names) if include is None else _matching(names, include, "include")
    kept -= _matching(names, exclude or (), "exclude")
    if not kept:
        raise ConfigError(
            f"include={include!r} and exclude={exclude!r} leave no parameter; loosen one of them."
        )
    return [name for name in names if name in kept]


def _matching(names: Sequence[str], patterns: str | Sequence[str], option: str) -> set[str]:
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{option} pattern {pattern!r} must be a regular expression, got {error}; fix it."
            ) from error
        found = {name for name in names if regex.fullmatch(name)}
        if not found:
            example = f" (such as {names[0]!r})" if names else ""
            raise ConfigError(
                f"{option} pattern {pattern!r} must match a whole parameter name{example}, "
                "got no match; fix the pattern."
            )
        matched |= found
    return matched
