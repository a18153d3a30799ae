"""Sources: documents by index. `open_source` opens one; records.py has the file format.

A source's path is FOLDER:SPLIT, for example data/openmoji/scenes:train. FOLDER contains one
tensorflow-datasets dataset, directly or as FOLDER/CONFIG/VERSION. Read next: records.py, then
../mixture.py.
"""

import re
from pathlib import Path
from typing import Protocol, runtime_checkable

from emu_jax.config import UserError
from emu_jax.data.documents import Document, pixels_of, texts_of

# Size of the cache of each source. It holds all of a small dataset, which is then decoded only
# once; for a large dataset a cache hardly helps.
CACHE_BYTES = 256 * 2**20
# Rough size in bytes of a document without its pixels and text.
RECORD_BYTES = 1000


class CorruptRecord(Exception):
    """Record `id` cannot be read; `reason` is one line.

    disk: whether the disk failed, so that a retry may succeed.
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
    """Documents by index. Thread-safe and picklable; ids are unique and never change."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document:
        """Document `index`, 0 <= index < len. Raises CorruptRecord."""


class CachedSource:
    """`source` with a cache of CACHE_BYTES; all readers of a document share its arrays."""

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
            # Two threads may both count the same document, so the limit is approximate.
            if size <= self._room:
                self._room -= size
                self._kept[index] = document
        return document


def open_source(path: str, image_size: int, fit: str = "squash") -> Source:
    """Open `path` = FOLDER:SPLIT, with images decoded to `image_size` by `fit` (images.py).

    Raises UserError if the folder has no dataset, more than one, or one that emu_jax.data did not
    write, if the split is unknown or empty, and if a file is missing.
    """
    # tensorflow-datasets takes a second to import.
    from emu_jax.data.sources import records

    folder, colon, split = path.rpartition(":")
    if not (colon and re.fullmatch(r"\w+", split)):
        raise UserError(
            f"the source '{path}' has no split; write FOLDER:SPLIT, for example '{path}:train'"
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
            f"no dataset in '{folder}'; build one with python -m emu_jax.data build, "
            "or the demo's with python -m emu_jax.demo build"
        )
    if len(found) > 1:
        raise UserError(
            f"'{folder}' contains several datasets; choose one: {', '.join(map(str, found))}"
        )
    return found[0]
