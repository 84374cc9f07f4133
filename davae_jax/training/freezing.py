"""Splits the weights into those that a run trains and those that it leaves as they are (`--init.freeze`).

Only the trained weights are differentiated, and only they have moments in the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Collection

import jax

from davae_jax.model.davae import Params
from davae_jax.training.config import TrainConfig

# The paths of weights that begin with one of a part's prefixes belong to it.
PARTS = {
    "encoder": (("encoder",),),
    "decoder": (("decoder",),),
    "embeddings": (
        *(("encoder", table) for table in ("word", "position", "token_type", "norm")),
        ("decoder", "embedding"),
    ),
    "posterior": (("encoder", "posterior"),),
}


def trains_table(config: TrainConfig) -> bool:
    """Returns whether the decoder's embedding table is trained, which the logits use as well."""
    return not {"decoder", "embeddings"} & set(config.init.freeze)


def split_frozen(params: Params, parts: Collection[str]) -> tuple[Params, Params]:
    """Returns the trained and the frozen weights, both in the layout of `params` with None for the others."""

    def is_frozen(path: jax.tree_util.KeyPath) -> bool:
        keys = tuple(getattr(entry, "key", None) for entry in path)
        return any(keys[: len(prefix)] == prefix for part in parts for prefix in PARTS[part])

    trained = jax.tree.map_with_path(lambda path, w: None if is_frozen(path) else w, params)
    frozen = jax.tree.map_with_path(lambda path, w: w if is_frozen(path) else None, params)
    return trained, frozen


def join_frozen(trained: Params, frozen: Params) -> Params:
    """Returns the weights of which `split_frozen` made two parts."""
    return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda x: x is None)
