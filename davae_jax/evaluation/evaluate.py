"""Evaluates a model on texts it was not trained on: the metrics of docs/evaluate.md and the texts they come from."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from davae_jax.data.tokenize import tokenize
from davae_jax.evaluation.caveats import collect_warnings
from davae_jax.evaluation.measures import MEASURES
from davae_jax.evaluation.outputs import ModelOutputs
from davae_jax.inference.generation import LENGTH_LIMIT
from davae_jax.inference.text_vae import TextVAE
from davae_jax.model.config import SAMPLING_SETTINGS
from davae_jax.model.latent import Posterior
from davae_jax.tokenizers.decoder import END, UNK
from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.progress import progress_bar

# Groups of metrics that a training run computes at its end.
END_OF_RUN = ("latent", "reconstruction", "posterior samples", "prior samples")


class Evaluation(NamedTuple):
    """Holds the metrics of a model on texts, and the outputs that they were computed from.

    Outputs that no metric needed are empty or None.
    """

    measures: dict[str, Any]  # what `davae evaluate --json` writes
    texts: list[str]  # after the tokenizer and the published clean-up
    labels: dict[str, list[str]]  # factor → the class of each text
    posterior: Posterior | None  # NumPy [n, L]
    reconstructions: list[str]  # greedy, from the posterior means
    samples: list[str]  # from the prior
    accepted: list[bool] | None  # whether each sample is valid; None if the language is unknown
    interpolations: list[list[str]]  # greedy texts on lines between the means of two texts, ends included


def evaluate(
    vae: TextVAE,
    texts: Sequence[str],
    *,
    samples: int = 50,
    seed: int = 0,
    labels: Mapping[str, Sequence[str]] | None = None,
    language: Container[str] | None = None,
    source: str = "the texts",
    measures: Collection[str] = tuple(MEASURES),
    sampling: Mapping[str, float] | None = None,
) -> Evaluation:
    """Evaluates a model on texts.

    Args:
      texts: blank texts, texts too long for the encoder and texts that contain the end token are dropped and counted.
      samples: number of importance samples per text (K).
      seed: random seed of all samples.
      labels: for each factor, the class of each text; linear probes are fitted to them.
      language: the set of valid texts, if it is known.
      source: names the texts in messages.
      measures: groups of metrics to compute, keys of `MEASURES`; all by default.
      sampling: sampling settings for the prior samples that replace the checkpoint's; {"top_k": 1} decodes greedily.

    Raises:
      InputError: no text remains (exit code 1).
      OptionError: samples is below 1, a group of metrics is unknown, or the number of labels differs from the number
        of texts.
    """
    texts = list(texts)
    if unknown := set(measures) - MEASURES.keys():
        raise OptionError("measures", f"{min(unknown)!r} is unknown; available: {', '.join(MEASURES)}")
    if samples < 1:
        raise OptionError("samples", f"must be at least 1, not {samples}")
    for name, values in (labels or {}).items():
        if len(values) != len(texts):
            reason = f"must match the texts: factor {name!r} has {len(values)} labels, but there are {len(texts)} texts"
            raise OptionError("labels", reason)
    usable, with_end_token = blank_texts_with_end_token(texts, source)
    tokenized = tokenize(usable, vae.encoder_tokenizer, vae.decoder_tokenizer, max_length=LENGTH_LIMIT, source=source)
    rows = tokenized.lines - 1
    outputs = ModelOutputs(
        vae,
        originals=[texts[i] for i in rows],
        tokenized=tokenized,
        labels={name: [str(values[i]) for i in rows] for name, values in (labels or {}).items()},
        language=language,
        iw_samples=samples,
        seed=seed,
        sampling=sampling or {},
        with_likelihood="likelihood" in measures,
    )
    values = {
        "n": outputs.n,
        "left_out": len(texts) - outputs.n,
        "left_out_for_end_token": with_end_token,
        "unknown_tokens": unknown_tokens(outputs.originals, tokenized.decoder_ids, vae.decoder_tokenizer.unk_id),
        "seed": seed,
        "sampling": {name: getattr(vae.config, name) for name in SAMPLING_SETTINGS} | outputs.sampling,
        "latent_size": vae.config.latent_size,
        **_compute(outputs, measures),
    }
    values["warnings"] = collect_warnings(values)
    return Evaluation(
        values,
        outputs.texts,
        outputs.labels,
        outputs.computed("posterior", None),
        outputs.computed("reconstructions", []),
        outputs.computed("prior_samples", []),
        outputs.computed("valid_prior_samples", None),
        outputs.computed("interpolations", []),
    )


def _compute(outputs: ModelOutputs, measures: Collection[str]) -> dict[str, Any]:
    """Returns the metrics of these groups, with their confidence intervals under `intervals`."""
    values, intervals = {}, {}
    selected = [name for name in MEASURES if name in measures]
    with progress_bar(selected, unit="group", disable=not outputs.vae.progress) as bar:
        for name in bar:
            bar.set_description(name)
            group, group_intervals = MEASURES[name](outputs)
            values |= group
            intervals |= group_intervals if outputs.n > 1 else {}  # all resamples of one text are equal
    return values | {"intervals": {name: list(bounds) for name, bounds in intervals.items()}}


def evaluate_run(vae: TextVAE, texts: Sequence[str], language: Container[str] | None) -> dict[str, Any]:
    """Returns the metrics that a training run computes at its end and writes to figures.json.

    They are the metrics of `evaluate` that need no likelihood. Prior samples are decoded greedily, so that they depend
    on the latent and not on the random choice of tokens. `prior_valid` is None if the language is unknown.
    """
    evaluation = evaluate(vae, texts, language=language, measures=END_OF_RUN, sampling={"top_k": 1})
    return as_json({"prior_valid": None} | evaluation.measures)


def as_json(value: Any) -> Any:
    """Returns the value with NaN and infinities replaced by None, because JSON has neither."""
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def blank_texts_with_end_token(texts: Sequence[str], source: str) -> tuple[list[str], int]:
    """Replaces texts that contain the literal end token by "". Returns the texts and the number of replaced ones.

    The likelihood of a text ends at its first end token: the words after it would be counted, but cost nothing.

    Raises:
      InputError: no text remains; the message names `source`.
    """
    usable = ["" if END in text else text for text in texts]
    count = sum(END in text for text in texts)
    if count and not any(text.strip() for text in usable):
        raise InputError(f"{source}: all texts contain {END}, which marks the end of a text")
    return usable, count


def unknown_tokens(texts: Sequence[str], decoder_ids: Sequence[np.ndarray], unk_id: int) -> int:
    """Counts the tokens that replace characters unknown to the decoder's tokenizer, excluding literal `<unk>`."""
    count = sum(int((row == unk_id).sum()) for row in decoder_ids)
    return max(0, count - sum(text.count(UNK) for text in texts))
