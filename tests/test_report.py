"""Components of the report: charts, projections, text diffs. (test_evaluate.py tests the whole page.)"""

import re
import sys

import numpy as np
import pytest

from davae_jax.evaluation.evaluate import Evaluation
from davae_jax.model.latent import Posterior
from davae_jax.reports import charts, html, projection, report
from davae_jax.reports.charts import COLOURS, OTHER, assign_colours, format_ticks, ticks
from davae_jax.reports.report import changes, nearest


def test_changes():
    assert changes("今天很好", "今天不好") == [("same", "今天"), ("lost", "很"), ("new", "不"), ("same", "好")]
    assert changes("a <b> c", "a <b>") == [("same", "a <b>"), ("lost", " c")]
    assert changes("", "x") == [("new", "x")]


def test_templates_escape_everything_but_charts():
    values = dict(caveats=["<b> & c"], settings_legend=[], plane=html.Figure("<svg></svg>", "<i>"), strips=[])
    page = html.render("comparison.html", title="<t>", kind="k", about="", columns=[], rows=[], options={}, **values)
    assert "<li>&lt;b&gt; &amp; c</li>" in page and "<figure><svg></svg><figcaption>&lt;i&gt;</figcaption>" in page
    assert page.startswith("<!DOCTYPE html>\n") and "<title>&lt;t&gt;: k</title>" in page and ".heads {" in page
    marked = html.TEMPLATES.get_template("macros.html").module.marked
    assert marked(changes("a <b> c", "d <b>")) == "<del>a</del><ins>d</ins> &lt;b&gt;<del> c</del>"


def test_nearest():
    means = np.array([[0.0, 0], [0, 3], [4, 0], [0, 1]])
    rows, far = nearest(means, 0)
    assert (rows.tolist(), far.tolist()) == ([3, 1, 2], [1, 3, 4])


def test_ticks():
    assert ticks(0, 1) == pytest.approx([0, 0.5, 1])
    assert ticks(0, 0.8) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert ticks(-3, 17) == pytest.approx([0, 5, 10, 15])
    assert ticks(2, 2) == [2]


def test_format_ticks():
    assert format_ticks([0, 5e-6, 1e-5, 1.5e-5]) == ["0", "5e-06", "1e-05", "1.5e-05"]
    assert format_ticks([12.3452, 12.3454]) == ["12.3452", "12.3454"]
    assert format_ticks([10_000, 12_000.0]) == ["10k", "12k"]
    assert format_ticks([2.0]) == ["2"] and format_ticks([0]) == ["0"]


@pytest.mark.parametrize("max_value", [1.6e-5, -1.6e-5, 0.025, 12.34567, 1234.5, 1.6e9, 1.0], ids=str)
def test_tick_labels_are_not_clipped(max_value):
    """Each label fits between the edge of the chart and the axis; DejaVu Sans digits are 0.636 × 17 units wide."""
    plots = [
        charts.bars([abs(max_value), abs(max_value) / 3], [True, False], title="t", unit="u"),
        charts.lines({"a": ([0, 1, 2], [max_value, max_value * (1 - 1e-5), max_value * (1 - 2e-5)])}, title="t"),
        charts.plane({"a": ([0.0, 1.0], [0.0, max_value])}, {"a": "#111111"}, title="t"),
    ]
    for chart in plots:
        numbers = re.findall(r'<text x="(\d+)" y="\d+" text-anchor="end">([^<]+)</text>', chart)
        starts = [int(x) - 17 * sum(0.36 if c in ".-" else 0.636 for c in number) for x, number in numbers]
        assert len(numbers) >= 2 and min(starts) >= 0
        assert len({number for x, number in numbers}) == len(numbers)
        left = {int(x) for x in re.findall(r'<line class="grid" x1="(\d+)"', chart)}
        assert len(left) == 1 and min(int(x) for x, _ in numbers) == left.pop() - 5


def test_assign_colours():
    assert assign_colours(["b", "a", "b"]) == {"a": COLOURS[0], "b": COLOURS[1]}
    many = assign_colours([str(i % 13) for i in range(100)] + ["12"] * 9)
    assert many["12"] == COLOURS[0] and list(many.values()).count(OTHER) == 3


@pytest.fixture
def many():
    """5000 texts with two factors: two alternating classes that one dimension separates, and one class per text."""
    rng, n = np.random.default_rng(0), 5000
    means = rng.standard_normal((n, 4))
    means[::2, 3] += 20
    labels = {"two": ["a", "b"] * (n // 2), "own": [str(i) for i in range(n)]}
    return Evaluation({}, [], labels, Posterior(means, np.zeros((n, 4))), [], [], None, [])


def test_projections_of_many_texts(many, monkeypatch):
    """At most 2000 sampled dots are shown, as the caption says. The plane separates alternating labels.

    It is omitted if no class has two texts.
    """
    monkeypatch.setattr(projection, "umap", lambda means: None)
    _, by_factor = report.latent_projections(many)
    figures = [figure for factor in by_factor for figure in factor.figures]
    page = "".join(figure.svg for figure in figures)
    dots = [(colour, path.count("M")) for colour, path in re.findall(r'class="dots" stroke="(.*?)" d="(.*?)"', page)]
    two_classes, single_text_classes = dots[:4], dots[4:]
    assert sum(count for _, count in two_classes[:2]) == sum(count for _, count in two_classes[2:]) == 2000
    assert min(count for _, count in two_classes) > 900  # both classes are shown
    assert sum(count for _, count in single_text_classes) == 2000
    captions = [figure.caption for figure in figures]
    assert len(captions) == 3
    assert captions[0].endswith("% of the variance, 2,000 of 5,000 texts, sampled") and captions[2] == captions[0]
    assert captions[1] == "2,000 texts, in the plane that best separates the classes of the other half"
    plane = re.findall(r'class="dots" stroke=".*?" d="(.*?)"', page)[2:4]
    sides = [np.array([float(x) for x in re.findall(r"M([\d.]+) ", path)]) for path in plane]
    assert max(sides[0]) < min(sides[1]) or max(sides[1]) < min(sides[0])


def test_a_folder_named_umap_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "umap").mkdir()
    monkeypatch.delitem(sys.modules, "umap", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert projection.umap(np.zeros((20, 2))) is None


def test_thin():
    assert report.thin(range(7)) == list(range(7))
    actual = report.thin(range(10_001))
    assert (len(actual), actual[0], actual[-1]) == (2000, 0, 10_000)
    assert set(np.diff(actual)) == {5, 6}


def test_curves_of_a_log_with_numbers_that_cannot_be_drawn(tmp_path):
    """An integer of JSON may be too large for floating point."""
    lines = ['{"step": 1, "rec": 3, "loss": 1' + "0" * 400 + "}", '{"step": 2, "rec": NaN}', '{"step": 3, "rec": 2}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (figure,) = report.training_curves(tmp_path)
    assert figure.caption.startswith("reconstruction") and "polyline" in figure.svg
