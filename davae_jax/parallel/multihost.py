"""Several processes that train one model: how they find each other, wait for each other, and who speaks for them."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from davae_jax.parallel.config import RANKS, DistributedConfig
from davae_jax.utils.errors import InputError, first_line

Params = dict[str, Any]


ANSWER = 5  # seconds for a process to say that it is here
LEAVING = 2  # seconds from its last word to its end, on a busy machine
EXIT = 300  # seconds for all to come to the end of the program
BYE = "bye"  # the last call
LOCAL_RANKS = (("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"), ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"))


def connect(config: DistributedConfig, stand: Callable[[], str] = str) -> None:
    """Joins this process with the others. To be called before anything asks for devices.

    stand: how far the run is, for the message of a process that has lost another.

    Raises:
      InputError: the others did not come within the timeout; the missing ones are named. Or the environment says that
        there are others, and not how to find them (exit code 2).
    """
    where = config.where(os.environ)
    if config.coordinator is not None:
        _roll_call(*where, config.timeout)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Kubernetes environment detected")  # said below where it matters
            devices = local_devices(os.environ)
            # Who is told all is told nothing by Kubernetes, which it may have no leave to ask.
            told = (
                {"cluster_detection_method": "deactivate"}
                if where[0] and "KUBERNETES_SERVICE_HOST" in os.environ
                else {}
            )
            jax.distributed.initialize(*where, devices, initialization_timeout=config.timeout, **told)
    except ValueError:
        if config.coordinator is not None:
            raise
        check_alone(os.environ)  # No cluster around this process that JAX knows: it is alone.
    except Exception as e:  # Kubernetes' client has many
        if "KUBERNETES_SERVICE_HOST" not in os.environ or where[0]:
            raise
        if "JOB_COMPLETION_INDEX" in os.environ:
            raise InputError(f"Kubernetes: {first_line(e)}; or give {_BY_HAND}") from e
        check_alone(os.environ)  # A pod of no indexed job.
    if _client() is not None:
        line = _Line(stand)
        line.start()
        atexit.register(line.hang_up)


_BY_HAND = "--distributed.coordinator HOST:PORT --distributed.num-processes N --distributed.process-id I"


def check_alone(environ: Mapping[str, str]) -> None:
    """Raises InputError (exit code 2) where the environment knows of other processes."""
    for size, rank in (*RANKS, ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")):
        if int(environ.get(size) or 1) > 1:
            give = "--distributed.coordinator HOST:PORT" if (size, rank) in RANKS and rank in environ else _BY_HAND
            raise InputError(f"{size} is {environ[size]}, but JAX finds no other process; give {give}", exit_code=2)
    if "PMIX_RANK" in environ and int(environ["PMIX_RANK"]) > 0:
        raise InputError(
            f"PMIX_RANK is {environ['PMIX_RANK']}, but JAX finds no other process; give {_BY_HAND}", exit_code=2
        )
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        raise InputError(
            f"JOB_COMPLETION_INDEX is {environ['JOB_COMPLETION_INDEX']}, but JAX cannot ask Kubernetes for the other "
            f"pods: pip install '.[k8s]', or give {_BY_HAND}",
            exit_code=2,
        )


def local_devices(environ: Mapping[str, str]) -> list[int] | None:
    """Which GPUs of its node this process takes: [] all, where it is the only one there; of several under an MPI, the
    one of its number. None: as JAX decides, which under Slurm is the same."""
    if "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    for size, rank in LOCAL_RANKS:
        if size in environ and rank in environ:
            return [] if environ[size] == "1" else [int(environ[rank])]
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or ""
    return [] if re.fullmatch(r"1(\(x\d+\))?", tasks) else None


def _roll_call(coordinator: str, n: int, process: int, timeout: float) -> None:
    """Waits until all processes are there. JAX's own wait ends with the process, and names nobody."""
    host, _, port = coordinator.rpartition(":")
    ends = time.monotonic() + timeout
    if process == 0:
        try:
            server = socket.create_server(("", int(port)))
        except OSError as e:
            raise InputError(f"--distributed.coordinator {coordinator}: {e.strerror}") from e
        with server:
            missing = _received(server, n, ends)
            if missing:
                raise InputError(f"{coordinator}: waited {timeout} s for {_processes(missing)}")
        return
    while (left := ends - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, int(port)), timeout=left) as connection:
                connection.sendall(process.to_bytes(4, "big"))
                if connection.recv(1):
                    return
            ends = min(ends, time.monotonic())  # process 0 gave up
        except OSError:
            time.sleep(0.2)
    raise InputError(f"{coordinator}: waited {timeout} s for process 0, or it waited in vain for others")


