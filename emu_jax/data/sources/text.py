"""Text alone: plain files, a document each, and JSONL (or JSON, or parquet) with a "text" column, a
document a record.

Read next: chats.py.
"""

from collections.abc import Iterator
from pathlib import Path

from emu_jax.data import clean
from emu_jax.data.documents import Document, Skipped, Text
from emu_jax.data.sources import archives, tables
from emu_jax.data.sources.options import Options
from emu_jax.data.sources.tables import Unit

PLAIN = (".txt", ".md")
# plain files in a unit
FILES = 1000
# bytes of a plain file
MAX_TEXT = 64 * 2**20


def units(path: Path) -> list[Unit]:
    """A unit a table, about 4096 rows of a parquet file, 1000 plain files."""
    found = archives.found(path, (*PLAIN, *tables.JSONS, ".parquet"))
    plain = [
        file.relative_to(path if path.is_dir() else path.parent).as_posix()
        for file in found
        if file.name.lower().endswith(PLAIN)
    ]
    units = [
        Unit(path if path.is_dir() else path.parent, tuple(plain[first : first + FILES]))
        for first in range(0, len(plain), FILES)
    ]
    for file in found:
        if not file.name.lower().endswith(PLAIN):
            units += tables.groups(file) if file.suffix == ".parquet" else [Unit(file)]
    return units


def read(unit: Unit, options: Options) -> Iterator[Document | Skipped]:
    """The texts of one unit; ids are FILE for a plain file, else the record's "id" or
    FILE:NUMBER.
    """
    if unit.names:
        files = archives.opened(unit.path)
        for name in unit.names:
            try:
                yield _document(name, clean.decode(files.read(name, MAX_TEXT)), unit, {})
            except ValueError as error:
                yield Skipped(name, str(error))
        return
    for number, record in (
        tables.rows(unit) if unit.path.suffix == ".parquet" else tables.records(unit.path)
    ):
        id = f"{unit.name}:{number}"
        if isinstance(record, Skipped):
            yield record
        elif not isinstance(record, dict) or not isinstance(record.get("text"), str):
            yield Skipped(id, "no text")
        else:
            provenance = {"url": record["url"]} if isinstance(record.get("url"), str) else {}
            yield _document(str(record.get("id") or id), record["text"], unit, provenance)


def _document(id: str, text: str, unit: Unit, provenance: dict) -> Document | Skipped:
    return (
        Document(id, (Text(text.strip()),), unit.name, provenance)
        if text.strip()
        else Skipped(id, "the text is empty")
    )
