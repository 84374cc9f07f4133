"""Defines the exceptions for invalid input. The command line prints them as one line."""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Callable, Collection
from typing import Any


class InputError(ValueError):
    """An input of the user is invalid: a file, a folder, an option, a text.

    The message is one line that names the file or option, and says what to do unless that is obvious. Programs print it
    without a traceback.

    Attributes:
      exit_code: the exit code of the program: 2 for invalid arguments, 1 otherwise.
    """

    def __init__(self, message: str, *, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class OptionError(InputError):
    """An option of the command line, or an argument of a Python function, has an invalid value.

    The message is the option followed by the reason, which completes the sentence: "must be at least 1, not 0".

    Attributes:
      option: the name of the option or argument, "--beta.max" or "max_length".
      reason: what is wrong with its value.
    """

    def __init__(self, option: str, reason: str, *, exit_code: int = 2):
        super().__init__(f"{option} {reason}", exit_code=exit_code)
        self.option = option
        self.reason = reason


class ConfigError(InputError):
    """A field of a model's configuration is missing or has an invalid value.

    Attributes:
      section: the section, "encoder" or "decoder"; "" for a field of the configuration itself.
      field: the field's name within the section.
      reason: what is wrong; the message is the field followed by the reason.
    """

    def __init__(self, section: str, field: str, reason: str, *, file: Any = "config"):
        super().__init__(f"{file}: {section}{'.' if section else ''}{field} {reason}")
        self.section = section
        self.field = field
        self.reason = reason


class StepError(InputError):
    """A training step failed in the same way on every process: a regularizer raised, or a value is not finite."""


# Conditions of `check_options`. That of vocabularies to be trained has a limit, because the trainers reserve memory for
# the whole vocabulary.
NON_NEGATIVE = (lambda x: 0 <= x < float("inf"), "be 0 or more and finite")
UNIT_INTERVAL = (lambda x: 0 <= x <= 1, "be in [0, 1]")
VOCAB_SIZES = (lambda n: n is None or 10 <= n <= 1_000_000, "be at least 10 and at most 1,000,000")


def check_options(config: Any, section: str, names: str, fits: Callable[[Any], bool], must: str) -> None:
    """Checks fields of an options dataclass.

    Args:
      config: the dataclass.
      section: the prefix of the options' names, such as "beta."; "" for options without a section.
      names: the fields to check, separated by spaces.
      fits: returns whether a value is allowed.
      must: completes "must …" in the message: "be at least 1".

    Raises:
      OptionError: for the first field whose value does not fit.
    """
    for name in names.split():
        if not fits(value := getattr(config, name)):
            raise OptionError(f"--{section}{name.replace('_', '-')}", f"must {must}, not {value}")


LARGEST_INTEGER = 2**31 - 1  # of XLA's default integers


def check_integers(config: Any, section: str = "", unless: Collection[str] = ()) -> None:
    """Checks that XLA can compute with all integers in an options dataclass and in those that it contains.

    Args:
      section: the prefix of the options' names, as of `check_options`.
      unless: names of options that may be larger.

    Raises:
      OptionError: for the first integer that is too large.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{section}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            check_integers(value, f"{name}.", unless)
        elif type(value) is int and abs(value) > LARGEST_INTEGER and name not in unless:
            raise OptionError(f"--{name}", f"must be less than 2³¹ in size, not {value}")


MAX_MESSAGE = 4000  # characters of a message on the terminal
MAX_REASON = 400  # characters of another library's error; Orbax prints the whole tree of arrays


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error, for a message of one line. A long one is cut off."""
    try:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    except Exception:  # of a user's plugin, whose errors may fail to describe themselves
        return type(error).__name__
    line = line.partition(" [tensorstore_spec=")[0]  # a page of settings
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]} …"


def on_one_line(message: str) -> str:
    """Returns a message with its control characters and line breaks escaped.

    Names of files, options and tensors may contain them, and would break the line or the terminal. The middle of a
    very long message, such as one with a damaged setting of megabytes, is left out.
    """
    if (length := len(message)) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} … {message[-MAX_MESSAGE // 4 :]} ({length:,} characters)"
    return escape_controls(message)


def escape_controls(text: str) -> str:
    """Returns a text with its control characters and line breaks escaped."""
    return "".join(
        char.encode("unicode_escape").decode("ascii")
        if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
        else char
        for char in text
    )


def system_reason(error: Exception) -> str | None:
    """Returns the operating system's reason for an error, or None if the error does not come from it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore, safetensors and PyTorch raise their own exceptions when the disk is full.
    if code := re.search(r"os_error_code='(\d+)'|os error (\d+)", str(error)):
        return os.strerror(int(code[1] or code[2]))
    return "is the disk full?" if re.search("inline_container|iostream error", str(error)) else None
