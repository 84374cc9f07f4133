"""Rounds sizes up, so that arrays of many lengths have only a few shapes and need only a few compiled programs."""

from __future__ import annotations


def round_up(n: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


def power_of_two(n: int, least: int = 16) -> int:
    """Returns the smallest power of two that is at least n, and not below `least`, itself a power of two."""
    return max(least, 1 << (n - 1).bit_length())
