"""Multimodal C4 (github.com/allenai/mmc4): JSONL of `text_list` and `image_info`, plain or zipped,
beside the folder its script downloads into.

scripts/download_images.py of that project puts the picture `image_name` of SHARD.jsonl into
SHARD_images/ (of SHARD.jsonl.zip into SHARD.jsonl_images/). A picture and the sentence that it was
matched to become a `Pair`, in the sentence's place; what matches less than 0.32 is dropped, as the
paper does. Read next: obelics.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emu_jax.data.documents import Document, Pair, Picture, Skipped, Text
from emu_jax.data.images import MAX_BYTES
from emu_jax.data.sources import archives, tables
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard

SUFFIXES = (".jsonl", ".jsonl.zip", ".jsonl.gz")


def list_shards(path: Path) -> list[InputShard]:
    """A unit a shard."""
    return [InputShard(file) for file in archives.list_files(path, SUFFIXES)]


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The documents of one shard; ids are SHARD:LINE."""
    stem = shard.path.name.split(".")[0]
    places = archives.media_archives(
        options.images,
        shard.path.parent,
        [
            f"{stem}_images",
            f"{shard.path.stem}_images",
            f"{stem}_images.zip",
            f"{stem}_images.tar",
            f"{stem}.zip",
            "images",
            ".",
        ],
    )
    for number, record in tables.json_records(shard.path):
        yield (
            record
            if isinstance(record, Skipped)
            else _document(f"{shard.name}:{number}", record, places, shard, options)
        )


def _document(
    id: str, record: Any, places: list[archives.Files], shard: InputShard, options: SourceOptions
) -> Document | Skipped:
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("text_list"), list)
        or not isinstance(record.get("image_info"), list)
    ):
        return Skipped(id, "no text_list and image_info")
    sentences = record["text_list"]
    if not all(isinstance(sentence, str) for sentence in sentences):
        return Skipped(id, "text_list holds what is no text")
    at: dict[int, list[Picture]] = {}
    dropped = []
    for info in record["image_info"]:
        picture = _picture(info, len(sentences), places, options)
        if isinstance(picture, str):
            dropped.append(picture)
        else:
            at.setdefault(info["matched_text_index"], []).append(picture)
    parts: list[Text | Picture | Pair] = []
    for number, sentence in enumerate(sentences):
        *before, last = at.get(number, [None])
        parts += before
        if sentence.strip():
            parts.append(Text(sentence) if last is None else Pair(last, Text(sentence)))
        elif last is not None:
            parts.append(last)
    provenance = {"url": record["url"]} if isinstance(record.get("url"), str) else {}
    return Document(id, tuple(parts), shard.name, provenance, tuple(dropped))


def _picture(
    info: Any, sentences: int, places: list[archives.Files], options: SourceOptions
) -> Picture | str:
    """The picture, or why it is dropped."""
    if (
        not isinstance(info, dict)
        or not isinstance(info.get("image_name"), str)
        or not isinstance(info.get("matched_sim"), (int, float))
    ):
        return "an image_info without image_name and matched_sim"
    # NaN is JSON to Python
    if not info["matched_sim"] >= options.min_similarity:
        return f"a picture whose similarity is under {options.min_similarity}"
    if (
        type(info.get("matched_text_index")) is not int
        or not 0 <= info["matched_text_index"] < sentences
    ):
        return "a picture matched to no sentence"
    data = archives.fetch(info["image_name"], places, MAX_BYTES)
    return data if isinstance(data, str) else Picture(data)
