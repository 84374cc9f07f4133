"""Input files for the tests of readers and of `davae prepare`, in every format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizer_fixtures import sentences

TEXTS = sentences(300)
FORMATS = ["txt", "txt.gz", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "arrow-file", "folder"]


def write_texts(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    """Writes one text a line."""
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def write_input(folder: Path, format_name: str) -> Path:
    """Writes TEXTS into a new folder. Returns the file, or the folder where `davae prepare` is given the folder."""
    folder.mkdir()
    pa = pytest.importorskip("pyarrow") if format_name in ("parquet", "arrow", "arrow-file") else None
    rows = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
    match format_name:
        case "txt":
            return write_texts(folder / "a.txt")
        case "txt.gz":
            (folder / "a.txt.gz").write_bytes(gzip.compress("\r\n".join(TEXTS).encode()))
            return folder / "a.txt.gz"
        case "jsonl" | "folder":
            (folder / "a.jsonl").write_bytes(rows)
            (folder / "README.md").write_text("no data", encoding="utf-8")
            return folder if format_name == "folder" else folder / "a.jsonl"
        case "jsonl.gz":
            (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows[:5000]) + gzip.compress(rows[5000:]))
        case "jsonl.zst":
            compress = pytest.importorskip("zstandard").ZstdCompressor().compress
            (folder / "a.jsonl.zst").write_bytes(compress(rows[:5000]) + compress(rows[5000:]))  # two frames
        case "parquet":
            table = pa.table({"text": TEXTS, "id": range(len(TEXTS))})
            pytest.importorskip("pyarrow.parquet").write_table(table, folder / "train-00000.parquet", row_group_size=70)
        case _:  # a folder as the `datasets` library saves it
            table = pa.table({"text": TEXTS})
            new = pa.ipc.new_stream if format_name == "arrow" else pa.ipc.new_file
            with new(folder / "data-00000-of-00001.arrow", table.schema) as writer:
                writer.write_table(table, max_chunksize=70)
            (folder / "state.json").write_text("{}", encoding="utf-8")
            (folder / "dataset_info.json").write_text("{}", encoding="utf-8")
    return folder
