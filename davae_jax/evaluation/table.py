"""Formats the metrics of an evaluation as a table, for the terminal and for the report."""

from __future__ import annotations

import math
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

DASH = "–"  # replaces a value that cannot be computed


class Row(NamedTuple):
    """A row of the table, as formatted text."""

    name: str
    value: str
    interval: str  # 95 % confidence interval, or ""
    note: str  # the unit or a reference value


class _Line(NamedTuple):
    """Describes how to format a metric as a row. Notes are format strings that may refer to other metrics."""

    name: str
    key: str
    template: str
    note: str = ""
    missing: str = ""  # note if the value is NaN: what the metric requires


_TWO_TEXTS = "needs two texts"
_TWO_SAMPLES = "needs two samples"
_IN_DISTANCES = "in units of the distance between the ends"
_ENDS_DIFFER = "needs an interpolation whose ends differ"
_TWO_FACTORS = "needs two factors and nonzero importances"
_TWO_DIMENSIONS = "needs two dimensions"
_N_IS_ENOUGH = "close to the line above if n is large enough"

_SECTIONS: dict[str, list[_Line]] = {
    "Reconstruction": [
        _Line("BLEU", "bleu", "{:.1f}", "greedy from the posterior mean; Chinese characters are words"),
        _Line("exact match", "exact_match", "{:.1%}", "greedy from the posterior mean"),
        _Line("BLEU, posterior sample", "bleu_sampled", "{:.1f}", "greedy from one sample of the posterior"),
        _Line("BLEU, another text's latent", "bleu_other_latent", "{:.1f}", "reference: an unused latent"),
        _Line("token accuracy", "token_accuracy", "{:.1%}", "given the true preceding tokens"),
    ],
    "Likelihood": [
        _Line("reconstruction loss", "rec_nll", "{:.2f}", "nats per text, −E log p(x|z)"),
        _Line("ELBO", "elbo", "{:.2f}", "nats per text"),
        _Line("−log p(x)", "iw_nll", "{:.2f}", "nats per text, importance-weighted, K = {iw_samples}"),
        _Line("−log p(x), half of K", "iw_nll_of_half", "{:.2f}", "close to the line above if K is large enough"),
        _Line("effective sample size", "effective_sample_size", "{:.1f}", "median, of {iw_samples}"),
        _Line(
            "perplexity per token", "ppl_per_token", "{:.2f}", "{denominators[tokens]:,} tokens, including end tokens"
        ),
        _Line(
            "perplexity per word",
            "ppl_per_word",
            "{:.2f}",
            "{denominators[words]:,} words, including the end; each Chinese character is a word",
        ),
        _Line("perplexity per word, ELBO", "elbo_ppl_per_word", "{:.2f}", "from the ELBO"),
    ],
    "Latent": [
        _Line("KL", "kl", "{:.2f}", "nats per text, without the free-bits mask"),
        _Line("active units", "active_units", "{:d}", "of {latent_size}"),
        _Line(
            "mutual information",
            "mutual_information",
            "{:.2f}",
            "nats; at most log n = {mutual_information_ceiling:.2f}, underestimated near it",
        ),
        _Line("… from half of the texts", "mutual_information_of_half", "{:.2f}", _N_IS_ENOUGH, _TWO_TEXTS),
        _Line(
            "aggregate KL",
            "aggregate_kl",
            "{:.2f}",
            "nats from the prior, 0 is best; overestimated by the same amount",
        ),
        _Line("… from half of the texts", "aggregate_kl_of_half", "{:.2f}", _N_IS_ENOUGH, _TWO_TEXTS),
        _Line("aggregate MMD²", "aggregate_mmd", "{:.4f}", "from the prior, 0 is best", _TWO_TEXTS),
    ],
    "Samples from the prior": [
        _Line("valid samples", "prior_valid", "{:.1%}", "accepted by the grammar", "the grammar is unknown"),
        _Line("distinct samples", "prior_distinct", "{:.1%}", "of {prior_samples} samples"),
        _Line("self-BLEU", "self_bleu", "{:.1f}", "texts: {self_bleu_texts:.1f}", _TWO_SAMPLES),
        _Line("distinct-1", "distinct_1", "{:.3f}", "texts: {distinct_1_texts:.3f}", "all samples are empty"),
        _Line("distinct-2", "distinct_2", "{:.3f}", "texts: {distinct_2_texts:.3f}", "needs a sample of 2 words"),
        _Line("distinct-3", "distinct_3", "{:.3f}", "texts: {distinct_3_texts:.3f}", "needs a sample of 3 words"),
        _Line("forward perplexity", "forward_ppl", "{:.2f}", "trigrams of texts; texts: {real_ppl:.2f}", _TWO_TEXTS),
        _Line("reverse perplexity", "reverse_ppl", "{:.2f}", "trigrams of samples; texts: {real_ppl:.2f}", _TWO_TEXTS),
    ],
    "Interpolation": [
        _Line("length", "interpolation_length", "{:.2f}", f"{_IN_DISTANCES}; 1 is a straight path", _ENDS_DIFFER),
        _Line("largest step", "interpolation_largest_step", "{:.2f}", _IN_DISTANCES, _ENDS_DIFFER),
    ],
    "Factors": [  # follows one row per factor
        _Line("MIG", "mig", "{:.3f}", "mean over the factors; 1 is best", _TWO_DIMENSIONS),
        _Line(
            "DCI disentanglement",
            "dci_disentanglement",
            "{:.3f}",
            "1 is best",
            _TWO_FACTORS,
        ),
        _Line("DCI completeness", "dci_completeness", "{:.3f}", "1 is best", _TWO_DIMENSIONS),
        _Line("DCI informativeness", "dci_informativeness", "{:.1%}", "mean accuracy of the probes"),
    ],
}


