"""Worker processes that write shards."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end

from tqdm import tqdm

from davae_jax.data.shard_writer import (
    ShardTask,
    write_shards,
)
from davae_jax.utils.errors import InputError


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(tasks: list[ShardTask], workers: int) -> None:
    total = sum(task.piece.size for task in tasks)
    bar = tqdm(total=total, desc="prepare", unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False)
    with bar:
        if min(workers, len(tasks)) == 1:
            for task in tasks:
                write_shards(task, bar.update)
            return
        # Not forked: the threads of what is imported here would not survive that.
        context = multiprocessing.get_context("spawn")
        done, stop = context.Value("d", 0.0), context.Event()
        pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_begin, initargs=(done, stop))
        try:
            left = {pool.submit(_make_shards, task) for task in tasks}
            while left:
                finished, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(done.value - bar.n)
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise InputError("a worker process was ended from outside (out of memory?); start again to go on") from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    pass


def _begin(done, stop) -> None:
    """In a worker: end with the program, leave Ctrl-C to it, and use one core."""
    import signal

    global _done, _stop
    _done, _stop = done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def end_with_parent():
        wait_for_end([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _make_shards(task: ShardTask) -> None:
    def report(n: float) -> None:
        if _stop.is_set():
            raise _Stopped
        with _done.get_lock():
            _done.value += n

    write_shards(task, report)
