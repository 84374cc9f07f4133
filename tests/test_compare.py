"""`davae compare`: statistics against direct computation, invalid studies, and a study that is run and resumed."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats
from test_train import TEXTS, TINY, environment

from davae_jax.cli import compare
from davae_jax.cli.compare import Study, complete_run, read_study, setting_folder
from davae_jax.cli.main import main
from davae_jax.evaluation.comparison import (
    caveats,
    compare_settings,
    format_table,
    holm,
    is_finite_number,
    summary_statistics,
    welch,
)
from davae_jax.reports import charts
from davae_jax.reports.comparison_page import figure, page
from davae_jax.utils.errors import InputError

DAMAGED_FILES = [  # of a run of a study
    ("seed-0.json", '{"train": 5}'),
    ("seed-0.json", '{"train": [1], "evaluate": []}'),
    ("seed-0.json", "{"),
    ("seed-0/evaluation.json", '{"kl": "x"}'),
    ("seed-0/evaluation.json", '{"warnings": [5]}'),
    ("seed-0/evaluation.json", "{}"),
]
STUDIES = Path(__file__).parent.parent / "studies"
RESULTS = {
    "plain": {seed: {"kl": kl, "rec_nll": 20.0 - kl, "bleu": 50.0} for seed, kl in enumerate((1.0, 1.1, 0.9))},
    "better": {seed: {"kl": kl, "rec_nll": 20.0 - kl, "bleu": 50.0} for seed, kl in enumerate((5.0, 5.2, 4.9))},
    "alike": {seed: {"kl": kl, "rec_nll": 20.0 - kl, "bleu": 50.0} for seed, kl in enumerate((1.2, 0.9, 1.1))},
}


def test_welch_by_hand():
    """t = Δ/√(s²/n + s²/m) with Welch's degrees of freedom; integrates the density of Student's t numerically."""
    a, b = [1.0, 1.1, 0.9], [1.2, 0.9, 1.4, 1.3]
    va, vb = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 4
    t = abs(np.mean(a) - np.mean(b)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)
    x = np.linspace(t, t + 2000, 4_000_001)
    density = (
        math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2)) * (1 + x**2 / df) ** (-(df + 1) / 2)
    )
    assert welch(a, b) == pytest.approx(2 * np.trapezoid(density, x), rel=1e-3)
    assert welch([1.0], b) is None
    assert welch([2.0, 2.0], [2.0, 2.0]) is welch([2.0, 2.0], [3.0, 3.0]) is welch([1.0, math.nan], b) is None


def test_welch_with_one_constant_side(recwarn):
    """Equals the one-sample t-test of the other side against the constant, without a warning."""
    varying = [1.0, 1.1, 0.9, 1.3]
    assert welch([1.5] * 3, varying) == pytest.approx(stats.ttest_1samp(varying, 1.5).pvalue)
    assert not recwarn.list


def test_holm_by_hand():
    """The smallest p-value is multiplied by 3, the next by 2; results are non-decreasing and at most 1."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, None, 0.6]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_table_of_means_and_deviations():
    table = {measure.key: cells for measure, cells in compare_settings(RESULTS).items()}
    assert table.keys() == {"kl", "rec_nll", "bleu"}  # metrics that no run has are omitted
    assert table["kl"]["plain"].mean == pytest.approx(1.0) and table["kl"]["plain"].deviation == pytest.approx(0.1)
    assert table["kl"]["plain"].p is None and table["kl"]["better"].p < 0.01 and table["kl"]["alike"].p > 0.3
    text = format_table(RESULTS)
    assert "| better | 3 | 5.03 ± 0.15* | 14.97 ± 0.15* | 50.0 ± 0.0 |" in text
    assert "| plain | 3 | 1.00 ± 0.10 | 19.00 ± 0.10 | 50.0 ± 0.0 |" in text
    assert "differs from “plain”" in text and "warning" not in text


def test_studies_of_the_project_are_valid():
    """All options are known; demo.toml contains every setting of the other studies, with the same options."""
    studies = {path.stem: read_study(path) for path in STUDIES.glob("*.toml")}
    assert studies.keys() == {"demo", "dialogue", "ptb"}
    demo_options = _specific_options(studies["demo"])
    for name in ("dialogue", "ptb"):
        assert len(studies[name].seeds) >= 3
        assert _specific_options(studies[name]).items() <= demo_options.items()


