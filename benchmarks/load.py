"""How long do converting and loading a published checkpoint take, and how much memory, beside `torch.load`?

    python -m benchmarks load [DIR] [--layers N] [--width N] [--vocab N]

DIR is a published folder with a pytorch_model.bin. Without it, one is made with random weights and a decoder of the
given sizes. Each measurement is a process of its own, in turns, with the file in the page cache; its memory includes
the libraries and the pages of mapped files. Conversion reads back what it has written, and loading gives float32. The
peers are `torch.load`, and `torch.load` with a cast to float32. The limit is reading the file from the page cache.
"""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.common import Row, in_turns, make_parser, parse, report, row, run_python, summarize
from benchmarks.models import add_sizes, resize, write_published
from davae_jax.training.presets import RANDENG_1B

SMALLEST = {"layers": 1, "width": 64, "vocab": 64}
SMALL_ENCODER = {"layers": 1, "width": 64, "vocab": 64}
FILE = "pytorch_model.bin"
# Each program prints the seconds of what it does, without importing the libraries.
TIMED = """
import shutil, sys, time
{imports}
source, target = sys.argv[1:]
start = time.perf_counter()
{work}
print(time.perf_counter() - start)
"""
CONVERT = TIMED.format(
    imports="from davae_jax.checkpoints.published.from_torch import convert",
    work="convert(source, target, overwrite=True)",
)
LOAD = TIMED.format(
    imports="import jax, davae_jax.checkpoints.pretrained, davae_jax.model.davae as davae",
    work="model = davae_jax.from_pretrained(source)\njax.block_until_ready(davae.split(model)[1])",
)
TORCH_LOAD = TIMED.format(imports="import torch", work=f"state = torch.load(f'{{source}}/{FILE}', weights_only=True)")
TORCH_FLOAT = TORCH_LOAD.replace("print(", "state = {name: tensor.float() for name, tensor in state.items()}\nprint(")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__, rounds=3)
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR")
    add_sizes(parser, RANDENG_1B.model)
    args = parse(parser, argv, SMALLEST)
    if args.folder and not (args.folder / FILE).is_file():
        parser.error(f"{args.folder}: has no {FILE}")
    with tempfile.TemporaryDirectory(dir=args.folder and args.folder.absolute().parent) as scratch:
        folder = args.folder
        if not folder:
            sizes = {"layers": args.layers, "width": args.width, "vocab": args.vocab}
            config = resize(RANDENG_1B.model, encoder=SMALL_ENCODER, decoder=sizes)
            folder = write_published(config, Path(scratch) / "published")
        report(args, measure(folder.absolute(), Path(scratch) / "converted", args.rounds))


def measure(published: Path, converted: Path, rounds: int) -> Iterator[Row]:
    """Yields a row for the conversion and for each form of loading."""
    read_seconds(published / FILE)  # so that all find the file in the page cache
    run = partial(run_python, "-c")
    programs = {
        "torch.load": partial(run, TORCH_LOAD, published, converted),
        "torch.load, float32": partial(run, TORCH_FLOAT, published, converted),
        "convert": partial(run, CONVERT, published, converted),
        "load the published file": partial(run, LOAD, published, converted),
        "load the converted folder": partial(run, LOAD, converted, published),
        "read": lambda: read_seconds(published / FILE),
    }
    results = in_turns(programs, rounds)
    reading = min(results.pop("read"))
    for what in programs:
        if what in ("read", "torch.load", "torch.load, float32"):
            continue
        peer = "torch.load" if what == "convert" else "torch.load, float32"
        seconds, peer_seconds = ([float(done.output) for done in results[name]] for name in (what, peer))
        memory = {
            name: summarize(done.peak_MB for done in results[which])
            for name, which in (("peak MB", what), ("peak MB of the peer", peer))
        }
        size = {"MB of the file": (published / FILE).stat().st_size / 1e6}
        yield row({"what": what}, "s", seconds, peer=(peer, peer_seconds), limit=("read", reading), **memory, **size)


def read_seconds(file: Path) -> float:
    """Returns the time to read a file."""
    buffer, start = bytearray(1 << 24), time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
