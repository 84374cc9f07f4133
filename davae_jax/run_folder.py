"""A run's folder: the resolved config, metrics, checkpoints.

train.json       everything the run was told, and a digest of its texts
config.json      the model; with vocab.txt and spiece.model beside it, every `davae` command reads the folder
checkpoints/     one folder a step, newest ones only; each holds `params` and the rest of the train state
metrics.jsonl    a line every few steps; the same values go to TensorBoard's event files in `events/`
samples.jsonl    what the model wrote along the way
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from davae_jax.checkpoint import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    PARAMS_FOLDER,
    TOKENIZER_FILES,
    checkpoints_of,
    flatten,
    nest,
    quiet,
)
from davae_jax.errors import InputError, first_line, system_reason
from davae_jax.files import write_json, write_text
from davae_jax.train_config import TrainConfig, differences, to_dict
from davae_jax.train_step import TrainState

REST = "state"  # the part of a checkpoint that is not weights


class RunFolder:
    """Opened to go on from `self.step`, the newest complete checkpoint's, or 0."""

    def __init__(self, path: Path, config: TrainConfig, texts: str):
        """Makes the folder or checks that what stands there was made with the same config and texts.

        Args:
          texts: a digest of what is trained on: the data's order means nothing on other texts.

        Raises:
          InputError: it was not (exit code 2, the fields named), or it cannot be written.
        """
        self.path = path
        stored = path / "train.json"
        values = to_dict(config) | {"digest_of_texts": texts}
        self.step = max((int(p.name) for p in checkpoints_of(path)), default=0)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if stored.exists():
                changed = differences(json.loads(stored.read_text(encoding="utf-8")), values)
                if changed and self.step:
                    raise InputError(
                        f"{path}: was made with another config: {', '.join(changed)}; give another --run-dir",
                        exit_code=2,
                    )
                if changed:  # nothing was learnt yet: begin anew
                    for name in (CONFIG_FILE, *TOKENIZER_FILES):
                        (path / name).unlink(missing_ok=True)
                    shutil.rmtree(path / "init", ignore_errors=True)
            elif any(path.iterdir()):
                raise InputError(
                    f"{path}: holds files, but no run (no train.json); give another --run-dir", exit_code=2
                )
            write_json(stored, values)
        except (OSError, json.JSONDecodeError) as e:
            raise InputError(f"{path}: cannot be used as a run's folder ({e})") from e
        self._keep, self._every = config.log.keep, config.log.every

    def checkpoint(self, step: int) -> Path:
        return self.path / CHECKPOINTS_FOLDER / str(step)

    def save(self, state: TrainState) -> int:
        """Writes a checkpoint of the state's step, whole or not at all, and drops the oldest ones past `log.keep`."""
        from orbax.checkpoint import v1 as ocp

        step = int(state.step)
        newest = ocp.training.preservation_policies.LatestN(self._keep)
        try:
            with quiet():
                self._write(step, _parts(state), newest)
        except Exception as e:  # Orbax and TensorStore have many types for a disk that is full
            reason = system_reason(e) or first_line(e)
            raise InputError(
                f"{self.path / CHECKPOINTS_FOLDER}: step {step} cannot be saved ({reason}); "
                f"the last complete checkpoint is {self.last_checkpoint()}"
            ) from e
        self.step = step
        return step

    def _write(self, step: int, parts: dict[str, Any], policy) -> None:
        try:
            with self._checkpointer(preservation_policy=policy) as checkpointer:
                checkpointer.save_checkpointables(step, parts, force=True, overwrite=True)
        except Exception:
            # The run ends here; what Orbax's other threads and tasks meet is not to be reported after it.
            for name in ("absl", "asyncio"):
                logging.getLogger(name).disabled = True
            raise

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, laid out as `like` (arrays or abstract ones with shardings).

        Raises:
          InputError: it is damaged or of another model.
        """
        path = self.checkpoint(self.step)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _parts(like))
        try:
            with quiet(), self._checkpointer() as checkpointer:
                parts = checkpointer.load_checkpointables(self.step, abstract)
        except Exception as e:  # likewise
            raise InputError(f"{path}: cannot be read ({first_line(e)}); remove it to go on from the one before") from e
        params = {f"params.{name}": leaf for name, leaf in flatten(parts[PARAMS_FOLDER]).items()}
        loaded = params | parts[REST]
        return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in _flat_leaves(like)])

    def _checkpointer(self, **kwargs):
        from orbax.checkpoint import v1 as ocp

        directory = self.path.absolute() / CHECKPOINTS_FOLDER
        return ocp.training.Checkpointer(directory, cleanup_tmp_directories=True, **kwargs)

    def last_checkpoint(self) -> str:
        """The newest one's place, for messages."""
        return str(self.checkpoint(self.step)) if self.step else "none yet"

    # What is logged. Lines past the step that a run resumes from are dropped: they will be written anew.

    def __enter__(self) -> RunFolder:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        with self._writing():
            self._metrics, self._samples = map(self._reopened, ("metrics.jsonl", "samples.jsonl"))
            folder = self.path / "events"
            folder.mkdir(exist_ok=True)
            # Not tensorboardX's SummaryWriter: on a full disk its thread dies, and the run would wait for it for ever.
            self._events = EventsWriter(str(folder / "events"))
            # TensorBoard forgets what stands behind the step that the run goes on from.
            self._write_event(Event(step=self.step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._interval, self._interval_began = [], time.perf_counter()
        return self

    def __exit__(self, kind, *_) -> None:
        for writer in (self._metrics, self._samples, self._events):
            with contextlib.suppress(OSError) if kind else self._writing():  # the first error is the one to tell
                writer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            said = f"{e.filename or self.path}: cannot be written ({system_reason(e)})"
            raise InputError(f"{said}; the last complete checkpoint is {self.last_checkpoint()}") from e

    def _write_event(self, event: Any) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()

    def _reopened(self, name: str) -> TextIO:
        path = self.path / name
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        write_text(
            path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step)
        )
        return path.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, float], tokens: int, *, last: bool) -> dict[str, float] | None:
        """Takes a step's values; every `log.every` steps, and at the last one, writes and returns their means.

        tokens: of the step, those that are trained.
        """
        self._interval.append(values | {"tokens": tokens})
        if not last and step % self._every:
            return None
        n, now = len(self._interval), time.perf_counter()
        means = {name: sum(v[name] for v in self._interval) / n for name in self._interval[0]}
        means["tokens_per_s"] = means.pop("tokens") * n / (now - self._interval_began)
        self._interval, self._interval_began = [], now
        # What part of the machine's arithmetic is used is known for accelerators with a published peak only.
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with self._writing():
            print(json.dumps({"step": step, **means, "mfu": None}), file=self._metrics, flush=True)
            for name, value in means.items():
                self._write_event(Event(step=step, summary=scalar(name, value)))
        return means

    def log_samples(self, step: int, samples: dict[str, Any]) -> None:
        """Writes what the model made of some texts. The time it took does not count as training."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import text

        with self._writing():
            print(json.dumps({"step": step} | samples, ensure_ascii=False), file=self._samples, flush=True)
            shown = text("samples", json.dumps(samples, ensure_ascii=False, indent=2))
            self._write_event(Event(step=step, summary=shown))
        self._interval_began = time.perf_counter()


def _parts(state: TrainState) -> dict[str, Any]:
    """The weights under the names every checkpoint has, and the rest by path."""
    rest = {name: leaf for name, leaf in _flat_leaves(state).items() if not name.startswith("params.")}
    return {PARAMS_FOLDER: nest(flatten(state.params)), REST: rest}


def _flat_leaves(state: TrainState) -> dict[str, Any]:
    """Every leaf by its path; those of the params as `flatten` names them."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
