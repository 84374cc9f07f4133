"""Walking in the latent space from the command line: `davae attribute`, `neighbours`, `combine`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from davae_jax.cli.text import GreedyCommand
from davae_jax.data.texts import read_texts
from davae_jax.inference.text_vae import check_radius
from davae_jax.model.latent import combine
from davae_jax.utils.errors import OptionError


@dataclass(kw_only=True)
class Attribute(GreedyCommand):
    """Texts with more or less of an attribute, which two files of examples show; greedy unless an option says how to
    draw.

    The mean of the examples that have it, less the mean of those that lack it, is added to each text's posterior mean
    with each strength. Writes {"text", "strength", "generated"} a line.
    """

    having: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Texts that have the attribute, one a line."""

    lacking: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Texts that lack it."""

    strength: tuple[float, ...] = (1.0,)
    """How much of it is added, one or several numbers, behind the texts; below 0 it is taken away."""

    def check(self) -> None:
        super().check()
        check_numbers(self.strength, "--strength")

    def results(self) -> list[dict]:
        having, lacking = ([text for text in read_texts(file) if text.strip()] for file in (self.having, self.lacking))
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
    """Texts around each text: at a distance from its posterior mean, in directions that the seed draws; greedy unless
    an option says how to draw.

    A draw of the prior lies about √(latent size) from the origin. Writes {"text", "radius", "generated"} a line.
    """

    radius: float = 1.0
    """Distance from the text's posterior mean."""

    n: int = 5
    """Texts around each."""

    def check(self) -> None:
        super().check()
        check_radius(self.radius, name="--radius")
        if self.n < 1:
            raise OptionError("--n", f"must be at least 1, not {self.n}")

    def results(self) -> list[dict]:
        texts, label = self.read()
        vae = self.load(label)
        means = vae.encode(texts, std_scale=0.0)
        around = vae.around(means, self.n, self.radius, seed=self.seed)
        generated = iter(vae.generate(around, seed=self.seed, **self.sampling()))
        return [{"text": t, "radius": self.radius, "generated": next(generated)} for t in texts for _ in range(self.n)]


@dataclass(kw_only=True)
class Combine(GreedyCommand):
    """Sums and differences of texts: the text of Σ weight · posterior mean; greedy unless an option says how to draw.

    Takes as many texts as weights, or a file whose lines hold so many with tabs between them. Writes {"texts",
    "weights", "text"} a line.
    """

    weights: tuple[float, ...]
    """A weight for each text, behind the texts: 0.5 0.5 is what lies between two, -1 1 1 is an analogy."""

    def check(self) -> None:
        super().check()
        check_numbers(self.weights, "--weights")

    def results(self) -> list[dict]:
        groups, label = self.columns(len(self.weights), why=", one a weight")
        vae = self.load(label)
        means = vae.encode([text for group in groups for text in group], std_scale=0.0)
        by_place = means.reshape(len(groups), len(self.weights), -1).swapaxes(0, 1)
        generated = vae.generate(combine(by_place, self.weights), seed=self.seed, **self.sampling())
        return [
            {"texts": list(group), "weights": list(self.weights), "text": text}
            for group, text in zip(groups, generated, strict=True)
        ]


def check_numbers(numbers: tuple[float, ...], name: str) -> None:
    """Raises InputError where there are none, or one is not finite."""
    if not numbers or not all(map(np.isfinite, numbers)):
        said = " ".join(map(str, numbers)) or "nothing"
        raise OptionError(name, f"must be finite numbers, not {said}")