def _specific_options(study):
    """Returns the options of each setting that the first setting does not have."""
    common = next(iter(study.settings.values()))
    return {name: options[len(common) :] for name, options in study.settings.items()}


def test_caveats_of_few_seeds():
    few = {"a": {0: {"kl": 1.0, "warnings": ["K is small"]}}, "b": {0: {"kl": 2.0}, 1: {"kl": 3.0}}}
    warnings = caveats(few)
    assert "only 1 seed" in warnings[0] and warnings[1] == "1 of 3 runs: K is small"
    assert f"warning: {warnings[0]}" in format_table(few)
    assert "| a | 1 | 1.00 |" in format_table(few)


class Checked(HTMLParser):
    """Checks that all tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "path", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "path", "line", "polyline"):
            assert self.open.pop() == tag


def test_page_is_self_contained():
    text = page("a <study>", RESULTS, {name: ["--steps", "3"] for name in RESULTS})
    seen = Checked(text).seen
    assert "a &lt;study&gt;" in text and not any({"src", "href"} & attrs.keys() for _, attrs in seen)
    assert sum(tag == "svg" for tag, _ in seen) == 1 + 3  # the plane, and one chart per metric
    dots = [attrs["d"] for tag, attrs in seen if tag == "path"]
    assert sum(d.count("M") for d in dots) == 9 * 4


def test_dot_positions_match_values():
    """The largest value is rightmost, equal values share a position, non-finite values are dropped."""
    svg = charts.strips({"a": [1.0, 3.0], "b": [3.0, math.nan]}, {"a": "#111111", "b": "#222222"}, title="t")
    a, b = (path.split('"')[0].split("h0")[:-1] for path in svg.split(' d="')[1:])
    xs = [float(point[1:].split()[0]) for point in a + b]
    assert len(xs) == 3 and xs[0] < xs[1] == xs[2]
    ticks = {node.text: float(node.get("x")) for node in ElementTree.fromstring(svg).iter("text")}
    assert ticks["1"] == pytest.approx(xs[0], abs=0.6) and ticks["3"] == pytest.approx(xs[1], abs=0.6)


def test_figure_for_a_paper():
    """Each setting's number is in the plane and next to its name, with one dot per value and one scale per column."""
    text = figure("a <study>", RESULTS)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "href" not in text
    texts = list(root.iter("{http://www.w3.org/2000/svg}text"))
    labels, small = [node.text for node in texts], [node.text for node in texts if node.get("class") == "small"]
    assert all(small.count(number) == 2 for number in "123") and all(labels.count(name) == 1 for name in RESULTS)
    dots = [d for node in root.iter("{http://www.w3.org/2000/svg}path") for d in node.get("d").split("M")[1:]]
    assert len(dots) == 9 + 3  # the plane and the legend; these runs have no metric of the columns
    single_run = {"a": {0: {"kl": 1.0, "rec_nll": 2.0, "iw_nll": 3.0, "mutual_information": math.nan}}}
    assert "−log p(x)" in figure("t", single_run)


def test_runs_without_a_value():
    """Incomplete settings give a warning and no p-value; a study without any value can still be drawn."""
    incomplete = RESULTS["better"] | {1: {"kl": 5.0, "rec_nll": None, "bleu": math.inf}}
    text = format_table({"plain": RESULTS["plain"], "better": incomplete})
    assert "| better | 3 | 4.97 ± 0.06* | 15.05 ± 0.07 (2 of 3) | 50.0 ± 0.0 (2 of 3) |" in text
    assert "warning: distortion, nats: 1 of 3 runs of “better” have no finite value" in text
    assert summary_statistics({"plain": RESULTS["plain"], "better": incomplete})["rec_nll"]["better"]["p"] is None
    empty = {"a": {0: {"kl": None, "rec_nll": None, "bleu": 3.0}}}
    Checked(page("t", empty, {"a": []}))
    ElementTree.fromstring(figure("t", empty))


