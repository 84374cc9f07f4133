"""`davae check`: tells what folders are and whether their files are whole."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from davae_jax.cli.base import Command
from davae_jax.utils.errors import OptionError
from davae_jax.utils.files import check_output, to_json, write_output

if TYPE_CHECKING:
    from davae_jax.checkpoints.check_folder import Report


@dataclass(kw_only=True)
class Check(Command):
    """Tells what a folder is (a published or converted model, a run, one checkpoint of a run, prepared texts,
    tokenizers), in what state it is, and whether its files are what was written.

    Every file with a sum is read. Nothing is written, and a program may be using the folder meanwhile. The exit code is
    0 if every folder is whole, and 1 if one is not; each damaged file is named in a line.
    """

    folders: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDER [FOLDER ...]")]
    """Folders to check."""

    json: Path | None = None
    """JSON file to which the same results are written."""

    def run(self) -> int:
        if not self.folders:
            raise OptionError("FOLDER", "is required")
        for folder in self.folders:
            _check_is_folder(folder)
        if self.json:
            from davae_jax.checkpoints.run_folder import model_files
            from davae_jax.data.prepared.shards import MANIFEST, SETTINGS

            prepared = [folder / name for folder in self.folders for name in (MANIFEST, SETTINGS)]
            check_output(self.json, "--json", inputs=[*model_files(*self.folders), *prepared])

        import jax

        jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerators
        from davae_jax.checkpoints.check_folder import check_folder

        reports = []
        for folder in self.folders:
            reports.append(check_folder(folder))
            print(format_report(reports[-1]), flush=True)
        if self.json:
            write_output(self.json, to_json([report._asdict() | {"folder": str(report.folder)} for report in reports]))
        return int(any(report.damaged for report in reports))


def _check_is_folder(folder: Path) -> None:
    """Raises OptionError unless a path is a folder that can be read."""
    try:
        os.listdir(folder)
    except OSError as e:
        raise OptionError("FOLDER", f"{folder}: {e.strerror}") from None


def format_report(report: Report) -> str:
    """Returns the lines that describe a folder; of a damaged one, one line for each problem."""
    lines = [f"{report.folder}: {report.kind}"]
    lines += [f"  {name}: {_words(value)}" for name, value in report.state.items()]
    lines += [f"  damaged: {problem}" for problem in report.damaged] or ["  whole"]
    return "\n".join(_printable(line) for line in lines)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _printable(line: str) -> str:
    """Returns a line in which line feeds and other control characters of names are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
