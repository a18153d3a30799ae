"""What a source yields: documents, ordered lists of parts, before tokenisation.

An image is an encoded file, or pixels if it is a frame of a video, until sources/records.py decodes
it for the model. Then it is a plain array, or a Picture if it has a role. Read next:
sources/kinds.py, which reads others' formats, or sequence.py.
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
    """A text and its weight in the loss. A part that is a plain str has weight 1."""

    text: str
    weight: float = 1.0
    # role of a turn in a conversation: "system", "user" or "assistant"
    role: str = ""
    # seconds from the start of the video
    time: float | None = None


@dataclass(frozen=True)
class Picture:
    """An image with its role and time, as in Text: an encoded file, or upright RGB pixels."""

    data: bytes | Image
    role: str = ""
    time: float | None = None


@dataclass(frozen=True)
class Pair:
    """An image and its text, whose order is drawn again in every epoch."""

    image: Picture | Image
    text: str | Text


@dataclass(frozen=True)
class Document:
    """Parts in reading order, and an id that is unique in its source and never changes."""

    id: str
    parts: tuple[str | Text | Image | Picture | Pair, ...]
    # the file it was read from
    source: str = ""
    # where it comes from, as the file says; JSON-able
    provenance: dict[str, Any] = field(default_factory=dict)
    # a reason for each part that was left out
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A record that does not become a document, and the reason in one line."""

    id: str
    reason: str


def flat_parts(document: Document) -> Iterator[Text | Picture]:
    """The texts and images in reading order; a pair is its image, then its text."""
    for part in document.parts:
        for half in (part.image, part.text) if isinstance(part, Pair) else (part,):
            if isinstance(half, str):
                yield Text(half)
            elif isinstance(half, (Text, Picture)):
                yield half
            else:
                yield Picture(half)


def images_of(document: Document) -> Iterator[Picture | Image]:
    """The images of a document, in the order of its parts."""
    for part in document.parts:
        if isinstance(part, Pair):
            yield part.image
        elif not isinstance(part, (str, Text)):
            yield part


def pixels_of(document: Document) -> Iterator[Image]:
    """The images of a document whose images are decoded."""
    for image in images_of(document):
        pixels = image.data if isinstance(image, Picture) else image
        assert not isinstance(pixels, bytes), "the images are not decoded"
        yield pixels


def texts_of(document: Document) -> Iterator[Text]:
    """The texts of a document, in the order of its parts."""
    return (part for part in flat_parts(document) if isinstance(part, Text))
