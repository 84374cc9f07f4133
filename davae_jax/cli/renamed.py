"""Options that had other names in earlier versions. The old names still work."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_TRAIN_OPTIONS = {
    "--data.pieces": "--data.decoder-vocab-size",
    "--data.entries": "--data.encoder-vocab-size",
}
# Program → old name → current name.
RENAMED_OPTIONS = {
    "train.py": _TRAIN_OPTIONS,
    "davae train": _TRAIN_OPTIONS,
    "davae plan": _TRAIN_OPTIONS,
    "davae prepare": {
        "--pieces": "--decoder-vocab-size",
        "--entries": "--encoder-vocab-size",
        "--cut": "--truncate",
    },
}


def replace_renamed(argv: Sequence[str], prog: str) -> list[str]:
    """Returns a command line in which current names replace old ones, up to the word "--", and reports each on stderr.

    prog: the program, "train.py" or "davae prepare"; the name of a preset may follow.
    """
    renamed = next((names for program, names in RENAMED_OPTIONS.items() if f"{prog} ".startswith(f"{program} ")), {})
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    replaced = []
    for word in argv[:end]:
        name, equals, value = word.partition("=")
        if new := renamed.get(name.replace("_", "-")):
            print(f"{name} is now {new}", file=sys.stderr)
            word = f"{new}{equals}{value}"
        replaced.append(word)
    return [*replaced, *argv[end:]]
