"""The commands for latents in files, `davae encode` and `davae decode`, and for lines through the latent space,
`davae traverse`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from davae_jax.cli.base import option_hint
from davae_jax.cli.text import GreedyCommand, ModelCommand, read_given, require_utf8
from davae_jax.data.inputs.encodings import UTF_8, check_encoding
from davae_jax.data.inputs.readers import find_format, iterate_texts
from davae_jax.inference.arguments import check_traversal, unit_direction
from davae_jax.parallel.config import MeshConfig
from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.files import check_output, write_output
from davae_jax.utils.progress import progress_bar

GROUP_BATCHES = 64  # batches whose texts and posteriors are in memory at once
_KEY = option_hint("NAME", "z if the file has it, otherwise mean")


@dataclass(kw_only=True)
class Encode(ModelCommand):
    """Encodes texts to their posteriors, and writes these and the texts to a file: .npz or Parquet.

    Each text has a row in `mean` and in `logvar`, float32 [n, L]. In an .npz, the texts are the lines of texts.jsonl,
    in Parquet the column `text`. docs/latents.md shows how both are read.
    """

    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], option_hint("[TEXT ...]", "none")] = ()
    """Texts. If none is given, they are read from --input or standard input."""

    input: Annotated[Path | None, option_hint("FILE", "standard input, one text per line")] = None
    """File of texts of any size, in any format that `davae prepare` reads. Each line or row is one text."""

    field: Annotated[tuple[str, ...], option_hint("FIELD ...", "text")] = ()
    """JSON field or table column that contains the text; several are joined by line feeds."""

    encoding: str = UTF_8
    """Encoding of the input, such as gb18030: any text encoding of Python."""

    output: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """File for the latents, .npz or .parquet; it appears when it is complete."""

    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))
    """Mesh of all devices that the model is sharded over. If all axes are 1, only the first device is used."""

    def run(self) -> None:
        from davae_jax.inference.generation import NotFiniteError
        from davae_jax.inference.latent_files import latent_writer
        from davae_jax.parallel.sharding import make_mesh

        self.check()
        texts, label, name = self.read()
        groups = batched(texts, self.batch_size * GROUP_BATCHES)
        first = next(groups, [])  # so that an input that cannot be read is found before the model is loaded
        mesh = None if self.mesh == MeshConfig(data=1) else make_mesh(self.mesh, self.batch_size)
        vae = self.load(mesh=mesh)
        vae.progress = False  # this command has a bar of its own
        n, has_text, latent_size = 0, False, vae.config.latent_size
        with latent_writer(self.output, latent_size) as add, progress_bar(desc="encode", unit="text") as bar:
            for group in itertools.chain([first], groups):
                vae.label = lambda i, start=n: label(start + i)
                posterior = vae.posterior(group)
                if not all(np.isfinite(values).all() for values in posterior):
                    raise NotFiniteError(vae.source)
                add(group, posterior)
                n += len(group)
                has_text = has_text or any(text.strip() for text in group)
                bar.update(len(group))
            if not has_text:
                raise InputError(f"{name}: contains no text")
        print(f"{self.output}: {n:,} texts, latents of {latent_size} dimensions")

    def check(self) -> None:
        from davae_jax.checkpoints.run_folder import model_files
        from davae_jax.inference.latent_files import check_latent_output

        super().check()
        check_encoding(self.encoding)
        if self.texts and self.input:
            raise OptionError("--input", "cannot be given together with texts")
        if self.field and (not self.input or (kind := find_format(self.input)) is None or kind.name == "text"):
            raise OptionError("--field", "needs an --input of JSON Lines (.jsonl) or a table, whose fields have names")
        for number, text in enumerate(self.texts, 1):
            require_utf8(text, f"text {number}")
        check_latent_output(self.output)
        inputs = [*([self.input] if self.input else []), *model_files(self.model, self.tokenizers)]
        check_output(self.output, inputs=inputs)

    def read(self) -> tuple[Iterable[str], Callable[[int], str], str]:
        """Returns the texts, a function that names the i-th, from 1, and the name of their source in messages."""
        if self.input:
            texts = iterate_texts(self.input, self.field or "text", check_encoding(self.encoding))
            return texts, f"{self.input}: line {{}}".format, str(self.input)
        texts, label = read_given(self.texts, None, self.encoding)
        return texts, label, "the command line" if self.texts else "standard input"


def batched(items: Iterable[str], n: int) -> Iterator[list[str]]:
    """Yields lists of the next n items; the last one may be shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, n)):
        yield batch