def test_plugins_are_local_to_their_setting(tmp_path):
    """Two settings may register the same name; a setting without its plugin is rejected. Different budgets give a
    warning."""
    body = "from dataclasses import dataclass\nfrom davae_jax.regularizers import Regularizer, register\n"
    body += '@register("mine")\n@dataclass(frozen=True)\nclass Mine(Regularizer):\n    """It."""\n'
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(body, encoding="utf-8")
    settings = {name: f"--plugin {tmp_path / name}.py --regularizers.mine.weight 1" for name in "ab"}
    assert read_study(write(tmp_path / "study.toml", settings=settings)).notes == []
    study = read_study(write(tmp_path / "study.toml", settings=settings | {"longer": "--steps 7"}))
    assert study.notes == ["settings differ in --steps: their budget or data are not the same"]
    assert study.notes[0] in format_table(RESULTS, study.notes)
    with pytest.raises(InputError, match="mine"):
        read_study(write(tmp_path / "study.toml", settings=settings | {"c": "--regularizers.mine.weight 1"}))


def test_similar_warnings_are_merged():
    results = {"a": {i: {"kl": 1.0, "warnings": [f"of 50 samples only {i}.5 count"]} for i in range(3)}}
    assert caveats(results) == ["3 of 3 runs: of 50 samples only 0.5 count (values of the first run)"]


def test_labels_do_not_overlap():
    """Twelve settings with equal values have labels at distinct positions."""
    points = {str(i): ([1.0], [1.0]) for i in range(12)} | {"far": ([2.0], [2.0])}
    svg = charts.plane(points, dict.fromkeys(points, "#111111"), title="t")
    positions = {label.split(' text-anchor="middle"')[0] for label in svg.split('<text class="small"')[1:]}
    assert len(positions) == 13


def write(path, **values):
    """Writes a study as TOML and returns its path."""
    quoted = lambda v: json.dumps(v, ensure_ascii=False)  # noqa: E731
    lines = [f"{name} = {quoted(value)}" for name, value in values.items() if name != "settings"]
    lines += ["[settings]", *(f"{quoted(n)} = {quoted(o)}" for n, o in values.get("settings", {}).items())]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(), "[settings]"),
        (dict(trian="--steps 3"), "'trian' is not a known entry; available: train, evaluate, seeds, settings"),
        (dict(seeds=[1, 1], settings={"a": ""}), "seeds must be"),
        (dict(seeds=[], settings={"a": ""}), "seeds must be"),
        (dict(seeds=[[1], [2]], settings={"a": ""}), "seeds must be"),
        (dict(seeds=[True], settings={"a": ""}), "seeds must be"),
        (dict(settings={"a": 3}), "settings.a must be a string of options"),
        (dict(settings={"a": "--steps 0"}), "--steps must be at least 1, not 0"),
        (dict(settings={"a": "--nonsense 3"}), "settings.a: "),
        (dict(settings={"a": "--seed 3"}), "settings.a: --seed and --run-dir"),
        (dict(settings={"a": "--run_dir=x"}), "settings.a: --seed and --run-dir"),
        (dict(settings={"comparison.md": ""}), "would use the folder comparison.md, which is reserved"),
        (dict(settings={"a": ""}, evaluate="--dta x"), "evaluate: "),
        (dict(settings={"a": ""}, evaluate="--json x"), "evaluate: --model and --json"),
        (dict(settings={"a b": "", "a-b": ""}), "settings 'a b' and 'a-b' would use the same folder"),
        (dict(train="'", settings={"a": ""}), "No closing quotation"),
        (dict(settings={"长" * 86: ""}), "has more than 255 bytes"),
    ],
)
def test_invalid_studies(values, message, tmp_path, capsys):
    path = write(tmp_path / "study.toml", **values)
    assert main(["compare", str(path), "--output", str(tmp_path / "out")]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"davae compare: error: {path}: ") and message in line
    assert not (tmp_path / "out").exists()


