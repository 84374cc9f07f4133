"""A run's folder.

train.json       everything the run was told, and digests of its texts and plugins
config.json      the model; with vocab.txt and spiece.model beside it, every `davae` command reads the folder
checkpoints/     one folder a step (`run_checkpoints.py`)
metrics.jsonl    a line every few steps; the same values go to TensorBoard's event files in `events/` (`run_log.py`)
held_out.jsonl   losses of held-out texts, a line a checkpoint
samples.jsonl    what the model wrote along the way
profile/         a trace, where one was asked for
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from davae_jax.checkpoints.run_folder import CONFIG_FILE, complete_checkpoints
from davae_jax.regularizers import digest_of
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.training.config import PLACES, TrainConfig, differences, to_dict
from davae_jax.training.setup import Corpus
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import is_partial, remove_partial, write_json


def open_run(path: Path, config: TrainConfig, corpus: Corpus) -> None:
    """Makes the folder or checks that what stands there was made with the same config, texts and tokenizers. Of these
    the contents count, and not where they lie: the data's order means nothing on other texts.

    Raises:
      InputError: it was not (exit code 2, the options named), or it cannot be written.
    """
    stored = path / "train.json"
    try:
        values = to_dict(config) | {"digest_of_texts": corpus.digest, "digest_of_held_out": corpus.held_out_digest}
        values |= {"digest_of_plugins": [digest_of(plugin) for plugin in config.plugin]} if config.plugin else {}
        path.mkdir(parents=True, exist_ok=True)
        if stored.exists():
            old = json.loads(stored.read_text(encoding="utf-8"))
            changed = changes(old, values) + other_tokenizers(config, path)
            if changed and complete_checkpoints(path):
                raise InputError(
                    f"{path}: was made with another config: {', '.join(changed)}; give another --run-dir", exit_code=2
                )
            if changed or differences(old, values):  # nothing was learnt yet: begin anew
                _forget(path)
        elif not all(is_partial(file) for file in path.iterdir()):
            raise InputError(f"{path}: holds files, but no run (no train.json); give another --run-dir", exit_code=2)
        write_json(stored, values)
        remove_partial(path)
    except (OSError, json.JSONDecodeError) as e:
        raise InputError(f"{path}: cannot be used as a run's folder ({e})") from e


def _forget(path: Path) -> None:
    """Removes what a run has prepared, unless it has learnt something by now."""
    if not complete_checkpoints(path):
        for name in (CONFIG_FILE, *TOKENIZER_FILES):
            (path / name).unlink(missing_ok=True)
        shutil.rmtree(path / "init", ignore_errors=True)


CONTENTS = {"digest_of_texts": "data.train", "digest_of_held_out": "data.valid"}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options of two runs that differ, places aside; a digest that the older one lacks is not compared."""
    found = differences(old, new, besides=(*PLACES, *CONTENTS))
    for half, place in old.get("init", {}).items():
        if (place is None) != (new["init"][half] is None):
            found.append(f"init.{half} ({place}, now {new['init'][half]})")
    for name, option in CONTENTS.items():
        if name in old and old[name] != new[name]:
            found.append(f"{option} (other contents)")
    return found


def other_tokenizers(config: TrainConfig, path: Path) -> list[str]:
    """The option, where it names files that are not the run's own."""
    if config.tokenizers is None:
        return []
    pairs = [(config.tokenizers / name, path / name) for name in TOKENIZER_FILES]
    same = all(a.read_bytes() == b.read_bytes() for a, b in pairs if a.is_file() and b.is_file())
    return [] if same else ["tokenizers (other contents)"]
