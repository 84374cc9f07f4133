"""Runs whole programs cheaply: each in a process that is forked from one that has imported everything.

The forking process must not have initialized JAX's backend, whose threads a fork would not have. The program then goes
through its own `main`, as a fresh process would; only the imports have been done.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import resource
import runpy
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from verdicts import MIB, PROGRAM_LIMITS, Limits, Outcome

MODULES = """
array_record.python.array_record_module jax orbax.checkpoint pyarrow.parquet safetensors.numpy
sacrebleu scipy.stats sentencepiece sklearn.linear_model tensorboard.compat.proto.event_pb2
tensorboard.plugins.histogram.summary_v2 tensorboard.plugins.text.summary_v2 tokenizers torch zstandard
davae_jax.checkpoints.published.from_torch davae_jax.checkpoints.published.to_torch davae_jax.checkpoints.warm_start
davae_jax.cli.compare davae_jax.cli.evaluate davae_jax.cli.latent davae_jax.cli.main davae_jax.cli.parity
davae_jax.cli.plan davae_jax.cli.prepare davae_jax.cli.text davae_jax.cli.train davae_jax.evaluation.evaluate
davae_jax.inference.text_vae davae_jax.planning.plan davae_jax.reports.report davae_jax.training.loop
"""

# Audit events of Python that change files; `os.rename` stands for `os.replace` too. Opening for reading does not count.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
CODE = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def import_everything() -> None:
    """Imports what the programs import when they need it."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    for name in MODULES.split():
        importlib.import_module(name)


def main_of(argv: Sequence[str]) -> Callable[[], Any]:
    """Returns the entry point that a command line calls: "train …" is train.py, "convert.NAME …" a convert program."""
    program, *rest = argv
    if program == "train":
        from davae_jax.cli import base, train

        sys.argv = ["train.py", *rest]
        return lambda: base.exit_with(train.main)
    from davae_jax.cli import main

    if program.startswith("convert."):
        sys.argv = [program, *rest]
        return lambda: runpy.run_module(program, run_name="__main__", alter_sys=True)
    sys.argv = ["davae", *argv]
    return main.script


def run_program(argv: Sequence[str], folder: Path, **options: Any) -> Outcome:
    """Runs a command line in a folder, as `run_forked`."""

    def work() -> None:
        main_of(argv)()

    outcome = run_forked(work, folder, **options)
    if argv[0] == "compare":  # trains and evaluates in processes of its own
        own = re.compile(r"code: subprocess\.Popen .*'-m', 'davae_jax\.cli")
        return outcome._replace(violations=tuple(x for x in outcome.violations if not own.match(x)))
    return outcome


def run_forked(
    work: Callable[[], Any],
    folder: Path,
    *,
    logs: Path,
    limits: Limits = PROGRAM_LIMITS,
    stdin: bytes = b"",
    on_event: Callable[[int], Any] | None = None,
    kill_after: float | None = None,
    fence: Path | None = None,
) -> Outcome:
    """Calls a function in a forked process and waits for its end.

    Args:
      folder: its working directory.
      logs: a folder outside of it, for its standard streams.
      on_event: called in the process before each change of a file, with the number of changes before.
      kill_after: seconds after which the process is killed.
      fence: what is written outside of this folder is a violation; None: the working directory's parent.
    """
    (logs / "in").write_bytes(stdin)
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            _enter(folder, logs)
            _watch(logs, fence or folder.parent, on_event)
            code = work() or 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException as e:
            import traceback

            traceback.print_exception(e)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return _wait(pid, limits, kill_after, logs)


def _enter(folder: Path, logs: Path) -> None:
    """Makes the forked process look like a new one: session, working directory, streams, signals."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the harness
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    for number, name, how in ((0, "in", os.O_RDONLY), (1, "out", flags), (2, "err", flags)):
        stream = os.open(logs / name, how)
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _watch(logs: Path, fence: Path, on_event: Callable[[int], Any] | None) -> None:
    """Writes to logs/violations what the process must not do, and counts the changes of files in logs/events."""
    out = os.open(logs / "violations", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    allowed = [str(fence), str(logs), "/dev/", "/proc/", "/tmp/", *_environment_folders()]
    busy = False

    def is_change(event: str, args: tuple) -> bool:
        if event == "open":
            return isinstance(args[0], str | bytes) and isinstance(args[2], int) and bool(args[2] & WRITING)
        return event in CHANGES

    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal busy, count
        if busy or (event != "open" and event not in CHANGES and event not in CODE):
            return
        busy = True
        try:
            if event in CODE:
                os.write(out, f"code: {event} {str(args)[:150]!r}\n".encode("utf-8", "backslashreplace"))
            elif is_change(event, args):
                path = _real_path(args[0])
                if path.startswith("/dev/"):
                    return
                if path and not path.startswith(tuple(allowed)):
                    os.write(out, f"outside: {event} {path[:150]!r}\n".encode("utf-8", "backslashreplace"))
                if path.startswith(str(fence)):
                    if on_event:
                        on_event(count)
                    count += 1
                    events = os.open(logs / "events", os.O_WRONLY | os.O_CREAT)
                    os.write(events, f"{count:9d} {event:12} {path[-80:]:80}\n".encode("utf-8", "backslashreplace"))
                    os.close(events)
        finally:
            busy = False

    sys.addaudithook(hook)


def _real_path(name: Any) -> str:
    """Returns the path of an audit event's argument; "" for a descriptor, and where the working directory is gone."""
    try:
        return "" if isinstance(name, int) else os.path.realpath(os.fsdecode(name))
    except OSError:
        return ""


def _environment_folders() -> Iterator[str]:
    """Yields the documented caches, and the temporary folder."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "TMPDIR", "HF_HOME"):
        if value := os.environ.get(name):
            yield os.path.realpath(value)


def _wait(pid: int, limits: Limits, kill_after: float | None, logs: Path) -> Outcome:
    """Waits for a process; kills it at its limits or at the given time."""
    start, pause, timed_out = time.monotonic(), 0.001, False
    peak = 0
    try:
        while True:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            seconds = time.monotonic() - start
            if ended:
                break
            peak = max(peak, resident(pid))
            is_over = seconds > limits.seconds or peak > 2 * limits.memory
            if is_over or (kill_after is not None and seconds >= kill_after):
                timed_out = is_over
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                kill_after = None
            time.sleep(min(pause, max(kill_after - seconds, 0)) if kill_after else pause)
            pause = min(pause * 1.3, 0.05)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what it started
    code = os.waitstatus_to_exitcode(status)
    read = lambda name: (logs / name).read_bytes().decode("utf-8", "backslashreplace") if (logs / name).exists() else ""  # noqa: E731
    err, violations = read("err"), tuple(dict.fromkeys(read("violations").splitlines()))
    memory = max(peak, usage.ru_maxrss * 1024 if usage.ru_maxrss * 1024 < 64 * 1024 * MIB else 0)
    return Outcome(None if timed_out else code, err, seconds, memory, violations, read("out"))


def resident(pid: int | str) -> int:
    """Returns the resident memory of a process in bytes; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * 4096
    except (OSError, IndexError, ValueError):
        return 0
