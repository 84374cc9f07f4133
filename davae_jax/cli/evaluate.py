"""`davae evaluate`: evaluates a model on texts, and writes a table, JSON and an HTML report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from davae_jax.cli.base import Command, option_hint
from davae_jax.data import demo_corpus
from davae_jax.data.inputs.encodings import UTF_8, check_encoding
from davae_jax.data.inputs.line_readers import DECOMPRESSORS, is_json_array
from davae_jax.data.inputs.readers import find_format, parse_texts, read_lines, read_texts
from davae_jax.data.inputs.texts import parse_json_text
from davae_jax.evaluation.table import format_table
from davae_jax.parallel.config import MeshConfig
from davae_jax.utils.errors import InputError, OptionError, check_options
from davae_jax.utils.files import check_output, to_json, write_output
from davae_jax.utils.json_files import read_json_object
from davae_jax.utils.progress import progress_bar

MAX_SAMPLES = 1_000_000  # the tables of all samples of a batch are in memory


@dataclass(kw_only=True)
class Evaluate(Command):
    """Evaluates a model: reconstruction, likelihood, use of the latent, samples, interpolations.

    Prints a table. The table and the files include warnings about metrics that are unreliable because there are too few
    texts or samples. docs/evaluate.md defines the metrics and their limits.
    """

    model: str
    """Run folder, converted checkpoint, published folder, or Hugging Face repo id."""

    data: Annotated[Path | None, option_hint("FILE", "for a demo run, its held-out texts")] = None
    """Texts that were not used for training: a file with one text per line, or any that `davae prepare` reads."""

    field: Annotated[tuple[str, ...], option_hint("FIELD ...", "text")] = ()
    """JSON field or table column that contains the text; several are joined by line feeds."""

    encoding: str = UTF_8
    """Encoding of the texts, such as gb18030: any text encoding of Python."""

    label: Annotated[tuple[str, ...], option_hint("FIELD", "none; for a demo run, all factors")] = ()
    """JSON fields with class labels, used for linear probes and to colour the report's projections."""

    n: int = 1000
    """Maximum number of texts; the first texts of the file are used."""

    samples: int = 50
    """Number of importance samples per text (K)."""

    json: Annotated[Path | None, option_hint("FILE", "none")] = None
    """Output file for the metrics."""

    html: Annotated[Path | None, option_hint("FILE", "none")] = None
    """Output file for the report, a self-contained page."""

    tokenizers: Annotated[Path | None, option_hint("DIR", "the model's folder")] = None
    """Folder with spiece.model and vocab.txt."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""

    batch_size: int = 64
    """Number of texts per batch; affects speed and memory, not results."""

    seed: int = 0
    """Random seed."""

    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))
    """Mesh of all devices that the model is sharded over. If all axes are 1, only the first device is used."""

    def run(self) -> None:
        from davae_jax.checkpoints.run_folder import model_files
        from davae_jax.evaluation.evaluate import as_json, evaluate
        from davae_jax.inference.text_vae import TextVAE
        from davae_jax.parallel.sharding import make_mesh
        from davae_jax.reports.report import report

        check_options(self, "", "n samples batch_size", lambda n: n >= 1, "be at least 1")
        check_options(self, "", "samples", lambda n: n <= MAX_SAMPLES, f"be at most {MAX_SAMPLES}")
        inputs = [*([self.data] if self.data else []), *model_files(self.model, self.tokenizers)]
        for path, option in ((self.json, "--json"), (self.html, "--html")):
            if path:
                check_output(path, option, inputs=inputs)
        if self.json and self.html and self.json.resolve() == self.html.resolve():
            raise OptionError("--json", "and --html must be different files")
        encoding = check_encoding(self.encoding)
        if self.data:
            data = read_data(self.data, self.field, self.label, encoding)
        else:
            data = demo_texts(Path(self.model), self.label)
        mesh = None if self.mesh == MeshConfig(data=1) else make_mesh(self.mesh, self.batch_size)
        vae = TextVAE.from_pretrained(self.model, tokenizers=self.tokenizers, dtype=self.dtype, mesh=mesh)
        vae.batch_size, vae.progress = self.batch_size, True
        evaluation = evaluate(
            vae,
            data.texts[: self.n],
            samples=self.samples,
            seed=self.seed,
            labels={name: values[: self.n] for name, values in data.labels.items()},
            language=data.language,
            source=data.source,
        )
        measures = {"model": self.model, "data": data.source, "of": len(data.texts), **evaluation.measures}
        print(format_table(measures))
        if self.json:
            write_output(self.json, to_json(as_json(measures)))
        if self.html:
            with progress_bar(total=1, desc="report", unit="page", disable=not vae.progress) as bar:
                write_output(self.html, report(evaluation._replace(measures=measures), Path(self.model)))
                bar.update()


class Data(NamedTuple):
    """Holds the texts to evaluate on."""

    texts: list[str]
    labels: dict[str, Sequence[str]]  # factor → the class of each text
    language: Container[str] | None  # the set of valid texts; None if unknown
    source: str  # name of the texts in messages


def read_data(path: Path, fields: Sequence[str], labels: Sequence[str], encoding: str = UTF_8) -> Data:
    """Reads the texts of a file, and the labels from JSON Lines.

    Raises:
      InputError: a line is invalid; the message names the file and the line.
      OptionError: a field or label is given, but the file is not JSON Lines.
    """
    input_format = find_format(path)
    if fields and (input_format is None or input_format.name == "text"):
        raise OptionError("--field", f"needs JSON Lines (.jsonl) or a table; {path} has no fields")
    is_json = input_format is not None and input_format.name == "json" and path.suffix.lower() not in DECOMPRESSORS
    if labels and (not is_json or is_json_array(path, encoding)):
        raise OptionError("--label", f"needs uncompressed JSON Lines (.jsonl), not {path}")
    lines = read_lines(path, encoding) if labels else []  # a pipe can be read once
    texts = parse_texts(path, lines, fields or "text") if labels else read_texts(path, fields or "text", encoding)
    classes = {
        name: [read_label(line, name, f"{path}: line {i}") for i, line in enumerate(lines, 1)] for name in labels
    }
    return Data(texts, classes, None, str(path))


def read_label(line: str, field: str, location: str) -> str:
    """Reads the class of a text from a field of a JSON line: a string, integer or boolean. "" for a blank line.

    Raises:
      InputError: the field is missing or has another type; `location` names the line in the message.
    """
    if not line.strip():
        return ""
    values = json.loads(line)
    if field not in values:
        raise InputError(f"{location}: has no field {field!r}")
    if not isinstance(values[field], str | int):
        raise InputError(f"{location}: the field {field!r} must be a string, an integer, true or false to be a class")
    if not isinstance(values[field], str):
        return str(values[field])
    try:
        return parse_json_text(line, [field])
    except ValueError as e:
        raise InputError(f"{location}: {e}") from None


def demo_texts(run: Path, labels: Sequence[str]) -> Data:
    """Returns the held-out texts of the demo and their factors.

    Raises:
      OptionError: `run` is not a run of the demo or one of its checkpoints, or a label is not one of its factors.
    """
    from davae_jax.checkpoints.run_folder import config_folder

    try:
        is_demo_run = read_json_object(config_folder(run) / "train.json")["data"]["train"] is None
    except (OSError, ValueError, KeyError, TypeError):
        is_demo_run = False
    if not is_demo_run:
        raise OptionError("--data", f"is required: {run} is not a run of the demo preset")
    factor_names = demo_corpus.Factors._fields
    if unknown := [name for name in labels if name not in factor_names]:
        raise OptionError("--label", f"{unknown[0]}: unknown factor of the demo; available: {', '.join(factor_names)}")
    corpus = demo_corpus.make_corpus()
    factors = [corpus.factors[text]._asdict() for text in corpus.held_out]
    for factor in factors:
        factor["good"] = "good" if factor["good"] else "bad"
    classes = {name: [factor[name] for factor in factors] for name in labels or factor_names}
    return Data(corpus.held_out, classes, corpus.factors, "the demo's held-out texts")
