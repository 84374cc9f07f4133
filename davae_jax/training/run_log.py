"""What a run writes about itself: metrics.jsonl, held_out.jsonl, samples.jsonl, TensorBoard's event files.

In several processes the first alone writes; the others keep the same books, so that all checkpoints agree.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from davae_jax.parallel.multihost import is_process_zero
from davae_jax.utils.errors import InputError, system_reason
from davae_jax.utils.files import write_text


class Work(NamedTuple):
    """What a step cost."""

    tokens: int  # trained
    flops: float  # by `plan.model_flops`
    waited: float  # seconds for its data


class RunLog:
    """A context: opened to go on behind `step`. Lines past that step are dropped: they will be written anew."""

    def __init__(
        self,
        path: Path,
        every: int,
        *,
        step: int,
        pending: list[dict[str, float]],
        peak_flops: float | None,
        last_checkpoint: Callable[[], str],
    ):
        """
        Args:
          every: steps between two lines of metrics.jsonl.
          pending: what `pending` was when the step's checkpoint was saved.
          peak_flops: of all devices together, a second; None where it is not known, and then no MFU is written.
          last_checkpoint: gives its place, for messages.
        """
        self.path, self._every, self._step = path, every, step
        self._peak_flops, self._last_checkpoint = peak_flops, last_checkpoint
        self.pending: list[dict[str, float]] = list(pending)  # values of the steps since the last line

    def __enter__(self) -> RunLog:
        self._writers = []
        if is_process_zero():
            self._open()
        self.restart_clock()
        return self

    def _open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        with self._writing():
            self._lines = {name: self._reopened(f"{name}.jsonl") for name in ("metrics", "held_out", "samples")}
            folder = self.path / "events"
            folder.mkdir(exist_ok=True)
            # Not tensorboardX's SummaryWriter: on a full disk its thread dies, and the run would wait for it for ever.
            self._events = EventsWriter(str(folder / "events"))
            self._writers = [*self._lines.values(), self._events]
            # TensorBoard forgets what stands behind the step that the run goes on from.
            self._write_event(Event(step=self._step + 1, session_log=SessionLog(status=SessionLog.START)))

    def __exit__(self, kind, *_) -> None:
        for writer in self._writers:
            with contextlib.suppress(OSError) if kind else self._writing():  # the first error is the one to tell
                writer.close()

    def step(self, step: int, values: dict[str, float], work: Work, *, last: bool) -> dict[str, float | None] | None:
        """Takes a step's values; every few steps, and at the last one, writes and returns their means."""
        self.pending.append(values)
        self._work.append(work)
        if not last and step % self._every:
            return None
        n = len(self.pending)
        means = {name: sum(v[name] for v in self.pending) / n for name in self.pending[0]}
        means |= self._rates()
        self.pending = []
        self.restart_clock()
        self._write("metrics", {"step": step, **means})
        self._scalars(step, means)
        return means

    def held_out(self, step: int, values: dict[str, float]) -> None:
        """Writes the losses of held-out texts."""
        self._write("held_out", {"step": step, **values})
        self._scalars(step, {f"held_out/{name}": value for name, value in values.items()})

    def samples(self, step: int, samples: dict[str, Any]) -> None:
        """Writes what the model made of some texts."""
        from tensorboardX.summary import text

        self._write("samples", {"step": step, **samples})
        self._summary(step, lambda: text("samples", json.dumps(samples, ensure_ascii=False, indent=2)))

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        from tensorboardX.summary import histogram

        self._summary(step, lambda: histogram(name, values, "auto"))

    def restart_clock(self) -> None:
        """What went before does not count as time of training."""
        self._work: list[Work] = []
        self._began, self._compiled = time.perf_counter(), compile_seconds()

    def _rates(self) -> dict[str, float | None]:
        """Of the steps since the clock was started, which may be fewer than those of the means."""
        seconds = time.perf_counter() - self._began
        flops = sum(work.flops for work in self._work) / seconds
        return {
            "tokens_per_s": sum(work.tokens for work in self._work) / seconds,
            "mfu": flops / self._peak_flops if self._peak_flops else None,
            "data_wait": sum(work.waited for work in self._work) / seconds,
            "compile_s": compile_seconds() - self._compiled,
            "device_memory": device_memory(),
        }

    def _scalars(self, step: int, values: dict[str, float | None]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            if value is not None:
                self._summary(step, lambda name=name, value=value: scalar(name, value))

    def _write(self, file: str, values: dict[str, Any]) -> None:
        if self._writers:
            with self._writing():
                print(json.dumps(values, ensure_ascii=False), file=self._lines[file], flush=True)

    def _summary(self, step: int, make: Callable[[], Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if self._writers:
            with self._writing():
                self._write_event(Event(step=step, summary=make()))

    def _write_event(self, event: Any) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            said = f"{e.filename or self.path}: cannot be written ({system_reason(e)})"
            raise InputError(f"{said}; the last complete checkpoint is {self._last_checkpoint()}") from e

    def _reopened(self, name: str) -> TextIO:
        path = self.path / name
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        write_text(
            path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self._step)
        )
        return path.open("a", encoding="utf-8")


_compile_seconds = [0.0]


def _heed(event: str, seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compile_seconds[0] += seconds


jax.monitoring.register_event_duration_secs_listener(_heed)


def compile_seconds() -> float:
    """Spent in XLA's compiler by this process so far."""
    return _compile_seconds[0]


def device_memory() -> int | None:
    """The most bytes that the fullest of this process's devices ever held; None where the backend does not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)
