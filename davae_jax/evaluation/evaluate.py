"""Evaluates a model on texts it was not trained on: the measures of docs/evaluate.md, and the texts behind them."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from davae_jax.data.tokenize import tokenize
from davae_jax.evaluation.caveats import collect_warnings
from davae_jax.evaluation.measures import MEASURES
from davae_jax.evaluation.outputs import ModelOutputs
from davae_jax.inference.generation import LENGTH_LIMIT
from davae_jax.inference.text_vae import TextVAE
from davae_jax.model.latent import Posterior
from davae_jax.tokenizers.decoder import END, UNK
from davae_jax.utils.errors import InputError, OptionError

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
END_OF_RUN = ("latent", "reconstruction", "posterior samples", "prior samples")  # what a training run measures at last


class Evaluation(NamedTuple):
    """The measures of a model on texts, and the outputs that they were computed from.

    Outputs that none of the measures asked for are empty, or None.
    """

    measures: dict[str, Any]  # what `davae evaluate --json` writes
    texts: list[str]  # after the tokenizer and the published clean-up
    labels: dict[str, list[str]]  # factor → the class of each text
    posterior: Posterior | None  # NumPy [n, L]
    reconstructions: list[str]  # greedy, from the posterior means
    samples: list[str]  # from the prior
    accepted: list[bool] | None  # which of the samples are in the language, where it is known
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
    """Measures a model on texts.

    Args:
      texts: blank texts, texts too long for the encoder and texts that hold the end token are left out and counted.
      samples: K of the importance-weighted likelihood.
      labels: the class of each text in each of several factors, which are probed for.
      language: the valid texts, where they are known.
      source: names the texts in messages.
      measures: which groups of measures to compute, of `MEASURES`; all by default.
      sampling: settings of the prior samples that replace the checkpoint's own, {"top_k": 1} for greedy ones.

    Raises:
      InputError: no text is left (exit code 1); samples below 1, unknown measures, or labels of more or fewer
        texts (exit code 2).
    """
    texts = list(texts)
    if unknown := set(measures) - MEASURES.keys():
        raise OptionError("measures", f"{min(unknown)!r} is not known; known: {', '.join(MEASURES)}")
    if samples < 1:
        raise OptionError("samples", f"must be at least 1, not {samples}")
    for name, values in (labels or {}).items():
        if len(values) != len(texts):
            raise OptionError("labels", f"of {name!r} are {len(values)}, for {len(texts)} texts")
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
        "sampling": {name: getattr(vae.config, name) for name in SAMPLING} | outputs.sampling,
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
    """Returns the values of these groups of measures, and under `intervals` the intervals of those that have one."""
    values, intervals = {}, {}
    selected = [name for name in MEASURES if name in measures]
    with tqdm(selected, unit="group", disable=not outputs.vae.progress) as bar:
        for name in bar:
            bar.set_description(name)
            group, group_intervals = MEASURES[name](outputs)
            values |= group
            intervals |= group_intervals if outputs.n > 1 else {}  # one text drawn with replacement is always itself
    return values | {"intervals": {name: list(bounds) for name, bounds in intervals.items()}}


def evaluate_run(vae: TextVAE, texts: Sequence[str], language: Container[str] | None) -> dict[str, Any]:
    """Returns the measures that a training run takes of its model at the end, for figures.json.

    They are those of `evaluate` that need no likelihood. Prior samples are greedy, so that they show what the latent
    holds and not how tokens are drawn. `prior_valid` is None where the language is not known.
    """
    evaluation = evaluate(vae, texts, language=language, measures=END_OF_RUN, sampling={"top_k": 1})
    return as_json({"prior_valid": None} | evaluation.measures)


def as_json(value: Any) -> Any:
    """Returns the value with None for what JSON does not have: NaN and the infinities."""
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def blank_texts_with_end_token(texts: Sequence[str], source: str) -> tuple[list[str], int]:
    """Returns the texts, with "" for each that holds the literal end token, and how many these are.

    The likelihood of a text ends with its first end token: what follows would cost nothing, and its words count.

    Raises:
      InputError: no text is left, of texts named by `source`.
    """
    usable = ["" if END in text else text for text in texts]
    count = sum(END in text for text in texts)
    if count and not any(text.strip() for text in usable):
        raise InputError(f"{source}: all texts hold {END}, which ends a text")
    return usable, count


def unknown_tokens(texts: Sequence[str], decoder_ids: Sequence[np.ndarray], unk_id: int) -> int:
    """Counts the tokens of characters that the decoder's tokenizer does not know, without each literal `<unk>`."""
    count = sum(int((row == unk_id).sum()) for row in decoder_ids)
    return max(0, count - sum(text.count(UNK) for text in texts))
