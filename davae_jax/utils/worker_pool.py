"""Runs a function on many tasks in worker processes, with a progress bar."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_exit
from typing import Any

from tqdm import tqdm

from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.signals import ignore_interrupts

# Adds numbers to totals and returns the totals. The first of them is the number of units of the progress bar.
ReportProgress = Callable[..., list[float]]


def available_cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    work: Callable[[Any, ReportProgress], None], tasks: Sequence[Any], workers: int, bar: tqdm, counts: int = 0
) -> None:
    """Calls `work(task, report_progress)` for every task, in this process or in several worker processes.

    Args:
      work: a function of a module, so that another process can import it. It calls `report_progress(n, *counts)` for
        every n units of `bar` that it has done, which returns the totals of these numbers over all processes.
      workers: the number of processes; with 1, the tasks run in this process.
      counts: how many numbers `work` reports besides the units of `bar`.

    Raises:
      InputError: the worker processes cannot be started, or one was killed. An exception in a worker is raised here.
    """
    if min(workers, len(tasks)) == 1:
        totals = [0.0] * (1 + counts)

        def report_progress(*numbers: float) -> list[float]:
            totals[:] = (a + b for a, b in zip(totals, numbers, strict=True))
            bar.update(numbers[0])
            return totals

        for task in tasks:
            work(task, report_progress)
        return
    # "spawn", because a forked process would not have the threads of the libraries that are imported here.
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as cleanup:
        try:
            progress, stop = context.Array("d", 1 + counts), context.Event()
            pool = ProcessPoolExecutor(
                min(workers, len(tasks)), context, initializer=_initialize_worker, initargs=(progress, stop)
            )
            cleanup.callback(pool.shutdown, cancel_futures=True)
            cleanup.callback(stop.set)
            pending = {pool.submit(_work_in_process, work, task) for task in tasks}
        except OSError as e:
            raise OptionError("--workers", f"{workers}: {_why_not_started(e)}", exit_code=1) from e
        _wait_for(pending, progress, bar)


def _wait_for(pending: set[Future], progress: Any, bar: tqdm) -> None:
    """Shows the progress until all tasks are done. Raises the first exception of a task."""
    try:
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(progress[0] - bar.n)
            for future in finished:
                future.result()
    except BrokenProcessPool:
        raise InputError("a worker process was killed (out of memory?); repeat the command to resume") from None


def _why_not_started(error: OSError) -> str:
    """Explains an error at the start of worker processes, which share memory and locks by files in /dev/shm."""
    try:
        temporary = tempfile.gettempdir()
    except OSError:
        temporary = "a folder for temporary files"
    return (
        f"worker processes cannot be started ({error.strerror or error}); they need space in /dev/shm and in "
        f"{temporary} (TMPDIR), and may not be too many; make space, or use --workers 1"
    )


class _Stopped(Exception):
    """Raised in a worker process whose pool is shut down."""


def _initialize_worker(progress, stop) -> None:
    """Sets up a worker process: one thread for tokenizers, Ctrl-C ignored, and an exit if the parent has ended."""
    global _progress, _stop
    _progress, _stop = progress, stop
    ignore_interrupts()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def exit_with_parent():
        wait_for_exit([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _work_in_process(work: Callable[[Any, ReportProgress], None], task: Any) -> None:
    def report_progress(*numbers: float) -> list[float]:
        if _stop.is_set():
            raise _Stopped
        with _progress.get_lock():
            _progress[:] = [a + b for a, b in zip(_progress, numbers, strict=True)]
            return _progress[:]

    work(task, report_progress)
