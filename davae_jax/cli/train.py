"""`davae train` and `train.py`: parses a preset, files of settings and every field of `TrainConfig` as an option,
trains, and prints the next command."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from davae_jax.cli.base import going_on_without_reader, parse_options, run_cli
from davae_jax.regularizers import check_registered, config_with_plugins, load_installed, load_plugin
from davae_jax.training.config import TrainConfig
from davae_jax.training.presets import PRESETS
from davae_jax.training.run.config_file import SettingsFile, plugins_of, read_settings, setting_keys, with_settings
from davae_jax.utils.compile_cache import disable_compile_cache, use_compile_cache
from davae_jax.utils.errors import ConfigError, InputError, OptionError
from davae_jax.utils.progress import end_progress_lines
from davae_jax.utils.signals import INTERRUPTED, interrupt_on_signals

NO_CACHE = "--no-compile-cache"


@dataclass(frozen=True)
class TrainOptions:
    """The options of the command line: the settings, and files of them."""

    config: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """File of settings: TOML, or the train.json of another run (docs/training.md). It replaces the settings of the
    preset, and the other options replace its own. Can be given several times: later files replace earlier ones."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name="", prefix_name=False)] = dataclasses.field(
        default_factory=TrainConfig
    )


def parse_train(argv: Sequence[str], prog: str = "train.py") -> tuple[str, TrainConfig] | None:
    """Parses the options of a training. The first word may be a preset; the default is the demo.

    Args:
      prog: the program's name in messages.

    Returns:
      The preset's name and the settings, or None if the help text was requested.

    Raises:
      ParseError, OptionError: an option is unknown, cannot be read, or does not allow its value.
      InputError: there is no such preset; or a file that --config names cannot be used.
    """
    preset, argv = split_preset(argv, "demo")
    description, settings = PRESETS[preset]
    default, files = default_settings(argv, settings)
    with naming_settings(argv, files):
        options = parse_options(
            TrainOptions,
            argv,
            f"{prog} {preset}",
            default=TrainOptions(settings=default),
            description=_describe(preset, description),
        )
    return None if options is None else (preset, options.settings)


def split_preset(argv: Sequence[str], default: str) -> tuple[str, list[str]]:
    """Returns the preset that the first word names, or the default, and the remaining words.

    Raises:
      InputError: the first word is neither a preset nor an option (exit code 2).
    """
    if not argv or argv[0].startswith("-"):
        return default, list(argv)
    if argv[0] not in PRESETS:
        raise InputError(f"no preset {argv[0]!r}; available: {', '.join(PRESETS)}", exit_code=2)
    return argv[0], list(argv[1:])


def default_settings(argv: Sequence[str], settings: TrainConfig) -> tuple[TrainConfig, list[SettingsFile]]:
    """Returns the settings that the options of a command line change, and the files that it names by --config.

    They are those of the preset, then of the files, in this order, with a field for each plugin's regularizer in
    `regularizers`: as the default of `tyro.cli`, they add the plugins' options to the command line. Imports the plugins
    of the command line, of the files and of installed packages.

    The train.json of a run replaces the preset. Values are checked with the options (`naming_settings`).
    """
    files = [read_settings(path) for path in _option_paths(argv, "--config", "a file")]
    load_installed()
    for file in files:
        with naming_settings([], [file]):
            for path in plugins_of(file):
                load_plugin(path)
    for path in _option_paths(argv, "--plugin", "a Python file"):
        load_plugin(path)
    for arg in argv:
        if match := re.match(r"--regularizers\.([^.=]+)", arg):
            check_registered(match[1].replace("-", "_"), option=arg.partition("=")[0])
    settings = _with_plugin_fields(settings)
    for file in files:
        settings = with_settings(_with_plugin_fields(TrainConfig()) if file.is_of_run else settings, file)
    return settings, files


def _with_plugin_fields(settings: TrainConfig) -> TrainConfig:
    """Returns the same settings with a field for each registered plugin's regularizer."""
    given = settings.regularizers
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    return dataclasses.replace(settings, regularizers=config_with_plugins()(**values))


@contextlib.contextmanager
def naming_settings(argv: Sequence[str], files: Sequence[SettingsFile] = ()) -> Iterator[None]:
    """Names the option, or the file and its key, in errors about a setting.

    Args:
      argv: the command line, whose options replace the settings of the files.
      files: the files of --config, the later of which replace those of the earlier.
    """
    try:
        yield
    except ConfigError as e:
        field = f"{e.section}.{e.field}" if e.section else e.field
        raise _with_file(OptionError(f"--model.{field.replace('_', '-')}", e.reason), argv, files) from None
    except OptionError as e:
        raise _with_file(e, argv, files) from None


