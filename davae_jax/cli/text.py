"""The commands that work on texts: `davae generate`, `reconstruct`, `sample`, `interpolate`, `analogy`.

They read one text per line and write JSON Lines. Texts come from the command line, from `--input`, or from standard
input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from davae_jax.cli.base import Command, option_hint
from davae_jax.data.inputs.encodings import UTF_8, check_encoding
from davae_jax.data.inputs.readers import is_plain_text
from davae_jax.data.inputs.texts import decode_lines
from davae_jax.inference.arguments import check_count, check_std_scale, check_steps, greedy_by_default
from davae_jax.model.config import SAMPLING_SETTINGS, WeightFormat, check_sampling
from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.files import check_output, read_bounded, read_stream, write_output

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jaxtyping import Array, Float

    from davae_jax.inference.text_vae import TextVAE

MAX_INPUT_BYTES = 1 << 28  # 256 MiB of texts, which are in memory with their results
_FLOAT, _INT = (option_hint(kind, "the checkpoint's") for kind in ("FLOAT", "INT"))
_GREEDY = "greedy; with another of these four, the checkpoint's"
_GREEDY_FLOAT, _GREEDY_INT = (option_hint(kind, _GREEDY) for kind in ("FLOAT", "INT"))


@dataclass(kw_only=True)
class ModelCommand(Command):
    """The base class of commands that compute with a model and its tokenizers."""

    model: str
    """Run folder, converted checkpoint, published folder, or Hugging Face repo id."""

    tokenizers: Annotated[Path | None, option_hint("DIR", "the model's folder")] = None
    """Folder with spiece.model and vocab.txt."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. On a CPU, float32 is faster."""

    weight_format: Annotated[WeightFormat, tyro.conf.arg(name="weights")] = "float32"
    """Storage of the weights. bfloat16 takes half of float32's memory and int8 a quarter; both are less exact."""

    batch_size: int = 16
    """Number of texts per batch; affects speed and memory, not results."""

    def check(self) -> None:
        """Raises OptionError for an option that is out of its range, before anything is read or loaded."""
        if self.batch_size < 1:
            raise OptionError("--batch-size", f"must be at least 1, not {self.batch_size}")

    def load(self, label: Callable[[int], str] = "text {}".format, mesh: Mesh | None = None) -> TextVAE:
        """Loads the model, over a mesh if one is given. label: names the i-th text, from 1, in its warnings."""
        from davae_jax.inference.text_vae import TextVAE

        vae = TextVAE.from_pretrained(
            self.model, tokenizers=self.tokenizers, dtype=self.dtype, weights=self.weight_format, mesh=mesh
        )
        vae.batch_size = self.batch_size
        vae.progress = True
        vae.label = label
        return vae


