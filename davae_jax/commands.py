"""The commands that work on texts: `davae generate`, `reconstruct`, `sample`, `interpolate`, `analogy`.

One text a line in, JSON Lines out. Texts come from the command line, from `--input`, or from standard input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro
from jaxtyping import Array, Float

from davae_jax.cli import Command
from davae_jax.errors import InputError
from davae_jax.latent import analogy, interpolate
from davae_jax.text import GREEDY, TextVAE


def _option(metavar: str, default: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


_FLOAT, _INT = (_option(kind, "the checkpoint's") for kind in ("FLOAT", "INT"))


@dataclass(kw_only=True)
class _TextCommand(Command):
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], _option("[TEXT ...]", "none")] = ()
    """Texts; without any, one a line from --input or standard input."""

    model: str
    """Converted checkpoint, published folder, or Hugging Face repo id."""

    tokenizers: Annotated[Path | None, _option("DIR", "the model's folder")] = None
    """Folder with spiece.model and vocab.txt."""

    input: Annotated[Path | None, _option("FILE", "standard input")] = None
    """File of texts, UTF-8, one a line."""

    output: Annotated[Path | None, _option("FILE", "standard output")] = None
    """File for the results, JSON Lines. It appears when all is done."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What to compute in. On a CPU, float32 is the fast one."""

    batch_size: int = 16
    """Texts worked on at once; changes speed and memory, not results."""

    seed: int = 0
    """Seed of every draw."""

    max_length: Annotated[int | None, _INT] = None
    """Tokens of a text at most, prompt included."""

    temperature: Annotated[float | None, _FLOAT] = None
    """Divides the logits; above 0."""

    top_k: Annotated[int | None, _INT] = None
    """Draw from the k most likely tokens; 0 is off, 1 is greedy."""

    top_p: Annotated[float | None, _FLOAT] = None
    """Draw from the most likely tokens that hold this mass; 0 and 1 are off."""

    repetition_penalty: Annotated[float | None, _FLOAT] = None
    """Divides a token's probability once for each time it stands in the text already; 1 is off."""

    def sampling(self) -> dict:
        names = ("max_length", "temperature", "top_k", "top_p", "repetition_penalty")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def load(self) -> TextVAE:
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, not {self.batch_size}", exit_code=2)
        vae = TextVAE.from_pretrained(self.model, tokenizers=self.tokenizers, dtype=jnp.dtype(self.dtype))
        vae.batch_size = self.batch_size
        vae.progress = sys.stderr.isatty()
        vae._check_sampling(None, **self.sampling())
        return vae

    def read(self) -> tuple[list[str], Callable[[int], str]]:
        """The texts, and how a message names the i-th of them, from 1."""
        if self.texts:
            if self.input:
                raise InputError("give texts or --input, not both", exit_code=2)
            return list(self.texts), "text {}".format
        if not self.input and sys.stdin.isatty():
            raise InputError("no text given: name some, or give --input FILE", exit_code=2)
        name = str(self.input or "standard input")
        data = self.input.read_bytes() if self.input else sys.stdin.buffer.read()
        return read_lines(data, name), f"{name}: line {{}}".format

    def columns(self, n: int) -> tuple[list[tuple[str, ...]], Callable[[int], str]]:
        """Groups of n texts: those on the command line are one group; in a file, tabs part the texts of each line."""
        texts, label = self.read()
        groups = [tuple(texts)] if self.texts else [tuple(line.split("\t")) for line in texts]
        for number, group in enumerate(groups, 1):
            if len(group) != n:
                where = "" if self.texts else f"{label(number)}: "
                raise InputError(
                    f"{where}needs {n} texts{'' if self.texts else ' with tabs between'}, not {len(group)}"
                )
        return groups, (label if self.texts else lambda i: label((i - 1) // n + 1))

    def write(self, results: list[dict]) -> None:
        text = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        if not self.output:
            sys.stdout.write(text)
            return
        beside = self.output.with_name(f".{self.output.name}.{os.getpid()}.partial")
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(self.output)
        finally:
            beside.unlink(missing_ok=True)


def read_lines(data: bytes, name: str) -> list[str]:
    """The lines of UTF-8 bytes, split at line feeds alone. Raises InputError naming a line that is not UTF-8."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"{name}: line {number} is not UTF-8") from None
    return texts


@dataclass(kw_only=True)
class Generate(_TextCommand):
    """Variations of each text: encode it, draw a latent near it, generate from that.

    Writes {"text", "generated"} a line, or {"text", "prompt", "generated"} with --prompt.
    """

    prompt: Annotated[str | None, _option("TEXT", "none")] = None
    """How every generated text begins; it is not repeated in the output."""

    std_scale: Annotated[float | None, _FLOAT] = None
    """Width of the draw around a text's mean; 0 is the mean itself."""

    def run(self) -> None:
        texts, label = self.read()
        vae = self.load()
        vae.label = label
        prompts = None if self.prompt is None else [self.prompt] * len(texts)
        if prompts:
            vae._check_sampling(vae.prompt_ids(prompts[:1]), **self.sampling())
        latent = vae.encode(texts, seed=self.seed, std_scale=self.std_scale)
        generated = vae.generate(latent, prompts, seed=self.seed, **self.sampling())
        prompt = {} if self.prompt is None else {"prompt": self.prompt}
        self.write([{"text": a, **prompt, "generated": b} for a, b in zip(texts, generated, strict=True)])


@dataclass(kw_only=True)
class Reconstruct(_TextCommand):
    """Each text through its posterior mean and back; greedy unless told otherwise.

    Writes {"text", "reconstruction"} a line.
    """

    def run(self) -> None:
        texts, label = self.read()
        vae = self.load()
        vae.label = label
        reconstructions = vae.reconstruct(texts, seed=self.seed, **self.sampling())
        self.write([{"text": a, "reconstruction": b} for a, b in zip(texts, reconstructions, strict=True)])


@dataclass(kw_only=True)
class Sample(_TextCommand):
    """Texts from the prior, z ~ N(0, I). Writes {"sample"} a line."""

    texts: tyro.conf.Suppress[tuple[str, ...]] = ()
    input: tyro.conf.Suppress[Path | None] = None

    n: int = 10
    """How many."""

    def run(self) -> None:
        if self.n < 1:
            raise InputError(f"--n must be at least 1, not {self.n}", exit_code=2)
        self.write([{"sample": text} for text in self.load().sample(self.n, seed=self.seed, **self.sampling())])


@dataclass(kw_only=True)
class Interpolate(_TextCommand):
    """Texts on the straight line between the posterior means of two texts; greedy unless told otherwise.

    Takes two texts, or a file whose lines hold two texts with a tab between them. Writes {"from", "to", "weight",
    "text"} a line.
    """

    steps: int = 7
    """Texts on the line, both ends included."""

    def run(self) -> None:
        pairs, label = self.columns(2)
        if self.steps < 2:
            raise InputError(f"--steps must be at least 2 (both ends), not {self.steps}", exit_code=2)
        vae = self.load()
        means = means_of(vae, pairs, label)
        latents = interpolate(means[:, 0], means[:, 1], self.steps).swapaxes(0, 1)  # [pairs, steps, L]
        texts = vae.generate(latents.reshape(-1, latents.shape[-1]), seed=self.seed, **(GREEDY | self.sampling()))
        self.write(
            [
                {"from": a, "to": b, "weight": i / (self.steps - 1), "text": texts[row * self.steps + i]}
                for row, (a, b) in enumerate(pairs)
                for i in range(self.steps)
            ]
        )


@dataclass(kw_only=True)
class Analogy(_TextCommand):
    """What is to C as B is to A: the text of mean(B) − mean(A) + mean(C); greedy unless told otherwise.

    Takes three texts, or a file whose lines hold three texts with tabs between them. Writes {"a", "b", "c", "text"} a
    line.
    """

    def run(self) -> None:
        triples, label = self.columns(3)
        vae = self.load()
        means = means_of(vae, triples, label)
        latents = analogy(means[:, 0], means[:, 1], means[:, 2])
        texts = vae.generate(latents, seed=self.seed, **(GREEDY | self.sampling()))
        self.write([dict(zip("abc", abc, strict=True), text=t) for abc, t in zip(triples, texts, strict=True)])


def means_of(vae: TextVAE, groups: list[tuple[str, ...]], label: Callable[[int], str]) -> Float[Array, "groups n L"]:
    """Posterior means of groups of n texts."""
    vae.label = label
    means = vae.encode([text for group in groups for text in group], std_scale=0.0)
    return means.reshape(len(groups), -1, means.shape[-1])
