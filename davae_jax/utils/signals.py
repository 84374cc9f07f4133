"""Handles the signals that end a program: SIGINT (Ctrl-C), SIGTERM, by which schedulers end a job, and SIGHUP, by which
a terminal or connection that is closed does.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

INTERRUPTED = 130  # the exit code of a program that was ended by one of these signals
SAME_SIGNAL_SECONDS = 1.0  # after the first: schedulers signal both a job and each of its processes, users press twice
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def interrupt_on_signals(signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Raises KeyboardInterrupt on these signals as on Ctrl-C while the block runs.

    A library that is running when the signal arrives may replace the interrupt by another exception; the block then
    still raises KeyboardInterrupt. Signals within `SAME_SIGNAL_SECONDS` of the first do not interrupt the clean-up that
    it has begun.
    """
    received: list[float] = []  # times by time.monotonic

    def interrupt(number: int, frame: Any) -> None:
        if received and time.monotonic() < received[0] + SAME_SIGNAL_SECONDS:
            return
        received.append(time.monotonic())
        raise KeyboardInterrupt

    with _handlers(interrupt, signals):
        try:
            yield
        except Exception:
            if received:
                raise KeyboardInterrupt from None
            raise


@contextlib.contextmanager
def importing(prog: str) -> Iterator[None]:
    """Ends the program with one line if it is interrupted while it imports its modules, for which it takes a second."""
    try:
        yield
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


class StopRequest:
    """Turns the first of the `SIGNALS` into a request to stop, which the program honours when it can.

        with StopRequest() as stop:
            for step in steps:
                …
                if stop.requested:
                    break

    A later signal raises KeyboardInterrupt at once. Signals within `SAME_SIGNAL_SECONDS` of the first count as the same
    one.

    Attributes:
      requested: whether a signal has arrived.
      number: the first signal, None before it.
    """

    def __init__(self):
        self.requested, self.number = False, None
        self._first_signal = 0.0  # by time.monotonic

    def __enter__(self) -> StopRequest:
        self._restore = contextlib.ExitStack()
        self._restore.enter_context(_handlers(self._handle, SIGNALS))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore.close()

    def _handle(self, number: int, frame: Any) -> None:
        if not self.requested:
            self.requested, self.number = True, number
            self._first_signal = time.monotonic()
        elif time.monotonic() > self._first_signal + SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interrupt_at_end() -> Iterator[None]:
    """Handles a signal of `SIGNALS`, as outside of the block, at the end of the block instead of within it.

    For a library that goes on in threads of its own when it is interrupted. A later signal interrupts at once, as of
    `StopRequest`.
    """
    with StopRequest() as stop:
        yield
    if stop.number is not None:
        signal.raise_signal(stop.number)
        raise KeyboardInterrupt  # the signal is ignored outside


def ignore_interrupts() -> None:
    """Ignores Ctrl-C, which a terminal sends to every process of a command: its main process stops the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def repeat_interrupt() -> None:
    """Sends SIGINT to the main thread a moment later, when it no longer counts as the same signal.

    For an interrupt that was raised inside a library's callback, in which Python can only report and discard it.
    """
    seconds = SAME_SIGNAL_SECONDS + 0.05
    timer = threading.Timer(seconds, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def _handlers(handler: Callable[[int, Any], None], signals: Sequence[int]) -> Iterator[None]:
    """Installs one handler for these signals, and restores the previous ones when the block ends.

    A signal that is ignored stays so, except Ctrl-C: `nohup` ignores SIGHUP. Only the main thread can install handlers.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handled = [n for n in signals if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN] if is_main else []
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
