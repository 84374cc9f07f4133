"""What programs do when nobody reads their output, or it is closed."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from davae_jax.cli.base import run_cli
from davae_jax.parallel.backend import backend_problem

ROOT = Path(__file__).parent.parent
# Output to a pipe is buffered, unless the environment says otherwise.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
WORK = """
import sys
from pathlib import Path
from davae_jax.cli.base import exit_with, going_on_without_reader, run_cli

def work():
    with going_on_without_reader():
        for stream in (sys.stdout, sys.stderr):
            for i in range(20_000):
                print("a line", i, file=stream)
            stream.flush()
        Path("done").touch()
        return 130

exit_with(lambda: run_cli(work, "program"))
"""
FAILS = """
from davae_jax.cli.base import exit_with, run_cli
from davae_jax.utils.errors import InputError

def work():
    {print}
    raise {error}

exit_with(lambda: run_cli(work, "program"))
"""
FILTER = """
import sys
from davae_jax.cli.base import run_cli
sys.exit(run_cli(lambda: [print("a line", i) for i in range(20_000)] and None, "program"))
"""


def run_without_reader(code, cwd):
    """Runs a program whose standard output and error are pipes that nobody reads. Returns its exit code."""
    pipes = [os.pipe() for _ in range(2)]
    for reader, _ in pipes:
        os.close(reader)
    (out, err), env = (writer for _, writer in pipes), ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], stdout=out, stderr=err, cwd=cwd, env=env).returncode


def test_work_goes_on_without_a_reader(tmp_path):
    assert run_without_reader(WORK, tmp_path) == 130 and (tmp_path / "done").exists()


@pytest.mark.parametrize("output", ["pass", "print('a line')"])
@pytest.mark.parametrize(
    ("error", "code"), [("InputError('wrong', exit_code=2)", 2), ("KeyboardInterrupt", 130), ("ValueError('wrong')", 1)]
)
def test_the_exit_code_of_an_error_without_a_reader(output, error, code, tmp_path):
    assert run_without_reader(FAILS.format(print=output, error=error), tmp_path) == code


def test_a_full_disk_is_reported_when_the_work_is_done(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    command, env = [sys.executable, "-c", WORK.replace("return 130", "")], ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        run = dict(cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
        done = subprocess.run(command, stdout=full, **run)
    assert (tmp_path / "done").exists() and done.returncode == 1
    assert done.stderr.splitlines()[-1] == "program: error: standard output: No space left on device"


def test_a_filter_ends_quietly():
    """As `davae generate … | head -1` does."""
    command = [sys.executable, "-c", FILTER]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "a line 0\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
@pytest.mark.parametrize(("arguments", "code"), [("--help", 0), ("--steps 0", 2)])
def test_closed_streams(closed, arguments, code):
    command = f'"$0" train.py {arguments} {closed}'
    done = subprocess.run(["bash", "-c", command, sys.executable], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr


def test_an_exit_in_the_middle_of_the_work_is_an_error(capsys):
    """Code that a program calls, such as a plugin's, may call sys.exit(0)."""
    assert run_cli(lambda: sys.exit(0), "program") == 1
    err = capsys.readouterr().err
    assert err.startswith("program: error: SystemExit: 0") and err.count("\n") == 1


def test_an_exception_of_any_type_is_one_line(capsys):
    def work():
        raise BaseExceptionGroup("several", [GeneratorExit()])

    assert run_cli(work, "program") == 1
    err = capsys.readouterr().err
    assert err.startswith("program: error: BaseExceptionGroup: several") and err.count("\n") == 1


def test_a_package_that_is_not_installed_is_named(capsys):
    assert run_cli(lambda: importlib.import_module("nowhere_at_all"), "program") == 1
    err = capsys.readouterr().err
    assert "nowhere_at_all" in err and "--debug" not in err and err.count("\n") == 1


def test_a_platform_that_cannot_start_after_another():
    """JAX raises once, and then has the devices of the first platform."""
    error = RuntimeError("Unable to initialize backend 'nonsense': it is not known")
    assert "JAX_PLATFORMS=cpu,nonsense" in backend_problem(error, {"JAX_PLATFORMS": "cpu,nonsense"})
    assert backend_problem(RuntimeError("another"), {"JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("with the config option jax_numpy_rank_promotion='raise'", "JAX_NUMPY_RANK_PROMOTION"),
        ("jax.default_device must be passed", "JAX_DEFAULT_DEVICE"),
        ("jax_default_devices", None),
        ("JAX_ENABLE_X64 is maybe", "JAX_ENABLE_X64"),
    ],
)
def test_settings_of_jax_that_an_error_names(reason, name):
    variables = dict.fromkeys(("JAX_NUMPY_RANK_PROMOTION", "JAX_DEFAULT_DEVICE", "JAX_ENABLE_X64"), "x")
    problem = backend_problem(ValueError(reason), variables)
    assert problem == (f"{name}=x: {reason}" if name else None)


def test_a_working_folder_that_is_gone(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    program = f'rmdir "$PWD"; exec "$0" -P {ROOT / "train.py"} --data.train t.txt'
    env = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = ["bash", "-c", program, sys.executable]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1
    assert "the working directory no longer exists" in done.stderr