def sections(measures: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Returns the rows of the metrics by heading. NaN and None are shown as a dash."""
    rows_by_title = {
        title: [_row(line, measures) for line in lines if line.key in measures] for title, lines in _SECTIONS.items()
    }
    rows_by_title["Factors"] = [*_factor_rows(measures), *rows_by_title["Factors"]]
    return {title: rows for title, rows in rows_by_title.items() if rows}


def _row(line: _Line, measures: Mapping[str, Any]) -> Row:
    value = measures[line.key]
    if value is None or math.isnan(value):
        return Row(line.name, DASH, "", line.missing)
    interval = _format_interval(measures["intervals"].get(line.key), line.template)
    return Row(line.name, line.template.format(value), interval, _NOTES.vformat(line.note, (), measures))


def _factor_rows(measures: Mapping[str, Any]) -> Iterator[Row]:
    for name, factor in measures.get("factors", {}).items():
        interval = _format_interval(measures["intervals"].get(f"probe_{name}"), "{:.1%}")
        note = "linear probe; the most frequent of {classes} classes has {majority:.1%}".format_map(factor)
        yield Row(name, f"{factor['probe_accuracy']:.1%}", interval, note)


class _NoteFormatter(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        return DASH if missing else super().format_field(value, format_spec)


_NOTES = _NoteFormatter()


def _format_interval(bounds: Sequence[float] | None, template: str) -> str:
    template = template.replace("d}", ".0f}")  # the bounds of a count's interval may be fractions
    return "" if bounds is None else " to ".join(template.format(end) for end in bounds)


def format_table(measures: Mapping[str, Any]) -> str:
    """Formats the metrics for the terminal, followed by the warnings."""
    by_section = sections(measures)
    rows = [row for section in by_section.values() for row in section]
    widths = [max(display_width(row[i]) for row in rows) for i in range(3)]
    lines = [f"{measures['n']} texts, with 95 % confidence intervals"]
    for title, section in by_section.items():
        lines += ["", title]
        lines += [
            f"  {_pad(row.name, widths[0])}  {' ' * (widths[1] - display_width(row.value))}{row.value}"
            f"  {_pad(row.interval, widths[2])}  {row.note}".rstrip()
            for row in section
        ]
    if measures["warnings"]:
        lines += ["", "Warnings", *(f"  {warning}" for warning in measures["warnings"])]
    return "\n".join(lines)


def display_width(text: str) -> int:
    """Returns the number of terminal columns that a text takes; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - display_width(text))
