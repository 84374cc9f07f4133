"""Files that the user names: links are followed, devices are written to, and the longest names work."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN

from davae_jax.cli.main import main
from davae_jax.tokenizers.files import read_file
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import check_local, check_output, file_sha256, read_bounded, write_output, write_text
from davae_jax.utils.json_files import read_json_object


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to("real")
    for text in ("first", "second"):
        check_output(tmp_path / "link")
        write_output(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o640])
def test_permissions_are_kept(mode, tmp_path):
    path = tmp_path / "f.json"
    path.touch()
    path.chmod(mode)
    write_output(path, "new")
    assert path.stat().st_mode & 0o777 == mode and path.read_text(encoding="utf-8") == "new"


def test_errors_name_the_file_and_not_the_temporary_one(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "f.json"):
        with pytest.raises(OSError) as e:
            write_text(path, "new")
        assert e.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    check_output(tmp_path / "pipe")
    write_output(tmp_path / "pipe", "文")
    assert os.read(reader, 10).decode() == "文" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_the_file_of_standard_output_is_not_replaced(tmp_path):
    program = "import sys; from pathlib import Path; from davae_jax.utils.files import write_output; print('first'); "
    program += "write_output(Path('/dev/stdout'), 'second\\n'); print('third')"
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", program], stdout=log, check=True, cwd=Path(__file__).parent.parent)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "first\nsecond\nthird\n"


@pytest.mark.parametrize("reason", [errno.EBUSY, errno.EROFS, errno.EACCES])
def test_a_file_that_cannot_be_replaced_is_written_to(reason, tmp_path, monkeypatch):
    """One that is mounted alone, as into a container; or in a folder into which nothing else can be written."""

    def fails(*_):
        raise OSError(reason, os.strerror(reason))

    path = tmp_path / "f.json"
    path.write_text("a longer text than the new one", encoding="utf-8")
    monkeypatch.setattr(Path, "replace", fails)
    write_output(path, "new")
    assert path.read_text(encoding="utf-8") == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match=os.strerror(reason)):
        write_output(tmp_path / "none.json", "new")


def test_a_file_in_a_read_only_folder_can_be_written(tmp_path, monkeypatch):
    path = tmp_path / "f.json"
    path.touch()
    monkeypatch.setattr(os, "access", lambda where, mode: Path(where) == path)
    check_output(path)
    with pytest.raises(InputError, match="Permission denied"):
        check_output(tmp_path / "none.json")


@pytest.mark.parametrize(
    "argv",
    [
        "convert m {}/m",
        "prepare --input t.txt --output {}/p",
        "compare s.toml --output {}/study",
    ],
)
@pytest.mark.parametrize("place", ["s3://bucket", "gs:/bucket", "file:///tmp", "~"])
def test_results_are_not_written_to_a_folder_that_is_called_as_an_address(argv, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "small", "m", ignore=lambda *_: ["io.npz"])
    Path("t.txt").write_text("a\n", encoding="utf-8")
    Path("s.toml").write_text('[settings]\na = ""', encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    words = argv.format(place).split()
    assert main(words) in (1, 2)
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and (str(Path(place)) in error[0]) and sorted(tmp_path.iterdir()) == before


def test_folders_that_only_look_like_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "C:/x", "a:b/c", "~old/x", "/s3:/x", "x/s3:/y", "s3:", "."):
        check_local(Path(name))
    for name in ("s3://x", "~/x"):
        with pytest.raises(InputError, match=str(Path(name))):
            check_local(Path(name))
        (tmp_path / Path(name).parts[0]).mkdir()
        check_local(Path(name))


@pytest.mark.parametrize("name", ["n" * 255, "文" * 85], ids=["ASCII", "Chinese"])
def test_a_name_of_255_bytes(name, tmp_path):
    check_output(tmp_path / name)
    write_output(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "no" / "file", tmp_path / ("n" * 256), tmp_path / "loop"):
        with pytest.raises(InputError) as e:
            check_output(path, "--json")
        assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "argv",
    [
        "reconstruct --model m --input t.txt --output t.txt",
        "reconstruct --model m --input t.txt --output m/config.json",
        "reconstruct --model m --tokenizers k --input t.txt --output k/vocab.txt",
        "attribute x --model m --having u.txt --lacking t.txt --output link",
        "evaluate --model m --data t.txt --json link",
        "evaluate --model m --data t.txt --html ./t.txt",
        "evaluate --model m --data t.txt --json m/train.json",
        "check m --json m/config.json",
        "check k --json k/manifest.json",
        "sample --model r/checkpoints/3 --output r/samples.jsonl",
        "evaluate --model r/checkpoints/3 --data t.txt --json r/config.json",
        "plan --data.train u.txt t.txt --json t.txt",
    ],
)
def test_what_a_command_reads_is_not_replaced_by_its_result(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["t.txt", "u.txt", "m/config.json", "m/train.json", "k/vocab.txt", "k/manifest.json"]
    names += ["r/config.json", "r/samples.jsonl", "r/checkpoints/3/params/d"]
    for path in map(Path, names):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(str(path), encoding="utf-8")
    Path("link").symlink_to("t.txt")
    assert main(argv.split()) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and str(Path(argv.split()[-1])) in error[0]
    assert all(path.read_text(encoding="utf-8") == str(path) for path in map(Path, names)) and Path("link").is_symlink()


def test_a_json_file_is_bounded(tmp_path):
    (tmp_path / "a.json").write_bytes(b"{" + b" " * (1 << 24) + b"}")
    with pytest.raises(InputError, match=r"a\.json: is larger than 16,384 KiB"):
        read_json_object(tmp_path / "a.json")
    assert read_json_object(tmp_path / "a.json", 1 << 25) == {}


@pytest.mark.parametrize("read", [read_json_object, read_file, file_sha256, lambda path: read_bounded(path, 10)])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_in_place_of_a_file_is_refused(read, kind, tmp_path):
    """It would be read for ever, or waited for."""
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(InputError) as e:
        read(path)
    assert str(e.value).startswith(f"{path}: ")


def test_no_more_is_read_than_the_bound(tmp_path):
    path = tmp_path / "x"
    for size in (0, 9, 10):
        path.write_bytes(bytes(size))
        assert read_bounded(path, 10) == bytes(size)
    path.write_bytes(bytes(11))
    with pytest.raises(InputError, match=str(path)):
        read_bounded(path, 10)
    with pytest.raises(InputError, match="/dev/zero"):
        read_bounded(Path("/dev/zero"), 10, pipes=True)
