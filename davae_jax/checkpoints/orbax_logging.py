"""Silences Orbax's warnings about its own internals."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax's log within the context: each save and load logs warnings that no user can act on."""
    logging.getLogger("asyncio").addFilter(_is_not_abandoned_read)  # a second time, this does nothing
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_not_abandoned_read(record: logging.LogRecord) -> bool:
    """Returns False for an error of a read that Orbax has abandoned, because another array could not be read.

    The error of the first one is raised. asyncio logs those of the others, with tracebacks, at some later time.
    """
    message = record.getMessage()
    is_unread = message.startswith(("Task exception was never retrieved", "Future exception was never retrieved"))
    return not (is_unread and re.search("orbax|ocdbt|tensorstore", message))
