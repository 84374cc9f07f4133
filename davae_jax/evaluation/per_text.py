"""What the model says of each text: its posterior, and how likely it finds the text.

The model reads a batch at a time; of a batch, numbers a text are kept and nothing larger.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from davae_jax.data.batches import pad_rows
from davae_jax.data.tokenize import TokenizedTexts
from davae_jax.evaluation import metrics
from davae_jax.model.davae import DAVAE, merge, split
from davae_jax.model.latent import Posterior, kl_per_dimension
from davae_jax.model.losses import reconstruction_nll
from davae_jax.parallel.sharding import shard_batch
from davae_jax.utils.shapes import power_of_two


class PerText(NamedTuple):
    """Numbers of each text, in the texts' order."""

    mean: Float[np.ndarray, "n L"]
    logvar: Float[np.ndarray, "n L"]
    kl: Float[np.ndarray, "n L"]  # of each dimension, nats; nothing is masked, whatever free bits training had
    tokens: Int[np.ndarray, " n"]  # that the decoder has to tell: the end token counts, bos does not
    hits: Int[np.ndarray, " n"]  # of them, those that it holds most likely, told the true ones before them
    mean_nll: Float[np.ndarray, " n"]  # −log p(x|mean), nats
    rec_nll: Float[np.ndarray, " n"]  # E_q[−log p(x|z)], nats, over the K samples
    iw_nll: Float[np.ndarray, " n"]  # −log p(x), nats, importance weighted
    half_nll: Float[np.ndarray, " n"]  # the same from the first half of the samples
    effective: Float[np.ndarray, " n"]  # effective sample size, 1 to K


def per_text(
    model: DAVAE, texts: TokenizedTexts, *, samples: int, seed: int, batch_size: int, progress: bool = False
) -> PerText:
    """The model's numbers of each text. They do not depend on the batches, but for rounding: a text's draws follow from
    the seed and its line."""
    graphdef, params = split(model)
    n = len(texts.lines)
    order = np.argsort([len(row) for row in texts.decoder_ids], kind="stable")
    positions, key = model.config.encoder.max_position_embeddings, jax.random.key(seed % 2**32)
    parts = []
    with tqdm(total=n, desc="measure", unit="text", disable=not progress) as bar:
        for start in range(0, n, batch_size):
            part = order[start : start + batch_size]
            rows = [texts.ids(i) for i in part]
            # Rounded up, so that a few programs serve texts of all lengths; what fills a batch is dropped again.
            S, T = (max(len(row[side]) for row in rows) for side in (0, 1))
            shape = min(power_of_two(S), positions), power_of_two(T - 1) + 1
            fill = power_of_two(len(part), least=1) - len(part) if n < batch_size else batch_size - len(part)
            encoder_ids, decoder_ids, _ = pad_rows(rows + rows[:1] * fill, shape, model.config.pad_token_id)
            index = np.concatenate([texts.lines[part] - 1, np.zeros(fill, int)]).astype(np.int32)
            inputs = shard_batch((encoder_ids, decoder_ids, index), params)
            values = jax.device_get(_of_batch(graphdef, params, *inputs, key, samples))
            parts.append([value[: len(part)] for value in values])
            bar.update(len(part))
    place = np.argsort(order)
    return PerText(*(np.concatenate(column)[place] for column in zip(*parts, strict=True)))


@partial(jax.jit, static_argnums=(0, 6))
def _of_batch(graphdef, params, encoder_ids, decoder_ids, index, key, samples) -> PerText:
    model = merge(graphdef, params)
    encoded = model.encoder(encoder_ids)
    posterior = Posterior(encoded.mean, encoded.logvar)
    targets = decoder_ids[:, 1:]
    mask = metrics.text_mask(targets, model.config.end_token_id)
    logits = model.decoder.logits(model.decoder(decoder_ids[:, :-1], posterior.mean).final)
    keys = jax.vmap(partial(jax.random.fold_in, key))(index)
    log_p, log_ratio = metrics.importance_samples(
        posterior, partial(metrics.text_log_likelihood, model, decoder_ids), keys, samples
    )
    log_weights = log_p + log_ratio
    return PerText(
        *posterior,
        kl=kl_per_dimension(posterior),
        tokens=mask.sum(1),
        hits=(mask & (logits.argmax(-1) == targets)).sum(1),
        mean_nll=reconstruction_nll(logits, targets, mask),
        rec_nll=-log_p.mean(0),
        iw_nll=-metrics.log_mean_weight(log_weights),
        half_nll=-metrics.log_mean_weight(log_weights[: max(samples // 2, 1)]),
        effective=metrics.effective_sample_size(log_weights),
    )
