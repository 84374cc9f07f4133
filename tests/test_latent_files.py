"""`davae encode`, `decode` and `traverse`: files of latents equal what `TextVAE` computes; damaged ones are named."""

import json
import os

import numpy as np
import pytest
from test_compare import Checked
from tokenizer_fixtures import sentences

from davae_jax import InputError
from davae_jax.cli import latent_files
from davae_jax.cli.main import main
from davae_jax.inference.latent_files import latent_writer, read_latents
from davae_jax.model.latent import Posterior, traverse

# So many and so long that few programs are compiled.
TEXTS = [text for text in sentences(100) if 15 <= len(text) <= 20][:4]
A, B = TEXTS[:2]


@pytest.fixture
def davae(capsys, tiny_checkpoint):
    """Runs a command on the tiny checkpoint: (its output, its exit code, what it said)."""

    def call(*argv):
        code = main([str(arg) for arg in (*argv, "--model", tiny_checkpoint)])
        out, err = capsys.readouterr()
        return out, code, err

    return call


def rows_of(out):
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [json.dumps({"body": text}, ensure_ascii=False) for text in TEXTS]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_checkpoint, text_file):
    """The files of `davae encode` of the texts, by their suffixes; two batches, each in a group of its own."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("latents")
    paths = {suffix: folder / f"latents{suffix}" for suffix in (".npz", ".parquet")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_files, "GROUP_BATCHES", 1)
        for path in paths.values():
            argv = ["encode", "--model", tiny_checkpoint, "--input", text_file, "--field", "body", "--batch-size", 2]
            assert main([*map(str, argv), "--output", str(path)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["latents.npz", "latents.parquet"]
    return paths


def test_encoded_files_hold_the_posteriors_and_the_texts(files, tiny_vae):
    from pyarrow import parquet

    tiny_vae.batch_size, size = 2, tiny_vae.batch_size
    try:
        posterior, latent = tiny_vae.posterior(TEXTS), tiny_vae.encode(TEXTS, std_scale=0.0)
    finally:
        tiny_vae.batch_size = size
    archive = np.load(files[".npz"])
    assert sorted(archive.files) == ["logvar", "mean", "texts.jsonl"]
    assert [json.loads(line) for line in archive["texts.jsonl"].splitlines()] == TEXTS
    table = parquet.read_table(files[".parquet"])
    assert table.column_names == ["text", "mean", "logvar"] and table["text"].to_pylist() == TEXTS
    for name, expected in (("mean", posterior.mean), ("logvar", posterior.logvar)):
        assert archive[name].dtype == np.float32
        np.testing.assert_array_equal(archive[name], expected)
        np.testing.assert_array_equal(np.array(table[name].to_pylist(), np.float32), expected)
    np.testing.assert_array_equal(archive["mean"], latent)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_decode_of_encode_is_reconstruct(suffix, files, davae, tiny_vae):
    out, code, err = davae("decode", "--latents", files[suffix])
    assert (code, err) == (0, "")
    reconstructed = tiny_vae.reconstruct(TEXTS)
    assert rows_of(out) == [{"text": a, "decoded": b} for a, b in zip(TEXTS, reconstructed, strict=True)]
    assert tiny_vae.decode(tiny_vae.encode(TEXTS, std_scale=0.0)) == reconstructed


def test_latents_of_other_programs(davae, tiny_vae, tmp_path):
    z = np.random.default_rng(0).standard_normal((2, 4))
    np.save(tmp_path / "z.npy", z)
    np.savez(tmp_path / "z.npz", mean=np.zeros((2, 4)), z=z, other=-z)
    for argv, latents in (
        (("z.npy",), z),
        (("z.npz",), z),
        (("z.npz", "--key", "other"), -z),
        (("z.npz", "--key", "mean"), 0 * z),
    ):
        out, code, err = davae("decode", "--latents", tmp_path / argv[0], *argv[1:])
        assert (code, err) == (0, "")
        assert rows_of(out) == [{"decoded": text} for text in tiny_vae.decode(latents)]
    out, code, err = davae("decode", "--latents", tmp_path / "z.npy", "--key", "z")
    assert (out, code) == ("", 2) and err.endswith("z.npy: is one array, which --key cannot name\n")
    sampled = davae("decode", "--latents", tmp_path / "z.npy", "--temperature", 2, "--seed", 3)[0]
    assert [row["decoded"] for row in rows_of(sampled)] == tiny_vae.generate(z, temperature=2.0, seed=3)


def test_encode_reads_texts_of_the_command_line(davae, tiny_vae, tmp_path):
    out, code, err = davae("encode", A, B, "--output", tmp_path / "z.npz")
    assert (out, code, err) == (f"{tmp_path / 'z.npz'}: 2 texts, latents of 4 dimensions\n", 0, "")
    np.testing.assert_array_equal(np.load(tmp_path / "z.npz")["mean"], tiny_vae.posterior([A, B]).mean)
    davae("encode", A, "", "--output", tmp_path / "z.npz")
    assert len(np.load(tmp_path / "z.npz")["mean"]) == 2  # a row for each line, as for every command


def test_encode_over_a_mesh(davae, files, text_file, tmp_path):
    argv = ["--input", text_file, "--field", "body", "--batch-size", 8, "--mesh.data", 4, "--mesh.fsdp", 2]
    _, code, err = davae("encode", *argv, "--output", tmp_path / "z.npz")
    assert (code, err) == (0, "")
    for name in ("mean", "logvar"):
        np.testing.assert_allclose(np.load(tmp_path / "z.npz")[name], np.load(files[".npz"])[name], atol=1e-5)


def test_a_traversal_goes_in_steps_through_its_start():
    z, direction = np.array([[1.0, -2.0, 0.5], [0.0, 0.25, 8.0]]), np.array([0.6, 0.0, -0.8])
    line = traverse(z, direction, 0.5, 2)
    assert line.shape == (5, 2, 3)
    np.testing.assert_array_equal(line[2], z)
    np.testing.assert_allclose(np.diff(line, axis=0), np.broadcast_to(0.5 * direction, (4, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(line[4] - line[0], axis=-1), 2, rtol=1e-6)  # prior's deviations


def test_traverse(davae, tiny_vae, tmp_path):
    mean = tiny_vae.encode([A], std_scale=0.0)[0]
    np.save(tmp_path / "d.npy", [3.0, 0.0, -4.0, 0.0])
    options = ["--dim", 2, "--direction", tmp_path / "d.npy", "--step", 1.5, "--each-side", 1]
    out, code, err = davae("traverse", A, *options, "--html", tmp_path / "page.html")
    assert (code, err) == (0, "")
    rows = rows_of(out)
    units = np.array([[0, 0, 1, 0], [0.6, 0, -0.8, 0]], np.float32)
    latents = np.stack([mean + np.float32(offset) * unit for unit in units for offset in (-1.5, 0, 1.5)])
    names = [{"dim": 2}] * 3 + [{"direction": 1}] * 3
    assert rows == [
        {"text": A, **name, "offset": offset, "decoded": text}
        for name, offset, text in zip(names, [-1.5, 0.0, 1.5] * 2, tiny_vae.decode(latents), strict=True)
    ]
    assert rows[1]["decoded"] == rows[4]["decoded"] == tiny_vae.reconstruct([A])[0]
    for direction, expected in ((2, rows[:3]), (np.array([3.0, 0, -4, 0]), rows[3:])):
        assert tiny_vae.traverse(A, direction, step=1.5, each_side=1) == [row["decoded"] for row in expected]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<h2>{A}</h2>" in page and "<b>dimension 2</b>" in page and f"row 1 of {tmp_path / 'd.npy'}" in page
    Checked(page)
    assert page.count("<li") <= 6 and all(row["decoded"].split()[0] in page for row in rows if row["decoded"].split())


def test_traverse_the_prior(davae, tiny_vae):
    out, code, err = davae("traverse", "--dim", 0, 3)
    assert (code, err) == (0, "")
    rows = rows_of(out)
    assert [(row["text"], row["dim"]) for row in rows] == [(None, 0)] * 7 + [(None, 3)] * 7
    assert [row["offset"] for row in rows[:7]] == [-3, -2, -1, 0, 1, 2, 3]
    assert rows[3]["decoded"] == tiny_vae.decode(np.zeros((1, 4)))[0] == tiny_vae.traverse(None, 3)[3]


# What is refused: one line, and nothing is written.


def bad_file(folder, kind):
    """Writes a file of latents that cannot be used. Returns it and what is said about it."""
    path = folder / "z.npz"
    values = {
        "width": (dict(mean=np.zeros((2, 5))), "contains latents of width 5; those of the model have 4"),
        "nan": (dict(mean=np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]])), "row 2 contains NaN or infinity"),
        "overflow": (dict(mean=np.full((1, 4), 1e300)), "row 1 contains NaN or infinity"),
        "empty": (dict(mean=np.zeros((0, 4))), "contains no latents"),
        "key": (dict(a=np.zeros((2, 4))), "has neither 'z' nor 'mean'; available with --key: a"),
        "shape": (dict(mean=np.zeros((2, 4, 1))), "must contain rows of latents, not an array of shape [2, 4, 1]"),
        "strings": (dict(mean=np.array([["a"] * 4])), "contains <U1, not numbers"),
        "objects": (dict(mean=np.array([[None] * 4])), "cannot be read (Object arrays cannot be loaded"),
    }
    if kind in values:
        np.savez(path, **values[kind][0])
        return path, values[kind][1]
    if kind == "truncated":
        np.savez(path, mean=np.zeros((20, 4)))
        path.write_bytes(path.read_bytes()[:200])
        return path, "cannot be read ("
    if kind == "nothing":
        path.touch()
        return path, "cannot be read (No data left in file)"
    if kind == "missing":
        return path, "cannot be read (No such file or directory)"
    if kind == "folder":
        path.mkdir()
        return path, "is a folder, not a file"
    if kind == "pipe":
        os.mkfifo(path)
        return path, "is a pipe or a device, not a file"
    assert kind == "suffix"
    return folder / "z.csv", "unknown suffix; latents are read from .npz, .npy, .parquet"


KINDS = ["width", "nan", "overflow", "empty", "key", "shape", "strings", "objects"]
KINDS += ["truncated", "nothing", "missing", "folder", "pipe", "suffix"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_be_decoded(kind, davae, tmp_path):
    path, said = bad_file(tmp_path, kind)
    before = set(tmp_path.iterdir())
    out, code, err = davae("decode", "--latents", path, "--output", tmp_path / "out.jsonl")
    assert (out, code) == ("", 2 if kind == "suffix" else 1)
    assert err.startswith(f"davae decode: error: {path}: {said}") and err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_a_table_that_cannot_be_decoded(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for columns, said in (
        ({"mean": [[1.0, 2.0], [3.0]]}, "row 2 has 1 numbers, and row 1 has 2"),
        ({"mean": [[1.0, 2.0], None]}, "row 2 has no latent"),
        ({"mean": [[1.0, 2.0], [1.0, None]]}, "row 2 contains NaN or infinity"),
        ({"mean": [[1.0, 2.0, 3.0]]}, "contains latents of width 3; those of the model have 2"),
        ({"mean": [1.0]}, "has neither 'z' nor 'mean'; available with --key: nothing"),
        ({"a": [[1.0, 2.0]], "b": ["x"]}, "has neither 'z' nor 'mean'; available with --key: a"),
    ):
        parquet.write_table(pa.table(columns), tmp_path / "z.parquet")
        with pytest.raises(InputError) as e:
            read_latents(tmp_path / "z.parquet", 2)
        assert str(e.value) == f"{tmp_path / 'z.parquet'}: {said}"
    (tmp_path / "z.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(InputError, match=r"z\.parquet: cannot be read \("):
        read_latents(tmp_path / "z.parquet", 2)


def test_a_file_that_fails_in_its_middle_leaves_the_old_one(tmp_path):
    """Nothing else is left in the folder."""
    pytest.importorskip("pyarrow")
    posterior = Posterior(np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32))
    for name in ("z.npz", "z.parquet"):
        (tmp_path / name).write_text("old", encoding="utf-8")
        with pytest.raises(KeyboardInterrupt), latent_writer(tmp_path / name, 2) as add:
            add(["a"], posterior)
            raise KeyboardInterrupt
        assert (tmp_path / name).read_text(encoding="utf-8") == "old"
        with latent_writer(tmp_path / name, 2) as add:
            add(["a"], posterior)
            add(["b\nc", "d"], Posterior(np.zeros((2, 2)), np.ones((2, 2))))
        latents = read_latents(tmp_path / name, 2)
        assert latents.texts == ["a", "b\nc", "d"] and latents.values.tolist() == [[1, 1], [0, 0], [0, 0]]
        assert read_latents(tmp_path / name, 2, "logvar").values.tolist() == [[0, 0], [1, 1], [1, 1]]
    assert {path.name for path in tmp_path.iterdir()} == {"z.npz", "z.parquet"}


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["encode", "a", "--output", "{0}/z.csv"], 2, "--output must be a file that ends in .npz or .parquet, not {0}"),
        (["encode", "a", "--output", "{0}/no/z.npz"], 1, "{0}/no/z.npz: cannot be written ({0}/no does not exist)"),
        (["encode", "a", "--input", "{0}/t", "--output", "{0}/z.npz"], 2, "--input cannot be given together with"),
        (["encode", "--input", "{0}/t.txt", "--output", "{0}/z.npz"], 1, "{0}/t.txt: cannot be read (No such file"),
        (["encode", "--input", "{0}/blank.txt", "--output", "{0}/z.npz"], 1, "{0}/blank.txt: contains no text"),
        (["encode", "--input", "{0}/bad.jsonl", "--output", "{0}/z.npz"], 1, "{0}/bad.jsonl: line 2: "),
        (["encode", "a", "--field", "b", "--output", "{0}/z.npz"], 2, "--field needs an --input of JSON Lines"),
        (["traverse", "a"], 2, "--dim or --direction must be given"),
        (["traverse", "a", "--dim", "4"], 2, "--dim must be a dimension of 0 to 3, not 4"),
        (["traverse", "a", "--dim", "0", "--step", "0"], 2, "--step must be a number above 0, not 0.0"),
        (["traverse", "a", "--dim", "0", "--step", "nan"], 2, "--step must be a number above 0, not nan"),
        (["traverse", "a", "--dim", "0", "--each-side", "0"], 2, "--each-side must be 1 to 5000, not 0"),
        (["traverse", "a", "--dim", "0", "--key", "z"], 2, "--key is used only with --direction"),
        (["traverse", "a", "--direction", "{0}/zero.npy"], 1, "{0}/zero.npy: row 2 is 0, which is no direction"),
        (["traverse", "--dim", "0", "--html", "{0}"], 1, "{0}: is a folder; --html needs a file"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refused(argv, code, said, davae, tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 1}\n', encoding="utf-8")
    np.save(tmp_path / "zero.npy", np.eye(2, 4) * [1, 0, 0, 0])
    before = set(tmp_path.iterdir())
    out, found, err = davae(*[word.format(tmp_path) for word in argv])
    *warnings, line = err.splitlines()
    assert (out, found) == ("", code) and all("warning: " in warning for warning in warnings)
    assert line.startswith(f"davae {argv[0]}: error: {said.format(tmp_path)}"), line
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda v: v.traverse(A, 4), "direction must be a dimension of 0 to 3, not 4"),
        (lambda v: v.traverse(A, np.zeros(4)), "direction must be a vector of finite numbers that are not all 0"),
        (lambda v: v.traverse(A, np.ones(3)), "direction must have shape [4], not [3]"),
        (lambda v: v.traverse(A, 0, step=-1), "step must be a number above 0, not -1"),
        (lambda v: v.traverse(A, 0, each_side=0), "each_side must be 1 to 5000, not 0"),
        (lambda v: v.decode(np.full((1, 4), np.nan)), "the latent contains NaN or infinity"),
        (lambda v: v.decode(np.zeros((1, 3))), "the latent must have shape [1, 4], not [1, 3]"),
    ],
)
def test_invalid_arguments_raise(tiny_vae, call, said):
    with pytest.raises(InputError) as e:
        call(tiny_vae)
    assert (str(e.value), e.value.exit_code) == (said, 2)