@dataclass(kw_only=True)
class TextCommand(ModelCommand):
    """The base class of commands that generate texts."""

    is_filter: ClassVar[bool] = True

    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], option_hint("[TEXT ...]", "none")] = ()
    """Texts. If none is given, they are read from --input or standard input, one per line."""

    input: Annotated[Path | None, option_hint("FILE", "standard input")] = None
    """File with one text per line, uncompressed; not JSON Lines or a table."""

    encoding: str = UTF_8
    """Encoding of the input, such as gb18030: any text encoding of Python."""

    output: Annotated[Path | None, option_hint("FILE", "standard output")] = None
    """JSON Lines file for the results; it appears when it is complete."""

    seed: int = 0
    """Random seed."""

    max_length: Annotated[int | None, _INT] = None
    """Maximum number of tokens per text, including the prompt."""

    temperature: Annotated[float | None, _FLOAT] = None
    """Sampling temperature: the logits are divided by it; above 0."""

    top_k: Annotated[int | None, _INT] = None
    """Sample from the k most likely tokens; 0 is off, 1 is greedy."""

    top_p: Annotated[float | None, _FLOAT] = None
    """Nucleus sampling: sample from the most likely tokens with this total probability; 0 and 1 are off."""

    repetition_penalty: Annotated[float | None, _FLOAT] = None
    """Factor by which a token's probability is divided for each earlier occurrence in the text; 1 is off."""

    def run(self) -> None:
        self.check()
        self.write(self.results())

    def results(self) -> list[dict]:
        """Computes the results. Returns a dict for each line of the output."""
        raise NotImplementedError

    def check(self) -> None:
        from davae_jax.inference.generation import check_max_length

        super().check()
        if self.max_length is not None:
            _naming_the_option(lambda: check_max_length(self.max_length))
        allowed = dict(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)  # for those that are not given
        settings = allowed | {name: value for name, value in self.sampling().items() if name in allowed}
        _naming_the_option(lambda: check_sampling(**settings))
        check_encoding(self.encoding)
        if self.texts and self.input:
            raise OptionError("--input", "cannot be given together with texts")
        if self.input and not is_plain_text(self.input):
            raise OptionError(
                "--input", f"{self.input}: needs plain text, one text per line; unpack or convert the file"
            )
        for number, text in enumerate(self.texts, 1):
            require_utf8(text, f"text {number}")
        if self.output:
            from davae_jax.checkpoints.run_folder import model_files

            check_output(self.output, inputs=[*self.input_files(), *model_files(self.model, self.tokenizers)])

    def input_files(self) -> list[Path]:
        """Returns the files of texts that are read."""
        return [self.input] if self.input else []

    def sampling(self) -> dict:
        """Returns the sampling options that are given, as keyword arguments of `TextVAE.generate`."""
        names = ("max_length", *SAMPLING_SETTINGS)
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def read(self) -> tuple[list[str], Callable[[int], str]]:
        """Returns the texts, and a function that names the i-th of them, from 1, in messages."""
        return read_given(self.texts, self.input, self.encoding)

    def read_groups(self, n: int, why: str = "") -> tuple[list[tuple[str, ...]], Callable[[int], str]]:
        """Returns groups of n texts, and a function that names the group of the i-th text in messages.

        The texts of the command line are one group. In a file each line is a group of texts separated by tabs.

        Raises:
          InputError: a group does not have n texts; `why` is appended to the number.
        """
        texts, label = self.read()
        groups = [tuple(texts)] if self.texts else [tuple(line.split("\t")) for line in texts]
        for number, group in enumerate(groups, 1):
            if len(group) != n:
                if self.texts:
                    raise InputError(f"needs {n} texts{why}, not {len(group)}", exit_code=2)
                raise InputError(f"{label(number)}: needs {n} texts separated by tabs{why}, not {len(group)}")
        return groups, (label if self.texts else lambda i: label((i - 1) // n + 1))

    def write(self, results: list[dict]) -> None:
        """Writes the results as JSON Lines to --output or standard output."""
        text = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        if self.output:
            write_output(self.output, text)
        else:
            sys.stdout.write(text)


def read_given(texts: Sequence[str], input: Path | None, encoding: str) -> tuple[list[str], Callable[[int], str]]:
    """Returns the texts of the command line, of a file of lines or of standard input.

    Returns:
      The texts, and a function that names the i-th of them, from 1, in messages.
    """
    if texts:
        return list(texts), "text {}".format
    if not input and (sys.stdin is None or sys.stdin.isatty()):
        raise OptionError("--input", "or texts must be given")
    name = str(input or "standard input")
    if input:
        data = read_bounded(input, MAX_INPUT_BYTES, pipes=True)
    else:
        data = read_stream(sys.stdin.buffer, MAX_INPUT_BYTES, name)
    return decode_lines(data, name, check_encoding(encoding)), f"{name}: line {{}}".format


def require_utf8(text: str, name: str) -> None:
    """Raises OptionError if an argument is not UTF-8, which Python represents by lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise OptionError(name, "is not UTF-8") from None


def _naming_the_option(check: Callable[[], object]) -> None:
    """Runs a check of a function's argument. If it fails, the error names the option of the same name."""
    try:
        check()
    except OptionError as e:
        raise OptionError(f"--{e.option.replace('_', '-')}", e.reason) from None


@dataclass(kw_only=True)
class Generate(TextCommand):
    """Generates a variation of each text: encodes it, samples a latent from its posterior, and decodes that.

    Writes lines {"text", "generated"}, or {"text", "prompt", "generated"} with --prompt.
    """

    prompt: Annotated[str | None, option_hint("TEXT", "none")] = None
    """Beginning of every generated text; the output does not repeat it."""

    std_scale: Annotated[float | None, _FLOAT] = None
    """Factor of the posterior's standard deviation; 0 uses the posterior mean itself."""

    def check(self) -> None:
        super().check()
        if self.std_scale is not None:
            _naming_the_option(lambda: check_std_scale(self.std_scale))
        if self.prompt is not None:
            require_utf8(self.prompt, "--prompt")

    def results(self) -> list[dict]:
        texts, label = self.read()
        vae = self.load(label)
        prompts = None if self.prompt is None else [self.prompt] * len(texts)
        if self.prompt is not None:
            try:
                vae.check([self.prompt], **self.sampling())
            except OptionError as e:
                raise OptionError("--prompt" if e.option == "prompt 1" else e.option, e.reason) from None
        latent = vae.encode(texts, seed=self.seed, std_scale=self.std_scale)
        generated = vae.generate(latent, prompts, seed=self.seed, **self.sampling())
        prompt = {} if self.prompt is None else {"prompt": self.prompt}
        return [{"text": a, **prompt, "generated": b} for a, b in zip(texts, generated, strict=True)]


@dataclass(kw_only=True)
class Sample(TextCommand):
    """Samples texts from the prior, z ~ N(0, I). Writes lines {"sample"}."""

    texts: tyro.conf.Suppress[tuple[str, ...]] = ()
    input: tyro.conf.Suppress[Path | None] = None

    n: int = 10
    """Number of texts."""

    def check(self) -> None:
        super().check()
        check_count(self.n, least=1, name="--n")

    def results(self) -> list[dict]:
        return [{"sample": text} for text in self.load().sample(self.n, seed=self.seed, **self.sampling())]


@dataclass(kw_only=True)
class GreedyCommand(TextCommand):
    """A text command that decodes greedily unless a sampling option is given."""

    temperature: Annotated[float | None, _GREEDY_FLOAT] = None
    top_k: Annotated[int | None, _GREEDY_INT] = None
    top_p: Annotated[float | None, _GREEDY_FLOAT] = None
    repetition_penalty: Annotated[float | None, _GREEDY_FLOAT] = None

    def sampling(self) -> dict:
        return greedy_by_default(super().sampling())


@dataclass(kw_only=True)
class Reconstruct(GreedyCommand):
    """Reconstructs each text from its posterior mean; greedy unless a sampling option is given.

    Writes lines {"text", "reconstruction"}.
    """

    def results(self) -> list[dict]:
        texts, label = self.read()
        reconstructions = self.load(label).reconstruct(texts, seed=self.seed, **self.sampling())
        return [{"text": a, "reconstruction": b} for a, b in zip(texts, reconstructions, strict=True)]


@dataclass(kw_only=True)
class Interpolate(GreedyCommand):
    """Interpolates between the posterior means of two texts; greedy unless a sampling option is given.

    Takes two texts, or a file whose lines contain two texts, separated by a tab.

    Writes lines {"from", "to", "weight", "text"}.
    """

    steps: int = 7
    """Number of texts, including both ends."""

    spherical: bool = False
    """Spherical interpolation, which keeps the norm of the latents, instead of linear."""

    def check(self) -> None:
        super().check()
        check_steps(self.steps, name="--steps")

    def results(self) -> list[dict]:
        from davae_jax.model import latent

        pairs, label = self.read_groups(2)
        vae = self.load(label)
        means = posterior_means(vae, pairs, 2)
        interpolate = latent.slerp if self.spherical else latent.interpolate
        latents = interpolate(means[:, 0], means[:, 1], self.steps).swapaxes(0, 1)  # [pairs, steps, L]
        texts = vae.generate(latents.reshape(-1, latents.shape[-1]), seed=self.seed, **self.sampling())
        return [
            {"from": a, "to": b, "weight": i / (self.steps - 1), "text": texts[row * self.steps + i]}
            for row, (a, b) in enumerate(pairs)
            for i in range(self.steps)
        ]


@dataclass(kw_only=True)
class Analogy(GreedyCommand):
    """Completes the analogy A is to B as C is to …: decodes mean(B) − mean(A) + mean(C); greedy unless a sampling
    option is given.

    Takes three texts, or a file whose lines contain three texts, separated by tabs.

    Writes lines {"a", "b", "c", "text"}.
    """

    def results(self) -> list[dict]:
        from davae_jax.model.latent import analogy

        triples, label = self.read_groups(3)
        vae = self.load(label)
        means = posterior_means(vae, triples, 3)
        latents = analogy(means[:, 0], means[:, 1], means[:, 2])
        texts = vae.generate(latents, seed=self.seed, **self.sampling())
        return [dict(zip("abc", abc, strict=True), text=t) for abc, t in zip(triples, texts, strict=True)]


def posterior_means(vae: TextVAE, groups: list[tuple[str, ...]], n: int) -> Float[Array, "groups n L"]:
    """Returns the posterior means of groups, perhaps none, of n texts."""
    means = vae.encode([text for group in groups for text in group], std_scale=0.0)
    return means.reshape(len(groups), n, means.shape[-1])
