"""Rounding of sizes, so that a few compiled programs serve all."""

from __future__ import annotations


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two ≥ n and ≥ least: the bucket a length falls into."""
    return max(least, 1 << (n - 1).bit_length())
