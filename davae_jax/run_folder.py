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

from davae_jax.checkpoint import CONFIG_FILE, TOKENIZER_FILES, checkpoints_of
from davae_jax.errors import InputError
from davae_jax.files import write_json
from davae_jax.regularizers import digest_of
from davae_jax.train_config import TrainConfig, differences, to_dict


def open_run(path: Path, config: TrainConfig, texts: str) -> None:
    """Makes the folder or checks that what stands there was made with the same config and texts.

    Args:
      texts: a digest of what is trained on: the data's order means nothing on other texts.

    Raises:
      InputError: it was not (exit code 2, the fields named), or it cannot be written.
    """
    stored = path / "train.json"
    try:
        values = to_dict(config) | {"digest_of_texts": texts}
        values |= {"digest_of_plugins": [digest_of(plugin) for plugin in config.plugin]} if config.plugin else {}
        path.mkdir(parents=True, exist_ok=True)
        if stored.exists():
            changed = differences(json.loads(stored.read_text(encoding="utf-8")), values)
            if changed and checkpoints_of(path):
                raise InputError(
                    f"{path}: was made with another config: {', '.join(changed)}; give another --run-dir", exit_code=2
                )
            if changed:  # nothing was learnt yet: begin anew
                for name in (CONFIG_FILE, *TOKENIZER_FILES):
                    (path / name).unlink(missing_ok=True)
                shutil.rmtree(path / "init", ignore_errors=True)
        elif any(path.iterdir()):
            raise InputError(f"{path}: holds files, but no run (no train.json); give another --run-dir", exit_code=2)
        write_json(stored, values)
    except (OSError, json.JSONDecodeError) as e:
        raise InputError(f"{path}: cannot be used as a run's folder ({e})") from e
