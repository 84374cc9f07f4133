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

from davae_jax.cli.base import Command
from davae_jax.data.texts import decode_lines
from davae_jax.inference.generation import check_max_length, sampling_settings
from davae_jax.inference.text_vae import TextVAE, check_std_scale, check_steps, greedy_by_default
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.latent import analogy, interpolate, slerp
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import write_text


def _option(metavar: str, default: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


_FLOAT, _INT = (_option(kind, "the checkpoint's") for kind in ("FLOAT", "INT"))
_GREEDY = "greedy; with another of these four, the checkpoint's"
_GREEDY_FLOAT, _GREEDY_INT = (_option(kind, _GREEDY) for kind in ("FLOAT", "INT"))


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

    def run(self) -> None:
        self.check()
        self.write(self.results())

    def results(self) -> list[dict]:
        """Does the work: one dict a line of output."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises InputError on an option that cannot be, before anything is read or loaded."""
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, not {self.batch_size}", exit_code=2)
        if self.max_length is not None:
            _as_option(lambda: check_max_length(self.max_length))
        settings = {name: value for name, value in self.sampling().items() if name != "max_length"}
        _as_option(lambda: sampling_settings(DAVAEConfig(), **settings))
        if self.texts and self.input:
            raise InputError("give texts or --input, not both", exit_code=2)
        for number, text in enumerate(self.texts, 1):
            _require_utf8(text, f"text {number}")
        if self.output:
            check_output(self.output)

    def sampling(self) -> dict:
        names = ("max_length", "temperature", "top_k", "top_p", "repetition_penalty")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def load(self, label: Callable[[int], str] = "text {}".format) -> TextVAE:
        """The model; `label` names the i-th text in its warnings."""
        vae = TextVAE.from_pretrained(self.model, tokenizers=self.tokenizers, dtype=jnp.dtype(self.dtype))
        vae.batch_size = self.batch_size
        vae.progress = sys.stderr.isatty()
        vae.label = label
        return vae

    def read(self) -> tuple[list[str], Callable[[int], str]]:
        """The texts, and how a message names the i-th of them, from 1."""
        if self.texts:
            return list(self.texts), "text {}".format
        if not self.input and (sys.stdin is None or sys.stdin.isatty()):
            raise InputError("no text given: name some, or give --input FILE", exit_code=2)
        name = str(self.input or "standard input")
        data = self.input.read_bytes() if self.input else sys.stdin.buffer.read()
        return decode_lines(data, name), f"{name}: line {{}}".format

    def columns(self, n: int, why: str = "") -> tuple[list[tuple[str, ...]], Callable[[int], str]]:
        """Groups of n texts: those on the command line are one group; in a file, tabs part the texts of each line."""
        texts, label = self.read()
        groups = [tuple(texts)] if self.texts else [tuple(line.split("\t")) for line in texts]
        for number, group in enumerate(groups, 1):
            if len(group) != n:
                if self.texts:
                    raise InputError(f"needs {n} texts{why}, not {len(group)}", exit_code=2)
                raise InputError(f"{label(number)}: needs {n} texts with tabs between{why}, not {len(group)}")
        return groups, (label if self.texts else lambda i: label((i - 1) // n + 1))

    def write(self, results: list[dict]) -> None:
        text = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        if self.output:
            write_whole(self.output, text)
        else:
            sys.stdout.write(text)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears complete or not at all. Raises InputError naming it where it cannot be written."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device, /dev/stdout say, is written to, never replaced
            path.write_text(text, encoding="utf-8")
            return
        write_text(path.resolve(), text)  # of a link, the file that it points to
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror})") from e


def check_output(path: Path, option: str = "--output") -> None:
    """Raises InputError where a file will not go, so that this is not found out after hours of work."""
    folder = path.resolve().parent
    is_special = path.exists() and not path.is_file()
    if path.is_dir():
        raise InputError(f"{path}: is a folder; {option} needs a file")
    if not folder.is_dir():
        raise InputError(f"{path}: cannot be written (no folder {folder})")
    if not os.access(path if is_special else folder, os.W_OK):
        raise InputError(f"{path}: cannot be written (Permission denied)")


def _require_utf8(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8 reach Python as lone surrogates
        raise InputError(f"{what} is not UTF-8", exit_code=2) from None


def _as_option(check: Callable[[], object]) -> None:
    """Runs a check whose message begins with a setting's name, and has it name the option instead."""
    try:
        check()
    except InputError as e:
        name, rest = str(e).split(" ", 1)
        raise InputError(f"--{name.replace('_', '-')} {rest}", exit_code=2) from None


@dataclass(kw_only=True)
class Generate(_TextCommand):
    """Variations of each text: encode it, draw a latent near it, generate from that.

    Writes {"text", "generated"} a line, or {"text", "prompt", "generated"} with --prompt.
    """

    prompt: Annotated[str | None, _option("TEXT", "none")] = None
    """How every generated text begins; it is not repeated in the output."""

    std_scale: Annotated[float | None, _FLOAT] = None
    """Width of the draw around a text's mean; 0 is the mean itself."""

    def check(self) -> None:
        super().check()
        if self.std_scale is not None:
            _as_option(lambda: check_std_scale(self.std_scale))
        if self.prompt is not None:
            _require_utf8(self.prompt, "--prompt")

    def results(self) -> list[dict]:
        texts, label = self.read()
        vae = self.load(label)
        prompts = None if self.prompt is None else [self.prompt] * len(texts)
        if self.prompt is not None:
            try:
                vae.check([self.prompt], **self.sampling())
            except InputError as e:
                raise InputError(str(e).replace("prompt 1", "--prompt", 1), exit_code=2) from None
        latent = vae.encode(texts, seed=self.seed, std_scale=self.std_scale)
        generated = vae.generate(latent, prompts, seed=self.seed, **self.sampling())
        prompt = {} if self.prompt is None else {"prompt": self.prompt}
        return [{"text": a, **prompt, "generated": b} for a, b in zip(texts, generated, strict=True)]


@dataclass(kw_only=True)
class Sample(_TextCommand):
    """Texts from the prior, z ~ N(0, I). Writes {"sample"} a line."""

    texts: tyro.conf.Suppress[tuple[str, ...]] = ()
    input: tyro.conf.Suppress[Path | None] = None

    n: int = 10
    """How many."""

    def check(self) -> None:
        super().check()
        if self.n < 1:
            raise InputError(f"--n must be at least 1, not {self.n}", exit_code=2)

    def results(self) -> list[dict]:
        return [{"sample": text} for text in self.load().sample(self.n, seed=self.seed, **self.sampling())]


@dataclass(kw_only=True)
class GreedyCommand(_TextCommand):
    """A text command that is greedy unless an option says how to draw."""

    temperature: Annotated[float | None, _GREEDY_FLOAT] = None
    top_k: Annotated[int | None, _GREEDY_INT] = None
    top_p: Annotated[float | None, _GREEDY_FLOAT] = None
    repetition_penalty: Annotated[float | None, _GREEDY_FLOAT] = None

    def sampling(self) -> dict:
        return greedy_by_default(super().sampling())


@dataclass(kw_only=True)
class Reconstruct(GreedyCommand):
    """Each text through its posterior mean and back; greedy unless an option says how to draw.

    Writes {"text", "reconstruction"} a line.
    """

    def results(self) -> list[dict]:
        texts, label = self.read()
        reconstructions = self.load(label).reconstruct(texts, seed=self.seed, **self.sampling())
        return [{"text": a, "reconstruction": b} for a, b in zip(texts, reconstructions, strict=True)]


@dataclass(kw_only=True)
class Interpolate(GreedyCommand):
    """Texts on the line between the posterior means of two texts; greedy unless an option says how to draw.

    Takes two texts, or a file whose lines hold two texts with a tab between them. Writes {"from", "to", "weight",
    "text"} a line.
    """

    steps: int = 7
    """Texts on the line, both ends included."""

    spherical: bool = False
    """Go along the great arc around the origin, which keeps the latents' length, not along the straight line."""

    def check(self) -> None:
        super().check()
        check_steps(self.steps, name="--steps")

    def results(self) -> list[dict]:
        pairs, label = self.columns(2)
        vae = self.load(label)
        means = means_of(vae, pairs)
        along = slerp if self.spherical else interpolate
        latents = along(means[:, 0], means[:, 1], self.steps).swapaxes(0, 1)  # [pairs, steps, L]
        texts = vae.generate(latents.reshape(-1, latents.shape[-1]), seed=self.seed, **self.sampling())
        return [
            {"from": a, "to": b, "weight": i / (self.steps - 1), "text": texts[row * self.steps + i]}
            for row, (a, b) in enumerate(pairs)
            for i in range(self.steps)
        ]


@dataclass(kw_only=True)
class Analogy(GreedyCommand):
    """What is to C as B is to A: the text of mean(B) − mean(A) + mean(C); greedy unless an option says how to draw.

    Takes three texts, or a file whose lines hold three texts with tabs between them. Writes {"a", "b", "c", "text"} a
    line.
    """

    def results(self) -> list[dict]:
        triples, label = self.columns(3)
        vae = self.load(label)
        means = means_of(vae, triples)
        latents = analogy(means[:, 0], means[:, 1], means[:, 2])
        texts = vae.generate(latents, seed=self.seed, **self.sampling())
        return [dict(zip("abc", abc, strict=True), text=t) for abc, t in zip(triples, texts, strict=True)]


def means_of(vae: TextVAE, groups: list[tuple[str, ...]]) -> Float[Array, "groups n L"]:
    """Posterior means of groups of n texts."""
    means = vae.encode([text for group in groups for text in group], std_scale=0.0)
    return means.reshape(len(groups), -1, means.shape[-1])