def _received(server: socket.socket, n: int, ends: float) -> set[int]:
    """Process 0's part: answers the others once all are there. Returns those that did not come."""
    came: dict[int, socket.socket] = {}
    missing = set(range(1, n))
    with contextlib.ExitStack() as stack:
        while missing and (left := ends - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5)
                process = int.from_bytes(connection.recv(4), "big")
                came[process] = connection
                missing.discard(process)
        for connection in came.values() if not missing else ():
            with contextlib.suppress(OSError):
                connection.sendall(b"!")
    return missing


def barrier(reached: str, timeout: int = 300) -> None:
    """Waits until every process is here. Raises InputError, which names those that are not, after `timeout` seconds.

    reached: what stands behind them, for the message; each barrier of a run has its own.
    """
    if jax.process_count() == 1:
        return
    client, place = _client(), reached.replace(" ", "_")  # multihost_utils.sync_global_devices has no timeout
    client.key_value_set(f"{place}/{jax.process_index()}", "", allow_overwrite=True)
    try:
        client.wait_at_barrier(place, timeout * 1000)
    except RuntimeError as e:
        came = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(f"{place}/")}
        missing = set(range(jax.process_count())) - came
        raise InputError(f"waited {timeout} s until {reached}: no word from {_processes(missing)}") from e


def run_on_process_zero(what: str, work: Callable[[], Any]) -> None:
    """Process 0 does the work for all; each of them returns when it is done. What process 0 fails with, all raise.

    what: a name for it; each of a run has its own.
    """
    if jax.process_count() == 1:
        work()
        return
    client, place = _client(), f"outcome/{what.replace(' ', '_')}"
    if is_process_zero():
        said, code = "", 0
        try:
            work()
        except InputError as e:
            said, code = str(e), e.exit_code
            raise
        except BaseException as e:
            said, code = f"process 0: {type(e).__name__}: {first_line(e)}", 130 if type(e) is KeyboardInterrupt else 1
            raise
        finally:
            client.key_value_set(place, json.dumps([said, code]))
        return
    said, code = json.loads(_heard(client, place, seconds=1))  # between two looks, signals are heard
    if code == 130:
        raise KeyboardInterrupt
    if said:
        raise InputError(said, exit_code=code)


def any_process_requested_stop(asked: bool, step: int) -> bool:
    """Whether any process was asked to stop. Several look at it together, every ten steps."""
    if jax.process_count() == 1:
        return asked
    return step % 10 == 0 and bool(_of_all(asked).any())


def all_processes(good: bool) -> bool:
    """Whether it is so on every process; to be called by all."""
    return good if jax.process_count() == 1 else bool(_of_all(good).all())


def check_same_on_all_processes(what: str, digest: str) -> None:
    """Raises InputError, on every process, where one has another digest than process 0."""
    if jax.process_count() == 1:
        return
    found = _of_all(np.frombuffer(hashlib.sha256(digest.encode()).digest()[:4], np.uint32))
    if others := {int(i) for i in np.flatnonzero((found != found[0]).any(1))}:
        raise InputError(f"{what}: {_processes(others)} and process 0 have different ones")


def _of_all(value) -> np.ndarray:
    """[processes, …]"""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.array(value)))


def gather_params(params: Params) -> Params:
    """Weights that this process can use alone."""
    if jax.process_count() == 1:
        return params
    from jax.experimental import multihost_utils

    return jax.device_put(multihost_utils.process_allgather(params, tiled=True), jax.local_devices()[0])


def is_process_zero() -> bool:
    """Process 0 writes logs and prints for all."""
    return jax.process_index() == 0


def _processes(ids: set[int]) -> str:
    named = ", ".join(map(str, sorted(ids)))
    return f"process{'es' if len(ids) > 1 else ''} {named}" if ids else "the other processes"


# ---- when a process is lost, or ends before the others


def _client() -> Any:
    """Of JAX's key-value store, which lies in process 0; None where this process is alone."""
    from jax._src import distributed  # jax.distributed gives it to nobody

    return distributed.global_state.client