def test_a_run_whose_folder_cannot_be_made_does_not_keep_the_others_back(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b").touch()
    done = []

    def completed(study, name, seed, folder):
        (folder.parent).mkdir(exist_ok=True)
        done.append(name)
        return {"kl": 1.0}

    monkeypatch.setattr(compare, "complete_run", completed)
    path = write(tmp_path / "study.toml", seeds=[0], settings={"a": "", "b": "", "c": ""})
    assert main(["compare", str(path), "--output", str(out)]) == 1 and done == ["a", "c"]
    assert capsys.readouterr().err == f"davae compare: error: {out / 'b'}: File exists\n"


def test_an_option_of_several_values_replaces_the_common_one(tmp_path):
    """Given twice on one command line, its values would be joined."""
    settings = {"same": "", "other": "--data.train c --data.field=u"}
    common = "--data.train a b --steps 3 --data.field t"
    study = read_study(write(tmp_path / "study.toml", train=common, settings=settings))
    assert study.settings["same"] == ["--data.train", "a", "b", "--steps", "3", "--data.field", "t"]
    assert study.settings["other"] == ["--steps", "3", "--data.train", "c", "--data.field=u"]
    assert study.notes == ["settings differ in --data.train: their budget or data are not the same"]


def test_a_nul_in_the_options_of_a_study(tmp_path):
    """No program can be started with it."""
    for entries in (dict(train="--data.train a\0b"), dict(evaluate="--data a\0b")):
        path = write(tmp_path / "study.toml", **entries, settings={"a": ""})
        with pytest.raises(InputError, match=r"study\.toml: .*a\0b: contains a NUL character"):
            read_study(path)


def test_unreadable_studies(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml: cannot be read \(No such file"):
        read_study(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = b")
    with pytest.raises(InputError, match=r"bad\.toml: is not TOML"):
        read_study(tmp_path / "bad.toml")


def test_setting_folder():
    assert (
        setting_folder("β 0.1, no KL/free") == "β-0.1-no-KL-free"
        and setting_folder("///") == setting_folder("..") == "setting"
    )


def test_runs_of_an_earlier_version_are_complete(tmp_path):
    """The stored options have their old names. Another value, or a missing option, makes it a different run."""
    folder, measures = tmp_path / "a" / "seed-0", {"kl": 1.0}
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(measures), encoding="utf-8")
    stored = {"train": ["--data.pieces", "60", "--data.entries=80"], "evaluate": ["--n", "3"]}
    (folder.parent / "seed-0.json").write_text(json.dumps(stored), encoding="utf-8")
    renamed = ["--data.decoder-vocab-size", "60", "--data.encoder-vocab-size=80"]
    for options in (stored["train"], renamed):
        assert complete_run(Study({"a": options}, stored["evaluate"], [0], []), "a", 0, folder) == measures
    for options in (["--data.decoder-vocab-size", "61", *renamed[2:]], renamed[:2]):
        with pytest.raises(InputError, match="was trained with other options"):
            complete_run(Study({"a": options}, stored["evaluate"], [0], []), "a", 0, folder)


def test_an_interrupted_comparison_leaves_nothing_beside(tmp_path, monkeypatch):
    """What a killed program was writing is removed, in the folder and in those of the settings."""
    monkeypatch.setattr(compare, "complete_run", lambda *_: {"kl": 1.0})
    study = write(tmp_path / "study.toml", train="--steps 1", evaluate="", seeds=[0], settings={"a": ""})
    out = tmp_path / "out"
    leftovers = [out / ".d5b39372.29921.partial", out / "a" / ".0123abcd.7.partial"]
    leftovers[1].parent.mkdir(parents=True)
    for path in (*leftovers, out / "notes.partial"):
        path.touch()
    assert main(["compare", str(study), "--output", str(out)]) == 0
    assert not any(path.exists() for path in leftovers) and (out / "notes.partial").exists()


def test_a_comparison_of_another_program_is_not_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    write(tmp_path / "study.toml", settings={"plain": ""})
    notes = tmp_path / "out" / "comparison.md"
    notes.write_text("my notes", encoding="utf-8")
    argv = ["compare", str(tmp_path / "study.toml"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(compare, "complete_run", lambda *_: {"kl": 1.0, "rec_nll": 2.0})
    for content in (None, "{}", "[1]"):
        if content:
            (tmp_path / "out" / "comparison.json").write_text(content, encoding="utf-8")
        code = main(argv)
        if content != "[1]":
            assert code == 1 and "out/comparison." in capsys.readouterr().err
            assert notes.read_text(encoding="utf-8") == "my notes"
    assert code == 0 and notes.read_text(encoding="utf-8") != "my notes"  # damaged, as by a crash
    assert main(argv) == 0


def test_an_output_that_cannot_be_a_run_folder_is_refused_before_the_first_run(tmp_path, capsys):
    study = write(tmp_path / "study.toml", train="--steps 1", evaluate="", seeds=[0], settings={"a": "", "b": ""})
    out = tmp_path / "\udcff"
    assert main(["compare", str(study), "--output", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("davae compare: error: ") and "UTF-8" in line
    assert not out.exists()


@pytest.mark.parametrize(("name", "content"), DAMAGED_FILES)
def test_a_damaged_file_of_a_run_is_written_anew(name, content, tmp_path, monkeypatch):
    """The run is trained, which a complete one does not repeat, and evaluated again."""
    folder, measures = tmp_path / "a" / "seed-0", {"kl": 1.0, "rec_nll": None}
    folder.mkdir(parents=True)
    options = {"train": ["--steps", "3"], "evaluate": ["--n", "3"]}
    (folder.parent / "seed-0.json").write_text(json.dumps(options), encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps(measures), encoding="utf-8")
    (folder.parent / name).write_text(content, encoding="utf-8")

    def run_python(argv, log):
        if "evaluate" in argv:
            (folder / "evaluation.json").write_text(json.dumps(measures), encoding="utf-8")

    monkeypatch.setattr(compare, "_run_python", run_python)
    study = Study({"a": options["train"]}, options["evaluate"], [0], [])
    assert complete_run(study, "a", 0, folder) == measures
    assert json.loads((folder.parent / "seed-0.json").read_text(encoding="utf-8")) == options


def test_numbers_that_are_not_finite_in_floating_point():
    """JSON has integers of any size."""
    numbers = (1, -2.5, 10**400, -(10**400), float("nan"), float("inf"), True, None, "1")
    assert [is_finite_number(x) for x in numbers] == [True, True] + [False] * 7


@pytest.mark.slow
def test_two_settings(tmp_path, monkeypatch, capsys):
    """Runs are trained and evaluated. A second start only reads them. A failed setting is reported."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    common = f"--data.train {tmp_path / 'texts.txt'} --steps 4 {' '.join(map(str, TINY))}"
    study = dict(train=common, evaluate=f"--data {tmp_path / 'texts.txt'} --n 20 --samples 2", seeds=[0, 1])
    settings = {"plain": "--beta.max 0.1", "capacity": "--regularizers.capacity.weight 1"}
    path, out = write(tmp_path / "study.toml", **study, settings=settings), tmp_path / "out"
    assert main(["compare", str(path), "--output", str(out)]) == 0
    first = capsys.readouterr().out
    assert "| plain | 2 | " in first and "| capacity | 2 | " in first
    stored = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert stored["seeds"] == [0, 1] and stored["metrics"]["plain"]["0"]["n"] == 20
    Checked((out / "comparison.html").read_text(encoding="utf-8"))
    ElementTree.parse(out / "comparison.svg")
    assert (out / "comparison.md").read_text(encoding="utf-8").startswith("| setting | seeds | rate: KL, nats | ")

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent != out}
    assert main(["compare", str(path), "--output", str(out)]) == 0
    assert capsys.readouterr().out == first
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent != out}

    # A damaged evaluation, or other evaluation options: the run is evaluated again, but not trained again.
    (out / "plain" / "seed-1" / "evaluation.json").write_text("[]")
    trained = {p: p.read_bytes() for p in out.rglob("metrics.jsonl")}
    write(path, **study | dict(evaluate=study["evaluate"] + " --seed 3", seeds=[1]), settings=settings)
    assert main(["compare", str(path), "--output", str(out)]) == 0
    assert "| plain | 1 | " in capsys.readouterr().out
    assert len(trained) == 4 and trained == {p: p.read_bytes() for p in out.rglob("metrics.jsonl")}
    assert json.loads((out / "plain" / "seed-1.json").read_text(encoding="utf-8"))["evaluate"][-2:] == ["--seed", "3"]

    write(path, **study, settings={"plain": "--beta.max 0.2", "capacity": settings["capacity"]})
    assert main(["compare", str(path), "--output", str(out)]) == 1
    output = capsys.readouterr()
    assert (
        f"{out / 'plain' / 'seed-0'}: was trained with other options" in output.err
        and "| capacity | 2 | " in output.out
    )
