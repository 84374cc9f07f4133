"""Logs a run: metrics.jsonl, held_out.jsonl, samples.jsonl, and the same values as TensorBoard events.

With several processes only process 0 writes files; the others keep the same pending values, so that every process
saves the same checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from davae_jax.parallel.multihost import is_process_zero
from davae_jax.training.run.rates import Rates, Work
from davae_jax.utils.errors import InputError, system_reason
from davae_jax.utils.files import TEXT_ENCODING, naming_file, write_bytes
from davae_jax.utils.json_lines import read_log_lines


class RunLog:
    """Collects the values of each step and writes their means every few steps. Use it as a context manager.

    When a run resumes, lines after the step that it resumes from are removed, because they will be written again.
    """

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
        """Prepares the log; the files are opened on entering the context.

        Args:
          path: the run folder.
          every: steps between two lines of metrics.jsonl.
          step: the step that the run resumes from.
          pending: the attribute `pending` at the time that step was saved.
          peak_flops: peak FLOP/s summed over all devices; None if unknown, and MFU is then None.
          last_checkpoint: returns the path of the last complete checkpoint, for messages.
        """
        self.pending: list[dict[str, float]] = list(pending)  # values of the steps since the last line
        self._path, self._every, self._step = path, every, step
        self._last_checkpoint = last_checkpoint
        self._rates = Rates(peak_flops)
        self._files: dict[str, JsonLinesFile] = {}
        self._events: EventsFile | None = None

    def __enter__(self) -> RunLog:
        if is_process_zero():
            with self._write_errors():
                for name in ("metrics", "held_out", "samples"):
                    self._files[name] = JsonLinesFile(self._path / f"{name}.jsonl", self._step)
                self._events = EventsFile(self._path / "events", self._step + 1)
        self.restart_clock()
        return self

    def __exit__(self, kind, *_) -> None:
        for file in [*self._files.values(), *([self._events] if self._events else [])]:
            # The first error is the one to report.
            with contextlib.suppress(OSError) if kind else self._write_errors():
                file.close()

    def step(self, step: int, values: dict[str, float], work: Work, *, last: bool) -> dict[str, float | None] | None:
        """Adds a step's values. Every few steps, and at the last one, writes and returns their means and the rates."""
        self.pending.append(values)
        self._rates.add(work)
        if not last and step % self._every:
            return None
        n = len(self.pending)
        means = {name: sum(v[name] for v in self.pending) / n for name in self.pending[0]}
        means |= self._rates.compute()
        self.pending = []
        self.restart_clock()
        self._write_line("metrics", step, means)
        self._write_scalars(step, means)
        return means

    def held_out(self, step: int, values: dict[str, float]) -> None:
        """Writes the losses of the held-out texts."""
        self._write_line("held_out", step, values)
        self._write_scalars(step, {f"held_out/{name}": value for name, value in values.items()})

    def samples(self, step: int, samples: dict[str, Any]) -> None:
        """Writes texts that the model generated, as JSON values."""
        self._write_line("samples", step, samples)
        if self._events:
            with self._write_errors():
                self._events.text(step, "samples", json.dumps(samples, ensure_ascii=False, indent=2))

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Writes a histogram as a TensorBoard event."""
        if self._events:
            with self._write_errors():
                self._events.histogram(step, name, values)

    def restart_clock(self) -> None:
        """Starts a new interval for the rates, so that evaluating and saving do not count as training time."""
        self._rates.restart()

    def _write_line(self, name: str, step: int, values: dict[str, Any]) -> None:
        if self._files:
            with self._write_errors():
                self._files[name].write({"step": step, **values})

    def _write_scalars(self, step: int, values: dict[str, float | None]) -> None:
        if self._events:
            with self._write_errors():
                self._events.scalars(step, values)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turns an OSError into an InputError that names the file and the last complete checkpoint."""
        try:
            yield
        except OSError as e:
            raise InputError(
                f"{e.filename or self._path}: cannot be written ({system_reason(e)}); "
                f"the last complete checkpoint is {self._last_checkpoint()}"
            ) from e


class JsonLinesFile:
    """A file of JSON objects, one per line, each with its step.

    Opening it removes the lines after `last_step`, and damaged lines with a warning.
    """

    def __init__(self, path: Path, last_step: int):
        write_bytes(path, b"".join(line.data for line in read_log_lines(path) if line.values["step"] <= last_step))
        self._path = path
        self._file = path.open("a", **TEXT_ENCODING)

    def write(self, values: dict[str, Any]) -> None:
        with naming_file(self._path):
            print(json.dumps(values, ensure_ascii=False), file=self._file, flush=True)

    def close(self) -> None:
        with naming_file(self._path):
            self._file.close()


class EventsFile:
    """A new file of TensorBoard events in `folder`; TensorBoard discards older events from `first_step` on.

    TensorBoard's own EventFileWriter is not used: on a full disk its thread ends, and the run would not notice.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"  # as TensorBoard names it
        self._path = folder / name
        self._file = open(self._path, "wb")  # noqa: SIM115 (closed by `close`)
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        present = [(name, value) for name, value in values.items() if value is not None]
        self._write_summary(
            step, Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in present])
        )

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        self._write_summary(step, histogram_pb(name, values))

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write_summary(step, text_pb(name, text))

    def close(self) -> None:
        self._file.close()

    def _write_summary(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._write(Event(step=step, summary=summary))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        with naming_file(self._path):
            self._records.write(event.SerializeToString())
            self._file.flush()
