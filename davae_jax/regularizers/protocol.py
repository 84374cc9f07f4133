"""What a regularizer is: what it gets, what it gives back, and the options that each of them has.

A regularizer is a frozen dataclass whose fields are its options; `registry.register` gives it a name, and with that a
place on the command line and in the logs. docs/regularizers.md begins with a whole one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from davae_jax.utils.errors import check_options

Params = dict[str, Any]  # nested dicts of arrays
Logs = dict[str, Float[Array, ""]]


class LatentBatch(NamedTuple):
    """The latents of a batch, of all devices together; with --accumulate, of one part of it.

    Of B places some may hold no text, where rows are packed: there mean, logvar and z are 0, and no statistic may count
    them (`average` and `count` do not).
    """

    mean: Float[Array, "B L"]  # of the posterior
    logvar: Float[Array, "B L"]
    z: Float[Array, "B L"]  # a draw of the posterior, the one that the decoder gets
    prior: Float[Array, "B L"]  # draws of N(0, I)
    is_text: Bool[Array, "B"]
    step: Int[Array, ""]  # steps taken, out of `steps`
    steps: int
    key: jax.Array  # for draws of its own; another one every step
    corpus_size: int | None  # texts that are trained on, where the caller said it
    targets: Int[Array, "B T"]  # what the decoder is to say, in rows
    text_of_target: Int[Array, "B T"]  # which of the B places each target is of; −1 is padding

    @property
    def count(self) -> Float[Array, ""]:
        """Texts in the batch."""
        return jnp.maximum(self.is_text.sum(), 1).astype(self.z.dtype)

    def average(self, x: Float[Array, "B ..."]) -> Float[Array, "..."]:
        """The mean over the texts."""
        kept = self.is_text.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(kept, x, 0).sum(0) / self.count


class Sizes(NamedTuple):
    """What the shapes of a regularizer's own parameters may depend on."""

    latent: int
    vocabulary: int  # of the decoder


@dataclass(frozen=True)
class Regularizer:
    """One term of the loss, weight · value."""

    name: ClassVar[str] = "regularizer"  # under which it is registered

    weight: float = 0.0
    """What its value is multiplied by in the loss. 0: off, and not computed."""

    ramp: tuple[float, float] = (0.0, 0.0)
    """Parts of the training between which the weight rises from 0 to the whole. 0 0: whole from the beginning."""

    def __post_init__(self):
        self.check("weight", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")
        self.check("ramp", lambda x: 0 <= x[0] <= x[1] <= 1, "be two parts in [0, 1], the second not before the first")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        """(value, what to log beside it). params: its own, of a `Learned` one; {} of any other."""
        raise NotImplementedError

    def check(self, names: str, fits, must: str) -> None:
        """Raises InputError (exit code 2), which names the option, for the first of these fields that does not fit."""
        check_options(self, f"regularizers.{self.name.replace('_', '-')}.", names, fits, must)

    def check_positive(self, names: str) -> None:
        self.check(names, lambda x: 0 < x < float("inf"), "be above 0 and finite")


@dataclass(frozen=True)
class Learned(Regularizer):
    """One with parameters of its own, which learn from its value too. They are no part of the model."""

    learning_rate: float = 1e-3
    """Of its own parameters; constant."""

    def __post_init__(self):
        super().__post_init__()
        self.check("learning_rate", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        """Its own parameters before the first step."""
        raise NotImplementedError


@dataclass(frozen=True)
class Adversarial(Learned):
    """One whose parameters learn from another loss, `adversary`: that sees latents with their gradient stopped, and the
    value sees the parameters with theirs stopped."""

    def adversary(self, batch: LatentBatch, params: Params) -> Float[Array, ""]:
        """What its own parameters make small."""
        raise NotImplementedError


def weight_at(regularizer: Regularizer, step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """The weight of one step out of `steps`, counted from 0."""
    begin, end = regularizer.ramp
    if end == 0:
        return jnp.float32(regularizer.weight)
    if begin == end:
        return regularizer.weight * jnp.float32(step >= begin * steps)
    risen = (step - begin * steps) / ((end - begin) * steps)
    return regularizer.weight * jnp.float32(jnp.clip(risen, 0.0, 1.0))
