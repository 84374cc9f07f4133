"""`davae evaluate`: metrics against independent computations, output files, and invalid input."""

import html.parser
import json
import math
import os
import re
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
from tokenizer_fixtures import sentences

from davae_jax import InputError, TextVAE
from davae_jax.cli.evaluate import read_data
from davae_jax.cli.main import main
from davae_jax.data.tokenize import tokenize
from davae_jax.evaluation import bootstrap, caveats, metrics, outputs
from davae_jax.evaluation.evaluate import blank_texts_with_end_token, evaluate, evaluate_run
from davae_jax.evaluation.measures import bleu_interval
from davae_jax.evaluation.per_text import PerText, per_text
from davae_jax.evaluation.table import format_table
from davae_jax.evaluation.text_metrics import words
from davae_jax.inference.generation import generate
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_mesh
from davae_jax.reports.report import training_curves
from davae_jax.tokenizers.decoder import END
from davae_jax.utils.errors import OptionError

# Texts of similar lengths share one compiled program.
TEXTS = [text for text in sentences(200) if 15 <= len(text) <= 20][:40]
LABELS = {"long": [str(len(text) > 17) for text in TEXTS], "same": ["x"] * 40}
K = 6
KEYS = [
    *["n", "bleu", "token_accuracy", "exact_match", "kl", "kl_per_dim", "active_units"],
    *["mutual_information", "mutual_information_ceiling", "iw_nll", "iw_samples", "effective_sample_size"],
    *["ppl_per_token", "ppl_per_word"],
]


@pytest.fixture(scope="module")
def vae(tiny_checkpoint):
    vae = TextVAE.from_pretrained(tiny_checkpoint)
    vae.batch_size = 64
    return vae


@pytest.fixture(scope="module")
def tokenized(vae):
    return tokenize(TEXTS, vae.encoder_tokenizer, vae.decoder_tokenizer, max_length=100, source="")


@pytest.fixture(scope="module")
def results(vae, tokenized):
    return per_text(vae.model, tokenized, samples=K, seed=0, batch_size=64)


@pytest.fixture(scope="module")
def evaluation(vae):
    return evaluate(vae, TEXTS, samples=K, labels=LABELS)


# Metrics.


def test_per_text_results(vae, tokenized, results):
    """Compares with the logits of single texts, without padding or batches."""
    assert results.mean.shape == (40, 4)
    for i in (5, 7):
        ids = tokenized.decoder_ids[i]
        posterior = vae.model.encode(tokenized.encoder_ids[i][None])
        np.testing.assert_allclose(results.mean[i], posterior.mean[0], atol=1e-5)
        np.testing.assert_allclose(results.logvar[i], posterior.logvar[0], atol=1e-5)
        logits, _ = vae.model.decode(ids[None, :-1], posterior.mean)
        log_p = np.asarray(jax.nn.log_softmax(logits[0]))
        assert results.tokens[i] == len(ids) - 1
        assert results.hits[i] == (log_p.argmax(-1) == ids[1:]).sum()
        assert results.mean_nll[i] == pytest.approx(-log_p[np.arange(len(ids) - 1), ids[1:]].sum(), rel=1e-4)


def test_greedy_texts_have_full_token_accuracy(vae, tokenized, results):
    """Greedy texts from the means are truncated, so every token but the end token is a hit."""
    generated = generate(vae.model, results.mean, top_k=1, max_length=11)
    rows = [np.array([*ids, vae.config.end_token_id], np.int32) for ids in generated]
    actual = per_text(vae.model, tokenized._replace(decoder_ids=rows), samples=K, seed=0, batch_size=64)
    assert (actual.hits >= actual.tokens - 1).all()
    assert actual.tokens.tolist() == [len(ids) for ids in generated]


