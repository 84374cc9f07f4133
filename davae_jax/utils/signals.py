"""What a program does when it is interrupted: the one place that handles SIGINT and SIGTERM."""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within this context, the first Ctrl-C or SIGTERM sets `requested`; a later one raises KeyboardInterrupt.

    Signals within a second of the first count as one, because schedulers signal a job and its processes.
    """

    def __init__(self):
        self.requested, self._when = False, 0.0

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._when = True, time.monotonic()
        elif time.monotonic() > self._when + 1:
            raise KeyboardInterrupt
