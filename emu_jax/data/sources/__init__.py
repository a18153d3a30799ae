"""Sources of documents, by random access. `open_source` is the door; records.py is the format; kinds.py
knows the formats of others.

A source's path is FOLDER:SPLIT, for example data/openmoji/scenes:train. FOLDER holds one
tensorflow-datasets dataset (itself, or below it as tfds lays them out: FOLDER/CONFIG/VERSION). Read
next: records.py, then ../mixture.py.
"""

import re
from pathlib import Path
from typing import Protocol, runtime_checkable

from emu_jax.config import UserError
from emu_jax.data.documents import Document, pixels_of, texts_of

# of documents a source keeps: small sets are decoded once, large ones hardly notice
CACHE_BYTES = 256 * 2**20
# of a document beside its pixels and letters, about
RECORD_BYTES = 1000


class CorruptRecord(Exception):
    """Record `id` cannot be read: `reason`, in one line. `disk`: it is the disk that failed, and
    may do better when asked again.
    """

    def __init__(self, id: str, reason: str, disk: bool = False):
        super().__init__(id, reason, disk)
        self.id = id
        self.reason = reason
        self.disk = disk

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


@runtime_checkable
class Source(Protocol):
    """What `open_source` gives. Thread-safe, and can be pickled; documents' ids are unique in it and do
    not change.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document:
        """Document 0 <= index < len. Raises CorruptRecord."""


class CachedSource:
    """`source`, of whose documents it keeps the first CACHE_BYTES. Their arrays are shared."""

    def __init__(self, source: Source):
        self.source = source
        self._kept: dict[int, Document] = {}
        self._room = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Document:
        document = self._kept.get(index)
        if document is None:
            document = self.source[index]
            size = (
                RECORD_BYTES
                + sum(image.nbytes for image in pixels_of(document))
                + sum(len(text.text) for text in texts_of(document))
            )
            # two threads may both count one document: the limit is a rough one
            if size <= self._room:
                self._room -= size
                self._kept[index] = document
        return document


def open_source(path: str, image_size: int, fit: str = "squash") -> Source:
    """The documents of `path` = FOLDER:SPLIT, their images brought to image_size by `fit`
    (images.decode).

    Raises UserError for a folder with no dataset, with several, or with one whose records are not
    documents; for an unknown or empty split; for a missing file.
    """
    # tfds takes a second to import
    from emu_jax.data.sources import records

    folder, colon, split = path.rpartition(":")
    if not (colon and re.fullmatch(r"\w+", split)):
        raise UserError(
            f"the source '{path}' names no split; write it as FOLDER:SPLIT, for example '{path}:train'"
        )
    return records.RecordSource(_dataset(Path(folder)), split, image_size, fit)


def _dataset(folder: Path) -> Path:
    found = sorted(
        {
            info.parent
            for depth in ("", "*/", "*/*/")
            for info in folder.glob(f"{depth}dataset_info.json")
            if not info.parent.name.startswith("incomplete.")
        }
    )
    if not found:
        raise UserError(
            f"no dataset in '{folder}'; the demo's is made by: python -m emu_jax.demo build --to=DIR"
        )
    if len(found) > 1:
        raise UserError(
            f"'{folder}' holds several datasets; name one of them: {', '.join(map(str, found))}"
        )
    return found[0]
