"""Silences Orbax's messages about its own internals."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax's log within the context: each save and load logs warnings that no user can act on.

    asyncio's log is silenced as well: when a damaged checkpoint is read, it reports every read that failed after the
    first, whose error is raised.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