def _heard(client: Any, key: str, seconds: int = 3600) -> str:
    """The key's value, once it has one; it is waited for in parts of so many seconds."""
    while True:
        try:
            return client.blocking_key_value_get(key, seconds * 1000)
        except Exception as e:
            if "DEADLINE_EXCEEDED" not in str(e):
                raise


class _Line(threading.Thread):
    """Where this process is called, whatever its main thread waits for: with nothing, to hear whether it is here, or
    with the reason why all must end. Calls are numbered, and every process hears each of them."""

    current: _Line | None = None  # of this process

    def __init__(self, stand: Callable[[], str]):
        from jax._src.distributed import global_state as state

        super().__init__(daemon=True)
        self.client, self.me, self.n = state.client, state.process_id, state.num_processes
        self.stand, self.ended, self._speaking = stand, False, threading.Lock()
        _Line.current = self

    def run(self) -> None:
        try:
            for number in itertools.count(1):
                said = _heard(self.client, f"call/{number}")
                if said == BYE:
                    return
                if said:
                    code, _, said = said.partition(" ")
                    self.stop(said, int(code))
                else:
                    self.client.key_value_set(f"here/{self.me}", "", allow_overwrite=True)
        except Exception:  # what all are called through lies in process 0
            self.stop(*_lost({0} - {self.me}))

    def call(self, said: str = "") -> None:
        self.client.key_value_set(f"call/{self.client.key_value_increment('calls', 1)}", said)

    def missing(self) -> set[int]:
        """Those that do not answer; where nothing can be asked, process 0, or to its own knowledge none."""
        ends, missing = time.monotonic() + ANSWER, set(range(self.n))
        try:
            self.call()
            while missing and time.monotonic() < ends:
                time.sleep(0.05)
                missing -= {int(key.rpartition("/")[2]) for key, _ in self.client.key_value_dir_get("here/")}
            return missing
        except Exception:
            return {0} - {self.me}

    def stop(self, said: str, code: int) -> None:
        """Ends this process with one line, if it does not end already."""
        if not self.ended and self._speaking.acquire(blocking=False):
            print(f"train.py: error: {said}{self.stand()}; start all processes again to go on", file=sys.stderr)
            self.leave(code)

    def leave(self, code: int) -> None:
        """Ends the process at once; of all, process 0 last: when it goes, JAX ends what is left with a stack trace."""
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"gone/{self.me}", "", allow_overwrite=True)
            ends = time.monotonic() + ANSWER
            while self.me == 0 and len(self.client.key_value_dir_get("gone/")) < self.n and time.monotonic() < ends:
                time.sleep(0.05)
        if self.me == 0:
            time.sleep(LEAVING)
        os._exit(code)

    def hang_up(self) -> None:
        """At the end of a run that went well, before JAX's own: Python would not end well with the thread in a call."""
        self.ended = True
        try:
            self.client.wait_at_barrier("all have ended", 1000 * EXIT)
            if self.me == 0:
                self.call(BYE)
            self.join(EXIT)
        except BaseException as e:
            self.leave(130 if isinstance(e, KeyboardInterrupt) else 1)


def _lost(processes: set[int]) -> tuple[str, int]:
    return f"lost {_processes(processes)}", 1


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Where an error comes of a process that is gone, ends all that are left with a line that names it."""
    try:
        yield
    except Exception:
        if (line := _Line.current) and (missing := line.missing()):
            said, code = _lost(missing)
            with contextlib.suppress(Exception):
                line.call(f"{code} {said}")
            line.stop(said, code)
            time.sleep(ANSWER)  # the other thread is at it
        raise


def end(code: int) -> None:
    """This process is about to exit. After a failure it does so here, and the others hear of it: JAX's own way out
    would wait for them for minutes."""
    if not code or (line := _Line.current) is None:
        return
    line.ended = True
    for number in (signal.SIGINT, signal.SIGTERM):  # it takes seconds, and is under way
        signal.signal(number, signal.SIG_IGN)
    try:
        line.client.wait_at_barrier("all have failed", ANSWER * 1000)
    except Exception:
        with contextlib.suppress(Exception):
            line.call(f"{code} process {line.me} has ended with code {code}")
    line.leave(code)
