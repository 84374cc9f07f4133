"""Computes the posterior of each text and bounds on its likelihood.

Texts are processed in batches, of which only a few numbers per text are stored.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from davae_jax.data.batches import pad_rows
from davae_jax.data.tokenize import TokenizedTexts
from davae_jax.evaluation import metrics
from davae_jax.model.davae import DAVAE, merge, split
from davae_jax.model.latent import kl_per_dimension
from davae_jax.model.losses import reconstruction_nll
from davae_jax.parallel.sharding import shard_batch
from davae_jax.utils.progress import progress_bar
from davae_jax.utils.shapes import power_of_two


class PerText(NamedTuple):
    """Holds the results of each text, in the order of the texts."""

    mean: Float[np.ndarray, "n L"]
    logvar: Float[np.ndarray, "n L"]
    kl: Float[np.ndarray, "n L"]  # per dimension, in nats, without the free-bits mask of training
    tokens: Int[np.ndarray, " n"]  # number of target tokens, including the end token, excluding bos
    hits: Int[np.ndarray, " n"]  # number of targets that are the decoder's most likely token given the preceding ones
    mean_nll: Float[np.ndarray, " n"]  # −log p(x|mean), nats
    rec_nll: Float[np.ndarray, " n"]  # E_q[−log p(x|z)], nats, mean over the K samples
    iw_nll: Float[np.ndarray, " n"]  # upper bound on −log p(x), nats, importance weighted
    half_nll: Float[np.ndarray, " n"]  # the same from the first half of the samples
    effective: Float[np.ndarray, " n"]  # effective sample size, 1 to K


def per_text(
    model: DAVAE, texts: TokenizedTexts, *, samples: int, seed: int, batch_size: int, progress: bool = False
) -> PerText:
    """Computes the posterior of each text and bounds on its likelihood.

    The samples of a text depend only on the seed and on its line, so the batch size changes results by rounding only.

    Args:
      samples: number of importance samples per text (K).
    """
    graphdef, params = split(model)
    n = len(texts.lines)
    order = np.argsort([len(row) for row in texts.decoder_ids], kind="stable")
    positions, key = model.config.encoder.max_position_embeddings, jax.random.key(seed % 2**32)
    batches = []
    with progress_bar(total=n, desc="evaluate", unit="text", disable=not progress) as bar:
        for start in range(0, n, batch_size):
            batch = order[start : start + batch_size]
            rows = [texts.ids(i) for i in batch]
            # Sizes are rounded up, so that a few compiled programs suffice for all lengths. The rows that fill up a
            # batch are dropped afterwards.
            S, T = (max(len(row[side]) for row in rows) for side in (0, 1))
            shape = min(power_of_two(S), positions), power_of_two(T - 1) + 1
            padding_rows = power_of_two(len(batch), least=1) - len(batch) if n < batch_size else batch_size - len(batch)
            encoder_ids, decoder_ids, _ = pad_rows(rows + rows[:1] * padding_rows, shape, model.config.pad_token_id)
            index = np.concatenate([texts.lines[batch] - 1, np.zeros(padding_rows, int)]).astype(np.int32)
            inputs = shard_batch((encoder_ids, decoder_ids, index), params)
            values = jax.device_get(_compute_batch(graphdef, params, *inputs, key, samples))
            batches.append([value[: len(batch)] for value in values])
            bar.update(len(batch))
    original = np.argsort(order)
    return PerText(*(np.concatenate(column)[original] for column in zip(*batches, strict=True)))


@partial(jax.jit, static_argnums=(0, 6))
def _compute_batch(graphdef, params, encoder_ids, decoder_ids, index, key, samples) -> PerText:
    model = merge(graphdef, params)
    encoded = model.encoder(encoder_ids)
    posterior = encoded.posterior
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