@dataclass(kw_only=True)
class Decode(GreedyCommand):
    """Decodes the latents of a file, such as one of `davae encode`; greedy unless a sampling option is given.

    Writes lines {"decoded"}, or {"text", "decoded"} if the file contains the texts of the latents.
    """

    texts: tyro.conf.Suppress[tuple[str, ...]] = ()
    input: tyro.conf.Suppress[Path | None] = None
    encoding: tyro.conf.Suppress[str] = UTF_8

    latents: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """File of latents, one per row: .npz, .npy or .parquet."""

    key: Annotated[str | None, _KEY] = None
    """Array of the .npz or column of the table that contains the latents."""

    def input_files(self) -> list[Path]:
        return [self.latents]

    def results(self) -> list[dict]:
        from davae_jax.inference.latent_files import read_latents

        latents, texts = read_latents(self.latents, latent_size(self.model), self.key)
        decoded = self.load().decode(latents, seed=self.seed, **self.sampling())
        if texts is None:
            return [{"decoded": text} for text in decoded]
        return [{"text": a, "decoded": b} for a, b in zip(texts, decoded, strict=True)]


@dataclass(kw_only=True)
class Traverse(GreedyCommand):
    """Decodes latents on lines through each text's posterior mean, or through the prior's mean if no text is given;
    greedy unless a sampling option is given.

    A line goes along a latent dimension (--dim) or along a direction from a file (--direction). Its latents are --step
    apart, and the text itself is in the middle. Writes lines {"text", "dim" or "direction", "offset", "decoded"}.
    """

    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], option_hint("[TEXT ...]", "the prior's mean")] = ()
    """Texts through whose posterior means the lines go."""

    input: Annotated[Path | None, option_hint("FILE", "none")] = None
    """File with one text per line, in place of texts."""

    dim: Annotated[tuple[int, ...], option_hint("INT ...", "none")] = ()
    """Latent dimensions, counted from 0, after the texts. `davae evaluate` reports which are active."""

    direction: Annotated[Path | None, option_hint("FILE", "none")] = None
    """File of directions, one per row: .npz, .npy or .parquet. Their lengths do not count."""

    key: Annotated[str | None, _KEY] = None
    """Array of the .npz or column of the table that contains the directions."""

    step: float = 1.0
    """Distance of neighbouring latents, in standard deviations of the prior."""

    each_side: int = 3
    """Number of latents on each side of the middle."""

    html: Annotated[Path | None, option_hint("FILE", "none")] = None
    """HTML file with the lines as strips of texts, a self-contained page."""

    def check(self) -> None:
        super().check()
        check_traversal(self.step, self.each_side, names=("--step", "--each-side"))
        if not self.dim and not self.direction:
            raise OptionError("--dim", "or --direction must be given")
        if self.key is not None and not self.direction:
            raise OptionError("--key", "is used only with --direction")
        if self.html:
            from davae_jax.checkpoints.run_folder import model_files

            check_output(self.html, "--html", inputs=[*self.input_files(), *model_files(self.model, self.tokenizers)])
            if self.output and self.output.resolve() == self.html.resolve():
                raise OptionError("--html", "and --output must be different files")

    def input_files(self) -> list[Path]:
        return [*super().input_files(), *([self.direction] if self.direction else [])]

    def results(self) -> list[dict]:
        from davae_jax.model.latent import traverse

        directions = self.directions(latent_size(self.model))
        texts, label = self.read() if self.texts or self.input else ([None], "text {}".format)
        vae = self.load(label)
        shape = (len(texts), vae.config.latent_size)
        means = vae.encode(texts, std_scale=0.0) if texts != [None] else np.zeros(shape, np.float32)
        # [texts, directions, steps, L]
        lines = np.array([traverse(means, unit, self.step, self.each_side) for _, unit in directions])
        latents = lines.transpose(2, 0, 1, 3).reshape(-1, shape[1])
        decoded = iter(vae.decode(latents, seed=self.seed, **self.sampling()))
        offsets = [self.step * i for i in range(-self.each_side, self.each_side + 1)]
        rows = [
            {"text": text, **name, "offset": offset, "decoded": next(decoded)}
            for text in texts
            for name, _ in directions
            for offset in offsets
        ]
        if self.html:
            from davae_jax.reports.traversal_page import page

            write_output(self.html, page(rows, len(offsets), self.model, self.direction))
        return rows

    def directions(self, latent_size: int) -> list[tuple[dict[str, int], np.ndarray]]:
        """Returns each direction's entry in the output, and the vector of length 1 along it."""
        pairs = [({"dim": dim}, unit_direction(dim, latent_size, name="--dim")) for dim in self.dim]
        if self.direction:
            from davae_jax.inference.latent_files import read_latents

            for row, vector in enumerate(read_latents(self.direction, latent_size, self.key).values, 1):
                if not vector.any():
                    raise InputError(f"{self.direction}: row {row} is 0, which is no direction")
                pairs.append(({"direction": row}, unit_direction(vector, latent_size)))
        return pairs


def latent_size(model: str) -> int:
    """Returns the latent size of a model by its config.json, so that a file is checked before weights are read."""
    from davae_jax.checkpoints.hub import resolve_source
    from davae_jax.checkpoints.run_folder import CONFIG_FILE, config_folder
    from davae_jax.model.config import DAVAEConfig

    return DAVAEConfig.from_json(config_folder(resolve_source(model)) / CONFIG_FILE).latent_size
