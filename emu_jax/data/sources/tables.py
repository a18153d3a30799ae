"""Records of JSON, JSONL and parquet files, and the slices of input that one task of a build reads.

A broken line or row group becomes one `Skipped`; what is around it is read. Read next: pairs.py.
"""

import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from emu_jax.config import UserError
from emu_jax.data import clean
from emu_jax.data.documents import Skipped

JSONS = (".json", ".jsonl", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zip", ".json.zip")
# of a parquet file in a shard, rounded up to whole row groups
ROWS = 4096
MAX_LINE = 64 * 2**20


@dataclass(frozen=True)
class InputShard:
    """What one task reads, and writes a shard of: a file, or `names` of the folder or archive
    `path`, or its row groups [first, last).
    """

    path: Path
    names: tuple[str, ...] = ()
    first: int = 0
    last: int | None = None

    @property
    def name(self) -> str:
        """The file's name without its suffixes: unique among the shards of a set, and the first
        half of its documents' full ids.
        """
        return self.path.name.split(".")[0] or self.path.name


def parquet_shards(file: Path) -> list[InputShard]:
    """A parquet file as units of about ROWS rows. One that cannot be opened is one shard, whose
    reader says why.
    """
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            sizes = [
                table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)
            ]
    # pyarrow's errors have no common type; `parquet_rows` reports them
    except Exception:
        return [InputShard(file)]
    units = []
    first = 0
    rows = 0
    for number, size in enumerate(sizes):
        rows += size
        if rows >= ROWS or number == len(sizes) - 1:
            units.append(InputShard(file, first=first, last=number + 1))
            first = number + 1
            rows = 0
    return units or [InputShard(file)]


def parquet_columns(file: Path) -> list[str]:
    """The names of a parquet file's columns; those of images for one that cannot be opened, so that
    its reader reports it.
    """
    try:
        return pyarrow.parquet.read_schema(file).names
    except Exception:
        return ["jpg"]


def parquet_rows(shard: InputShard) -> Iterator[tuple[int, dict[str, Any] | Skipped]]:
    """(number in the file, row) of the unit's row groups, a batch in memory at a time."""
    try:
        table = pyarrow.parquet.ParquetFile(shard.path)
        sizes = [
            table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)
        ]
    except Exception as error:
        yield 0, Skipped(shard.path.name, f"not a readable parquet file: {_line(error)}")
        return
    with table:
        for group in range(shard.first, len(sizes) if shard.last is None else shard.last):
            number = sum(sizes[:group])
            try:
                for batch in table.iter_batches(batch_size=64, row_groups=[group]):
                    for row in batch.to_pylist():
                        yield number, row
                        number += 1
            except Exception as error:
                yield number, Skipped(f"{shard.name}:{number}", f"damaged rows: {_line(error)}")


def json_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, record) of a JSON file: the items of one array, or a value a line; .gz and .zip are
    unpacked on the way. A line that is no JSON or no UTF-8 comes as `Skipped`.
    """
    try:
        with _opened(path) as file:
            head = file.peek(64)[:64] if hasattr(file, "peek") else b""
            if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                values = json.loads(clean.decode_text(file.read()))
                yield from enumerate(values)
                return
            number = 0
            while line := file.readline(MAX_LINE):
                if line.strip():
                    yield number, _value(line, f"{InputShard(path).name}:{number}")
                number += 1
    except UserError:
        raise
    # a cut .gz, a bad .zip, an array that is none
    except Exception as error:
        yield 0, Skipped(path.name, f"not readable JSON: {_line(error)}")


def _value(line: bytes, id: str) -> Any:
    try:
        return json.loads(clean.decode_text(line))
    except (ValueError, RecursionError) as error:
        return Skipped(
            id,
            "the line is not JSON"
            if not str(error).startswith("the text")
            else f"the line: {error}",
        )


def _opened(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(path)
        names = [
            name
            for name in archive.namelist()
            if name.lower().endswith((".json", ".jsonl", ".ndjson"))
        ]
        if not names:
            raise UserError(f"'{path}' holds no JSON")
        return io.BufferedReader(archive.open(names[0]))
    return path.open("rb")


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
