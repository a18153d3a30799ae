"""The kinds of sources: for each, how its input is shared out to tasks, and the pure function from
records to documents.

`documents` is the door: it reads one unit and checks every picture by decoding it, so that what is
built decodes. Read next: ../builders/build.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from emu_jax.data import images
from emu_jax.data.documents import Document, Pair, Picture, Skipped, pictures, texts
from emu_jax.data.sources import (
    chats,
    html,
    mmc4,
    obelics,
    pairs,
    storyboards,
    subtitled,
    text,
    videos,
)
from emu_jax.data.sources.options import Options
from emu_jax.data.sources.tables import Unit


@dataclass(frozen=True)
class Kind:
    """`pictures`: "all" must be good, or the record is skipped; of "some", bad ones are dropped and
    one must be left; "none" has none.
    """

    units: Callable[[Path], list[Unit]]
    read: Callable[[Unit, Options], Iterator[Document | Skipped]]
    pictures: str
    help: str


KINDS = {
    "pairs": Kind(pairs.units, pairs.read, "all", "img2dataset's tars and parquet"),
    "mmc4": Kind(
        mmc4.units, mmc4.read, "some", "Multimodal C4: JSONL and folders or zips of pictures"
    ),
    "obelics": Kind(obelics.units, obelics.read, "some", "OBELICS: parquet of texts and images"),
    "html": Kind(html.units, html.read, "some", "a folder or archive of pages with their pictures"),
    "videos": Kind(
        videos.units,
        videos.read,
        "all",
        "video2dataset's tars, or videos with captions beside them",
    ),
    "storyboards": Kind(
        storyboards.units, storyboards.read, "some", "the tars of Emu's YT-Storyboard tool"
    ),
    "subtitled": Kind(
        subtitled.units, subtitled.read, "some", "videos with .vtt or .srt beside them"
    ),
    "text": Kind(text.units, text.read, "none", "plain text, JSONL"),
    "llava": Kind(
        chats.units, chats.reader(chats.llava), "all", "LLaVA's conversations on pictures"
    ),
    "sharegpt": Kind(chats.units, chats.reader(chats.sharegpt), "none", "ShareGPT's conversations"),
    "alpaca": Kind(chats.units, chats.reader(chats.alpaca), "none", "Alpaca's instructions"),
    "videochat": Kind(
        chats.units, chats.reader(chats.videochat), "all", "VideoChat's conversations on videos"
    ),
    "videochatgpt": Kind(
        chats.units, chats.reader(chats.videochatgpt), "all", "Video-ChatGPT's questions on videos"
    ),
}


def documents(kind: str, unit: Unit, options: Options) -> Iterator[Document | Skipped]:
    """What becomes of the records of `unit`, in their order; every picture has been decoded once
    and is as large as `options` asks for.
    """
    needs = KINDS[kind].pictures
    for document in KINDS[kind].read(unit, options):
        # names of files need not be Unicode
        document = replace(document, id=document.id.encode("utf-8", "replace").decode())
        if isinstance(document, Document) and not all(
            _is_unicode(text.text) for text in texts(document)
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


def _checked(document: Document, needs: str, options: Options) -> Document | Skipped:
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
    if needs == "some" and not any(True for _ in pictures(replace(document, parts=tuple(parts)))):
        return Skipped(
            document.id,
            "no picture" + (f" is left: {'; '.join(dict.fromkeys(dropped))}" if dropped else ""),
        )
    return replace(document, parts=tuple(parts), dropped=tuple(dropped))


def _fault(picture: Picture, options: Options) -> str:
    """Why a picture cannot be taken, or ""."""
    if isinstance(picture.data, np.ndarray):
        height, width = picture.data.shape[:2]
    else:
        if not picture.data:
            return "the image is empty"
        try:
            height, width = images.pixels(picture.data).shape[:2]
        except ValueError as error:
            return str(error)
    if min(width, height) < options.min_side:
        return f"a picture with a side under {options.min_side} pixels"
    if max(width, height) > options.max_aspect * min(width, height):
        return f"a picture whose sides are further apart than {options.max_aspect:g}"
    return ""
