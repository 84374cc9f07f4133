"""Decides whether too many lines of the input cannot be read, as early as this is certain or as good as certain."""

from __future__ import annotations

from typing import NamedTuple

from davae_jax.utils.errors import InputError

# The limit is not judged by an estimate of the total number of lines before so much has been read that what readers
# have read ahead does not matter.
MIN_LINES, ESTIMATE_LINES, ESTIMATE_BYTES = 10_000, 1_000, 1 << 26


class BadLine(NamedTuple):
    file: str
    line: int
    problem: str


class BadLineLimit(NamedTuple):
    """The largest fraction of lines that may be unreadable.

    Attributes:
      max_bad: the fraction.
      total_bytes: of the whole input; 0: unknown.
      option: the option that sets the fraction, for messages.
    """

    max_bad: float
    total_bytes: int
    option: str = "--max-bad"

    def is_exceeded(self, lines: int, bad: int) -> bool:
        """Returns whether there are too many bad lines in the whole input."""
        return bad > self.max_bad * lines

    def will_be_exceeded(self, lines: int, bad: int, bytes_read: float) -> bool:
        """Returns whether what has been read so far decides.

        It does if no bad line is allowed, if more than half of 10,000 or more lines are bad (and twice the fraction),
        or if there are twice as many bad lines already as would be allowed in the whole input.
        """
        if self.max_bad == 0:
            return bad > 0
        if lines >= MIN_LINES and bad > max(0.5, 2 * self.max_bad) * lines:
            return True
        if lines < ESTIMATE_LINES or not ESTIMATE_BYTES <= bytes_read <= self.total_bytes:
            return False
        return bad > 2 * self.max_bad * lines * self.total_bytes / bytes_read

    def error(self, first: BadLine, lines: int, bad: int, where: str = "") -> InputError:
        """Returns the error of an input with too many bad lines. where: the file that lists them."""
        is_encoding = first.problem.startswith("is not UTF")
        hint = f"; {self.option.replace('max-bad', 'encoding')} names another encoding" if is_encoding else ""
        share = f"{bad:,} of {lines:,} lines cannot be read{where and f' ({where})'}"
        limit = f"more than {self.option} {self.max_bad:g}"
        return InputError(f"{first.file}: line {first.line}: {first.problem}; {share}, {limit}{hint}")
