"""The figures of an evaluation as a table, for the terminal and for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from davae_jax.evaluation.figures import columns

DASH = "–"  # in the place of a figure that cannot be had


class Row(NamedTuple):
    name: str
    value: str
    interval: str  # of 95 %, or ""
    note: str  # what the value is of, or is to be held against


def sections(measures: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows under their headings. What cannot be had is a dash, and its note says why."""
    m = measures
    parts = m["denominators"]

    def row(name: str, key: str, form: str, note: str = "", lacking: str = "") -> Row:
        if math.isnan(m[key]):
            return Row(name, DASH, "", lacking)
        return Row(name, form.format(m[key]), _interval(m["intervals"].get(key), form), note)

    enough, two = "near the line above where n is enough", "of two texts or more"
    of_texts = f"texts: {_or_dash(m['real_ppl'], '{:.2f}')}"
    ends, apart = "in distances of the ends", "no interpolation whose ends differ"
    found = {
        "Reconstruction": [
            row("BLEU", "bleu", "{:.1f}", "greedy from the posterior mean, over characters"),
            row("exact", "exact_match", "{:.1%}", "the same"),
            row("token accuracy", "token_accuracy", "{:.1%}", "told the true tokens before"),
        ],
        "Likelihood": [
            row("reconstruction", "rec_nll", "{:.2f}", "nats a text, −E log p(x|z)"),
            row("ELBO", "elbo", "{:.2f}", "nats a text"),
            row("−log p(x)", "iw_nll", "{:.2f}", f"nats a text, importance weighted, K = {m['iw_samples']}"),
            row("−log p(x), half of K", "iw_nll_of_half", "{:.2f}", "near the line above where K is enough"),
            row("effective samples", "effective_sample_size", "{:.1f}", f"median, of {m['iw_samples']}"),
            row("perplexity per token", "ppl_per_token", "{:.2f}", f"{parts['tokens']:,} tokens, ends counted"),
            row(
                "perplexity per word",
                "ppl_per_word",
                "{:.2f}",
                f"{parts['words']:,} words, ends counted; each Chinese character is one",
            ),
            row("perplexity per word, ELBO", "elbo_ppl_per_word", "{:.2f}", "the same words"),
        ],
        "Latent": [
            row("KL", "kl", "{:.2f}", "nats a text, nothing masked"),
            row("active units", "active_units", "{:d}", f"of {m['latent_size']}"),
            row(
                "mutual information",
                "mutual_information",
                "{:.2f}",
                f"nats, of log n = {m['mutual_information_ceiling']:.2f} at most; too low near it",
            ),
            row("… of half of the texts", "mutual_information_of_half", "{:.2f}", enough, two),
            row(
                "KL of all posteriors together",
                "aggregate_kl",
                "{:.2f}",
                "nats to the prior, 0 is best; too high by as much",
            ),
            row("… of half of the texts", "aggregate_kl_of_half", "{:.2f}", enough, two),
            row("MMD² of all posteriors together", "aggregate_mmd", "{:.4f}", "to the prior; 0 is best", two),
        ],
        "Samples from the prior": [
            row("different", "prior_distinct", "{:.1%}", f"of {m['prior_samples']} samples"),
            row(
                "self-BLEU",
                "self_bleu",
                "{:.1f}",
                f"texts: {_or_dash(m['self_bleu_texts'], '{:.1f}')}",
                "of two samples or more",
            ),
            *(
                row(
                    f"distinct-{n}",
                    f"distinct_{n}",
                    "{:.3f}",
                    f"texts: {_or_dash(m[f'distinct_{n}_texts'], '{:.3f}')}",
                    f"no sample has {n} words",
                )
                for n in (1, 2, 3)
            ),
            row("forward perplexity", "forward_ppl", "{:.2f}", f"trigrams of texts; {of_texts}", two),
            row("reverse perplexity", "reverse_ppl", "{:.2f}", f"trigrams of samples; {of_texts}", two),
        ],
        "Interpolation": [
            row("length of the way", "interpolation_length", "{:.2f}", f"{ends}; 1 is straight", apart),
            row("largest step", "interpolation_largest_step", "{:.2f}", ends, apart),
        ],
    }
    if "prior_valid" in m:
        found["Samples from the prior"].insert(0, row("the grammar accepts", "prior_valid", "{:.1%}"))
    if "factors" in m:
        one = "one factor only" if len(m["factors"]) == 1 else "no dimension is used"
        found["Factors"] = [
            *(
                Row(
                    name,
                    f"{factor['probe_accuracy']:.1%}",
                    _interval(m["intervals"].get(f"probe_{name}"), "{:.1%}"),
                    f"by a linear probe; the most frequent of {factor['classes']}: {factor['majority']:.1%}",
                )
                for name, factor in m["factors"].items()
            ),
            row("MIG", "mig", "{:.3f}", "mean over the factors; 1 is best", "a latent of one dimension"),
            row("DCI disentanglement", "dci_disentanglement", "{:.3f}", "1 is best", one),
            row("DCI completeness", "dci_completeness", "{:.3f}", "1 is best", "a latent of one dimension"),
            row("DCI informativeness", "dci_informativeness", "{:.1%}", "mean accuracy of the probes"),
        ]
    return found


def _or_dash(value: float, form: str) -> str:
    return DASH if math.isnan(value) else form.format(value)


def _interval(ends: list[float] | None, form: str) -> str:
    if ends is None:
        return ""
    form = form.replace("d}", ".0f}")
    return " to ".join(form.format(end) for end in ends)


def format_table(measures: Mapping[str, Any]) -> str:
    """For the terminal, with the warnings below."""
    by_section = sections(measures)
    rows = [row for section in by_section.values() for row in section]
    widths = [max(columns(row[i]) for row in rows) for i in range(3)]
    lines = [f"over {measures['n']} texts, with 95 % intervals"]
    for title, section in by_section.items():
        lines += ["", title]
        lines += [
            f"  {_pad(row.name, widths[0])}  {' ' * (widths[1] - columns(row.value))}{row.value}"
            f"  {_pad(row.interval, widths[2])}  {row.note}".rstrip()
            for row in section
        ]
    if measures["warnings"]:
        lines += ["", "Warnings", *(f"  {warning}" for warning in measures["warnings"])]
    return "\n".join(lines)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - columns(text))


def as_json(value: Any) -> Any:
    """The same with None for what JSON cannot hold: NaN and the infinities."""
    if isinstance(value, Mapping):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