def test_likelihood_per_text(vae, tokenized, results):
    """The samples of a text come from its own key; the weights are p(x|z) p(z) / q(z|x)."""
    i = 5
    ids, posterior = tokenized.decoder_ids[i], vae.model.encode(tokenized.encoder_ids[i][None])
    key = jax.random.fold_in(jax.random.key(0), i)
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, k), (4,)) for k in range(K)])
    z = np.asarray(posterior.mean + noise * jnp.exp(posterior.logvar / 2))
    log_p = jax.nn.log_softmax(vae.model.decode(np.tile(ids[:-1], (K, 1)), z)[0])
    log_p = np.asarray(log_p)[:, np.arange(len(ids) - 1), ids[1:]].sum(1)
    log_prior = -0.5 * (z**2 + np.log(2 * np.pi)).sum(1)
    log_q = -0.5 * (np.asarray(noise) ** 2 + np.log(2 * np.pi) + np.asarray(posterior.logvar)).sum(1)
    weights = np.exp(np.float64(log_p + log_prior - log_q))
    assert results.rec_nll[i] == pytest.approx(-log_p.mean(), rel=1e-4)
    assert results.iw_nll[i] == pytest.approx(-np.log(weights.mean()), rel=1e-4)
    assert results.half_nll[i] == pytest.approx(-np.log(weights[: K // 2].mean()), rel=1e-4)
    assert results.effective[i] == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-2)
    assert 1 <= results.effective.min() <= results.effective.max() <= K


def test_results_do_not_depend_on_batches_or_mesh(tiny_checkpoint, tokenized, results):
    """Three batches on eight devices, with sharded batch and weights, against one batch on one device."""
    vae = TextVAE.from_pretrained(tiny_checkpoint, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 16))
    sharded = per_text(vae.model, tokenized, samples=K, seed=0, batch_size=16)
    for name, actual, expected in zip(results._fields, sharded, results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4, err_msg=name)


def test_samples_depend_on_the_line(vae, tokenized, results):
    """Dropped texts do not change the samples of later texts."""
    gaps = tokenize(["", *TEXTS[1:]], vae.encoder_tokenizer, vae.decoder_tokenizer, max_length=100, source="")
    assert gaps.lines[0] == 2
    actual = per_text(vae.model, gaps, samples=K, seed=0, batch_size=64)
    for name, values, expected in zip(results._fields, actual, results, strict=True):
        np.testing.assert_allclose(values, expected[1:], rtol=1e-4, atol=1e-4, err_msg=name)
    shifted = per_text(vae.model, tokenized._replace(lines=tokenized.lines + 1), samples=K, seed=0, batch_size=64)
    assert np.abs(shifted.iw_nll - results.iw_nll).min() > 1e-4


def test_texts_with_the_end_token_are_dropped():
    texts = [TEXTS[0], f"今{END}天", "", f"今{END}", TEXTS[1]]
    assert blank_texts_with_end_token(texts, "here") == ([TEXTS[0], "", "", "", TEXTS[1]], 2)
    with pytest.raises(InputError, match=re.escape("here: all texts contain <|endoftext|>")):
        blank_texts_with_end_token(texts[1:4], "here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "must be at least 1, not 0"),
        ({"labels": {"a": ["x", "y"], "b": ["x"]}}, "factor 'b' has 1 labels, but there are 2 texts"),
        (
            {"measures": ["latent", "bleu"]},
            "'bleu' is unknown; available: latent, likelihood, reconstruction, posterior samples, factors, "
            "prior samples, diversity, trigrams, interpolation",
        ),
    ],
    ids=str,
)
def test_invalid_arguments_raise(vae, options, message):
    with pytest.raises(OptionError) as error:
        evaluate(vae, TEXTS[:2], **options)
    assert (error.value.option, error.value.exit_code) == (next(iter(options)), 2)
    assert message in error.value.reason


