"""Orbax's log lines that tell a user nothing."""

from __future__ import annotations

import logging


class quiet_orbax:
    """Orbax logs a few lines a save at WARNING that tell a user nothing to act on."""

    def __enter__(self):
        self.level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    def __exit__(self, *_):
        logging.getLogger("absl").setLevel(self.level)
