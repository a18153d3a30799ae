"""What a source yields: a document, an ordered list of parts, before anything about it is random or
tokenised.

A picture is the bytes of its file (or pixels, where it is a frame of a video) until
sources/records.py decodes it for the model; then it is a plain array, but where it has a role. Read
next: sources/kinds.py, which makes documents of the world's formats, or sequence.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8

# RGB, 0 to 255
Image = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Text:
    """A text and its weight in the loss; a part that is a plain str weighs 1. `role` is that of a
    turn in a conversation: "system", "user", "assistant" or ""; `time` is in seconds.
    """

    text: str
    weight: float = 1.0
    role: str = ""
    time: float | None = None


@dataclass(frozen=True)
class Picture:
    """An image as a source holds it: an encoded file, or upright RGB pixels. `role` and `time` as
    in Text.
    """

    data: bytes | Image
    role: str = ""
    time: float | None = None


@dataclass(frozen=True)
class Pair:
    """An image and its text, in an order drawn anew in every epoch."""

    image: Picture | Image
    text: str | Text


@dataclass(frozen=True)
class Document:
    """Parts in reading order, and an id that is unique in its source and never changes.

    `source` is the file it comes from; `provenance` is JSON-able: where that file says it found it.
    `dropped` says, a reason each, which parts were left out of it.
    """

    id: str
    parts: tuple[str | Text | Image | Picture | Pair, ...]
    source: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A record that becomes no document, and why, in one line."""

    id: str
    reason: str


def images_of(document: Document) -> Iterator[Picture | Image]:
    """The images of a document, in the order of its parts."""
    for part in document.parts:
        if isinstance(part, Pair):
            yield part.image
        elif not isinstance(part, (str, Text)):
            yield part


def pixels_of(document: Document) -> Iterator[Image]:
    """The same of a document whose images are decoded."""
    return (image.data if isinstance(image, Picture) else image for image in images_of(document))


def texts_of(document: Document) -> Iterator[Text]:
    """The texts of a document, in the order of its parts."""
    for part in document.parts:
        part = part.text if isinstance(part, Pair) else part
        if isinstance(part, (str, Text)):
            yield Text(part) if isinstance(part, str) else part
