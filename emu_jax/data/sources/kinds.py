"""The kinds of input: for each, how it is divided into shards and read as documents.

`read_documents` is the entry point. It decodes every image once, so that a built dataset contains
no image that cannot be decoded. Read next: ../builders/build.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from emu_jax.data import images
from emu_jax.data.documents import Document, Pair, Picture, Skipped, images_of, texts_of
from emu_jax.data.sources import (
    conversations,
    mmc4,
    obelics,
    pairs,
    storyboards,
    subtitled,
    text,
    videos,
    webpages,
)
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard


@dataclass(frozen=True)
class Kind:
    """How one kind of input is read.

    images: "all": a record with a bad image is skipped; "some": bad images are dropped, and a
    record is skipped if no image is left; "none": the kind has no images.
    """

    list_shards: Callable[[Path], list[InputShard]]
    read_documents: Callable[[InputShard, SourceOptions], Iterator[Document | Skipped]]
    images: str
    help: str


KINDS = {
    "pairs": Kind(pairs.list_shards, pairs.read_documents, "all", "img2dataset's tars and parquet"),
    "mmc4": Kind(
        mmc4.list_shards,
        mmc4.read_documents,
        "some",
        "Multimodal C4: JSONL and folders or zips of images",
    ),
    "obelics": Kind(
        obelics.list_shards, obelics.read_documents, "some", "OBELICS: parquet of texts and images"
    ),
    "html": Kind(
        webpages.list_shards,
        webpages.read_documents,
        "some",
        "a folder or archive of web pages with their images",
    ),
    "videos": Kind(
        videos.list_shards,
        videos.read_documents,
        "all",
        "video2dataset's tars, or videos with caption files next to them",
    ),
    "storyboards": Kind(
        storyboards.list_shards,
        storyboards.read_documents,
        "some",
        "the tars of Emu's YT-Storyboard tool",
    ),
    "subtitled": Kind(
        subtitled.list_shards,
        subtitled.read_documents,
        "some",
        "videos with .vtt or .srt files next to them",
    ),
    "text": Kind(text.list_shards, text.read_documents, "none", "plain text, JSONL"),
    "llava": Kind(
        conversations.list_shards,
        conversations.reader(conversations.llava),
        "all",
        "LLaVA's conversations about images",
    ),
    "sharegpt": Kind(
        conversations.list_shards,
        conversations.reader(conversations.sharegpt),
        "none",
        "ShareGPT's conversations",
    ),
    "alpaca": Kind(
        conversations.list_shards,
        conversations.reader(conversations.alpaca),
        "none",
        "Alpaca's instructions",
    ),
    "videochat": Kind(
        conversations.list_shards,
        conversations.reader(conversations.videochat),
        "all",
        "VideoChat's conversations about videos",
    ),
    "videochatgpt": Kind(
        conversations.list_shards,
        conversations.reader(conversations.videochatgpt),
        "all",
        "Video-ChatGPT's questions about videos",
    ),
}


def read_documents(
    kind: str, shard: InputShard, options: SourceOptions
) -> Iterator[Document | Skipped]:
    """The documents and skipped records of `shard`, in order.

    Every image in them has been decoded once, and its size is within `options`.
    """
    needs = KINDS[kind].images
    for document in KINDS[kind].read_documents(shard, options):
        # An id may be a file name with bytes that are not UTF-8.
        document = replace(document, id=document.id.encode("utf-8", "replace").decode())
        if isinstance(document, Document):
            document = _check_document(document, needs, options)
        yield document


def _check_document(document: Document, needs: str, options: SourceOptions) -> Document | Skipped:
    if not all(_is_unicode(text.text) for text in texts_of(document)):
        return Skipped(document.id, "unpaired surrogate in the text")
    if needs == "none":
        return document
    return _check_images(document, needs, options)


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON may contain unpaired surrogates, which cannot."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def _check_images(document: Document, needs: str, options: SourceOptions) -> Document | Skipped:
    parts = []
    dropped = list(document.dropped)
    for part in document.parts:
        picture = part.image if isinstance(part, Pair) else part
        reason = _image_fault(picture, options) if isinstance(picture, Picture) else ""
        if not reason:
            parts.append(part)
        elif needs == "all":
            return Skipped(document.id, reason)
        else:
            dropped.append(reason)
            if isinstance(part, Pair):
                parts.append(part.text)
    checked = replace(document, parts=tuple(parts), dropped=tuple(dropped))
    if needs == "some" and not any(True for _ in images_of(checked)):
        reasons = "; ".join(dict.fromkeys(dropped))
        return Skipped(document.id, f"no image left: {reasons}" if reasons else "no image")
    return checked


def _image_fault(picture: Picture, options: SourceOptions) -> str:
    """The reason why an image cannot be used; "" if it can."""
    if isinstance(picture.data, np.ndarray):
        height, width = picture.data.shape[:2]
    else:
        if not picture.data:
            return "image is empty"
        try:
            height, width = images.decode_full(picture.data).shape[:2]
        except ValueError as error:
            return str(error)
    if min(width, height) < options.min_side:
        return f"image side under {options.min_side} pixels"
    if max(width, height) > options.max_aspect * min(width, height):
        return f"aspect ratio over {options.max_aspect:g}"
    return ""
