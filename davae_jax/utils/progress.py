"""Shows progress: bars on a terminal, and elsewhere a line every few seconds, so that a log shows that work goes on."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from davae_jax.utils.errors import InputError

VARIABLE, SECONDS = "DAVAE_PROGRESS_SECONDS", "15"  # between two lines; 0 prints none
_LINE = "{n_fmt} of {total_fmt} {unit}, {remaining} left{postfix}"
_stop: threading.Event | None = None  # ends the lines; None if none are printed
_bars: list[weakref.ref[tqdm]] = []  # whose state the lines show, the innermost last


def progress_bar(iterable: Iterable[Any] | None = None, *, disable: bool | None = None, **options: Any) -> tqdm:
    """Returns tqdm's progress bar. Where lines are printed, it prints nothing, and they show its state.

    Args:
      disable: None: where standard error is neither a terminal nor shows lines.
      options: further arguments of tqdm.
    """
    if _stop is None:
        return tqdm(iterable, disable=disable, **options)
    line = f"{options['desc']}: {_LINE}" if options.get("desc") else _LINE
    bar = tqdm(iterable, disable=bool(disable), file=_Nowhere(), bar_format=line, **options)
    _bars[:] = [ref for ref in _bars if _is_open(ref())] + [weakref.ref(bar)]
    return bar


@contextlib.contextmanager
def progress_lines(prog: str) -> Iterator[None]:
    """Prints a line every 15 seconds while the block runs, if standard error is not a terminal.

    The environment may name another number of seconds, 0 for no lines, in DAVAE_PROGRESS_SECONDS. Raises InputError if
    that is no such number.
    """
    global _stop
    if _stop is not None or sys.stderr.isatty():
        yield
        return
    seconds = _interval()
    _stop = threading.Event()
    if seconds:
        threading.Thread(target=_print_lines, args=(prog, seconds, _stop), daemon=True).start()
    try:
        yield
    finally:
        end_progress_lines()
        _stop = None


def end_progress_lines() -> None:
    """Prints no further lines: of several processes, one is enough."""
    if _stop is not None:
        _stop.set()


def _interval() -> float:
    value = os.environ.get(VARIABLE, SECONDS)
    try:
        if 0 <= (seconds := float(value)) <= threading.TIMEOUT_MAX:
            return seconds
    except ValueError:
        pass
    raise InputError(f"{VARIABLE}={value}: must be a number of seconds between two lines of progress, or 0 for none")


def _print_lines(prog: str, seconds: float, stop: threading.Event) -> None:
    start = time.monotonic()
    with contextlib.suppress(OSError, ValueError):  # nobody reads them any more
        while not stop.wait(seconds):
            state = next((str(bar) for ref in reversed(_bars) if _is_open(bar := ref())), "working")
            sys.stderr.write(f"{prog}: {time.monotonic() - start:.0f} s: {state}\n")
            sys.stderr.flush()


def _is_open(bar: tqdm | None) -> bool:
    return bar is not None and not bar.disable  # a closed one is disabled


class _Nowhere:
    """A text file that keeps nothing."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass
