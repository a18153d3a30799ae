"""Describe documents, and records that are left out, for `python -m emu_jax.data inspect`.

Nothing is random and nothing is resized. An image is described by its size, the SHA-256 of its
upright RGB bytes (alpha over white), and the mean colours of 4 x 4 cells, which can be compared
between decoders that differ in rounding. Read next: builders/card.py.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.config import UserError
from emu_jax.data import images
from emu_jax.data.documents import Document, Image, Picture, Skipped, Text, flat_parts
from emu_jax.data.sources import kinds
from emu_jax.data.sources.options import SourceOptions

CELLS = 4


def inspect_documents(
    kind: str, path: Path, options: SourceOptions
) -> Iterator[Document | Skipped]:
    """Yield all documents and skipped records below `path`, in order.

    Raises UserError at the end if `path` is a file of which nothing could be read.
    """
    was_read = False
    reason = ""
    for shard in kinds.KINDS[kind].list_shards(path):
        for document in kinds.read_documents(kind, shard, options):
            yield document
            if isinstance(document, Skipped) and document.whole_file:
                reason = document.reason
            else:
                was_read = True
    if path.is_file() and reason and not was_read:
        raise UserError(f"nothing of '{path}' can be read as {kind}: {reason}")


def describe(document: Document | Skipped) -> dict[str, Any]:
    """Describe a document as {"id", "parts": [{"text"} | {"image"}]}.

    An image is {"width", "height", "sha256", "grid"}. A pair becomes its image and then its text;
    parts of conversations also have a "role". A skipped record is {"id", "skipped": reason}.
    """
    if isinstance(document, Skipped):
        return {"id": document.id, "skipped": document.reason}
    return {"id": document.id, "parts": [_part(part) for part in flat_parts(document)]}


def _part(part: Text | Picture) -> dict[str, Any]:
    described: dict[str, Any]
    described = {"text": part.text} if isinstance(part, Text) else {"image": _image(part)}
    if part.role:
        described["role"] = part.role
    return described


def _image(picture: Picture) -> dict[str, Any]:
    data = picture.data
    pixels = images.decode_full(data) if isinstance(data, bytes) else data
    return {
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "sha256": hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest(),
        "grid": grid(pixels),
    }


def grid(pixels: Image) -> list[list[float]]:
    """Mean [red, green, blue] of CELLS x CELLS cells in reading order, to two decimals.

    Along a side of n pixels, cell k covers pixels k n // 4 to (k + 1) n // 4, and at least one.
    """

    def edges(side: int) -> list[tuple[int, int]]:
        starts = [min(k * side // CELLS, side - 1) for k in range(CELLS)]
        return [(start, max((k + 1) * side // CELLS, start + 1)) for k, start in enumerate(starts)]

    rows = edges(pixels.shape[0])
    columns = edges(pixels.shape[1])
    return [
        [round(float(mean), 2) for mean in pixels[top:bottom, left:right].mean((0, 1))]
        for top, bottom in rows
        for left, right in columns
    ]
