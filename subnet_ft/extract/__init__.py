"""A prior run -> its mask."""

from subnet_ft.extract.rules import Rule
from subnet_ft.extract.stream import check_pair, extract_mask

__all__ = ["Rule", "check_pair", "extract_mask"]
