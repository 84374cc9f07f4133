"""Compiled programs are kept on the disk: where, for whom, and what happens to entries that cannot be used."""

import os
import warnings
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from davae_jax.cli.base import Command, run_command
from davae_jax.cli.train import main as train_main
from davae_jax.training.loop import TrainResult
from davae_jax.utils import compile_cache
from davae_jax.utils.compile_cache import default_folder, use_compile_cache

SETTINGS = [
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_enable_xla_caches",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
]
PROGRAM = """
import jax, numpy
def program_{0}(x):
    return x * 3 + {0}
result = jax.jit(program_{0})(numpy.ones(4, "float32"))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's empty cache folder. Returns the folder of programs; JAX's settings are restored at the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name in SETTINGS:
        monkeypatch.setenv(name.upper(), "")  # so that it is restored, even if the test sets it
        monkeypatch.delenv(name.upper())
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(compile_cache.atexit, "register", lambda *_: None)
    values = {name: getattr(jax.config, name) for name in SETTINGS}
    compilation_cache.reset_cache()
    yield default_folder()
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def events():
    """Counts JAX's events, by the last part of their names."""
    counts = Counter()
    listen = lambda event, **_: counts.update([event.rpartition("/")[2]])  # noqa: E731
    jax.monitoring.register_event_listener(listen)
    yield counts
    jax.monitoring.unregister_event_listener(listen)


def start(*numbers: int, folder: str = "/a") -> list[str]:
    """Runs small programs as a new process would. Returns the warnings that are printed."""
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: shown.append(str(message))
        compilation_cache.reset_cache()
        use_compile_cache()
        for number in numbers or (1,):
            names = {}
            exec(compile(PROGRAM.format(number), f"{folder}/program.py", "exec"), names)
            assert names["result"].tolist() == [3.0 + number] * 4
        compile_cache._write_sums(default_folder())  # as at the end of a process
    return shown


def test_the_second_start_compiles_nothing(cache, events):
    assert start() == []
    assert events["cache_misses"] > 0 and events["cache_hits"] == 0
    assert cache.stat().st_mode & 0o777 == 0o700
    events.clear()
    assert start(folder="/elsewhere") == []  # the keys do not name the source files
    assert events["cache_misses"] == 0 and events["cache_hits"] > 0


@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "unfinished"])
def test_a_damaged_entry_is_compiled_anew(cache, events, damage):
    start()
    (entry,) = cache.glob("*-cache")
    data = bytearray(entry.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 0x10  # which the compression does not always notice
        entry.write_bytes(data)
    elif damage == "unfinished":
        entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
    else:
        (cache / compile_cache.SUMS_FILE).write_text("{", encoding="utf-8")
        entry.write_bytes(data[:100] if damage == "truncated" else b"")
    events.clear()
    assert start() == []
    assert events["cache_misses"] == 1
    events.clear()
    assert start() == [] and events["cache_misses"] == 0


def test_where_jax_rejects_every_entry_one_line_says_so(cache, events):
    start(1, 2, 3, 4)
    (cache / compile_cache.SUMS_FILE).unlink()
    for entry in cache.glob("*-cache"):
        entry.write_bytes(b"of another machine")
    (line,) = start(1, 2, 3, 4)
    assert line.startswith(f"{cache}: JAX cannot load") and "\n" not in line
    assert not jax.config.jax_enable_compilation_cache
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"


def test_a_folder_that_cannot_be_used(cache, tmp_path):
    (tmp_path / "caches").write_text("a file")
    (line,) = start()
    assert line == f"{cache}: Not a directory; programs are compiled at every start"


def test_a_folder_into_which_others_may_write(cache):
    start()
    cache.chmod(0o777)
    (line,) = start()
    assert "others may write" in line


def test_entries_that_cannot_be_written_are_reported_once(cache):
    use_compile_cache()
    with pytest.warns(UserWarning) as shown:
        explain = compile_cache._explaining(lambda message, *_: warnings.warn(message, stacklevel=1), cache)
        for program in ("jit_f", "jit_g"):
            explain(f"Error writing persistent compilation cache entry for '{program}': OSError: no space\n...", None)
    assert [str(w.message) for w in shown] == [f"{cache}: compiled programs cannot be kept (OSError: no space)"]


@pytest.mark.parametrize("reason", ["OSError: [Errno 28] No space left on device: 'x'", "Timeout: .lockfile"])
def test_entries_that_the_system_does_not_let_be_read_are_no_damaged_ones(cache, reason):
    start()
    shown = []
    explain = compile_cache._explaining(lambda message, *_: shown.append(message), cache)
    explain(f"Error reading persistent compilation cache entry for 'jit_program_1': {reason}", None)
    assert shown == [f"{cache}: JAX cannot load the programs that it has kept ({reason}); they are compiled anew"]
    assert list(cache.glob("jit_program_1-*-cache")) and not jax.config.jax_enable_compilation_cache


def test_a_folder_in_the_environment_wins(cache, tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.FOLDER_VARIABLE, str(tmp_path / "mine"))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    use_compile_cache()
    assert {name: getattr(jax.config, name) for name in SETTINGS} == before
    assert not cache.exists()


def test_settings_in_the_environment_win(cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "7")
    before = jax.config.jax_compilation_cache_max_size
    use_compile_cache()
    assert jax.config.jax_compilation_cache_max_size == before


class Compile(Command):
    def run(self):
        jax.jit(lambda x: x - 5)(jnp.ones(3))


@pytest.mark.parametrize(("argv", "kept"), [([], True), (["--no-compile-cache"], False)])
def test_the_option_of_every_command(cache, argv, kept):
    assert run_command(lambda: Compile, argv, "davae compile") == 0
    assert bool(list(cache.glob("jit__lambda-*-cache"))) == kept


def test_training_has_the_option(cache, monkeypatch):
    calls = []
    for function in ("use_compile_cache", "disable_compile_cache"):
        monkeypatch.setattr(f"davae_jax.cli.train.{function}", partial(calls.append, function))
    monkeypatch.setattr("davae_jax.parallel.multihost.connect", lambda _: None)
    monkeypatch.setattr("davae_jax.training.loop.train", lambda _: TrainResult(None, None, 0, interrupted=True))
    assert train_main([]) == train_main(["--no-compile-cache"]) == 130
    assert calls == ["use_compile_cache", "disable_compile_cache"]
