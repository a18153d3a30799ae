"""Text without images: plain files, and JSONL, JSON or parquet with a "text" field.

Each plain file or record is one document. Read next: conversations.py.
"""

from collections.abc import Iterator
from pathlib import Path

from emu_jax.data import clean
from emu_jax.data.documents import Document, Skipped, Text
from emu_jax.data.sources import archives, tables
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard

# Suffixes of plain text files.
PLAIN = (".txt", ".md")
# Number of plain files in a shard.
FILES = 1000
# Size limit of a plain file, in bytes.
MAX_TEXT = 64 * 2**20


def list_shards(path: Path) -> list[InputShard]:
    """One shard per JSON file, per about 4096 rows of parquet, and per FILES plain files."""
    found = archives.list_files(path, (*PLAIN, *tables.JSONS, ".parquet"))
    plain = [
        file.relative_to(path if path.is_dir() else path.parent).as_posix()
        for file in found
        if file.name.lower().endswith(PLAIN)
    ]
    shards = [
        InputShard(path if path.is_dir() else path.parent, tuple(plain[first : first + FILES]))
        for first in range(0, len(plain), FILES)
    ]
    for file in found:
        if not file.name.lower().endswith(PLAIN):
            shards += (
                tables.parquet_shards(file) if file.suffix == ".parquet" else [InputShard(file)]
            )
    return shards


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The texts of one shard.

    The id is the name of a plain file, or a record's "id", or else FILE:NUMBER.
    """
    if shard.names:
        files = archives.open_archive(shard.path)
        for name in shard.names:
            try:
                yield _document(name, clean.decode_text(files.read(name, MAX_TEXT)), shard, {})
            except ValueError as error:
                yield Skipped(name, str(error))
        return
    for number, record in (
        tables.parquet_rows(shard)
        if shard.path.suffix == ".parquet"
        else tables.json_records(shard.path)
    ):
        id = f"{shard.name}:{number}"
        if isinstance(record, Skipped):
            yield record
        elif not isinstance(record, dict) or not isinstance(record.get("text"), str):
            yield Skipped(id, "no text")
        else:
            provenance = {"url": record["url"]} if isinstance(record.get("url"), str) else {}
            yield _document(str(record.get("id") or id), record["text"], shard, provenance)


def _document(id: str, text: str, shard: InputShard, provenance: dict) -> Document | Skipped:
    return (
        Document(id, (Text(text.strip()),), shard.name, provenance)
        if text.strip()
        else Skipped(id, "text is empty")
    )
