"""Defines the protocol of regularizers: their input, their result and their common options.

A regularizer is a frozen dataclass whose fields are its options; `registry.register` gives it a name, which is used
on the command line and in the logs. docs/regularizers.md begins with a complete example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from davae_jax.utils.errors import check_options
from davae_jax.utils.lazy import jax, jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]  # nested dicts of arrays
Logs = dict[str, "Float[Array, '']"]  # name → scalar


class LatentBatch(NamedTuple):
    """The latents of a batch over all devices; with --accumulate, of one micro-batch.

    A packed batch has B slots for texts and may contain fewer texts. In rows without a text, mean, logvar and z are 0,
    and every statistic must exclude these rows, as `average` and `count` do.
    """

    mean: Float[Array, "B L"]  # of the posterior
    logvar: Float[Array, "B L"]
    z: Float[Array, "B L"]  # a sample of the posterior, which is also the decoder's input
    prior: Float[Array, "B L"]  # samples of N(0, I)
    is_text: Bool[Array, "B"]
    step: Int[Array, ""]  # number of steps taken so far, out of `steps`
    steps: int
    key: jax.Array  # for the regularizer's random numbers, different in every step
    corpus_size: int | None  # number of training texts, if known
    targets: Int[Array, "B T"]  # the decoder's target ids, by row
    text_of_target: Int[Array, "B T"]  # index, among the B texts, of each target's text; −1 is padding

    @property
    def count(self) -> Float[Array, ""]:
        """Returns the number of texts in the batch, at least 1."""
        return jnp.maximum(self.is_text.sum(), 1).astype(self.z.dtype)

    def average(self, x: Float[Array, "B ..."]) -> Float[Array, "..."]:
        """Returns the mean over the texts."""
        is_text = self.is_text.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(is_text, x, 0).sum(0) / self.count


class Sizes(NamedTuple):
    """Sizes that the shapes of a regularizer's parameters may depend on."""

    latent: int
    vocabulary: int  # of the decoder


@dataclass(frozen=True)
class Regularizer:
    """A term of the loss, weight · value."""

    name: ClassVar[str] = "regularizer"  # set by `register`

    weight: float = 0.0
    """Factor of this term in the loss; 0 turns it off, and it is not computed."""

    ramp: tuple[float, float] = (0.0, 0.0)
    """Two fractions of the training between which the weight rises linearly from 0; 0 0: no warmup."""

    def __post_init__(self):
        self.check("weight", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")
        self.check("ramp", lambda x: 0 <= x[0] <= x[1] <= 1, "be two increasing fractions in [0, 1]")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        """Computes the term.

        Args:
          params: the parameters of a `Learned` regularizer; {} for others.

        Returns:
          The value, without the weight, and further scalars to log.
        """
        raise NotImplementedError

    def check(self, names: str, fits: Callable[[Any], bool], must: str) -> None:
        """Raises OptionError for the first of these fields that does not fit (`utils.errors.check_options`)."""
        check_options(self, f"regularizers.{self.name.replace('_', '-')}.", names, fits, must)


@dataclass(frozen=True)
class Learned(Regularizer):
    """A regularizer with parameters that are trained together with the model. They are not part of the model."""

    learning_rate: float = 1e-3
    """Learning rate of the regularizer's parameters; constant."""

    def __post_init__(self):
        super().__post_init__()
        self.check("learning_rate", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        """Returns the initial parameters."""
        raise NotImplementedError


@dataclass(frozen=True)
class Adversarial(Learned):
    """A regularizer whose parameters minimize a separate loss, `adversary`.

    In `adversary` no gradient reaches the latents; in the value none reaches the parameters.
    """

    def adversary(self, batch: LatentBatch, params: Params) -> Float[Array, ""]:
        """Returns the loss that the parameters minimize."""
        raise NotImplementedError


def weight_at(regularizer: Regularizer, step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """Returns a regularizer's weight in a step, counted from 0, out of `steps`."""
    begin, end = regularizer.ramp
    if end == 0:
        return jnp.float32(regularizer.weight)
    if begin == end:
        return regularizer.weight * jnp.float32(step >= begin * steps)
    risen = (step - begin * steps) / ((end - begin) * steps)
    return regularizer.weight * jnp.float32(jnp.clip(risen, 0.0, 1.0))
