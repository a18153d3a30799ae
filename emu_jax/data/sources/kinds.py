"""The kinds of sources: for each, how its input is shared out to tasks, and the pure function from
records to documents.

`read_documents` is the door: it reads one unit and checks every picture by decoding it, so that what is
built decodes. Read next: ../builders/build.py.
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
    """`pictures`: "all" must be good, or the record is skipped; of "some", bad ones are dropped and
    one must be left; "none" has none.
    """

    list_shards: Callable[[Path], list[InputShard]]
    read_documents: Callable[[InputShard, SourceOptions], Iterator[Document | Skipped]]
    pictures: str
    help: str


KINDS = {
    "pairs": Kind(pairs.list_shards, pairs.read_documents, "all", "img2dataset's tars and parquet"),
    "mmc4": Kind(
        mmc4.list_shards,
        mmc4.read_documents,
        "some",
        "Multimodal C4: JSONL and folders or zips of pictures",
    ),
    "obelics": Kind(
        obelics.list_shards, obelics.read_documents, "some", "OBELICS: parquet of texts and images"
    ),
    "html": Kind(
        webpages.list_shards,
        webpages.read_documents,
        "some",
        "a folder or archive of pages with their pictures",
    ),
    "videos": Kind(
        videos.list_shards,
        videos.read_documents,
        "all",
        "video2dataset's tars, or videos with captions beside them",
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
        "videos with .vtt or .srt beside them",
    ),
    "text": Kind(text.list_shards, text.read_documents, "none", "plain text, JSONL"),
    "llava": Kind(
        conversations.list_shards,
        conversations.reader(conversations.llava),
        "all",
        "LLaVA's conversations on pictures",
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
        "VideoChat's conversations on videos",
    ),
    "videochatgpt": Kind(
        conversations.list_shards,
        conversations.reader(conversations.videochatgpt),
        "all",
        "Video-ChatGPT's questions on videos",
    ),
}


def read_documents(
    kind: str, shard: InputShard, options: SourceOptions
) -> Iterator[Document | Skipped]:
    """What becomes of the records of `unit`, in their order; every picture has been decoded once
    and is as large as `options` asks for.
    """
    needs = KINDS[kind].pictures
    for document in KINDS[kind].read_documents(shard, options):
        # names of files need not be Unicode
        document = replace(document, id=document.id.encode("utf-8", "replace").decode())
        if isinstance(document, Document) and not all(
            _is_unicode(text.text) for text in texts_of(document)
        ):
            document = Skipped(document.id, "the text holds half a character")
        yield (
            document
            if isinstance(document, Skipped) or needs == "none"
            else _checked(document, needs, options)
        )


def _is_unicode(text: str) -> bool:
    """JSON may hold "\\ud83d" alone, which nothing can store."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def _checked(document: Document, needs: str, options: SourceOptions) -> Document | Skipped:
    parts = []
    dropped = list(document.dropped)
    for part in document.parts:
        picture = part.image if isinstance(part, Pair) else part
        reason = _fault(picture, options) if isinstance(picture, Picture) else ""
        if not reason:
            parts.append(part)
        elif needs == "all":
            return Skipped(document.id, reason)
        else:
            dropped.append(reason)
            parts += [part.text] if isinstance(part, Pair) else []
    if needs == "some" and not any(True for _ in images_of(replace(document, parts=tuple(parts)))):
        return Skipped(
            document.id,
            "no picture" + (f" is left: {'; '.join(dict.fromkeys(dropped))}" if dropped else ""),
        )
    return replace(document, parts=tuple(parts), dropped=tuple(dropped))


def _fault(picture: Picture, options: SourceOptions) -> str:
    """Why a picture cannot be taken, or ""."""
    if isinstance(picture.data, np.ndarray):
        height, width = picture.data.shape[:2]
    else:
        if not picture.data:
            return "the image is empty"
        try:
            height, width = images.decode_full(picture.data).shape[:2]
        except ValueError as error:
            return str(error)
    if min(width, height) < options.min_side:
        return f"a picture with a side under {options.min_side} pixels"
    if max(width, height) > options.max_aspect * min(width, height):
        return f"a picture whose sides are further apart than {options.max_aspect:g}"
    return ""
