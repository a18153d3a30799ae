"""Storyboards: tars written by Emu's released tool for YT-Storyboard-1B.

A video is one sample with the files KEY.0.txt, KEY.0.png, KEY.1.txt, ..., KEY.final_meta.json. Text
i, possibly empty, was spoken before frame i; a last text may have no frame. Frame i is at i *
round(duration / frames) seconds. The tool sorts names as strings ("10.png" before "2.png"); this
module sorts them by number. Long videos are split into several documents. Read next: subtitled.py.
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
from emu_jax.data.tokenizer import MIN_BYTES_PER_TOKEN, TOKENS_PER_IMAGE

IMAGES = ("png", "jpg", "jpeg", "webp")
Part = Text | Picture


def list_shards(path: Path) -> list[InputShard]:
    """One shard per tar."""
    return [InputShard(file) for file in archives.list_files(path, archives.TARS)]


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The videos of one tar; ids are keys (YouTube's ids), with "#1", ... for later pieces."""
    try:
        for key, files in archives.webdataset_samples(shard.path):
            try:
                parts = _parts(files)
            except ValueError as error:
                yield Skipped(key, str(error))
            else:
                yield from split_document(
                    parts, Document(key, (), shard.name, {"video": key}), options
                )
    except ValueError as error:
        yield Skipped(shard.path.name, str(error), whole_file=True)


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
        raise ValueError("no frames")
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
    """Seconds between frames; None if the metadata does not give the duration."""
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


def split_document(
    parts: Iterable[Part], document: Document, options: SourceOptions
) -> Iterator[Document | Skipped]:
    """Yield `document` with `parts`, split to respect options.max_images and max_tokens.

    Tokens are estimated from bytes. A piece without images is skipped. A single text over the limit
    is kept, and sequence.py truncates it. Only one piece is in memory at a time.
    """
    held: list[Part] = []
    tokens = 0
    images = 0
    number = 0

    def piece() -> Document | Skipped:
        id = f"{document.id}#{number}" if number else document.id
        if not images:
            return Skipped(id, "no image in this piece of a long document")
        return replace(document, id=id, parts=tuple(held))

    for part in parts:
        is_image = isinstance(part, Picture)
        if isinstance(part, Picture):
            cost = TOKENS_PER_IMAGE
        else:
            cost = 1 + len(part.text.encode()) // MIN_BYTES_PER_TOKEN
        # <s> and </s> are 2 tokens more.
        too_long = tokens + cost > options.max_tokens - 2
        if held and (images + is_image > options.max_images or too_long):
            yield piece()
            held = []
            tokens = 0
            images = 0
            number += 1
        held.append(part)
        tokens += cost
        images += is_image
    if held:
        yield piece()
