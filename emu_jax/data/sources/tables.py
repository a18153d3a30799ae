"""Read records of JSON, JSONL and parquet files; and `InputShard`, a shard of any input.

A broken line or row group becomes one `Skipped`; the other records are still read. Read next:
pairs.py.
"""

import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu_jax.config import UserError
from emu_jax.data import clean
from emu_jax.data.documents import Skipped
from emu_jax.files import one_line

JSONS = (".json", ".jsonl", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zip", ".json.zip")
# Number of parquet rows in a shard, rounded up to complete row groups.
ROWS = 4096
# Size limit of a line, in bytes.
MAX_LINE = 64 * 2**20


@dataclass(frozen=True)
class InputShard:
    """The input of one task, which becomes one output shard.

    It is the file `path`, the files `names` in the folder or archive `path`, or the row groups
    first to last - 1 of the parquet file `path`.
    """

    path: Path
    names: tuple[str, ...] = ()
    first: int = 0
    last: int | None = None

    @property
    def name(self) -> str:
        """The file's name without suffixes, which is `Document.source` of its documents."""
        return self.path.name.split(".")[0] or self.path.name


def parquet_shards(file: Path) -> list[InputShard]:
    """Divide a parquet file into shards of about ROWS rows.

    A file that cannot be opened becomes one shard, and reading that reports the reason.
    """
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            sizes = [
                table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)
            ]
    # pyarrow's errors have no common base class; `parquet_rows` reports them.
    except Exception:
        return [InputShard(file)]
    shards = []
    first = 0
    rows = 0
    for number, size in enumerate(sizes):
        rows += size
        if rows >= ROWS or number == len(sizes) - 1:
            shards.append(InputShard(file, first=first, last=number + 1))
            first = number + 1
            rows = 0
    return shards or [InputShard(file)]


def parquet_columns(file: Path) -> list[str]:
    """The names of a parquet file's columns.

    For a file that cannot be opened it returns ["jpg"], so that the file is read and reports why.
    """
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(file).names
    except Exception:
        return ["jpg"]


def parquet_rows(shard: InputShard) -> Iterator[tuple[int, dict[str, Any] | Skipped]]:
    """Yield (row number in the file, row) for the shard's row groups, in small batches."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(shard.path)
        sizes = [
            table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)
        ]
    except Exception as error:
        reason = f"not a readable parquet file: {one_line(error)}"
        yield 0, Skipped(shard.path.name, reason, whole_file=True)
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
                yield number, Skipped(f"{shard.name}:{number}", f"damaged rows: {one_line(error)}")


def json_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, record) for a JSON file: the items of one array, or one value per line.

    .gz and .zip are decompressed on the fly. A line that is not JSON or not UTF-8 becomes
    `Skipped`.
    """
    try:
        with _opened(path) as file:
            head = file.peek(64)[:64]
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
    # For example a truncated .gz, a damaged .zip, or a broken array.
    except Exception as error:
        yield 0, Skipped(path.name, f"not readable JSON: {one_line(error)}", whole_file=True)


def _value(line: bytes, id: str) -> Any:
    try:
        return json.loads(clean.decode_text(line))
    except UnicodeError as error:
        return Skipped(id, f"line: {error}")
    except (ValueError, RecursionError):
        return Skipped(id, "line is not JSON")


def _opened(path: Path) -> io.BufferedReader | gzip.GzipFile:
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
            raise UserError(f"'{path}' contains no JSON file")
        return io.BufferedReader(archive.open(names[0]))  # ty: ignore[invalid-argument-type]
    return path.open("rb")
