"""Silences Orbax's log, which is about its own internals."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax's log within the context: each save and load logs warnings that no user can act on.

    The errors that its threads and tasks log stay silent afterwards too: a save goes on in the background, and if it
    fails, each of them logs the error that waiting for the save raises. When a damaged checkpoint is read, asyncio
    reports every read that failed after the first, whose error is raised.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    logging.getLogger().addFilter(_is_not_orbax)  # Orbax writes to the root logger as well; others keep its level
    for logger in loggers:
        logger.addFilter(_is_not_orbax)  # once; adding it again does nothing
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Returns whether a record is to be logged: neither Orbax nor a task of Orbax has logged it."""
    return "orbax" not in record.pathname and not re.search("orbax|ocdbt|tensorstore", str(record.msg))
