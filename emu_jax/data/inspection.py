"""What `python -m emu_jax.data inspect` shows: every document of a source, as JSON lines or as a
page, and what was left out and why.

Nothing is random and nothing resized: a picture is said by its size, the SHA-256 of its upright RGB
bytes (alpha over white) and the mean colours of 4 x 4 cells, which other decoders come near to.
Read next: builders/card.py.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.data import images
from emu_jax.data.documents import Document, Image, Pair, Picture, Skipped, Text
from emu_jax.data.sources import kinds
from emu_jax.data.sources.options import SourceOptions

CELLS = 4


def inspect_documents(
    kind: str, path: Path, options: SourceOptions
) -> Iterator[Document | Skipped]:
    """All of `path`, shard after shard."""
    for shard in kinds.KINDS[kind].list_shards(path):
        yield from kinds.read_documents(kind, shard, options)


def describe(document: Document | Skipped) -> dict[str, Any]:
    """{"id", "parts": [{"text"} | {"image": {"width", "height", "sha256", "grid"}}]} or {"id",
    "skipped"}; a `Pair` is its image, then its text; parts of conversations have a "role".
    """
    if isinstance(document, Skipped):
        return {"id": document.id, "skipped": document.reason}
    parts = [
        half
        for part in document.parts
        for half in ((part.image, part.text) if isinstance(part, Pair) else (part,))
    ]
    return {"id": document.id, "parts": [_part(part) for part in parts]}


def _part(part: Any) -> dict[str, Any]:
    part = (
        Text(part)
        if isinstance(part, str)
        else Picture(part)
        if isinstance(part, np.ndarray)
        else part
    )
    return ({"text": part.text} if isinstance(part, Text) else {"image": _image(part)}) | (
        {"role": part.role} if part.role else {}
    )


def _image(picture: Picture) -> dict[str, Any]:
    pixels = (
        picture.data if isinstance(picture.data, np.ndarray) else images.decode_full(picture.data)
    )
    return {
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "sha256": hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest(),
        "grid": grid(pixels),
    }


def grid(pixels: Image) -> list[list[float]]:
    """Mean [red, green, blue] of CELLS x CELLS cells in reading order, to two decimals; cell k of a
    side of n pixels is [k n // 4, (k + 1) n // 4), and at least one pixel.
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
