"""Storyboards: the tars of Emu's released tool for YT-Storyboard-1B, a video a sample: KEY.0.txt,
KEY.0.png, KEY.1.txt, ..., KEY.final_meta.json.

Text i was said before frame i (it may be empty), and a last text has no frame; frame i is at i *
round(duration / frames) seconds. The tool writes its names sorted as texts ("10.png" before
"2.png"): numbers bring them in order. What is longer than a document may be is cut into several.
Read next: subtitled.py.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from emu_jax.data import clean
from emu_jax.data.documents import Document, Picture, Skipped, Text
from emu_jax.data.sources import archives
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard

IMAGES = ("png", "jpg", "jpeg", "webp")
# [IMG], 32 slots, [/IMG]; LLaMA's tokenizer makes a token of 3 to 4 bytes of English
IMAGE_TOKENS = 34
BYTES_A_TOKEN = 3

Part = Text | Picture


def list_shards(path: Path) -> list[InputShard]:
    """A unit a tar."""
    return [InputShard(file) for file in archives.list_files(path, archives.TARS)]


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The videos of one tar; ids are YouTube's, followed by "#1", "#2", ... for the later pieces of
    a long one.
    """
    try:
        for key, files in archives.webdataset_samples(shard.path):
            try:
                parts = _parts(files)
            except ValueError as error:
                yield Skipped(key, str(error))
            else:
                yield from pieces(parts, Document(key, (), shard.name, {"video": key}), options)
    except ValueError as error:
        yield Skipped(shard.path.name, str(error))


def _parts(files: dict[str, bytes]) -> tuple[Part, ...]:
    frames = {}
    texts = {}
    for name, data in files.items():
        number, _, extension = name.partition(".")
        if re.fullmatch(r"\d{1,9}", number) and extension in IMAGES:
            frames[int(number)] = data
        elif re.fullmatch(r"\d{1,9}", number) and extension == "txt":
            texts[int(number)] = clean.collapse_whitespace(clean.decode_text(data))
    if not frames:
        raise ValueError("no frame")
    step = _step(files.get("final_meta.json"), max(frames) + 1)
    parts: list[Part] = []
    for number in sorted(frames.keys() | texts.keys()):
        time = None if step is None else float(number * step)
        if texts.get(number):
            parts.append(Text(texts[number]))
        if number in frames:
            parts.append(Picture(frames[number], time=time))
    return tuple(parts)


def _step(meta: bytes | None, frames: int) -> int | None:
    """Seconds between frames, if the file says how long the video is."""
    try:
        meta = json.loads(clean.decode_text(meta or b"{}"))
        return round(float(meta["duration"]) / int(meta.get("frame_num") or frames))
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        ZeroDivisionError,
        OverflowError,
    ):
        return None


def pieces(
    parts: Iterable[Part], document: Document, options: SourceOptions
) -> Iterator[Document | Skipped]:
    """`document` with `parts`, cut where the next part would exceed options.max_images or
    max_tokens (tokens are estimated from bytes); a piece without pictures is skipped. A text that
    alone is too long stays whole: the sequence stage cuts it. Only one piece is held.
    """
    held: list[Part] = []
    tokens = images = number = 0

    def piece():
        id = f"{document.id}#{number}" if number else document.id
        return (
            replace(document, id=id, parts=tuple(held))
            if images
            else Skipped(id, "no picture in this piece of a long document")
        )

    for part in parts:
        is_image = isinstance(part, Picture)
        cost = IMAGE_TOKENS if is_image else 1 + len(part.text.encode()) // BYTES_A_TOKEN
        # <s> and </s>
        if held and (
            images + is_image > options.max_images or tokens + cost > options.max_tokens - 2
        ):
            yield piece()
            held = []
            tokens = 0
            images = 0
            number = number + 1
        held.append(part)
        tokens = tokens + cost
        images = images + is_image
    if held:
        yield piece()
