"""`davae evaluate`: measures a model over texts; a table, JSON, and a report to look at."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
import tyro
from tqdm import tqdm

from davae_jax.cli.base import Command
from davae_jax.cli.text import check_output, write_whole
from davae_jax.data import demo_corpus
from davae_jax.data.texts import json_text, read_lines, read_texts
from davae_jax.evaluation.evaluate import as_json, evaluate
from davae_jax.evaluation.table import format_table
from davae_jax.inference.text_vae import TextVAE
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_mesh
from davae_jax.reports.report import report
from davae_jax.utils.errors import InputError, check_options


def _option(metavar: str, default: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(kw_only=True)
class Evaluate(Command):
    """What a model is worth: reconstruction, likelihood, use of the latent, samples, interpolations.

    Prints a table. Figures over too few texts or samples to mean anything come with a warning, in the table and in the
    files. docs/evaluate.md says what each is and what it cannot tell.
    """

    model: str
    """Run folder, converted checkpoint, published folder, or Hugging Face repo id."""

    data: Annotated[Path | None, _option("FILE", "of a run of the demo, its held-out texts")] = None
    """Texts that training has not shown, UTF-8, one a line; or JSON Lines (.jsonl, .json)."""

    field: Annotated[str | None, _option("FIELD", "text")] = None
    """Where a text stands in a line of JSON."""

    label: Annotated[tuple[str, ...], _option("FIELD", "none; of the demo, its factors")] = ()
    """Fields of the same lines that say what kind a text is: the report colours by them, and they are probed for."""

    n: int = 1000
    """Texts at most, the first ones of the file."""

    samples: int = 50
    """K, draws of the latent a text for the likelihood."""

    json: Annotated[Path | None, _option("FILE", "none")] = None
    """File for the figures."""

    html: Annotated[Path | None, _option("FILE", "none")] = None
    """File for the report: one page that needs no other file."""

    tokenizers: Annotated[Path | None, _option("DIR", "the model's folder")] = None
    """Folder with spiece.model and vocab.txt."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What to compute in."""

    batch_size: int = 64
    """Texts worked on at once; changes speed and memory, not results."""

    seed: int = 0
    """Seed of every draw."""

    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))
    """How the model lies over all devices; with 1 everywhere, on the first alone."""

    def run(self) -> None:
        check_options(self, "", "n samples batch_size", lambda n: n >= 1, "be at least 1")
        for path, option in ((self.json, "--json"), (self.html, "--html")):
            if path:
                check_output(path, option)
        if self.json and self.html and self.json.resolve() == self.html.resolve():
            raise InputError("--json and --html name the same file", exit_code=2)
        data = read_data(self.data, self.field, self.label) if self.data else demo_texts(Path(self.model), self.label)
        mesh = None if self.mesh == MeshConfig(data=1) else make_mesh(self.mesh, self.batch_size)
        vae = TextVAE.from_pretrained(self.model, tokenizers=self.tokenizers, dtype=jnp.dtype(self.dtype), mesh=mesh)
        vae.batch_size, vae.progress = self.batch_size, sys.stderr.isatty()
        found = evaluate(
            vae,
            data.texts[: self.n],
            samples=self.samples,
            seed=self.seed,
            labels={name: values[: self.n] for name, values in data.labels.items()},
            language=data.language,
            source=data.source,
        )
        measures = {"model": self.model, "data": data.source, "of": len(data.texts), **found.measures}
        print(format_table(measures))
        if self.json:
            write_whole(self.json, json.dumps(as_json(measures), indent=2, ensure_ascii=False) + "\n")
        if self.html:
            with tqdm(total=1, desc="report", unit="page", disable=not vae.progress) as bar:
                write_whole(self.html, report(found._replace(measures=measures), Path(self.model)))
                bar.update()


class Data(NamedTuple):
    texts: list[str]
    labels: dict[str, Sequence[str]]
    language: Container[str] | None
    source: str


def read_data(path: Path, field: str | None, labels: Sequence[str]) -> Data:
    """Texts of a file, and of JSON Lines their labels. Raises InputError naming the file and the line."""
    for option, given in (("--field", field is not None), ("--label", labels)):
        if given and path.suffix not in (".jsonl", ".json"):
            raise InputError(f"{option}: {path} has no fields; give JSON Lines (.jsonl)", exit_code=2)
    texts = read_texts(path, field or "text")
    lines = read_lines(path.read_bytes(), str(path)) if labels else []
    read = {name: [label_of(line, name, f"{path}: line {i}") for i, line in enumerate(lines, 1)] for name in labels}
    return Data(texts, read, None, str(path))


def label_of(line: str, field: str, where: str) -> str:
    """A field of a line of JSON as a class: a text, a whole number, true or false. Of a blank line, none."""
    if not line.strip():
        return ""
    values = json.loads(line)
    if field not in values:
        raise InputError(f"{where} has no field {field!r}")
    if not isinstance(values[field], str | int):
        raise InputError(
            f"{where}: the field {field!r} is no class, but a text, a whole number, true or false can be one"
        )
    if not isinstance(values[field], str):
        return str(values[field])
    try:
        return json_text(line, field)
    except ValueError as e:
        raise InputError(f"{where}{e}") from None


def demo_texts(run: Path, labels: Sequence[str]) -> Data:
    """The texts that the demo holds out, and their factors. Raises InputError where the folder is not such a run's."""
    try:
        of_demo = json.loads((run / "train.json").read_text(encoding="utf-8"))["data"]["train"] is None
    except (OSError, ValueError, KeyError, TypeError):
        of_demo = False
    if not of_demo:
        raise InputError(
            f"--data: give a file of texts; {run} is no run of the demo, which has texts of its own", exit_code=2
        )
    known = demo_corpus.Factors._fields
    if unknown := [name for name in labels if name not in known]:
        raise InputError(f"--label {unknown[0]}: the demo's factors are {', '.join(known)}", exit_code=2)
    corpus = demo_corpus.make_corpus()
    factors = [corpus.factors[text]._asdict() for text in corpus.held_out]
    for factor in factors:
        factor["good"] = "good" if factor["good"] else "bad"
    found = {name: [factor[name] for factor in factors] for name in labels or known}
    return Data(corpus.held_out, found, corpus.factors, "the demo's held-out texts")
