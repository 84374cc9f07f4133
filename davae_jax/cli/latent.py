"""The commands for moving in the latent space: `davae attribute`, `neighbours`, `combine`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from davae_jax.cli.text import GreedyCommand, posterior_means
from davae_jax.data.inputs.encodings import check_encoding
from davae_jax.data.inputs.readers import read_texts
from davae_jax.inference.arguments import check_count, check_radius
from davae_jax.utils.errors import OptionError


@dataclass(kw_only=True)
class Attribute(GreedyCommand):
    """Strengthens or weakens an attribute of texts, given examples with and without it; greedy unless a sampling option
    is given.

    The attribute vector is the mean of the examples with the attribute minus the mean of those without it. It is added
    to each text's posterior mean with each strength. Writes lines {"text", "strength", "generated"}.
    """

    having: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """File of texts with the attribute, in any format that `davae prepare` reads."""

    lacking: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """File of texts without the attribute."""

    strength: tuple[float, ...] = (1.0,)
    """One or several factors of the attribute vector, after the texts; negative factors weaken the attribute."""

    def check(self) -> None:
        super().check()
        check_numbers(self.strength, "--strength")

    def input_files(self) -> list[Path]:
        return [*super().input_files(), self.having, self.lacking]

    def results(self) -> list[dict]:
        having, lacking = (
            [text for text in read_texts(file, encoding=check_encoding(self.encoding)) if text.strip()]
            for file in (self.having, self.lacking)
        )
        texts, label = self.read()
        vae = self.load("example {}".format)
        direction = vae.attribute_vector(having, lacking)
        vae.label = label
        means = vae.encode(texts, std_scale=0.0)
        latents = means[:, None] + np.array(self.strength)[:, None] * direction  # [texts, strengths, L]
        generated = iter(vae.generate(latents.reshape(-1, means.shape[1]), seed=self.seed, **self.sampling()))
        return [{"text": t, "strength": s, "generated": next(generated)} for t in texts for s in self.strength]


@dataclass(kw_only=True)
class Neighbours(GreedyCommand):
    """Decodes latents around each text, at a distance from its posterior mean in random directions; greedy unless a
    sampling option is given.

    For scale: samples of the prior are about √(latent size) away from the origin.

    Writes lines {"text", "radius", "generated"}.
    """

    radius: float = 1.0
    """Distance from the text's posterior mean."""

    n: int = 5
    """Number of neighbours of each text."""

    def check(self) -> None:
        super().check()
        check_radius(self.radius, name="--radius")
        check_count(self.n, least=1, name="--n")

    def results(self) -> list[dict]:
        texts, label = self.read()
        vae = self.load(label)
        means = vae.encode(texts, std_scale=0.0)
        around = vae.around(means, self.n, self.radius, seed=self.seed)
        generated = iter(vae.generate(around, seed=self.seed, **self.sampling()))
        return [{"text": t, "radius": self.radius, "generated": next(generated)} for t in texts for _ in range(self.n)]


@dataclass(kw_only=True)
class Combine(GreedyCommand):
    """Adds and subtracts texts: decodes Σ weight · posterior mean; greedy unless a sampling option is given.

    Takes as many texts as weights, or a file whose lines contain that many texts, separated by tabs.

    Writes lines {"texts", "weights", "text"}.
    """

    weight_format: tyro.conf.Suppress[Literal["float32"]] = "float32"  # --weights are those of the texts

    weights: tuple[float, ...]
    """A weight for each text, after the texts: 0.5 0.5 is the midpoint of two texts, -1 1 1 is an analogy."""

    def check(self) -> None:
        super().check()
        check_numbers(self.weights, "--weights")

    def results(self) -> list[dict]:
        from davae_jax.model.latent import combine

        groups, label = self.read_groups(len(self.weights), why=", one per weight")
        vae = self.load(label)
        means = posterior_means(vae, groups, len(self.weights)).swapaxes(0, 1)  # [n, groups, L]
        generated = vae.generate(combine(means, self.weights), seed=self.seed, **self.sampling())
        return [
            {"texts": list(group), "weights": list(self.weights), "text": text}
            for group, text in zip(groups, generated, strict=True)
        ]


def check_numbers(numbers: tuple[float, ...], name: str) -> None:
    """Raises OptionError if there are no numbers, or if one of them is not finite in float32."""
    given = " ".join(map(str, numbers)) or "nothing"
    if not numbers or not all(map(np.isfinite, numbers)):
        raise OptionError(name, f"must be finite numbers, not {given}")
    if max(map(abs, numbers)) > float(np.finfo(np.float32).max):
        raise OptionError(name, f"must be finite in float32, not {given}")