def test_metrics_against_their_definitions(vae, results, evaluation):
    m = evaluation.measures
    assert m["n"] == 40 and m["iw_samples"] == K and m["latent_size"] == 4
    assert m["token_accuracy"] == pytest.approx(results.hits.sum() / results.tokens.sum())
    mean, logvar = evaluation.posterior
    np.testing.assert_allclose(m["kl_per_dim"], 0.5 * (mean**2 + np.exp(logvar) - logvar - 1).mean(0), rtol=1e-4)
    assert m["kl"] == pytest.approx(sum(m["kl_per_dim"]), rel=1e-5)
    assert m["elbo"] == pytest.approx(-m["rec_nll"] - m["kl"], rel=1e-5)
    assert m["elbo"] < -m["iw_nll"]
    denominators = m["denominators"]
    assert denominators["tokens"] == results.tokens.sum()
    assert denominators["words"] == sum(len(words(text)) + 1 for text in TEXTS)
    assert m["ppl_per_token"] == pytest.approx(math.exp(40 * m["iw_nll"] / denominators["tokens"]), rel=1e-4)
    assert m["ppl_per_word"] == pytest.approx(math.exp(40 * m["iw_nll"] / denominators["words"]), rel=1e-4)
    assert m["active_units"] == metrics.active_units(results.mean)
    assert -0.5 < m["mutual_information"] <= m["mutual_information_ceiling"] == math.log(40)
    gap = m["mutual_information"] - m["mutual_information_of_half"]
    assert abs(gap) < 0.05 and gap == pytest.approx(m["aggregate_kl_of_half"] - m["aggregate_kl"], abs=1e-6)
    assert evaluation.reconstructions == vae.reconstruct(TEXTS)
    assert m["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(evaluation.reconstructions, [evaluation.texts], tokenize="zh").score
    )
    assert m["exact_match"] == np.mean(
        [a == b for a, b in zip(evaluation.reconstructions, evaluation.texts, strict=True)]
    )
    assert evaluation.samples == vae.sample(40)
    assert len(evaluation.interpolations) == 20
    for i, path in enumerate(evaluation.interpolations):
        assert len(path) == outputs.INTERPOLATION_STEPS
        assert [path[0], path[-1]] == evaluation.reconstructions[2 * i : 2 * i + 2]
    for name, (low, high) in m["intervals"].items():
        value = m["factors"]["long"]["probe_accuracy"] if name == "probe_long" else m[name]
        assert low <= value <= high or name == "active_units", name
    for value, (low, high) in zip(m["kl_per_dim"], m["kl_per_dim_intervals"], strict=True):
        assert low < value < high
    assert {"elbo_ppl_per_word", "effective_sample_size", "iw_nll_of_half", "exact_match"} <= m["intervals"].keys()
    assert m["intervals"]["exact_match"][1] - m["intervals"]["exact_match"][0] > 0.05
    assert m["factors"]["long"]["rare_classes"] == 0
    assert list(m["factors"]) == ["long"]  # a factor with one class has no probe


def test_evaluate_run(vae, evaluation, monkeypatch):
    """Equals `evaluate` without computing likelihoods; checks BLEU of posterior samples and of other texts' latents."""
    monkeypatch.setattr(outputs, "per_text", lambda *_, **__: pytest.fail("computes likelihoods"))
    monkeypatch.setattr(TextVAE, "interpolate", lambda *_, **__: pytest.fail("interpolates"))
    run = evaluate_run(vae, TEXTS, {"今天"})
    names = ["n", "bleu", "exact_match", "bleu_sampled", "bleu_other_latent", "mutual_information", "active_units"]
    names += ["mutual_information_ceiling", "latent_size", "kl"]
    for name in names:
        assert run[name] == pytest.approx(evaluation.measures[name], rel=1e-4), name
    samples = vae.sample(40, top_k=1)
    assert (run["prior_distinct"], run["prior_valid"]) == (len(set(samples)) / 40, 0)
    assert evaluate_run(vae, TEXTS[:2], None)["prior_valid"] is None
    posterior = vae.posterior(TEXTS)
    noise = np.asarray(jax.random.normal(jax.random.key(0), (40, 4)))
    sampled = vae.generate(posterior.mean + noise * np.exp(posterior.logvar / 2), top_k=1)
    expected = {
        "bleu_sampled": sampled,
        "bleu_other_latent": [*evaluation.reconstructions[1:], evaluation.reconstructions[0]],
    }
    for name, texts in expected.items():
        score = sacrebleu.corpus_bleu(texts, [evaluation.texts], tokenize="zh").score
        assert run[name] == pytest.approx(score, rel=1e-4)
    table = " ".join(format_table(run).split())
    assert f"mutual information {run['mutual_information']:.2f}" in table and "Likelihood" not in table
    assert "iw_nll" not in table and "self_bleu" not in table
    json.dumps(run, allow_nan=False)


