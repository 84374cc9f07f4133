"""What lies where in a run folder and in a converted checkpoint."""

from __future__ import annotations

from pathlib import Path

from davae_jax.checkpoints.orbax_logging import quiet_orbax

CONFIG_FILE = "config.json"


PARAMS_FOLDER = "params"


CHECKPOINTS_FOLDER = "checkpoints"  # of a run: one folder a step, whose part named "params" holds the weights


def weights_path(folder: Path) -> Path | None:
    """Where a folder's weights lie: a converted checkpoint's, or those of a run's newest complete checkpoint."""
    if config_folder(folder) != folder:
        return folder
    if (folder / PARAMS_FOLDER).is_dir():
        return folder / PARAMS_FOLDER
    return max(complete_checkpoints(folder), key=lambda path: int(path.name), default=None)


def config_folder(folder: Path) -> Path:
    """Where config.json and the tokenizers lie: the folder itself, or the run whose checkpoint it is."""
    return folder.absolute().parent.parent if folder.absolute().parent.name == CHECKPOINTS_FOLDER else folder


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, each named by its step."""
    from orbax.checkpoint import v1 as ocp

    with quiet_orbax():
        paths = (run / CHECKPOINTS_FOLDER).glob("*")
        return [path for path in paths if path.name.isdigit() and ocp.is_orbax_checkpoint(path.absolute())]
