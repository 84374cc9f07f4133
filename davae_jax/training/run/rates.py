"""Computes the rates of a run: tokens per second, MFU, time spent waiting and compiling, device memory."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax


class Work(NamedTuple):
    """The work of one step, for the rates."""

    tokens: int  # number of trained tokens
    flops: float  # as counted by `flops.model_flops`
    waited: float  # seconds spent waiting for the batch


class Rates:
    """Computes rates over the steps since `restart`, which may be fewer than the steps of the means."""

    def __init__(self, peak_flops: float | None):
        self._peak_flops = peak_flops
        self.restart()

    def restart(self) -> None:
        self._steps: list[Work] = []
        self._start, self._compile_start = time.perf_counter(), compile_seconds()

    def add(self, work: Work) -> None:
        self._steps.append(work)

    def compute(self) -> dict[str, float | None]:
        """Returns the rates by their names in metrics.jsonl."""
        seconds = time.perf_counter() - self._start
        flops = sum(work.flops for work in self._steps) / seconds
        return {
            "tokens_per_s": sum(work.tokens for work in self._steps) / seconds,
            "mfu": flops / self._peak_flops if self._peak_flops else None,
            "data_wait": sum(work.waited for work in self._steps) / seconds,
            "compile_s": compile_seconds() - self._compile_start,
            "device_memory": device_memory(),
        }


_compile_seconds = [0.0]


def _add_compile_seconds(event: str, seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compile_seconds[0] += seconds


jax.monitoring.register_event_duration_secs_listener(_add_compile_seconds)


def compile_seconds() -> float:
    """Returns the seconds that this process has spent in XLA's compiler."""
    return _compile_seconds[0]


def device_memory() -> int | None:
    """Returns the highest peak of bytes in use among this process's devices; None if the backend does not report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)
