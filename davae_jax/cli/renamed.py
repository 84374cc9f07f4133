"""Options that earlier versions called by another name. The old names still work."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

# Old name → today's.
TRAIN_OPTIONS = {
    "--data.pieces": "--data.decoder-vocab-size",
    "--data.entries": "--data.encoder-vocab-size",
}
PREPARE_OPTIONS = {
    "--pieces": "--decoder-vocab-size",
    "--entries": "--encoder-vocab-size",
    "--cut": "--truncate",
}


def replace_renamed(argv: Sequence[str], renamed: Mapping[str, str], *, announce: bool = True) -> list[str]:
    """Returns a command line in which today's names take the place of old ones, up to the word "--".

    announce: print a line on standard error for each option replaced.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    replaced = []
    for word in argv[:end]:
        name, equals, value = word.partition("=")
        if new := renamed.get(name.replace("_", "-")):
            if announce:
                print(f"{name} is now {new}", file=sys.stderr)
            word = f"{new}{equals}{value}"
        replaced.append(word)
    return [*replaced, *argv[end:]]