def _with_file(error: OptionError, argv: Sequence[str], files: Sequence[SettingsFile]) -> InputError:
    """Returns the error of an option, or one that names the file, if that and not the command line sets it.

    A setting that neither sets may not fit one of a file: the error names the files beside it.
    """
    if error.option in {word.partition("=")[0].replace("_", "-") for word in argv}:
        return error
    name = error.option.removeprefix("--").replace("-", "_")
    for file in reversed(files):
        for key in setting_keys(file.values):
            if key == name or key.endswith(f".{name}"):  # an option without its section, as --profile-steps
                return InputError(f"{file.path}: {key} {error.reason}", exit_code=error.exit_code)
    if not files:
        return error
    names = ", ".join(str(file.path) for file in files)
    return InputError(f"{error} (with the settings of {names})", exit_code=error.exit_code)


def _option_paths(argv: Sequence[str], option: str, kind: str) -> Iterator[Path]:
    """Yields the files that an option names, which can be given several times."""
    for arg, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = arg.partition("=")
        if name == option:
            value = value if equals else following
            if not value or (not equals and value.startswith("--")):
                raise OptionError(option, f"must be {kind}")
            yield Path(value)


def _describe(preset: str, description: str) -> str:
    others = ", ".join(f"{name} ({text.rstrip('.')})" for name, (text, _) in PRESETS.items() if name != preset)
    return (
        f"Trains a DAVAE. Preset {preset}: {description} Other presets, as the first word: {others}. "
        f"As for every command, --debug prints the traceback of an error as well, and {NO_CACHE} keeps no compiled "
        "programs in the user's cache folder."
    )


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Runs `train.py` or, as `prog` says, `davae train`.

    Returns:
      The exit code: 0, 2 for bad arguments, 130 if interrupted, 1 for a failure.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = [arg for arg in argv if arg not in ("--debug", NO_CACHE)]  # of the program, not of the training

    def work() -> int:
        with interrupt_on_signals(), going_on_without_reader():
            if (parsed := parse_train(options, prog)) is None:
                return 0
            from davae_jax.parallel.multihost import explain_lost_process  # imports JAX, which --help does not need

            with explain_lost_process():
                preset, config = parsed
                config = dataclasses.replace(config, run_dir=config.run_dir or Path("runs") / preset)
                if config.init.model:
                    from davae_jax.training.initial_state import check_model_options

                    check_model_options(config, given_model_fields(options))
                resume = resume_command(options, prog)
                return train_from_command_line(config, resume, compile_cache=NO_CACHE not in argv)

    return run_cli(work, prog, debug="--debug" in argv)


def train_from_command_line(config: TrainConfig, resume: str, *, compile_cache: bool = True) -> int:
    """Trains, and prints what to do next. Returns the exit code. resume: the command that resumes the run."""
    from jax import distributed

    from davae_jax.parallel import multihost
    from davae_jax.training.loop import train

    if waiting := multihost.describe_waiting(config.distributed):
        print(waiting, flush=True)
    multihost.connect(config.distributed)
    if distributed.is_initialized() and not multihost.is_process_zero():
        end_progress_lines()
    # The processes of a run compile for GPUs together: one that loaded its program would leave the others waiting.
    use_compile_cache() if compile_cache and not multihost.compiles_together() else disable_compile_cache()
    result = train(config)
    if result.interrupted:
        multihost.disconnect()
        if multihost.is_process_zero():
            print(f"interrupted after step {result.step}; to resume: {resume}", file=sys.stderr)
        return INTERRUPTED
    if multihost.is_process_zero():
        run = result.run
        print(f"{run.checkpoints.last}: complete")
        print(f"next: {generate_command(run.folder, run.corpus.example)}")
    return 0


def given_model_fields(argv: Sequence[str]) -> set[str]:
    """Returns the fields of the model's config that options set, or TOML files, such as "decoder.num_layers".

    A run's train.json contains all fields, whether they were given or not.
    """
    names = {match[1] for arg in argv if (match := re.match(r"--model\.([^=]+)", arg))}
    for file in map(read_settings, _option_paths(argv, "--config", "a file")):
        for name, value in file.values.get("model", {}).items() if not file.is_of_run else ():
            names |= {f"{name}.{field}" for field in value} if isinstance(value, dict) else {name}
    return {name.replace("-", "_") for name in names}


def generate_command(folder: Path, text: str) -> str:
    """Returns the command line that generates from a text with a run's model. Either may begin with a dash."""
    model = [f"--model={folder}"] if str(folder).startswith("-") else ["--model", str(folder)]
    texts = ["--", text] if text.startswith("-") else [text]
    return shlex.join([_program("davae", str(Path(sys.executable).with_name("davae"))), "generate", *model, *texts])


def resume_command(argv: Sequence[str], prog: str) -> str:
    """Returns the command line that resumes an interrupted run, by the program that was started."""
    if prog == "train.py":
        program = [_program("python", sys.executable), sys.argv[0]]
    elif Path(sys.argv[0]).name == "__main__.py":
        program = [_program("python", sys.executable), "-m", "davae_jax.cli", "train"]
    else:
        program = [_program("davae", sys.argv[0]), "train"]
    return shlex.join([*program, *argv])


def _program(name: str, path: str) -> str:
    """Returns how to call a program of this environment: by its path if its name means nothing or another program."""
    return name if shutil.which(name) == path or not Path(path).exists() else path