def test_bleu_interval(monkeypatch):
    """On fixed resamples: sacrebleu's score of the resampled texts."""
    hypotheses, references = TEXTS[:6], [*TEXTS[1:3], *TEXTS[2:6]]
    counts = np.array([[2, 0, 1, 1, 1, 1], [0, 0, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1]])
    scores = []
    for row in counts:
        indices = [i for i, c in enumerate(row) for _ in range(c)]
        pair = [hypotheses[i] for i in indices], [[references[i] for i in indices]]
        scores.append(sacrebleu.corpus_bleu(*pair, tokenize="zh").score)
    monkeypatch.setattr(bootstrap, "resampled_sums", lambda values, _: counts @ values)
    low, high = bleu_interval(hypotheses, references, 0)
    assert (low, high) == pytest.approx(tuple(np.percentile(scores, [2.5, 97.5])))
    assert low < high


# Warnings.

RELIABLE = {
    "n": 2000,
    "left_out": 0,
    "left_out_for_end_token": 0,
    "unknown_tokens": 0,
    "latent_size": 32,
    "mutual_information": 3.0,
    "mutual_information_of_half": 2.97,
    "mutual_information_ceiling": math.log(2000),
    "iw_samples": 50,
    "effective_sample_size": 20.0,
    "iw_nll": 50.0,
    "iw_nll_of_half": 50.05,
    "prior_samples": 1000,
    "self_bleu": 50.0,
    "active_units": 32,
    "factors": {"topic": {"classes": 10, "rare_classes": 0}},
}


@pytest.mark.parametrize(
    ("changed", "metric_names"),
    [
        ({}, []),
        ({"n": 50}, ["all", "active_units", "mig", "probe_accuracy, dci"]),
        ({"n": 300}, ["active_units", "mig"]),
        ({"left_out": 3}, ["n"]),
        ({"left_out": 3, "left_out_for_end_token": 3}, ["n"]),
        ({"left_out": 3, "left_out_for_end_token": 1}, ["n", "n"]),
        ({"unknown_tokens": 1}, ["iw_nll, ppl"]),
        ({"mutual_information": 7.0, "mutual_information_of_half": 7.0}, ["mutual_information, aggregate_kl"]),
        ({"mutual_information": 3.9, "mutual_information_of_half": 3.88}, ["mutual_information, aggregate_kl"]),
        ({"mutual_information_of_half": 2.94}, ["mutual_information, aggregate_kl"]),
        ({"active_units": 0}, ["active_units"]),
        ({"factors": {"topic": {"classes": 10, "rare_classes": 2}}}, ["probe_accuracy"]),
        ({"iw_samples": 9}, ["iw_nll, ppl"]),
        ({"effective_sample_size": 4.9}, ["iw_nll, ppl"]),
        ({"iw_nll_of_half": 50.15}, ["iw_nll, ppl"]),
        ({"prior_samples": 99}, ["self_bleu, distinct, forward_ppl, reverse_ppl"]),
    ],
    ids=str,
)
def test_warnings(changed, metric_names):
    assert [line.split(":")[0] for line in caveats.collect_warnings(RELIABLE | changed)] == metric_names


# The command line.


