"""Defines the options of all regularizers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from davae_jax.regularizers.critic import WGAN
from davae_jax.regularizers.decomposition import TCVAE
from davae_jax.regularizers.divergences import MMD, SIGReg, SlicedWasserstein
from davae_jax.regularizers.posteriors import Capacity, LogVariance
from davae_jax.regularizers.registry import REGISTRY
from davae_jax.regularizers.words import BagOfWords


@dataclass(frozen=True)
class RegularizersConfig:
    """Additional loss terms on the latents; all are off by default (docs/regularizers.md)."""

    # Terms are added in this order.
    wgan: WGAN = field(default_factory=WGAN)
    tcvae: TCVAE = field(default_factory=TCVAE)
    mmd: MMD = field(default_factory=MMD)
    sigreg: SIGReg = field(default_factory=SIGReg)
    sliced_wasserstein: SlicedWasserstein = field(default_factory=SlicedWasserstein)
    capacity: Capacity = field(default_factory=Capacity)
    logvar: LogVariance = field(default_factory=LogVariance)
    bag_of_words: BagOfWords = field(default_factory=BagOfWords)


def config_with_plugins() -> type[RegularizersConfig]:
    """Returns `RegularizersConfig`, or if plugins are registered, a subclass with a field for each."""
    # In Python 3.12.1, a variable `field` would hide the function.
    built_in = {option.name for option in dataclasses.fields(RegularizersConfig)}
    plugins = [
        (name, cls, field(default_factory=cls))  # as the fields above
        for name, cls in REGISTRY.items()
        if name not in built_in
    ]
    if not plugins:
        return RegularizersConfig
    return dataclasses.make_dataclass(
        "RegularizersConfig",
        plugins,
        bases=(RegularizersConfig,),
        frozen=True,
        namespace={"__doc__": RegularizersConfig.__doc__},
    )
