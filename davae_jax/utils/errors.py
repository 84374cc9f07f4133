"""The one exception for input that is wrong, so that the command line can print it as one line."""

import os
import re
from collections.abc import Callable
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong: a file, a folder, an option, a text.

    The message is one line, names the file or option, and says what to do where that is not obvious.
    The command line prints it without a traceback and exits with `exit_code`: 2 for a bad argument, 1 for the rest.
    """

    def __init__(self, message: str, *, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def check_options(config: Any, section: str, names: str, fits: Callable[[Any], bool], must: str) -> None:
    """Raises InputError, which names the option and says what it must be, for the first of these fields that is not."""
    for name in names.split():
        if not fits(value := getattr(config, name)):
            option = f"--{section}{name.replace('_', '-')}"
            raise InputError(f"{option} must {must}, not {value}", exit_code=2)


def first_line(error: Exception) -> str:
    """What another library's error says, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def system_reason(error: Exception) -> str | None:
    """What the operating system said, where the error comes from it; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore, safetensors and PyTorch have types of their own for a disk that is full.
    if code := re.search(r"os_error_code='(\d+)'|os error (\d+)", str(error)):
        return os.strerror(int(code[1] or code[2]))
    return "is the disk full?" if "inline_container" in str(error) else None