@pytest.fixture
def davae(capsys, tiny_checkpoint):
    def call(*argv, model=tiny_checkpoint):
        code = main(["evaluate", "--model", str(model), *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [{"t": text, "long": len(text) > 17, "kind": i % 3} for i, text in enumerate([*TEXTS, "x"])]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


class Page(html.parser.HTMLParser):
    """Collects the tags, the loaded resources and the text of a page. Fails if tags do not close."""

    VOID = ("meta", "br", "rect", "line", "path", "polyline")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_pipe_is_read_once(tmp_path):
    """Its labels come from the lines that contain the texts; a second reading would wait for ever."""
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    lines = '\ufeff{"text": "a", "mood": "x"}\n\n{"text": "b\u2028", "mood": 3}\n'
    writer = threading.Thread(target=path.write_text, args=[lines, "utf-8"], daemon=True)
    writer.start()
    data = read_data(path, (), ["mood"])
    writer.join(10)
    assert (data.texts, data.labels) == (["a", "", "b\u2028"], {"mood": ["x", "", "3"]})


def test_evaluate(davae, data, evaluation, tiny_checkpoint, tmp_path):
    run = tmp_path / "run <b>"  # a run folder with logs, whose name must be escaped in HTML
    shutil.copytree(tiny_checkpoint, run)
    lines = [
        {"step": s, "rec": 3 / s, "kl_unmasked": 1.0 * s, "loss": 3 / s, "beta": 0.1, "mfu": None} for s in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (run / "held_out.jsonl").write_text('{"step": 3, "loss": 2.0}\n{"step": 4', encoding="utf-8")
    files = tmp_path / "out.json", tmp_path / "out.html"
    options = ("--data", data, "--field", "t", "--label", "long", "kind", "--n", 40, "--samples", K)
    code, out, err = davae(*options, "--json", files[0], "--html", files[1], model=run)
    assert (code, err) == (0, "")
    measures = json.loads(files[0].read_text(encoding="utf-8"))
    assert set(KEYS) <= measures.keys()
    assert (measures["n"], measures["of"], measures["data"]) == (40, 41, str(data))
    assert list(measures["factors"]) == ["long", "kind"]
    for name in KEYS:
        assert measures[name] == pytest.approx(evaluation.measures[name], rel=1e-4), name
    # The table has the metrics, their notes, and the warnings.
    assert f"perplexity per word {measures['ppl_per_word']:.2f}" in " ".join(out.split())
    assert f"{measures['denominators']['words']} words, including the end" in out
    assert "log n = 3.69" in out
    assert all(warning in out for warning in measures["warnings"])
    assert any("K = 6 samples" in warning for warning in measures["warnings"])
    # The report is self-contained.
    text = files[1].read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == [] and "script" not in page.tags and "url(" not in text and "@import" not in text
    assert text.count("<b>") == text.count("</b>") and "run &lt;b&gt;" in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media print" in text
    assert all(warning in page.text for warning in measures["warnings"])
    for title in ("KL per dimension", "The latent in two dimensions", "Training", "Reconstructions"):
        assert f"<h2>{title}</h2>" in text
    # KL and variance, four training curves, and two projections for each of two labels.
    assert page.tags.count("svg") == 2 + 4 + 4
    assert page.tags.count("rect") == 2 * 4 + 4  # four dimensions in each bar chart, and the frames of the projections
    assert sorted(tmp_path.iterdir()) == sorted([*files, run])


def test_one_text(davae, results, tmp_path, monkeypatch):
    """A plain file with one usable text: dropped texts give warnings, metrics that cannot be computed are null in the
    JSON, and the report is written. (The model is replaced by stored results.)
    """
    monkeypatch.setattr(outputs, "per_text", lambda *_, **__: PerText(*(values[:1] for values in results)))
    monkeypatch.setattr(TextVAE, "generate", lambda _, latent, **__: ["今天"] * len(latent))
    file, files = tmp_path / "texts.txt", (tmp_path / "out.json", tmp_path / "out.html")
    file.write_text("\n春眠 <unk> 今天Ѫ\n今<|endoftext|>天\n", encoding="utf-8")
    code, out, err = davae("--data", file, "--samples", 1, "--json", files[0], "--html", files[1])
    assert (code, err) == (0, "")
    measures = json.loads(files[0].read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert (measures["n"], measures["left_out"], measures["unknown_tokens"]) == (1, 2, 1)
    assert measures["denominators"]["words"] == 7  # words of the original text, and its end
    assert "n: 1 texts were dropped because they are blank or too long" in out
    assert "n: 1 texts were dropped because they contain <|endoftext|>" in out
    assert "all: there are only 1 texts" in out
    assert "factors" not in measures and measures["intervals"] == {}
    table = " ".join(out.split())
    assert "nan" not in out and "length – needs an interpolation whose ends differ" in table
    assert "self-BLEU – needs two samples" in table and "distinct-3 – needs a sample of 3 words" in table
    unknown = {name for name, value in measures.items() if value is None}
    assert unknown == {
        *["self_bleu", "self_bleu_texts", "distinct_3", "forward_ppl", "reverse_ppl", "real_ppl"],
        *["aggregate_mmd", "interpolation_length", "interpolation_largest_step"],
        *["mutual_information_of_half", "aggregate_kl_of_half", "kl_per_dim_intervals"],
    }
    Page(files[1].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--n", "0"], 2, "--n must be at least 1, not 0"),
        (["--samples", "0"], 2, "--samples must be at least 1, not 0"),
        (["--samples", "99999999999"], 2, "--samples must be at most 1000000, not 99999999999"),
        (["--batch-size", "0"], 2, "--batch-size must be at least 1, not 0"),
        (
            ["--data", "{tmp}/t.txt", "--mesh.tensor", "3"],
            2,
            "--mesh.data 1 --mesh.fsdp 1 --mesh.tensor 3: does not fit 8 devices",
        ),
        (["--json", "{tmp}"], 1, "{tmp}: is a folder; --json needs a file"),
        (["--html", "{tmp}/no/x"], 1, "{tmp}/no/x: cannot be written ({tmp}/no does not exist)"),
        (["--html", "{tmp}/x", "--json", "{tmp}/x"], 2, "--json and --html must be different files"),
        (["--data", "{tmp}/no"], 1, "{tmp}/no: cannot be read (No such file or directory)"),
        (
            ["--data", "{tmp}/t.txt", "--label", "x"],
            2,
            "--label needs uncompressed JSON Lines (.jsonl), not {tmp}/t.txt",
        ),
        (
            ["--data", "{tmp}/t.txt", "--field", "x"],
            2,
            "--field needs JSON Lines (.jsonl) or a table; {tmp}/t.txt has no fields",
        ),
        (["--data", "{tmp}/t.jsonl"], 1, "{tmp}/t.jsonl: line 1: has no field 'text'"),
        (["--data", "{tmp}/t.jsonl", "--field", "t", "--label", "y"], 1, "{tmp}/t.jsonl: line 2: has no field 'y'"),
        (
            ["--data", "{tmp}/t.jsonl", "--field", "t", "--label", "z"],
            1,
            "{tmp}/t.jsonl: line 1: the field 'z' must be a string, an integer, true or false to be a class",
        ),
        (
            ["--data", "{tmp}/half.jsonl", "--label", "y"],
            1,
            "{tmp}/half.jsonl: line 1: the field 'y' contains half of a surrogate pair",
        ),
        ([], 2, "--data is required: /nowhere is not a run of the demo preset"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_invalid_options_exit_with_a_message(davae, tmp_path, options, code, message):
    """Options are checked before the model is loaded."""
    (tmp_path / "t.txt").write_text("今天\n", encoding="utf-8")
    (tmp_path / "t.jsonl").write_text('{"t": "a", "y": 1, "z": 0.5}\n{"t": "b"}\n', encoding="utf-8")
    (tmp_path / "half.jsonl").write_text('{"text": "a", "y": "\\ud800"}\n', encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    message = message.format(tmp=tmp_path)
    outcome = davae(*[option.format(tmp=tmp_path) for option in options], model="/nowhere")
    assert outcome == (code, "", f"davae evaluate: error: {message}\n")
    assert sorted(tmp_path.iterdir()) == before


def test_demo_runs_use_the_demo_texts(davae, tmp_path):
    (tmp_path / "train.json").write_text('{"data": {"train": null}}', encoding="utf-8")
    problem = f"davae evaluate: error: {tmp_path / 'config.json'}: no such file; a model folder needs its config.json\n"
    assert davae(model=tmp_path) == (1, "", problem)  # --data is not required
    code, _, err = davae("--label", "mood", model=tmp_path)
    assert code == 2 and "--label mood" in err and "topic, aspect, good, degree, time, person, style" in err
    (tmp_path / "train.json").write_text('{"data": {"train": "x.txt"}}', encoding="utf-8")
    assert davae(model=tmp_path)[0] == 2


def test_one_checkpoint_of_a_run_is_of_the_run(davae, tmp_path):
    """It has the run's texts, if the run is one of the demo, and the run's curves."""
    checkpoint = tmp_path / "checkpoints" / "3"
    checkpoint.mkdir(parents=True)
    (tmp_path / "train.json").write_text('{"data": {"train": null}}', encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    code, _, err = davae(model=checkpoint)
    assert code == 1 and err.startswith(f"davae evaluate: error: {tmp_path / 'config.json'}: ")
    for step in (1, 2):
        with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            print(json.dumps({"step": step, "loss": 3.0 / step}), file=file)
    assert [figure.caption for figure in training_curves(checkpoint)] == ["loss; x: steps"]
    assert training_curves(tmp_path / "elsewhere") == []
