"""The one exception for input that is wrong, so that the command line can print it as one line."""


class InputError(ValueError):
    """Something the user gave is wrong: a file, a folder, an option, a text.

    The message is one line, names the file or option, and says what to do where that is not obvious.
    The command line prints it without a traceback and exits with `exit_code`: 2 for a bad argument, 1 for the rest.
    """

    def __init__(self, message: str, *, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: Exception) -> str:
    """What another library's error says, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
