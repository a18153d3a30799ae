"""Documents: the ordered lists of parts that sources yield, before tokenization.

While a dataset is built, an image is an encoded file, or pixels if it is a video frame. When
sources/records.py reads the dataset, it decodes images to plain arrays, or to Pictures if they have
roles. Read next: sources/kinds.py, which reads foreign formats, or sequence.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8

# RGB pixels.
Image = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Text:
    """A text and its weight in the loss; a part that is a plain str has weight 1."""

    text: str
    weight: float = 1.0
    # Role of the speaker in a conversation: "system", "user" or "assistant".
    role: str = ""
    # Seconds from the start of the video.
    time: float | None = None


@dataclass(frozen=True)
class Picture:
    """An image with a role and a time, which mean the same as in Text."""

    # An encoded file, or upright RGB pixels.
    data: bytes | Image
    role: str = ""
    time: float | None = None


@dataclass(frozen=True)
class Pair:
    """An image and its text, whose order is drawn at random in every epoch."""

    image: Picture | Image
    text: str | Text


@dataclass(frozen=True)
class Document:
    """Parts in reading order, and an id that is unique in its source and never changes."""

    id: str
    parts: tuple[str | Text | Image | Picture | Pair, ...]
    # Name of the file that it was read from.
    source: str = ""
    # What the file says about its origin, such as a URL; values must be JSON-serializable.
    provenance: dict[str, Any] = field(default_factory=dict)
    # The reason for each part that was left out.
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A record that does not become a document, and the reason in one line.

    whole_file: `id` is the name of a file, and the reason is an error that ended its reading.
    """

    id: str
    reason: str
    whole_file: bool = False


def flat_parts(document: Document) -> Iterator[Text | Picture]:
    """The texts and images in reading order; of a pair, the image comes first."""
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
    """The pixels of a document's images, all of which must be decoded."""
    for image in images_of(document):
        pixels = image.data if isinstance(image, Picture) else image
        assert not isinstance(pixels, bytes), "an image is not decoded"
        yield pixels


def texts_of(document: Document) -> Iterator[Text]:
    """The texts of a document, in the order of its parts."""
    return (part for part in flat_parts(document) if isinstance(part, Text))
